"""RMSNorm of our own on CPUs against PyTorch's composed one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megapt.mesh import Axis
from megapt.model import compiled, norms
from megapt.parallel.tensor import TensorParallel
from megapt_kernels import blocks
from megapt_kernels.norms import rms_norm
from tests.model.accuracy import assert_accurate, random

# Some rows, one row, two columns.
SHAPES = [(700, 384), (1, 64), (33, 2)]


def own(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(x, weight, 1e-5, impl="reference")


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


def test_an_offset_is_added_before_anything_is_rounded() -> None:
    """1 + weight: in bf16 the sum has fewer bits than the weight."""
    x, weight = random(65, 96, seed=1), random(96, seed=2, scale=0.01)
    upstream = random(65, 96, seed=3)
    assert_accurate(
        lambda x, w: rms_norm(x, w, 1e-5, offset=1.0, impl="reference"),
        lambda x, w: compiled.rms_norm(x, w, 1e-5, 1.0),
        [x, weight],
        upstream,
    )
    few = x[:5].requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-5, offset=1.0, impl="reference"), few)


@pytest.mark.parametrize("whole", [False, True])
def test_queries_and_keys_are_normalised_and_values_are_not(whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_ELEMENTS", 1000)  # several blocks of rows
    heads, kv_heads, width = 4, 2, 8
    sums = norms._Sums((heads, kv_heads), (heads, kv_heads), width, whole, True, TensorParallel(Axis(0, 1, None)))

    def own(qkv: Tensor, weight: Tensor) -> Tensor:
        wide = torch.promote_types(weight.dtype, torch.float32)
        return norms._QKNorm.apply(qkv, weight.to(wide), 1e-5, sums)

    def plain(qkv: Tensor, weight: Tensor) -> Tensor:
        """By torch's own norm: of each head, or of all query heads and of all key heads."""
        q, k, v = qkv.split([heads * width, kv_heads * width, kv_heads * width], dim=1)
        parts = []
        for x, w in ((q, weight[:heads]), (k, weight[heads:])):
            y = x if whole else x.unflatten(1, (-1, width))
            parts.append(F.rms_norm(y, y.shape[-1:], eps=1e-5).view_as(x) * w.flatten())
        return torch.cat([*parts, v], dim=1)

    qkv, weight = random(50, 8 * width, seed=1), random(heads + kv_heads, width, seed=2)
    assert_accurate(own, plain, [qkv, weight], random(50, 8 * width, seed=3))
    torch.testing.assert_close(
        compiled.qk_norm(qkv, weight, (heads, kv_heads), width, whole, 1e-5), plain(qkv, weight)
    )
    few = qkv[:4].clone().requires_grad_()
    assert torch.autograd.gradcheck(own, (few, weight.requires_grad_()))
