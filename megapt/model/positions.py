"""Rotary positions (RoFormer, arXiv 2104.09864) in the rotate-half convention of GPT-NeoX and Hugging Face."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from megapt.config import ModelConfig, RopeScaling
from megapt.model.blocks import row_blocks

Rotary = tuple[Tensor, Tensor]  # cosines and sines, [S, 1, head_width / 2], or with a row for each sequence


def inverse_frequencies(width: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Angle per position of each of the width / 2 pairs: fp64 [width / 2]."""
    frequency = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    if scaling is None:
        return frequency
    if scaling.kind == "linear":
        return frequency / scaling.factor
    # Llama 3: wavelengths beyond the original context are stretched, short ones kept, those between blended.
    wavelength = 2 * math.pi / frequency
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    blend = ((scaling.original_sequence / wavelength - low) / (high - low)).clamp(0, 1)
    return frequency / scaling.factor * (1 - blend) + frequency * blend


@lru_cache(maxsize=16)
def rotary_table(model: ModelConfig, sequence: int, device: torch.device, dtype: torch.dtype) -> Rotary:
    """Cosines and sines of positions 0 .. sequence - 1: two [sequence, 1, head_width / 2]."""
    frequency = inverse_frequencies(model.head_width, model.rope_theta, model.rope_scaling)
    angle = torch.outer(torch.arange(sequence, dtype=torch.float64), frequency).unsqueeze(1)
    return angle.cos().to(device, dtype), angle.sin().to(device, dtype)


def at_positions(table: Rotary, positions: Tensor) -> Rotary:
    """The table's rows for tokens whose positions [B, S] restart inside of rows: two [B, S, 1, head_width / 2]."""
    cos, sin = table
    return cos[positions], sin[positions]


class _Rotate(Function):
    """A rotation needs nothing saved but its angle, and its gradient is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return turn(x, (cos, sin), torch.empty(x.shape, dtype=x.dtype, device=x.device))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return turn(grad, (cos, -sin), torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)), None, None


def turn(x: Tensor, table: Rotary, out: Tensor) -> Tensor:
    """Write x [B, S, heads, width] turned by its positions into `out` and return it."""
    cos, sin = (t.expand(len(x), *t.shape[-3:]) for t in table)  # the same table for every row, or one each
    for source, target, c, s in row_blocks(x, out, cos, sin):
        a, b = source.to(cos.dtype).chunk(2, dim=-1)
        left, right = target.chunk(2, dim=-1)
        left.copy_((a * c).addcmul_(b, s, value=-1))
        right.copy_((b * c).addcmul_(a, s))
    return out


def rotate(x: Tensor, table: Rotary) -> Tensor:
    """x [B, S, heads, width] turned by its positions, in the table's precision, back in its own."""
    return _Rotate.apply(x, *table)
