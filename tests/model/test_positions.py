"""Rotary positions against transformers' tables and its rotation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megapt.config import ModelConfig, from_tree
from megapt.errors import UserError
from megapt.model.positions import Rotary, rotary_table
from megapt_kernels.rope import rope_
from tests.model.accuracy import assert_accurate, distance, random

SCALINGS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "linear": {"kind": "linear", "factor": 2.0},
    "llama3": {"kind": "llama3", "factor": 8.0, "original_sequence": 64, "low_frequency_factor": 1.0},
}


def model(scaling: dict[str, Any] | None, width: int = 64) -> ModelConfig:
    tree = {"layers": 1, "hidden": 2 * width, "heads": 2, "ffn": 4, "vocabulary": 8, "rope_scaling": scaling}
    return ModelConfig.model_validate(tree)


def plain(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """rotate-half as everybody writes it, in the table's precision."""
    a, b = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


@pytest.mark.parametrize("name", SCALINGS)
def test_tables_are_those_of_transformers(name: str) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    from megapt.convert.llama import LLAMA

    ours = model(SCALINGS[name])
    theirs = LlamaRotaryEmbedding(LlamaConfig(**LLAMA.config(ours)))
    cos, sin = theirs(torch.zeros(1), torch.arange(100).unsqueeze(0))
    for mine, their in zip(rotary_table(ours, 100, torch.device("cpu"), torch.float32), (cos, sin), strict=True):
        assert mine.shape == (100, 1, 32)
        # transformers multiplies angles up in fp32
        torch.testing.assert_close(mine.squeeze(1), their[0, :, :32], rtol=0, atol=2e-5)


def turned_by(x: Tensor, table: Rotary) -> Tensor:
    """x [B, S, heads, width] by the operation that the model calls, in place of a copy."""
    cos, sin = (t.squeeze(1) for t in table)
    return rope_(x.clone().flatten(0, 1), cos, sin, impl="reference").view_as(x)


@pytest.mark.parametrize("heads", [1, 3])
def test_rotation_is_as_accurate_as_plain_operations(heads: int) -> None:
    table = rotary_table(model(None), 37, torch.device("cpu"), torch.float64)

    def with_table(function: Any, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        cos, sin = (t.to(dtype) for t in table)
        return function(x, cos, sin)

    assert_accurate(
        lambda x: with_table(lambda x, *t: turned_by(x, t), x),
        lambda x: with_table(plain, x),
        [random(2, 37, heads, 64, seed=1)],
        random(2, 37, heads, 64, seed=2),
    )


def test_rotation_keeps_lengths_and_turns_back() -> None:
    cos, sin = rotary_table(model(SCALINGS["llama3"]), 50, torch.device("cpu"), torch.float64)
    x = random(1, 50, 2, 64, seed=1)
    turned = turned_by(x, (cos, sin))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert distance(turned_by(turned, (cos, -sin)), x) < 1e-14
    assert torch.equal(turned[:, 0], x[:, 0]) and distance(turned, x) > 0.1


def test_what_is_wider_than_the_table_does_not_turn() -> None:
    partial = model(None).model_copy(update={"rotary_dim": 16})
    table = rotary_table(partial, 5, torch.device("cpu"), torch.float64)
    x = random(1, 5, 2, 64, seed=1)
    turned = turned_by(x, table)
    assert table[0].shape == (5, 1, 8) and torch.equal(turned[..., 16:], x[..., 16:])
    torch.testing.assert_close(turned[..., :16], plain(x[..., :16], *table))


@pytest.mark.parametrize(
    "scaling, complaint",
    [
        ({"kind": "linear", "beta_fast": 16.0}, "beta_fast: has no effect on kind = linear: it belongs to yarn"),
        ({"kind": "llama3", "attention_factor": 1.2}, "attention_factor: has no effect on kind = llama3"),
        ({"kind": "yarn", "low_frequency_factor": 2.0}, "low_frequency_factor: has no effect on kind = yarn"),
        ({"kind": "yarn", "beta_fast": 1.0}, "beta_fast: 1.0 must be above model.rope_scaling.beta_slow = 1.0"),
    ],
)
def test_what_a_scaling_does_not_read_is_refused(scaling: dict[str, Any], complaint: str) -> None:
    tree = {"layers": 1, "hidden": 64, "heads": 2, "ffn": 4, "vocabulary": 8, "rope_scaling": {"factor": 2.0} | scaling}
    run = {"data": {"train": "x"}, "train": {"steps": 1}, "batch": {"sequence": 8, "samples": 1}}
    with pytest.raises(UserError) as refused:
        from_tree(run | {"model": tree})
    assert complaint in str(refused.value)
