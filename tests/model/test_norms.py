"""RMSNorm of our own on CPUs against PyTorch's composed one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megapt.model import blocks, norms
from tests.model.accuracy import assert_accurate, random

# Some rows, one row, two columns.
SHAPES = [(700, 384), (1, 64), (33, 2)]


def own(x: Tensor, weight: Tensor) -> Tensor:
    return norms._CpuRMSNorm.apply(x, weight, 1e-5)


def plain(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, 1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1.0, 1e-3, 100.0])
def test_rms_norm_is_as_accurate_as_pytorch(shape: tuple[int, int], scale: float) -> None:
    x, weight = random(*shape, seed=1, scale=scale), (random(shape[1], seed=2) + 1).bfloat16().double()
    assert_accurate(own, plain, [x, weight], random(*shape, seed=3))


def test_rows_with_an_offset_and_a_row_of_zeros() -> None:
    x = (random(65, 96, seed=1) + 50).bfloat16().double()
    x[7] = 0
    assert_accurate(own, plain, [x, random(96, seed=2)], random(65, 96, seed=3))


def test_gradients_by_finite_differences() -> None:
    x, weight = random(5, 7, seed=1).requires_grad_(), random(7, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(own, (x, weight))


@pytest.mark.parametrize("elements", [1, 20, 22, 1000])
def test_blocks_cover_every_row_once(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_ELEMENTS", elements)
    a, b = torch.arange(22.0).view(11, 2), torch.arange(11.0).view(11, 1)
    pairs = list(blocks.row_blocks(a, b))
    assert [len(x) for x, _ in pairs] == [len(y) for _, y in pairs]
    assert len(pairs) == {1: 11, 20: 2, 22: 1, 1000: 1}[elements]
    assert torch.equal(torch.cat([x for x, _ in pairs]), a) and torch.equal(torch.cat([y for _, y in pairs]), b)


def test_norm_in_blocks_is_the_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_ELEMENTS", 7 * 64)
    inputs = [random(30, 64, seed=1), random(64, seed=2)]
    assert_accurate(own, plain, inputs, random(30, 64, seed=3))
