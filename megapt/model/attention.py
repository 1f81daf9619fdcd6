"""Causal attention over projected queries, keys and values, with rotary positions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from megapt.model.positions import Rotary, rotate, turn


def causal_attention(qkv: Tensor, batch: int, heads: int, kv_heads: int, rotary: Rotary | None) -> Tensor:
    """Each token attends to itself and to the tokens before it in its sequence.

    qkv: [T, (heads + 2 x kv_heads) x width], T = batch x sequence: a token's query heads, then its key heads, then
    its value heads; query head i meets key/value head i // (heads / kv_heads) (arXiv 2305.13245).
    rotary: turns queries and keys before they meet. Returns [T, heads x width].
    """
    if qkv.device.type == "cpu":
        return _CpuAttention.apply(qkv, batch, heads, kv_heads, *(rotary or (None, None)))
    q, k, v = _heads(qkv, batch, heads, kv_heads)
    if rotary is not None:
        q, k = rotate(q, rotary), rotate(k, rotary)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != kv_heads)
    return y.transpose(1, 2).flatten(0, 1).flatten(1)


def _heads(qkv: Tensor, batch: int, heads: int, kv_heads: int) -> tuple[Tensor, ...]:
    """q, k, v as views [B, S, heads, width]."""
    return qkv.unflatten(0, (batch, -1)).unflatten(2, (heads + 2 * kv_heads, -1)).split([heads, kv_heads, kv_heads], 2)


class _CpuAttention(Function):
    """The CPU's flash kernel (arXiv 2205.14135) on the projection's own layout.

    Turning while copying, and writing all gradients into one tensor, spare the copies, zero fills and sums that
    autograd makes of views.
    """

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, batch: int, heads: int, kv_heads: int, cos: Tensor | None, sin: Tensor | None
    ) -> Tensor:
        ctx.sizes = batch, heads, kv_heads
        q, k, v = _heads(qkv, *ctx.sizes)
        if cos is not None and sin is not None:
            q, k, v = _turned((q, k, v), torch.empty_like(qkv), ctx.sizes, (cos, sin))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        y, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
        ctx.save_for_backward(q, k, v, y, lse, cos, sin)
        return y.transpose(1, 2).flatten(0, 1).flatten(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        *saved, cos, sin = ctx.saved_tensors
        batch, heads, kv_heads = ctx.sizes
        dy = grad.reshape(batch, -1, heads, saved[0].shape[-1]).transpose(1, 2)
        gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(dy, *saved, 0.0, True)
        dq, dk, dv = (g.transpose(1, 2) for g in gradients)
        dqkv = grad.new_empty(grad.shape[0], (heads + 2 * kv_heads) * dq.shape[-1])
        if cos is None:
            torch.cat([dq, dk, dv], dim=2, out=dqkv.view(batch, -1, heads + 2 * kv_heads, dq.shape[-1]))
        else:
            _turned((dq, dk, dv), dqkv, ctx.sizes, (cos, -sin))
        return dqkv, None, None, None, None, None


def _turned(
    qkv: tuple[Tensor, ...], out: Tensor, sizes: tuple[int, int, int], rotary: Rotary
) -> tuple[Tensor, ...]:
    """Write queries and keys turned and values as they are into `out` [T, ...]; returns its views."""
    views = _heads(out, *sizes)
    turn(qkv[0], rotary, views[0])
    turn(qkv[1], rotary, views[1])
    views[2].copy_(qkv[2])
    return views
