"""Stochastic rounding: unbiased, and the same for an element whoever rounds it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megapt.parameters import Parameter, ParameterSpec, Split
from megapt.zero import rounding
from megapt.zero.rounding import StochasticRounding

BF16 = torch.bfloat16
SPECS = [
    ParameterSpec("rows.weight", (12, 10), Split(0)),
    ParameterSpec("columns.weight", (9, 40), Split(1, unit=5)),  # rows that begin at any place of a group of eight
    ParameterSpec("aligned.weight", (9, 32), Split(1)),
    ParameterSpec("shared.weight", (8, 6), Split(0, unit=4)),
    ParameterSpec("whole.weight", (37,)),
]


def _parameter(spec: ParameterSpec, tp: int, size: int) -> Parameter:
    shard = spec.shard(tp, size)
    parameter = Parameter(torch.empty(shard.shape, dtype=BF16))
    parameter.spec, parameter.shard = spec, shard
    return parameter


def _rounded(
    master: Tensor, spec: ParameterSpec, tp: int, size: int, cuts: list[int], update: int, seed: int
) -> Tensor:
    """A tensor rank's shard, rounded in pieces as data-parallel ranks would hold them."""
    parameter = _parameter(spec, tp, size)
    local = master[parameter.shard.slices()].flatten()
    out, ends = torch.empty(local.numel(), dtype=BF16), [*cuts, local.numel()]
    for start, stop in zip([0, *cuts], ends, strict=True):
        here = slice(start, stop)
        StochasticRounding(seed).round(out[here], local[here], parameter, start, torch.tensor(float(update)))
    return out.view(parameter.shape)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
@pytest.mark.parametrize("block", [7, 1 << 15])
def test_layouts_round_alike(spec: ParameterSpec, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    master = torch.randn(spec.shape, generator=torch.Generator().manual_seed(3))
    expected = _rounded(master, spec, 0, 1, [], update=5, seed=1)
    monkeypatch.setattr(rounding, "_BLOCK_CPU", block)
    for size in (1, 2, 4) if spec.split else (1, 2):
        for tp in range(size):
            shard = spec.shard(tp, size)
            for cuts in ([], [3], [5, 17]):
                found = _rounded(master, spec, tp, size, cuts, update=5, seed=1)
                assert torch.equal(found, expected[shard.slices()]), (size, tp, cuts)
    for other in ({"update": 6, "seed": 1}, {"update": 5, "seed": 2}):
        assert not torch.equal(_rounded(master, spec, 0, 1, [], **other), expected)


def test_rounds_to_a_neighbour_with_the_right_probability() -> None:
    spec = ParameterSpec("a.weight", (1 << 18,))
    for value in (1.0 + 2**-9, 1.0 + 7 * 2**-10, -3.3, 1e-30, 0.0, 1.5):
        master = torch.full(spec.shape, value)
        rounded = _rounded(master, spec, 0, 1, [], update=1, seed=1).float()
        below = (master.view(torch.int32) & -0x10000).view(torch.float32)
        above = ((master.view(torch.int32) & -0x10000) + 0x10000).view(torch.float32)
        exact = bool((below == master).all())
        assert ((rounded == below) | (rounded == above)).all() and (not exact or torch.equal(rounded, master))
        step = float((above - below).abs()[0])
        assert abs(float(rounded.double().mean()) - float(master[0])) < 4 * step / 2 / 512  # four standard deviations


def test_what_is_not_finite_stays_so() -> None:
    spec = ParameterSpec("a.weight", (3,))
    master = torch.tensor([torch.inf, -torch.inf, torch.nan])
    rounded = _rounded(master, spec, 0, 1, [], update=1, seed=1)
    assert rounded[:2].tolist() == [torch.inf, -torch.inf] and rounded[2].isnan()
