"""Rows to experts and back, by every implementation that runs here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megapt_kernels import library
from megapt_kernels.moe import moe_permute, moe_unpermute
from megapt_kernels.registry import Unsupported

from .guarded import guarded
from .planted import ORDERS, Emulated, planted

IMPLEMENTATIONS = ("cuda", "reference")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# (tokens, choices, experts, width): odd, one of each, many experts, several tiles of slots, 16 bytes and less.
SHAPES = [(33, 2, 7, 24), (1, 1, 1, 1), (5, 8, 1024, 40), (700, 3, 33, 3), (64, 4, 8, 136), (0, 2, 4, 8), (3, 2, 4, 0)]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def chosen(tokens: int, choices: int, experts: int, least: int = -1) -> Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randint(least, experts, (tokens, choices), generator=generator)


def sorted_by_hand(x: Tensor, experts: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    slots = [(e, slot) for slot, e in enumerate(experts.flatten().tolist()) if e >= 0]
    order = [slot for _, slot in sorted(slots)]
    rows = torch.zeros(experts.numel(), x.shape[1], dtype=x.dtype)
    rows[: len(order)] = x[[slot // experts.shape[1] for slot in order]]
    counts = torch.tensor([sum(e == n for e, _ in slots) for n in range(count)])
    return rows, torch.tensor(order + [-1] * (experts.numel() - len(order)), dtype=torch.int64), counts


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("integer", [torch.int32, torch.int64], ids=str)
def test_permute(device: str, thread_order: Any, impl: str, shape: tuple[int, ...], integer: torch.dtype) -> None:
    tokens, choices, count, width = shape
    x, experts = drawn(tokens, width), chosen(tokens, choices, count)
    rows, order, counts = moe_permute(x.to(device), experts.to(device, integer), count, impl=impl)
    want = sorted_by_hand(x, experts, count)
    for got, right in zip((rows, order, counts), want, strict=True):
        assert got.dtype == right.dtype and torch.equal(got.cpu(), right)


def by_hand(
    x: Tensor, experts: Tensor, weights: Tensor, factors: Tensor, grad: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    """Each expert multiplies by its factor: result and gradients of x, factors and weights, computed in `dtype`."""
    wide = [t.detach().to(dtype).requires_grad_() for t in (x, weights, factors)]
    kept = experts.ge(0).unsqueeze(2)
    made = (wide[0].unsqueeze(1) * wide[2][experts.clamp_min(0)].unsqueeze(2)).where(kept, torch.zeros((), dtype=dtype))
    y = (made * wide[1].unsqueeze(2)).sum(1)
    return [y, *torch.autograd.grad(y, wide, grad.to(dtype))]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(33, 2, 7, 24), (9, 3, 4, 5), (20, 4, 3, 264)], ids=str)
def test_there_and_back(device: str, impl: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tokens, choices, count, width = shape
    experts = chosen(tokens, choices, count)
    x, grad = (drawn(tokens, width, seed=n).to(dtype) for n in (1, 2))
    weights, factors = drawn(tokens, choices, seed=3), drawn(count, seed=4)
    leaves = [t.to(device).requires_grad_() for t in (x, weights, factors)]
    rows, order, counts = moe_permute(leaves[0], experts.to(device), count, impl=impl)
    factor = torch.cat([leaves[2], leaves[2].new_ones(1)]).repeat_interleave(
        torch.cat([counts, (len(order) - counts.sum()).view(1)])
    )
    made = rows * factor.to(dtype).unsqueeze(1)
    with torch.no_grad():
        made[order < 0] = float("nan")  # what no expert computes may hold anything
    y = moe_unpermute(made, order, leaves[1], impl=impl)
    assert y.dtype == dtype
    got = [y, *torch.autograd.grad(y, leaves, grad.to(device))]
    exact, plain = (by_hand(x, experts, weights, factors, grad, t) for t in (torch.float64, dtype))
    for mine, right, theirs, most in zip(got, exact, plain, (2, 3, 3, 3), strict=True):
        errors = [(t.detach().double().cpu() - right).abs().max().item() for t in (mine, theirs)]
        assert errors[0] <= most * errors[1] + 2e-6


def test_gradcheck() -> None:
    experts = chosen(5, 2, 3)

    def both(x: Tensor, weights: Tensor) -> Tensor:
        rows, order, _ = moe_permute(x, experts, 3, impl="reference")
        return moe_unpermute(rows.sin(), order, weights, impl="reference")

    given = drawn(5, 4).double().requires_grad_(), drawn(5, 2, seed=1).double().requires_grad_()
    assert torch.autograd.gradcheck(both, given)


def test_the_same_bits_in_every_order_of_threads(device: str) -> None:
    x, experts, weights = drawn(40, 72).bfloat16().to(device), chosen(40, 3, 5).to(device), drawn(40, 3).to(device)
    results = []
    for order in library.ThreadOrder:
        if device == "cpu":
            library.set_thread_order(order)
        leaves = [t.clone().requires_grad_() for t in (x, weights)]
        rows, order_of_rows, _ = moe_permute(leaves[0], experts, 5, impl="cuda")
        y = moe_unpermute(rows * 3, order_of_rows, leaves[1], impl="cuda")
        results.append([y, *torch.autograd.grad(y.float().square().sum(), leaves)])
    if device == "cpu":
        library.set_thread_order(library.ThreadOrder.forward)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(other, results[0], strict=True))


def test_memory_that_is_not_contiguous(device: str) -> None:
    x, experts = drawn(24, 9).to(device).T, chosen(2, 9, 4).to(device).T
    got = moe_permute(x, experts, 4, impl="cuda")
    want = moe_permute(x.contiguous(), experts.contiguous(), 4, impl="reference")
    assert all(map(torch.equal, got, want))
    weights = drawn(2, 9).to(device).T
    torch.testing.assert_close(*(moe_unpermute(*want[:2], weights, impl=impl) for impl in IMPLEMENTATIONS))


def test_experts_that_there_are_not(device: str) -> None:
    """The reference refuses them; kernels, for which nobody waits, make the row and its token NaN."""
    x = drawn(4, 8).to(device)
    for wrong, dtype in ((3, torch.int32), (-2, torch.int64), (1 << 40, torch.int64)):
        experts = torch.tensor([[0, 2], [1, wrong], [-1, 2], [2, 0]], dtype=dtype, device=device)
        with pytest.raises(Unsupported, match=r"moe_permute: experts lie in \[0, 3\)"):
            moe_permute(x, experts, 3, impl="reference")
        leaf = x.clone().requires_grad_()
        rows, order, counts = moe_permute(leaf, experts, 3, impl="cuda")
        assert order.tolist() == [0, 7, 2, 1, 5, 6, -2 - 3, -1] and counts.tolist() == [2, 1, 3]
        assert rows.isnan().any(1).tolist() == [False] * 6 + [True, False]
        weights = torch.ones(4, 2, device=device, requires_grad=True)
        y = moe_unpermute(rows, order, weights, impl="cuda")
        assert y.isnan().any(1).tolist() == [False, True, False, False]
        y.sum().backward()
        for t in (leaf, weights):
            assert t.grad is not None and t.grad.isnan().any(1).tolist() == [False, True, False, False]
        with pytest.raises(Unsupported, match="moe_unpermute: order"):
            moe_unpermute(rows, order, weights, impl="reference")


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"x": torch.zeros(4)}, "moe_permute: x"),
        ({"x": torch.zeros(4, 8, dtype=torch.int32)}, "moe_permute: x"),
        ({"experts": torch.zeros(4, 2)}, "moe_permute: experts"),
        ({"experts": torch.zeros(3, 2, dtype=torch.int64)}, "moe_permute: experts"),
        ({"experts": torch.zeros(4, 0, dtype=torch.int64)}, "moe_permute: experts"),
        ({"num_experts": 0}, "moe_permute: num_experts"),
        ({"rows": torch.zeros(8)}, "moe_unpermute: rows"),
        ({"order": torch.zeros(8, dtype=torch.int32)}, "moe_unpermute: order"),
        ({"weights": torch.zeros(4, 2).half()}, "moe_unpermute: weights"),
        ({"weights": torch.zeros(4, 3)}, "moe_unpermute: weights"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], names: str) -> None:
    integers = torch.zeros(4, 2, dtype=torch.int64)
    given: dict[str, Any] = {"x": torch.zeros(4, 8), "experts": integers, "num_experts": 3}
    back: dict[str, Any] = {"rows": torch.zeros(8, 8), "order": integers.flatten(), "weights": torch.zeros(4, 2)}
    with pytest.raises(Unsupported, match=names):
        moe_permute(**{k: change.get(k, v) for k, v in given.items()})
        moe_unpermute(**{k: change.get(k, v) for k, v in back.items()})


def test_more_experts_than_the_kernel_takes(device: str) -> None:
    given = drawn(4, 8), torch.tensor([[1024], [3], [1500], [0]]), 2000
    with pytest.raises(Unsupported, match="num_experts is 2000; the kernel takes up to 1024"):
        moe_permute(*given, impl="cuda")
    assert moe_permute(*given)[1].tolist() == [3, 1, 0, 2]


def test_operators_are_well_formed(device: str) -> None:
    ops = torch.ops.megapt_kernels
    x, experts = drawn(5, 8).to(device).requires_grad_(), chosen(5, 2, 3).to(device)
    torch.library.opcheck(ops.moe_permute.default, (x, experts, 3))
    rows, order, place, _ = (t.detach() for t in ops.moe_permute(x, experts, 3))
    weights = drawn(5, 2).to(device)
    torch.library.opcheck(ops.moe_sum.default, (rows, place))
    leaves = rows.clone().requires_grad_(), order, weights.clone().requires_grad_()
    torch.library.opcheck(ops.moe_unpermute.default, leaves)
    torch.library.opcheck(ops.moe_unpermute_backward.default, (x.detach(), rows, order, place, weights))
    with pytest.raises(RuntimeError, match="megapt_kernels::moe_unpermute: order must be Long"):
        ops.moe_unpermute(rows, order.int(), weights)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_compiles_whole(device: str, impl: str) -> None:
    experts = chosen(6, 2, 3).to(device)

    def layer(x: Tensor, weights: Tensor) -> Tensor:
        rows, order, _ = moe_permute(x, experts, 3, impl=impl)
        return moe_unpermute(rows.sin(), order, weights, impl=impl).square()

    results = []
    for function in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        leaves = [t.to(device).requires_grad_() for t in (drawn(6, 8), drawn(6, 2, seed=1))]
        y = function(*leaves)
        results.append([y.detach(), *torch.autograd.grad(y.sum(), leaves)])
    torch.testing.assert_close(*results)


# ---- memory's end, and a planted bug


def test_nothing_beyond_a_tensor_is_touched(device: str) -> None:
    if device == "cuda":
        pytest.skip("guarded memory is the CPU's")
    for width, align in ((5, 1), (8, 16)):
        x, experts, weights = drawn(21, width), chosen(21, 3, 4), drawn(21, 3)
        want = moe_permute(x, experts, 4, impl="reference")
        got = moe_permute(guarded(x, align=align), guarded(experts), 4, impl="cuda")
        assert all(map(torch.equal, got, want))
        y = moe_unpermute(guarded(want[0], align=align), guarded(want[1]), guarded(weights), impl="cuda")
        torch.testing.assert_close(y, moe_unpermute(*want[:2], weights, impl="reference"))


def sorted_in(launchers: Emulated, experts: Tensor, count: int) -> Tensor:
    """The order by a library's launcher, minus twos after an error."""
    slots = experts.numel()
    scratch = torch.zeros(launchers.call("megapt_moe_scratch", slots, count), dtype=torch.int32)
    order, counts = (torch.zeros(n, dtype=torch.int64) for n in (slots, count))
    ends = [guarded(t) for t in (experts, scratch, order, torch.zeros(slots, dtype=torch.int32), counts)]
    code = launchers.call("megapt_moe_sort", ends[0], 8, slots, count, *ends[1:], None)
    return ends[2] if code == 0 else order.fill_(-2)


def test_planted_bug_is_found(tmp_path: Path, device: str) -> None:
    """Without waiting for its lanes a warp counts on from rows that others have not read yet."""
    unread = "moe.cuh", "+ rank : 0;\n        __syncwarp();", "+ rank : 0;"
    broken = planted(tmp_path, "moe", unread, flags=["-O0"])  # compiles in half the time
    experts = chosen(700, 1, 5)
    want = sorted_by_hand(drawn(700, 1), experts, 5)[1]
    results = []
    for order in ORDERS:
        broken.order(order)
        results.append(torch.equal(sorted_in(broken, experts, 5), want))
    assert not all(results)
