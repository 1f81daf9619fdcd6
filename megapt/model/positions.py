"""Rotary positions (RoFormer, arXiv 2104.09864) in the rotate-half convention of GPT-NeoX and Hugging Face."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from megapt.config import ModelConfig, RopeScaling


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
def rotary_table(model: ModelConfig, sequence: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions 0 .. sequence - 1: two [sequence, 1, head_width / 2]."""
    frequency = inverse_frequencies(model.head_width, model.rope_theta, model.rope_scaling)
    angle = torch.outer(torch.arange(sequence, dtype=torch.float64), frequency).unsqueeze(1)
    return angle.cos().to(device, dtype), angle.sin().to(device, dtype)


class _Rotate(Function):
    """A rotation needs nothing saved but its angle, and its gradient is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, -sin), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    half = x.shape[-1] // 2
    out[..., :half] = a * cos - b * sin
    out[..., half:] = b * cos + a * sin
    return out


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """x [B, S, heads, width] turned by its positions, in the table's precision, back in its own."""
    return _Rotate.apply(x, *table)
