"""Rotary positions (RoFormer, arXiv 2104.09864) in the rotate-half convention of GPT-NeoX and Hugging Face."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from megapt.config import ModelConfig, RopeScaling
from megapt_kernels.blocks import row_blocks

Rotary = tuple[Tensor, Tensor]  # cosines and sines, [S, 1, rotary_width / 2], or with a row for each sequence


def inverse_frequencies(width: int, theta: float, scaling: RopeScaling | None, sequence: int) -> Tensor:
    """Angle per position of each of the width / 2 pairs, in sequences of `sequence` tokens: fp64 [width / 2]."""
    frequency = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    if scaling is None:
        return frequency
    if scaling.kind == "linear":
        return frequency / scaling.factor
    if scaling.kind == "longrope":
        factors = scaling.long_factors if sequence > scaling.original_sequence else scaling.short_factors
        return frequency / torch.tensor(factors, dtype=torch.float64)
    if scaling.kind == "yarn":
        keep = _yarn_kept(width, theta, scaling)
    else:
        # Llama 3: wavelengths beyond the original context are stretched, short ones kept, those between blended.
        wavelength = 2 * math.pi / frequency
        low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
        keep = ((scaling.original_sequence / wavelength - low) / (high - low)).clamp(0, 1)
    return frequency / scaling.factor * (1 - keep) + frequency * keep


def _yarn_kept(width: int, theta: float, scaling: RopeScaling) -> Tensor:
    """Of each pair, how much of its frequency stays: all if it turns more than `beta_fast` times in the original
    sequence, nothing if less than `beta_slow` times, linearly by the pair's number between."""

    def pair(turns: float) -> float:
        return width * math.log(scaling.original_sequence / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair(scaling.beta_fast)), 0)
    high = min(math.ceil(pair(scaling.beta_slow)), width - 1)
    ramp = (torch.arange(width // 2, dtype=torch.float64) - low) / (high - low or 0.001)
    return 1 - ramp.clamp(0, 1)


def attention_factor(scaling: RopeScaling | None) -> float:
    """What cosines and sines are multiplied by, so that attention stays as sharp over longer sequences."""
    if scaling is None or scaling.kind not in ("yarn", "longrope"):
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.factor <= 1:
        return 1.0
    if scaling.kind == "yarn":
        return 0.1 * math.log(scaling.factor) + 1
    return math.sqrt(1 + math.log(scaling.factor) / math.log(scaling.original_sequence))


@lru_cache(maxsize=16)
def rotary_table(model: ModelConfig, sequence: int, device: torch.device, dtype: torch.dtype) -> Rotary:
    """Cosines and sines of positions 0 .. sequence - 1: two [sequence, 1, rotary_width / 2]."""
    frequency = inverse_frequencies(model.rotary_width, model.rope_theta, model.rope_scaling, sequence)
    angle = torch.outer(torch.arange(sequence, dtype=torch.float64), frequency).unsqueeze(1)
    factor = attention_factor(model.rope_scaling)
    return (angle.cos() * factor).to(device, dtype), (angle.sin() * factor).to(device, dtype)


def at_positions(table: Rotary, positions: Tensor) -> Rotary:
    """The table's rows for tokens whose positions [B, S] restart inside of rows: two [B, S, 1, rotary_width / 2]."""
    cos, sin = table
    return cos[positions], sin[positions]


def turn(x: Tensor, table: Rotary, out: Tensor) -> Tensor:
    """Write x [B, S, heads, width] turned by its positions into `out` and return it; what is wider than the table
    stays as it is."""
    cos, sin = (t.expand(len(x), *t.shape[-3:]) for t in table)  # the same table for every row, or one each
    turned, width = out, 2 * cos.shape[-1]
    if width < x.shape[-1]:
        out[..., width:].copy_(x[..., width:])
        x, turned = x[..., :width], out[..., :width]
    for source, target, c, s in row_blocks(x, turned, cos, sin):
        a, b = source.to(cos.dtype).chunk(2, dim=-1)
        left, right = target.chunk(2, dim=-1)
        left.copy_((a * c).addcmul_(b, s, value=-1))
        right.copy_((b * c).addcmul_(a, s))
    return out
