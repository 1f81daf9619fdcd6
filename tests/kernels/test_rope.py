"""Rotary positions in place, by every implementation that runs here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megapt.model.positions import turn
from megapt_kernels.registry import Unsupported
from megapt_kernels.rope import rope_

from .guarded import guarded, sparse
from .planted import Emulated, planted

IMPLEMENTATIONS = ("cuda", "reference")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def table(rows: int, rotary: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    frequency = 100.0 ** (-torch.arange(0, rotary, 2, dtype=torch.float64) / rotary)
    angle = torch.outer(torch.arange(rows, dtype=torch.float64), frequency)
    return angle.cos().float().to(device), angle.sin().float().to(device)


def expected(x: Tensor, cos: Tensor, sin: Tensor, rows: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """The definition, computed in `dtype`: [T, N, D]."""
    half = cos.shape[1]
    x, c, s = x.to(dtype, copy=True), cos[rows].unsqueeze(1).to(dtype), sin[rows].unsqueeze(1).to(dtype)
    a, b = x[:, :heads, :half].clone(), x[:, :heads, half : 2 * half].clone()
    x[:, :heads, :half], x[:, :heads, half : 2 * half] = a * c - b * s, b * c + a * s
    return x


# (tokens, heads of all, width, rotary, heads that turn): whole, partial, all vector widths, odd sizes, none.
SHAPES = [
    (33, 6, 128, 128, 4),
    (7, 3, 96, 24, 3),
    (5, 2, 80, 40, 1),
    (9, 3, 7, 6, 2),
    (300, 1, 2, 2, 1),
    (4, 3, 16, 8, 0),
]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward(device: str, impl: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tokens, all_heads, width, rotary, heads = shape
    cos, sin = table(29, rotary, device)
    rows = torch.arange(tokens, device=device) % 29
    x, grad = (drawn(tokens, all_heads, width, seed=n).to(device, dtype) for n in (1, 2))
    leaf = x.clone().requires_grad_()
    inner = leaf * 1
    out = rope_(inner, cos, sin, heads=heads, impl=impl)
    assert out.data_ptr() == inner.data_ptr()
    seen = grad.clone()
    out.backward(seen)
    assert torch.equal(seen, grad)
    assert leaf.grad is not None
    for got, given, sign in ((out, x, 1), (leaf.grad, grad, -1)):
        exact = expected(given, cos, sign * sin, rows, heads, torch.float64)
        plain = expected(given, cos, sign * sin, rows, heads, dtype)
        error, theirs = ((t.detach().double() - exact).abs().max().item() for t in (got, plain))
        assert error <= 2 * theirs + 1e-6
        still = torch.ones_like(given, dtype=torch.bool)
        still[:, :heads, :rotary] = False
        assert torch.equal(got.detach()[still], given[still])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("rotary", [8, 24])
def test_reference_has_the_bits_of_the_model(dtype: torch.dtype, rotary: int) -> None:
    x = drawn(2 * 16, 3, 24).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    cos, sin = (t.to(wide) for t in table(16, rotary))
    want = turn(x.view(2, 16, 3, 24), (cos.unsqueeze(1), sin.unsqueeze(1)), torch.empty_like(x.view(2, 16, 3, 24)))
    assert torch.equal(rope_(x.clone(), cos, sin, impl="reference"), want.view(x.shape))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("integer", [torch.int32, torch.int64], ids=str)
def test_documents_and_a_strided_projection(device: str, thread_order: Any, impl: str, integer: torch.dtype) -> None:
    """Queries and keys of a projection that also holds values, in two documents; the same bits again."""
    tokens, heads, kv_heads, width = 11, 4, 2, 32
    cos, sin = table(16, width, device)
    positions = torch.tensor([0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 15], dtype=integer, device=device)
    wide = drawn(tokens, (heads + 2 * kv_heads) * width + 8).to(device, torch.bfloat16)
    results = []
    for _ in "ab":
        memory = wide.clone()
        qkv = memory[:, 8:].unflatten(1, (-1, width))
        assert rope_(qkv, cos, sin, positions, heads=heads + kv_heads, impl=impl) is qkv
        results.append(memory)
    exact = expected(wide[:, 8:].unflatten(1, (-1, width)), cos, sin, positions.long(), heads + kv_heads, torch.float32)
    torch.testing.assert_close(results[0][:, 8:].float(), exact.flatten(1).bfloat16().float(), rtol=8e-3, atol=1e-6)
    assert torch.equal(results[0][:, :8], wide[:, :8])
    assert torch.equal(results[0], results[1])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_gradient_through_a_view_of_a_projection(device: str, impl: str) -> None:
    """In place on a view: what was computed of the projection afterwards sees it turned, and so do its gradients."""
    x, weight = drawn(6, 5).to(device), drawn(24, 5, seed=1).to(device)
    cos, sin = table(6, 4, device)
    rows = torch.arange(6, device=device)

    def loss(weight: Tensor, impl: str | None) -> Tensor:
        qkv = x @ weight.T
        if impl is None:
            qkv = expected(qkv.view(6, 4, 6), cos, sin, rows, 3, torch.float32).flatten(1)
        else:
            rope_(qkv.view(6, 4, 6), cos, sin, heads=3, impl=impl)
        return (qkv * torch.arange(24.0, device=device)).square().sum()

    grads = []
    for how in (impl, None):
        leaf = weight.clone().requires_grad_()
        loss(leaf, how).backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)


def test_gradcheck() -> None:
    cos, sin = (t.double() for t in table(3, 4))
    positions = torch.tensor([2, 0, 1, 1])
    x = drawn(4, 2, 5).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: rope_(t.clone(), cos, sin, positions, heads=1, impl="reference"), (x,))


def test_as_transformers() -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k = drawn(1, 4, 10, 16), drawn(1, 2, 10, 16, seed=1)
    cos, sin = table(10, 16)
    twice = (torch.cat([t, t], dim=1).unsqueeze(0) for t in (cos, sin))
    want = apply_rotary_pos_emb(q, k, *twice)
    x = torch.cat([q, k], dim=1)[0].transpose(0, 1).contiguous()
    rope_(x, cos, sin, impl="reference")
    torch.testing.assert_close(x.transpose(0, 1), torch.cat(want, dim=1)[0])


def test_positions_outside_of_the_table(device: str) -> None:
    """The reference refuses them; a kernel, for which nobody waits, makes those tokens NaN and reads nothing there."""
    cos, sin = table(8, 4, device)
    for dtype in (torch.int32, torch.int64):
        positions = torch.tensor([0, 8, 7, -1, 1 << 30], dtype=dtype, device=device)
        x = drawn(5, 2, 6).to(device)
        with pytest.raises(Unsupported, match=r"positions lie in \[0, 8\), .* not in \[-1, 1073741824\]"):
            rope_(x.clone(), cos, sin, positions, impl="reference")
        rope_(x, cos, sin, positions, impl="cuda")
        assert x[..., :4].isnan().all((1, 2)).tolist() == [False, True, False, True, True]
        assert not bool(x[..., 4:].isnan().any() or x[[0, 2]].isnan().any())


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"x": torch.zeros(4, 16)}, r"x is \[T, N, D\]"),
        ({"x": torch.zeros(4, 8, 2).mT}, "x is .* unit stride"),
        ({"x": torch.zeros(1, 2, 8).expand(4, 2, 8)}, "x is written to, and elements of it share memory"),
        ({"x": torch.zeros(4, 2, 8, dtype=torch.int32)}, "x is bfloat16"),
        ({"cos": torch.zeros(4, 4, dtype=torch.bfloat16)}, "cos is torch.float32"),
        ({"sin": torch.zeros(4, 3)}, "cos and sin"),
        ({"cos": torch.zeros(4, 5), "sin": torch.zeros(4, 5)}, r"cos and sin .* D = 8"),
        ({"cos": torch.zeros(0, 4), "sin": torch.zeros(0, 4)}, "the table"),
        ({"positions": torch.zeros(3, dtype=torch.int64)}, "positions"),
        ({"positions": torch.zeros(4)}, "positions"),
        ({"heads": 3}, "heads"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], names: str) -> None:
    given: dict[str, Any] = {"x": torch.zeros(4, 2, 8), "cos": torch.zeros(4, 4), "sin": torch.zeros(4, 4), **change}
    with pytest.raises(Unsupported, match=f"rope_: {names}"):
        rope_(**given)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_empty(device: str, impl: str) -> None:
    cos, sin = table(8, 4, device)
    for shape in ((0, 2, 8), (3, 0, 8)):
        x = torch.zeros(shape, device=device, requires_grad=True)
        rope_(x * 1, cos, sin, impl=impl).sum().backward()
        assert x.grad is not None and x.grad.shape == shape


def test_operators_are_well_formed(device: str) -> None:
    ops = torch.ops.megapt_kernels
    cos, sin = table(8, 4, device)
    positions = torch.tensor([1, 7, 0], device=device)
    x = drawn(3, 2, 6).to(device)
    torch.library.opcheck(ops.rope_.default, (x, cos, sin, positions, 1, False))
    for given in (x.requires_grad_(), x.detach().expand(3, 2, 6)[:, :1]):
        torch.library.opcheck(ops.rope.default, (given, cos, sin, None, 1, True))
    with pytest.raises(RuntimeError, match="megapt_kernels::rope: cos must be Float, not"):
        ops.rope(x, cos.double(), sin, None, 1, False)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_compiles_whole(device: str, impl: str) -> None:
    cos, sin = table(16, 8, device)
    positions = torch.tensor([3, 0, 1, 15, 2], device=device)

    def layer(weight: Tensor, positions: Tensor | None) -> Tensor:
        qkv = weight.sin()
        rope_(qkv.view(5, 3, 8), cos, sin, positions, heads=2, impl=impl)
        return qkv.square() * torch.arange(24.0, device=device)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for at in (positions, None):
        results = []
        for function in (layer, compiled):
            leaf = drawn(5, 24).to(device).requires_grad_()
            y = function(leaf, at)
            y.sum().backward()
            results.append((y.detach(), leaf.grad))
        torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)


# ---- beyond 2^32 elements, beyond the last one, and with planted bugs


def far_apart() -> Tensor:
    """[2, 1, 32] bf16 ones, 2^32 elements from one token to the next."""
    return sparse((1 << 32) + 32, torch.bfloat16).as_strided((2, 1, 32), (1 << 32, 32, 1)).fill_(1.0)


def test_memory_ends_with_the_tensor_or_is_huge(device: str) -> None:
    if device == "cuda":
        pytest.skip("guarded memory is the CPU's")
    cos, sin = table(6, 16)
    for dtype in DTYPES:
        x = drawn(6, 2, 19).to(dtype)
        ends = rope_(guarded(x), guarded(cos, align=16), guarded(sin), impl="cuda")
        torch.testing.assert_close(ends, rope_(x.clone(), cos, sin, impl="reference"))
    assert torch.equal(rope_(far_apart(), cos, sin, impl="cuda"), rope_(far_apart(), cos, sin, impl="reference"))


def turned(library: Emulated, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    heads, width = x.shape[1:]
    sizes = len(x), len(cos), cos.shape[1], heads, heads, width, *x.stride()[:2], *x.stride()[:2]
    dtype = {torch.float32: 0, torch.bfloat16: 1}[x.dtype]
    assert library.call("megapt_rope", x, x, cos, sin, None, 0, *sizes, 0, dtype, None) == 0, library.error()
    return x


def test_planted_bugs_are_found(tmp_path: Path, device: str) -> None:
    """A 32-bit index and a wrong angle."""
    narrow = (
        "rope.cuh",
        "static_cast<T*>(a.out) + token * a.out_token",
        ("static_cast<T*>(a.out) + static_cast<unsigned>(token * a.out_token)"),
    )
    shifted = "rope.cuh", "(row) * a.half + i : i", "(row) * a.half + i + (i > 6) : i"
    broken = planted(tmp_path, "rope", narrow, shifted)
    cos, sin = table(6, 16)
    assert bool((turned(broken, far_apart(), cos, sin)[1] == 1.0).all())
    x = drawn(6, 2, 19)
    right = rope_(x.clone(), cos, sin, impl="reference")
    wrong = (turned(broken, x, cos, sin) - right).abs().amax((0, 1)) > 1e-3
    assert wrong.nonzero().flatten().tolist() == [7, 15]
