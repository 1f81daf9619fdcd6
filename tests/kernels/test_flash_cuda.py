"""Our CUDA flash attention against fp64: adversarial lengths, documents, windows, caps; the same bits on every run."""

from __future__ import annotations

import ctypes
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megapt_kernels import build, library
from megapt_kernels.attention_backends.documents import starts_and_ends
from megapt_kernels.attention_dispatch import AttentionSpec, attention
from megapt_kernels.registry import Unsupported, explain

from .guarded import guarded, sparse
from .planted import ORDERS, Emulated, planted
from .test_attention import computed, plain, tensors

# name: ((B, S, heads, kv_heads, D), spec). Blocks are of 96 (wide: 128) queries by 64 keys; backward, of 64 by 32.
CASES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "one token": ((1, 1, 2, 1, 64), {}),
    "127": ((1, 127, 2, 1, 64), {}),
    "127, wide": ((1, 127, 1, 1, 128), {}),
    "129, rows in one block": ((2, 129, 1, 1, 64), {}),
    "129, wide": ((1, 129, 1, 1, 128), {}),
    "64 past a block": ((1, 192, 1, 1, 64), {"scale": 0.3}),
    "without order": ((1, 129, 2, 1, 64), {"causal": False}),
    "groups of four": ((1, 70, 8, 2, 64), {}),
    "window of one": ((1, 70, 1, 1, 64), {"window": 1}),
    "window of five": ((1, 130, 1, 1, 64), {"window": 5}),
    "window of 66": ((1, 200, 1, 1, 64), {"window": 66}),
    "window of 66, wide": ((1, 150, 1, 1, 128), {"window": 66}),
    "soft cap": ((1, 65, 2, 2, 64), {"softcap": 1.5}),
    "documents": ((2, 100, 4, 1, 64), {"lengths": (1, 62, 37, 1, 1, 98)}),
    "documents without order": ((1, 160, 1, 1, 128), {"causal": False, "lengths": (63, 1, 66, 30)}),
    "everything": ((2, 80, 4, 1, 128), {"window": 9, "softcap": 2.0, "scale": 0.3, "lengths": (80, 1, 20, 59)}),
    "negative scale": ((1, 40, 1, 1, 64), {"scale": -0.2}),
    "large scores": ((1, 64, 1, 1, 64), {"scale": 10.0}),
}
DTYPES = (torch.bfloat16, torch.float16)


def on(device: str, made: list[Tensor]) -> list[Tensor]:
    return [t.to(device) for t in made]


@pytest.mark.parametrize("name", CASES)
def test_errors_stay_near_those_of_plain_pytorch(name: str, device: str) -> None:
    shape, options = CASES[name]
    spec, made = AttentionSpec(**options), tensors(shape)
    exact = computed(plain, made, torch.float64, spec)
    for dtype in DTYPES if shape[1] < 128 else DTYPES[:1]:
        theirs = computed(plain, made, dtype, spec)
        ours = computed(attention, on(device, made), dtype, spec, impl="cuda")
        for factor, wanted, other, got in zip((2, 3, 3, 3), exact, theirs, ours, strict=True):
            # Gradients that cancel to nothing are left with fp32's rounding of numbers as large as the arguments.
            floor = max(torch.finfo(dtype).eps * float(wanted.abs().max()), 2**-20)
            bound = factor * (other - wanted).abs().max() + floor
            assert (got.cpu() - wanted).abs().max() <= bound, dtype


@pytest.mark.parametrize("width", [64, 128])
def test_the_same_bits_in_any_order_of_threads(width: int, device: str) -> None:
    spec = AttentionSpec(window=50, softcap=5.0, lengths=(70, 1, 29))
    made, seen = on(device, tensors((1, 100, 2, 1, width))), []
    try:
        for order in library.ThreadOrder:
            if device == "cpu":
                library.set_thread_order(order, seed=3)
            seen.append(computed(attention, made, torch.bfloat16, spec, impl="cuda"))
    finally:
        if device == "cpu":
            library.set_thread_order(library.ThreadOrder.forward)
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


def test_the_denominators_are_kept_in_fp32(device: str) -> None:
    q, k, v = (t[0].to(device, torch.bfloat16) for t in tensors((1, 40, 2, 1, 64))[:3])
    _, lse = torch.ops.megapt_kernels.flash(q, k, v, *starts_and_ends((40,), q.device), True, 0, 0.125, 0.0)
    scores = torch.einsum("qhd,kd->hqk", q.double(), k[:, 0].double()) * 0.125
    scores = scores.masked_fill(torch.ones(40, 40, device=device).triu(1).bool(), -math.inf)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1) / math.log(2), rtol=1e-6, atol=1e-5)


def test_strides_and_addresses_do_not_matter(device: str) -> None:
    generator = torch.Generator().manual_seed(1)
    qkv = torch.randn(2, 20, 6, 64, generator=generator).bfloat16().to(device)
    views = list(qkv.split([4, 1, 1], dim=2))
    shifted = torch.empty(views[0].numel() + 1, dtype=qkv.dtype, device=device)[1:].view(views[0].shape)
    turned = [t.transpose(1, 3).contiguous().transpose(1, 3) for t in views]
    wide = torch.empty(2, 20, 6, 65, dtype=qkv.dtype, device=device)[..., :64].copy_(qkv).split([4, 1, 1], dim=2)
    wanted = attention(*(t.contiguous() for t in views), impl="cuda")
    for other in (views, [shifted.copy_(views[0]), *views[1:]], turned, list(wide)):
        assert torch.equal(attention(*other, impl="cuda"), wanted)


def test_nothing_reaches_over_the_end_of_a_document(device: str) -> None:
    q, k, v = (t.to(device, torch.bfloat16) for t in tensors((1, 300, 1, 1, 64))[:3])
    spec = AttentionSpec(lengths=(150, 150), causal=False)
    alone = attention(q[:, :150], k[:, :150], v[:, :150], AttentionSpec(causal=False), impl="cuda")
    assert torch.equal(attention(q, k, v, spec, impl="cuda")[:, :150], alone)
    v[:, 192:] = math.nan  # reaches queries that share a block of 96 with the second document's
    assert torch.equal(attention(q, k, v, spec, impl="cuda")[:, :96], alone[:, :96])


def test_more_than_two_to_the_31_elements(device: str) -> None:
    if device == "cuda":
        pytest.skip("needs memory that is there only where it is written")
    apart = 1 << 30
    q, k, v = (t[0].bfloat16() for t in tensors((1, 4, 1, 1, 64))[:3])
    far = [sparse(3 * apart + 64, torch.bfloat16).as_strided((4, 1, 64), (apart, 64, 1)).copy_(t) for t in (q, k, v)]
    bounds, options = starts_and_ends((4,), q.device), (True, 0, 0.125, 0.0)
    op = torch.ops.megapt_kernels
    y, lse = op.flash(q, k, v, *bounds, *options)
    assert torch.equal(op.flash(*far, *bounds, *options)[0], y)
    wanted = op.flash_backward(k, q, k, v, *bounds, y, lse, *options)
    got = op.flash_backward(far[1], *far, *bounds, y, lse, *options)
    assert all(torch.equal(a, b) for a, b in zip(wanted, got, strict=True))


def test_operators_keep_their_promises(device: str) -> None:
    q, k, v, dy = (t[0].to(device, torch.bfloat16) for t in tensors((1, 12, 2, 1, 64)))
    bounds, options = starts_and_ends((5, 7), q.device), (True, 3, 0.1, 2.0)
    op = torch.ops.megapt_kernels
    torch.library.opcheck(op.flash.default, (q, k, v, *bounds, *options))
    y, lse = op.flash(q, k, v, *bounds, *options)
    torch.library.opcheck(op.flash_backward.default, (dy, q, k, v, *bounds, y, lse, *options))
    for arguments, words in (
        ((q.float(), k, v, *bounds), "flash: q must be BFloat16 or Half"),
        ((q, k.half(), v, *bounds), "flash: k must have the dtype of q"),
        ((q[..., :32], k, v, *bounds), "flash: q must have heads of width 64 or 128, not 32"),
        ((q, k[:5], v, *bounds), "flash: k must have shape"),
        ((q, k, v, bounds[0].long(), bounds[1]), "flash: starts must be Int"),
        ((q, k, v, bounds[0], bounds[1][:5]), "flash: ends must have shape"),
        ((q.transpose(0, 2).contiguous().transpose(0, 2), k, v, *bounds), "flash: q must be contiguous in its last"),
    ):
        with pytest.raises(RuntimeError, match=words):
            op.flash(*arguments, *options)


def test_compiles_in_one_graph(device: str) -> None:
    spec, made = AttentionSpec(lengths=(20, 30), window=7), on(device, tensors((1, 50, 2, 1, 64)))
    torch.compiler.reset()
    run = lambda q, k, v: attention(q, k, v, spec, impl="cuda")  # noqa: E731
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    eager, traced = (computed(f, made, torch.bfloat16) for f in (run, compiled))
    assert all(torch.equal(a, b) for a, b in zip(eager, traced, strict=True))


def test_it_says_what_it_does_not_take(device: str) -> None:
    def refusal(width: int, dtype: torch.dtype) -> str:
        q = torch.zeros(1, 4, 1, width, device=device, dtype=dtype)
        with pytest.raises(Unsupported) as refused:
            attention(q, q, q, impl="cuda")
        return str(refused.value)

    assert "head width 96 of q is neither 64 nor 128" in refusal(96, torch.bfloat16)
    assert "takes bfloat16 and float16, not torch.float32" in refusal(64, torch.float32)
    q = torch.zeros(1, 4, 1, 64, device=device, dtype=torch.bfloat16)
    chosen = explain("attention", q, q, q, impl="cuda").chosen
    assert chosen is not None and chosen.name == "cuda"


# --- The kernels and broken copies of them, called by their launchers.


class Direct:
    """Forward and backward pass of 137 tokens, one head of 64, memory guarded at its end."""

    def __init__(self) -> None:
        made = [t[0] for t in tensors((1, 137, 1, 1, 64))]
        exact = computed(plain, [t[None] for t in made], torch.float64, AttentionSpec())
        self.y, *self.gradients = (t[0] for t in exact)
        self.inputs = [guarded(t.bfloat16(), align=16) for t in made]
        self.bounds = starts_and_ends((137,), torch.device("cpu"))
        q, k, v = self.inputs[:3]
        kept = torch.ops.megapt_kernels.flash(q, k, v, *self.bounds, True, 0, 0.125, 0.0)
        self.kept = [guarded(t, align=16) for t in kept]

    def fails(self, kernels: Emulated) -> tuple[bool, bool]:
        """Whether the forward pass fails in some order of threads, and the backward pass of a right forward pass."""
        q, k, v, dy = self.inputs
        places = (q, 64, 64, k, 64, 64, v, 64, 64, *self.bounds)
        numbers = (137, 1, 1, 64, 1, 0, ctypes.c_double(0.125), ctypes.c_double(0.0), 1, None)
        forward = backward = False
        for order in ORDERS:
            y, *gradients = (guarded(torch.zeros_like(q), align=16) for _ in range(4))
            lse, along = torch.zeros(1, 137), torch.zeros(1, 137)
            kernels.order(order)
            code = kernels.call("megapt_flash", *places, y, lse, *numbers)
            forward |= code != 0 or _far(y, self.y)
            code = kernels.call("megapt_flash_backward", dy, 64, 64, *places, *self.kept, along, *gradients, *numbers)
            backward |= code != 0 or any(map(_far, gradients, self.gradients))
            kernels.order(ORDERS[0])
        return forward, backward


def test_nothing_races(tmp_path: Path, device: str) -> None:
    if device == "cuda":
        pytest.skip("the race detector is the emulator's")
    kernels = planted(tmp_path, "flash", races=True)
    q, k, v, dy = (t[0].bfloat16() for t in tensors((1, 100, 2, 1, 64)))
    y, dq, dk, dv, lse, along = (*map(torch.empty_like, (q, q, k, k)), torch.empty(2, 100), torch.empty(2, 100))
    places = (q, 128, 64, k, 64, 64, v, 64, 64, *starts_and_ends((70, 30), torch.device("cpu")))
    numbers = (100, 2, 1, 64, 1, 0, ctypes.c_double(0.125), ctypes.c_double(2.0), 1, None)
    assert kernels.call("megapt_flash", *places, y, lse, *numbers) == 0, kernels.error()
    backward = kernels.call("megapt_flash_backward", dy, 128, 64, *places, y, lse, along, dq, dk, dv, *numbers)
    assert backward == 0, kernels.error()


def _far(got: Tensor, wanted: Tensor) -> bool:
    return not torch.allclose(got.double(), wanted, rtol=0.05, atol=0.05)


STEP = "            copies.wait<1>();\n        } else {"
LAST = "multiply<T, D>(made, ds, left);\n        __syncthreads();"
KEYS = "multiply<T, D>(softmax.values, s, keys + tile);\n        __syncthreads();"
# Of a copy each: a change that breaks the forward pass, and one that breaks the backward pass.
BUGS: dict[str, tuple[tuple[str, str], ...]] = {
    "tiles that others still read": ((KEYS, KEYS.split("\n")[0]), (LAST, LAST.split("\n")[0])),
    "what is not there yet": (
        (STEP, STEP.split("\n")[1]),
        ("copies.commit();\n        copies.wait<1>();\n        __syncthreads();", "__syncthreads();"),
    ),
    "masks, and what the softmax takes": (
        ("number >= seen.to", "number > seen.to"),
        ("ds[n][i] -= queries.along[of_keys ? at.met : at.own];", ""),
    ),
    "behind the last token": (("const bool inside = row < tokens - first;", "const bool inside = true;"),),
}


def test_planted_bugs_are_found(tmp_path: Path, device: str) -> None:
    if device == "cuda":
        pytest.skip("the copies are emulated")
    direct, loaded = Direct(), library.loaded()
    assert loaded is not None
    declared = Path(build.ROOT, "csrc", "flash.h").read_text(encoding="utf-8")
    assert direct.fails(Emulated(loaded.path, declared)) == (False, False)
    for number, (name, changes) in enumerate(BUGS.items()):
        broken = planted(tmp_path / str(number), "flash", *(("flash.cuh", old, new) for old, new in changes))
        assert direct.fails(broken) == (True, True), name
