"""Chains of cheap operations between the parallel layers, compiled by torch (`compile: true`).

Each chain is a function of tensors alone, compiled once for all layers, chunks and stages that have the same shapes.
The linear layers stay outside: products and collectives gain nothing, and their backward is cut in two by schedules.
Intermediate results are not rounded to 16 bits on the way, so that results differ from uncompiled ones by rounding.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megapt.errors import UserError


@cache
def chain(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function`, compiled. What cannot be compiled raises: nothing falls back to slow operations unseen."""
    compiled: Any = torch.compile(function, dynamic=False, fullgraph=True)
    return compiled


@cache
def check_compiler(device: torch.device) -> None:
    """Compile something small. UserError where torch has no compiler for this device."""
    unique = secrets.randbits(40)  # or torch would find the result in its cache on the disk
    try:
        torch.compile(lambda x: x + unique, dynamic=False, fullgraph=True)(torch.ones(8, device=device))
    except Exception as error:  # of many kinds, by what is missing
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        needs = "a C++ compiler (g++ or clang++, or CXX)" if device.type == "cpu" else "triton and a C compiler"
        raise UserError(
            f"compile = true needs {needs} on {device.type}, and torch could not compile a test: {reason}. Install "
            "it, or set compile = false"
        ) from error


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide)
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * (weight.to(wide) + offset)).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def turned(qkv: Tensor, cos: Tensor, sin: Tensor, batch: int, turning: int, width: int) -> Tensor:
    """qkv [T, heads x width] with its first `turning` heads (queries and keys) turned by their positions."""
    heads = qkv.unflatten(0, (batch, -1)).unflatten(2, (-1, width))
    whole, rotary = heads[:, :, :turning], 2 * cos.shape[-1]
    a, b = whole[..., :rotary].to(cos.dtype).chunk(2, dim=-1)
    turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(qkv.dtype)
    if rotary < width:
        turned = torch.cat([turned, whole[..., rotary:]], dim=-1)
    return torch.cat([turned, heads[:, :, turning:]], dim=2).flatten(0, 1).flatten(1)


def qk_norm(qkv: Tensor, weight: Tensor, groups: tuple[int, int], width: int, whole: bool, eps: float) -> Tensor:
    """qkv [T, heads x width] with its query heads and its key heads, as many as `groups` says, divided by their root
    mean square, of each head or of all, and multiplied by weight [heads, width] in at least fp32."""
    wide, count = weight.dtype, sum(groups)
    heads = qkv.unflatten(1, (-1, width))
    x = heads[:, :count].to(wide)
    mean = x.square().mean(-1, keepdim=True)
    if whole:
        mean = torch.cat([m.mean(1, keepdim=True).expand_as(m) for m in mean.split(groups, dim=1)], dim=1)
    y = (x * torch.rsqrt(mean + eps) * weight).to(qkv.dtype)
    return torch.cat([y, heads[:, count:]], dim=1).flatten(1)
