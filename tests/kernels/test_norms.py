"""RMSNorm and LayerNorm by every implementation that runs here, against fp64."""

from __future__ import annotations

import ctypes
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megapt_kernels import build, explain, layer_norm, library, rms_norm
from megapt_kernels.norms import OPERATIONS
from megapt_kernels.registry import Unsupported

from .guarded import guarded, sparse
from .planted import ORDERS, Emulated, planted

OPS = ("rms_norm", "layer_norm")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Rows for every way that a row is cut up, and more of them than groups of threads that stay: several rounds.
SHAPES = ((0, 64), (1, 1), (40, 7), (300, 64), (33, 127), (20, 129), (35, 1000), (9, 2056))
WIDE = ((5, 4104), (5, 8192), (5, 16384), (2, 20000))


def within(got: Tensor, plain: Tensor, exact: Tensor, factor: float) -> None:
    """The error against fp64 is at most `factor` times plain PyTorch's in the same dtype, with a floor of what rounding
    the exact numbers to that dtype may cost."""
    assert got.dtype == plain.dtype and got.shape == plain.shape
    floor = torch.finfo(got.dtype).eps
    got, plain, exact = (t.detach().double().cpu() for t in (got, plain, exact))
    assert torch.equal(got.isnan(), exact.isnan())
    got, plain, exact = (t.nan_to_num(0.0) for t in (got, plain, exact))
    if exact.numel():
        worst, allowed = (got - exact).abs().max(), (plain - exact).abs().max()
        assert worst <= factor * allowed + floor * exact.abs().max(), (float(worst), float(allowed))


class Case:
    """Arguments of an operation, and the gradients of its results."""

    def __init__(self, op: str, rows: int, width: int, dtype: torch.dtype, device: str, **more: Any) -> None:
        self.op, self.offset, self.added = op, more.pop("offset", 0.0), more.pop("residual", False)
        weights, self.size = more.pop("weights", None) or dtype, more.pop("size", 1.0)
        generator = torch.Generator().manual_seed(rows * 100_003 + width)

        def draw(shape: tuple[int, ...], dtype: torch.dtype, size: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator) * size).to(device, dtype)

        self.x = draw((rows, width), dtype, self.size) + 0.5 * self.size
        self.residual = draw((rows, width), dtype, self.size) if self.added else None
        self.vectors = [draw((width,), weights) for _ in range(1 if op == "rms_norm" else 2)]
        self.dy, self.ds = draw((rows, width), dtype), draw((rows, width), dtype)

    def run(self, impl: str, exact: bool = False) -> tuple[list[Tensor], list[Tensor]]:
        """Results y (and s), and gradients of x (and the residual), weight (and bias)."""
        x, residual, *vectors = (
            None if t is None else t.detach().to(torch.float64 if exact else t.dtype).requires_grad_()
            for t in (self.x, self.residual, *self.vectors)
        )
        if exact and self.added:  # of the sum as it is rounded
            residual = None
            x = (self.x + self.residual).double().requires_grad_()
        keywords = {"offset": self.offset} if self.op == "rms_norm" else {}
        function = rms_norm if self.op == "rms_norm" else layer_norm
        out = function(x, *vectors, residual=residual, impl=impl, **keywords)
        if exact and self.added:
            out = out, x * 1
        results = list(out) if self.added else [out]
        wrt = [x] if residual is None else [x, residual]
        gradients = torch.autograd.grad(
            results, [*wrt, *vectors], [self.dy.to(x.dtype), self.ds.to(x.dtype)][: len(results)]
        )
        gradients = list(gradients)
        if exact and self.added:
            gradients.insert(1, gradients[0])
        return results, gradients

    def check(self, impl: str = "cuda") -> None:
        (got, got_gradients), (plain, plain_gradients) = self.run(impl), self.run("reference")
        exact, exact_gradients = self.run("reference", exact=True)
        if self.added:
            assert torch.equal(got[1], plain[1])
        for g, p, e in zip(got, plain, exact, strict=True):
            within(g, p, e, 2)
        for g, p, e in zip(got_gradients, plain_gradients, exact_gradients, strict=True):
            within(g, p, e, 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_results_and_gradients(op: str, dtype: torch.dtype, device: str, thread_order: Any) -> None:
    for number, (rows, width) in enumerate(SHAPES):
        weights = torch.float32 if number % 2 else dtype
        Case(op, rows, width, dtype, device, residual=number % 3 == 0, weights=weights).check()


@pytest.mark.parametrize("op", OPS)
def test_wide_rows(op: str, device: str) -> None:
    for rows, width in WIDE:
        Case(op, rows, width, torch.bfloat16, device, residual=True).check()
    Case(op, 5, 8192, torch.float32, device).check()


def test_threads_in_any_order_give_the_same_bits(device: str) -> None:
    if device == "cuda":
        pytest.skip("a GPU orders threads itself")
    for op in OPS:
        for width in (7, 64, 1000, 4104):
            case, seen = Case(op, 20, width, torch.bfloat16, device, residual=True), []
            try:
                for order in library.ThreadOrder:
                    library.set_thread_order(order, seed=5)
                    seen.append([t for part in case.run("cuda") for t in part])
            finally:
                library.set_thread_order(library.ThreadOrder.forward)
            assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other, strict=True))


@pytest.mark.parametrize("op", OPS)
def test_twice_gives_the_same_bits(op: str, device: str) -> None:
    case = Case(op, 64, 1032, torch.bfloat16, device, residual=True)
    once, again = case.run("cuda"), case.run("cuda")
    assert all(torch.equal(a, b) for x, y in zip(once, again, strict=True) for a, b in zip(x, y, strict=True))


def test_offset_and_sizes_of_numbers(device: str) -> None:
    for dtype in DTYPES:
        Case("rms_norm", 5, 264, dtype, device, offset=1.0, residual=True).check()
        Case("rms_norm", 5, 33, dtype, device, offset=-0.5).check()
        for op in OPS:
            Case(op, 4, 520, dtype, device, size=2e4 if dtype is torch.float16 else 1e15).check()
            Case(op, 4, 77, dtype, device, size=1e-4).check()


@pytest.mark.parametrize("op", OPS)
def test_rows_anywhere_in_memory(op: str, device: str) -> None:
    """Rows at a distance, at odd addresses, and gradients that are not contiguous."""
    for dtype in (torch.bfloat16, torch.float32):
        case = Case(op, 6, 136, dtype, device, residual=True)
        plain = case.run("cuda")

        def same(case: Case = case, plain: Any = plain) -> None:
            for got, want in zip(case.run("cuda"), plain, strict=True):
                for g, w in zip(got, want, strict=True):
                    torch.testing.assert_close(g, w, rtol=2e-2 if g.dtype is torch.bfloat16 else 2e-6, atol=1e-5)

        def apart(t: Tensor, distance: int, first: int = 0) -> Tensor:
            memory = torch.full((first + 6 * distance,), math.nan, dtype=t.dtype, device=device)
            view = memory.as_strided(t.shape, (distance, 1), first)
            return view.copy_(t)

        x, residual, dy, ds = case.x, case.residual, case.dy, case.ds
        assert residual is not None
        for distance, first in ((144, 0), (136, 1), (139, 3)):
            case.x, case.residual = apart(x, distance, first), apart(residual, distance + 8, first)
            case.dy, case.ds = apart(dy, distance + 16, first), apart(ds, distance, first)
            same()
        case.x, case.residual = x, residual
        case.dy, case.ds = dy.t().contiguous().t(), ds
        same()
        case.dy = dy[:1].expand(6, -1)
        expanded = case.run("cuda")[1]
        case.dy = case.dy.contiguous()
        assert all(torch.equal(a, b) for a, b in zip(expanded, case.run("cuda")[1], strict=True))
    leading = torch.randn(2, 3, 40, device=device)
    weights = [torch.ones(40, device=device)] * (1 if op == "rms_norm" else 2)
    function = rms_norm if op == "rms_norm" else layer_norm
    y, s = function(leading, *weights, residual=leading, impl="cuda")
    assert y.shape == s.shape == leading.shape and torch.equal(s, leading + leading)
    turned = leading.transpose(0, 2)
    assert "stride" in str(explain(op, turned, *(w[:2] for w in weights), impl="cuda"))
    pairs = function(turned, *(w[:2] for w in weights))  # by another implementation
    torch.testing.assert_close(pairs, function(turned.contiguous(), *(w[:2] for w in weights), impl="cuda"))


def test_more_elements_than_32_bits_count(device: str) -> None:
    if device == "cuda":
        pytest.skip("the memory is sparse on a CPU alone")
    for width in (64, 63):
        far = sparse((1 << 31) + 4096, torch.bfloat16).as_strided((2, width), ((1 << 31) + 8, 1))
        far.copy_(torch.randn(2, width))
        for op in OPS:
            case = Case(op, 2, width, torch.bfloat16, device, residual=True)
            case.x = case.residual = case.dy = case.ds = far
            case.check()


@pytest.mark.parametrize("impl", ("cuda", "reference"))
@pytest.mark.parametrize("op", OPS)
def test_rows_that_are_not_numbers(op: str, impl: str, device: str) -> None:
    """They stay in their row, and in the gradient of the weights."""
    for width in (64, 33, 520):
        case = Case(op, 5, width, torch.bfloat16, device)
        clean = case.run(impl)
        case.x[1, 3], case.x[3, 0] = math.nan, -math.inf
        (y,), (dx, *dw) = case.run(impl)
        for got, want in ((y, clean[0][0]), (dx, clean[1][0])):
            assert torch.equal(got[::2], want[::2])
        assert y[1].isnan().all() and dx[1].isnan().all() and dx[3].isnan().all()
        # rsqrt(inf) is 0: with RMSNorm it is the infinity alone that has no result.
        assert y[3, 0].isnan() and (y[3].isnan().all() if op == "layer_norm" else (y[3, 1:] == 0).all())
        assert dw[0].isnan().all() if op == "layer_norm" else dw[0][[0, 3]].isnan().all()


def test_squares_beyond_fp32_give_zeros(device: str) -> None:
    x = torch.full((2, 40), 1e25, device=device)
    for impl in ("cuda", "reference"):
        assert not rms_norm(x, torch.ones(40, device=device), impl=impl).any()


@pytest.mark.parametrize("op", OPS)
def test_one_result_is_enough(op: str, device: str) -> None:
    """The gradient of a result that nobody used is nothing."""
    case = Case(op, 3, 72, torch.float32, device, residual=True)
    function = partial(rms_norm if op == "rms_norm" else layer_norm, impl="cuda")
    for used in (0, 1):
        x, residual = (t.detach().requires_grad_() for t in (case.x, case.residual))  # type: ignore[union-attr]
        dx, dr = torch.autograd.grad(function(x, *case.vectors, residual=residual)[used], (x, residual), case.dy)
        assert torch.equal(dx, dr)
        if used:
            torch.testing.assert_close(dx, case.dy)
    assert not function(*(t.detach() for t in (case.x, *case.vectors))).requires_grad


def test_gradients_of_the_reference() -> None:
    torch.manual_seed(0)
    x, r = (torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    w, b = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda x, w, r: rms_norm(x, w, 1e-6, r, offset=1.0), (x, w, r))
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-6), (x, w))
    assert torch.autograd.gradcheck(lambda x, w, b, r: layer_norm(x, w, b, 1e-5, r), (x, w, b, r))


def test_reference_rounds_once_whatever_the_weights_dtype() -> None:
    x, w = torch.randn(4, 64).bfloat16(), torch.randn(64)
    for weight in (w, w.bfloat16(), w.double()):
        exact = rms_norm(x.double(), weight.double())
        assert (rms_norm(x, weight).double() - exact).abs().max() <= 2.0**-8 * exact.abs().max()
        plain = layer_norm(x.double(), weight.double(), weight.double())
        assert (layer_norm(x, weight, weight).double() - plain).abs().max() <= 2.0**-8 * plain.abs().max()


def _operators(device: str) -> list[tuple[str, tuple[Any, ...]]]:
    x, w = torch.randn(5, 24, device=device).bfloat16(), torch.randn(24, device=device)
    stats = torch.rand(5, device=device) + 0.5
    return [
        ("rms_norm", (x, w, 1e-6, 0.0)),
        ("add_rms_norm", (x, x + 1, w, 1e-6, 1.0)),
        ("rms_norm_backward", (x, None, x + 1, w, stats, 1.0)),
        ("rms_norm_backward", (x, x - 1, x + 1, w, stats, 0.0)),
        ("layer_norm", (x, w, w + 1, 1e-5)),
        ("add_layer_norm", (x, x + 1, w, w + 1, 1e-5)),
        ("layer_norm_backward", (x, None, x + 1, w, stats, stats)),
        ("layer_norm_backward", (x, x - 1, x + 1, w, stats, stats)),
    ]


def test_operators_and_their_fakes(device: str) -> None:
    for name, arguments in _operators(device):
        torch.library.opcheck(getattr(torch.ops.megapt_kernels, name).default, arguments)


def test_operators_refuse_what_launchers_cannot_read(device: str) -> None:
    x, w = torch.randn(4, 8, device=device), torch.randn(8, device=device)
    op = torch.ops.megapt_kernels
    for call, words in (
        (lambda: op.rms_norm(x.double(), w, 1e-6, 0.0), "rms_norm: x must be Float, BFloat16 or Half"),
        (lambda: op.rms_norm(x[:, ::2], w[:4], 1e-6, 0.0), "rms_norm: x must have rows of contiguous"),
        (lambda: op.rms_norm(x, w[:7], 1e-6, 0.0), "rms_norm: weight must have shape"),
        (lambda: op.rms_norm(x, w.bfloat16(), 1e-6, 0.0), "rms_norm: weight must be Float"),
        (lambda: op.add_rms_norm(x, x[:3], w, 1e-6, 0.0), "add_rms_norm: residual must have shape"),
        (lambda: op.layer_norm(x, w, w.bfloat16(), 1e-6), "layer_norm: bias must"),
        (lambda: op.rms_norm_backward(x, x.half(), x, w, w[:4], 0.0), "rms_norm_backward: ds must have the dtype"),
        (lambda: op.rms_norm_backward(x, None, x, w, w, 0.0), "rms_norm_backward: rstd must have shape"),
    ):
        with pytest.raises(RuntimeError, match=words):
            call()


@pytest.mark.parametrize("impl", ("cuda", "reference"))
def test_compiled_without_graph_breaks(impl: str, device: str) -> None:
    def both(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
        y, s = rms_norm(x, w, 1e-6, r, offset=1.0, impl=impl)
        return layer_norm(rms_norm(y, w, impl=impl), w, b, residual=s, impl=impl)[0]

    generator = torch.Generator().manual_seed(0)
    arguments = [torch.randn(shape, generator=generator).to(device) for shape in ((4, 40), (4, 40), (40,), (40,))]
    results = []
    for function in (both, torch.compile(both, backend="aot_eager", fullgraph=True)):
        inputs = [t.clone().requires_grad_() for t in arguments]
        y = function(*inputs)
        results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-4)


def test_wrong_arguments_are_named() -> None:
    x, w = torch.zeros(2, 8), torch.zeros(8)
    for call, words in (
        (lambda: rms_norm(x.int(), w), "rms_norm: x must be bfloat16, float16, float32 or float64, not torch.int32"),
        (lambda: rms_norm([1.0], w), "rms_norm: x is a tensor, not list"),  # type: ignore[arg-type]
        (lambda: rms_norm(torch.zeros(2, 0), w[:0]), "rms_norm: x must have rows of at least one element"),
        (lambda: rms_norm(x, w[:4]), r"rms_norm: weight must have shape \[8\] as x's rows, not \[4\]"),
        (lambda: rms_norm(x, w.to("meta")), "rms_norm: weight is on meta and x on cpu"),
        (lambda: rms_norm(x, w, -1.0), "rms_norm: eps must be at least 0, not -1.0"),
        (lambda: rms_norm(x, w, math.nan), "rms_norm: eps is a finite number, not nan"),
        (lambda: rms_norm(x, w, residual=x[:1]), "rms_norm: residual must have x's shape"),
        (lambda: rms_norm(x, w, residual=x.half()), "rms_norm: residual must have x's dtype, torch.float32"),
        (lambda: rms_norm(x, w, offset=None), "rms_norm: offset is a number, not NoneType"),  # type: ignore[arg-type]
        (lambda: layer_norm(x, w, w.half()), "layer_norm: bias must have the weight's dtype"),
        (lambda: layer_norm(x, w, w[:3]), "layer_norm: bias must have shape"),
        (lambda: rms_norm(x, w, impl="fast"), "rms_norm: impl is one of"),
    ):
        with pytest.raises(Unsupported, match=words):
            call()


def test_what_each_implementation_says(device: str) -> None:
    x, w = torch.zeros(2, 8, device=device), torch.zeros(8, device=device)
    ours, *others = OPERATIONS["rms_norm"].implementations
    assert explain("rms_norm", x, w, impl="cuda").chosen is ours
    for arguments, words in (
        ((x.double(), w.double()), "x must be bfloat16, float16 or float32, not torch.float64"),
        ((x, w.double()), "weight must be float32 or float32, not torch.float64"),
        ((x[:, ::2], w[:4]), "x has a stride of 2 between the elements of a row, not 1"),
        ((x[None].expand(3, 2, 8)[:, :, :4], w[:4]), "x has rows at several distances"),
    ):
        assert words in dict(explain("rms_norm", *arguments, impl="cuda").rejected)[ours.name]
        with pytest.raises(Unsupported, match="no implementation for impl='cuda'"):
            rms_norm(*arguments, impl="cuda")
    tall = sparse(1 << 31, torch.float32).unsqueeze(1).to(device) if device == "cpu" else x.expand(1 << 30, 2, 8)
    assert "fewer than 2^31 rows" in str(ours.supports(tall, tall[0].contiguous()))
    if device == "cpu":
        assert [i.name for i in others] == ["quack", "liger", "apex", "torch", "reference"]
        with pytest.raises(Unsupported, match="liger: it runs on cuda, not on cpu.*torch: it is fused on cuda"):
            rms_norm(x, w, impl="library")


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    """The kernels for bf16 rows with a bug in each of four places."""
    try:
        return planted(
            tmp_path_factory.mktemp("planted"),
            "norms",
            (
                "norms.cu",
                "using T = typename decltype(type)::type;\n        return bias",
                "using T = bf16; return bias",
            ),
            ("norms.cu", "using T = typename decltype(type)::type;\n            const", "using T = bf16; const"),
            (
                "norms.cuh",
                "__syncthreads();\n#pragma unroll\n            for (int k = 0; k < n; ++k) x[k] =",
                "for (int k = 0; k < n; ++k) x[k] =",
            ),
            ("norms.cuh", "if (lane + p * group < mine) s.part[p]", "if (lane + p * group <= mine) s.part[p]"),
            (
                "norms.cuh",
                "__syncthreads();\n            for (int i = threadIdx.x; i < a.width",
                "for (int i = threadIdx.x; i < a.width",
            ),
            ("norms.cuh", "__syncthreads();\n    if (number || column", "if (number || column"),
        )
    except build.ToolMissing as missing:
        pytest.skip(str(missing))


@pytest.mark.parametrize("bug", ("block sum", "past the row", "groups of a block", "sum of blocks"))
def test_planted_bugs_are_found(bug: str, broken: Emulated, device: str) -> None:
    if device == "cuda":
        pytest.skip("bugs are planted for the emulator")
    found = {"block sum": _forward_fails, "past the row": _forward_fails}.get(bug, _backward_fails)
    width = {"block sum": 1040, "past the row": 64, "groups of a block": 64, "sum of blocks": 63}[bug]
    used = library.loaded()
    assert used is not None
    whole = Emulated(used.path, Path(build.ROOT, "csrc", "norms.h").read_text(encoding="utf-8"))
    assert not found(whole, width)
    assert found(broken, width)


def _forward_fails(kernels: Emulated, width: int) -> bool:
    x, w = torch.randn(3, width, generator=torch.Generator().manual_seed(1)).bfloat16(), torch.ones(width)
    exact, failed = rms_norm(x.double(), w.double()), False
    for order in ORDERS:
        y, rstd, rows = guarded(torch.zeros_like(x)), torch.zeros(3), guarded(x)
        kernels.order(order)
        arguments = rows, width, None, 0, w, None, 0.0, 1e-6, y, None, None, rstd, 3, width, 1, 0, None
        code = kernels.call("megapt_norm", *arguments)
        kernels.order(ORDERS[0])
        failed |= code != 0 or not torch.allclose(y.double(), exact, rtol=1e-2, atol=1e-6)
    return failed


def _backward_fails(kernels: Emulated, width: int) -> bool:
    """By the gradient of the weight alone."""
    generator = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(40, width, generator=generator).bfloat16() for _ in range(2))
    w, rstd, failed = torch.ones(width), torch.ones(40), False
    exact = (x.double() * dy.double()).sum(0)
    blocks = kernels.call("megapt_norm_backward_blocks", 40, width, 1)
    for order in ORDERS:
        dx, dw, partial = torch.zeros_like(x), torch.zeros(width), torch.zeros(blocks, width)
        kernels.order(order)
        head = dy, width, None, 0, x, width, w, ctypes.c_float(0.0), None, rstd
        code = kernels.call("megapt_norm_backward", *head, dx, dw, None, partial, blocks, 40, width, 1, 0, None)
        kernels.order(ORDERS[0])
        failed |= code != 0 or not torch.allclose(dw.double(), exact, atol=1e-4)
    return failed
