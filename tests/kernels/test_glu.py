"""SwiGLU and GeGLU by every implementation that runs here, against fp64."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megapt_kernels import build, explain, geglu, library, swiglu
from megapt_kernels.registry import Unsupported

from .guarded import guarded, sparse
from .planted import ORDERS, Emulated, planted
from .test_norms import within

ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "silu": swiglu,
    "gelu_tanh": geglu,
    "gelu": partial(geglu, approximate="none"),
}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Rows of fewer, as many and more vectors than a block has threads, and rows that vectors cannot read.
SHAPES = ((0, 8), (1, 1), (3, 7), (70, 8), (5, 64), (3, 129), (2, 2056), (3, 4104), (2, 1025))


def both(function: Callable[..., Tensor], xy: Tensor, dy: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    """The result and the gradient of xy."""
    xy = xy.detach().requires_grad_()
    y = function(xy, impl=impl)
    return y, torch.autograd.grad(y, xy, dy.to(y.dtype))[0]


def draw(rows: int, width: int, dtype: torch.dtype, device: str, size: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * 100_003 + width)
    xy = torch.randn(rows, 2 * width, generator=generator) * size
    return xy.to(device, dtype), torch.randn(rows, width, generator=generator).to(device, dtype)


def check(function: Callable[..., Tensor], xy: Tensor, dy: Tensor) -> None:
    got, plain = both(function, xy, dy, "cuda"), both(function, xy, dy, "reference")
    exact = both(function, xy.double(), dy, "reference")
    within(got[0], plain[0], exact[0], 2)
    within(got[1], plain[1], exact[1], 3)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_results_and_gradients(activation: str, device: str, thread_order: Any) -> None:
    for dtype in DTYPES:
        for rows, width in SHAPES:
            check(ACTIVATIONS[activation], *draw(rows, width, dtype, device))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_numbers_of_every_size(activation: str, device: str) -> None:
    """Gates from where the activation is nothing to where it is the gate."""
    for dtype in DTYPES:
        gate = torch.cat([torch.linspace(-110, 110, 64), torch.logspace(-6, 4, 32), -torch.logspace(-6, 4, 32)])
        up, dy = torch.linspace(-2, 3, 128), torch.linspace(1, 2, 128)
        xy = torch.cat([gate, up]).to(device, dtype)[None]
        check(ACTIVATIONS[activation], xy, dy.to(device, dtype)[None])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gates_that_are_not_numbers(activation: str, device: str) -> None:
    """NaN and infinite gates give what the formula gives, in their own elements alone."""
    function = ACTIVATIONS[activation]
    for width in (40, 33):
        xy, dy = draw(3, width, torch.float32, device)
        clean = both(function, xy, dy, "cuda")
        xy[1, 2], xy[1, 5], xy[1, 7], xy[2, width + 3] = math.nan, -math.inf, math.inf, math.nan
        y, dxy = both(function, xy, dy, "cuda")
        changed = torch.zeros_like(y, dtype=torch.bool)
        changed[1, [2, 5, 7]] = changed[2, 3] = True
        assert torch.equal(y[~changed], clean[0][~changed])
        assert torch.equal(dxy[~changed.repeat(1, 2)], clean[1][~changed.repeat(1, 2)])
        assert y[1, 2].isnan() and y[1, 5].isnan() and y[2, 3].isnan()
        assert y[1, 7] == xy[1, width + 7] * math.inf
        assert dxy[1, [2, 5, 7, width + 2, width + 5]].isnan().all() and dxy[1, width + 7].isinf()
        assert dxy[2, 3].isnan() and not dxy[2, width + 3].isnan()


def test_rows_anywhere_in_memory(device: str) -> None:
    """Rows at a distance, at odd addresses, with leading dimensions, and gradients that are not contiguous."""
    for function in ACTIVATIONS.values():
        xy, dy = draw(6, 24, torch.bfloat16, device)
        plain = both(function, xy, dy, "cuda")

        def apart(t: Tensor, distance: int, first: int) -> Tensor:
            memory = torch.full((first + 6 * distance,), math.nan, dtype=t.dtype, device=device)
            return memory.as_strided(t.shape, (distance, 1), first).copy_(t)

        turned, expanded = dy.t().contiguous().t(), dy[:1].expand(6, -1)
        for moved in ((64, 0), (48, 1), (51, 3)):
            got = both(function, apart(xy, *moved), apart(dy, moved[0] + 8, moved[1]), "cuda")
            assert all(torch.equal(g, p) for g, p in zip(got, plain, strict=True))
        assert torch.equal(both(function, xy, turned, "cuda")[1], plain[1])
        assert torch.equal(both(function, xy, expanded, "cuda")[1], both(function, xy, expanded + 0, "cuda")[1])
        cube = both(function, xy.view(2, 3, 48), dy.view(2, 3, 24), "cuda")
        assert torch.equal(cube[0].view(6, 24), plain[0]) and torch.equal(cube[1].view(6, 48), plain[1])
        assert torch.equal(function(xy[0], impl="cuda"), plain[0][0])


def test_more_elements_than_32_bits_count(device: str) -> None:
    if device == "cuda":
        pytest.skip("the memory is sparse on a CPU alone")
    for width in (32, 31):
        far = sparse((1 << 31) + 4096, torch.bfloat16).as_strided((2, 2 * width), ((1 << 31) + 8, 1))
        check(swiglu, far.copy_(torch.randn(2, 2 * width)), far[:, :width])


def test_gradients_of_the_reference() -> None:
    torch.manual_seed(0)
    xy = torch.randn(2, 3, 10, dtype=torch.float64, requires_grad=True)
    for function in ACTIVATIONS.values():
        assert torch.autograd.gradcheck(function, (xy,))


def test_operators_and_their_fakes(device: str) -> None:
    xy, dy = draw(5, 12, torch.bfloat16, device)
    for activation in range(3):
        torch.library.opcheck(torch.ops.megapt_kernels.glu.default, (xy, activation))
    torch.library.opcheck(torch.ops.megapt_kernels.glu_backward.default, (dy, xy, 1))


def test_operators_refuse_what_launchers_cannot_read(device: str) -> None:
    xy, dy = draw(4, 8, torch.float32, device)
    op = torch.ops.megapt_kernels
    for call, words in (
        (lambda: op.glu(xy.double(), 0), "glu: xy must be Float, BFloat16 or Half"),
        (lambda: op.glu(xy[:, ::2], 0), "glu: xy must have rows of contiguous elements"),
        (lambda: op.glu(xy[:, :5], 0), "glu: xy must have rows of gate and up, not of 5 elements"),
        (lambda: op.glu(xy, 3), "glu: activation must be 0, 1 or 2, not 3"),
        (lambda: op.glu_backward(dy[:, :4], xy, 0), "glu_backward: dy must have shape"),
        (lambda: op.glu_backward(dy.half(), xy, 0), "glu_backward: dy must have the dtype of xy"),
    ):
        with pytest.raises(RuntimeError, match=words):
            call()


@pytest.mark.parametrize("impl", ("cuda", "reference"))
def test_compiled_without_graph_breaks(impl: str, device: str) -> None:
    def chain(xy: Tensor) -> Tensor:
        return swiglu(xy, impl=impl) + geglu(xy, impl=impl) * geglu(xy, approximate="none", impl=impl)

    compiled = torch.compile(chain, backend="aot_eager", fullgraph=True)
    xy, dy = draw(6, 16, torch.float32, device)
    results = [both(lambda t, impl, f=f: f(t), xy, dy, impl) for f in (chain, compiled)]
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager)


def test_wrong_arguments_are_named(device: str) -> None:
    xy = torch.zeros(2, 8)
    for call, words in (
        (lambda: swiglu(xy.int()), "swiglu: xy must be bfloat16, float16, float32 or float64, not torch.int32"),
        (lambda: geglu(None), "geglu: xy is a tensor, not NoneType"),  # type: ignore[arg-type]
        (lambda: swiglu(xy[:, :3]), r"swiglu: xy must have rows of gate and up, of one length, not the shape \[2, 3\]"),
        (lambda: swiglu(xy[:, :0]), "swiglu: xy must have rows"),
        (lambda: geglu(xy, approximate="erf"), "geglu: approximate is tanh or none, not 'erf'"),
        (lambda: swiglu(xy, impl="library"), "liger: it runs on cuda, not on cpu"),
    ):
        with pytest.raises(Unsupported, match=words):
            call()
    wide = torch.zeros(2, 8, device=device)
    assert explain("swiglu", wide, impl="cuda").chosen is not None
    assert "not torch.float64" in str(explain("geglu", wide.double(), impl="cuda"))
    assert "a stride of 2 between" in str(explain("swiglu", wide[:, ::2], impl="cuda"))


def test_planted_bugs_are_found(tmp_path: Path, device: str) -> None:
    """Rows counted with 32 bits in the forward, results one element too far in the backward."""
    if device == "cuda":
        pytest.skip("bugs are planted for the emulator")
    line = "using T = {};\n        constexpr int V = 16 / sizeof(T);\n        const bool vectors = aligned(V, {{"
    any_dtype, only_bf16 = line.format("typename decltype(type)::type"), line.format("bf16")
    try:
        broken = planted(
            tmp_path,
            "glu",
            ("glu.cu", f"{any_dtype}xy", f"{only_bf16}xy"),
            ("glu.cu", f"{any_dtype}dy", f"{only_bf16}dy"),
            ("glu.cuh", "row * stride);\n    float gate[V], up[V];", "int(row * stride));\n    float gate[V], up[V];"),
            ("glu.cuh", "out[tiles.vectors + i] = pack<T>(up);", "out[tiles.vectors + i + 1] = pack<T>(up);"),
        )
    except build.ToolMissing as missing:
        pytest.skip(str(missing))
    used = library.loaded()
    assert used is not None
    whole = Emulated(used.path, Path(build.ROOT, "csrc", "glu.h").read_text(encoding="utf-8"))
    for fails in (_forward_fails, _backward_fails):
        assert not fails(whole) and fails(broken)


def _forward_fails(kernels: Emulated) -> bool:
    far = sparse((1 << 31) + 4096, torch.bfloat16).as_strided((2, 40), ((1 << 31) + 8, 1))
    far.copy_(torch.randn(2, 40, generator=torch.Generator().manual_seed(0)))
    y = torch.zeros(2, 20, dtype=torch.bfloat16)
    code = kernels.call("megapt_glu", far, far.stride(0), y, 2, 20, 0, 1, None)
    return code != 0 or not torch.allclose(y, swiglu(far, impl="reference"), rtol=2e-2)


def _backward_fails(kernels: Emulated) -> bool:
    failed = False
    xy, dy = draw(3, 20, torch.bfloat16, "cpu")
    exact = both(swiglu, xy, dy, "reference")[1]
    for order in ORDERS:
        kernels.order(order)
        dxy = guarded(torch.zeros_like(xy))
        code = kernels.call("megapt_glu_backward", dy, 20, xy, 40, dxy, 3, 20, 0, 1, None)
        kernels.order(ORDERS[0])
        failed |= code != 0 or not torch.allclose(dxy, exact, rtol=2e-2, atol=1e-3)
    return failed
