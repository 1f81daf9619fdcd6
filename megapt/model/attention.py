"""Attention over projected queries, keys and values, with rotary positions, inside of documents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from megapt.batch import Documents
from megapt.model.kernels import AUTO, Kernels
from megapt.model.positions import Rotary, turn
from megapt_kernels.attention_dispatch import AttentionSpec
from megapt_kernels.attention_dispatch import attention as kernel_attention
from megapt_kernels.blockwise import (
    CAUSAL,
    Scores,
    attend,
    attend_backward,
    attend_in_window,
    attend_in_window_backward,
)
from megapt_kernels.rope import rope_


def attention(
    qkv: Tensor,
    batch: int,
    heads: int,
    kv_heads: int,
    rotary: Rotary | None,
    scores: Scores = CAUSAL,
    documents: Documents | None = None,
    kernels: Kernels = AUTO,
    owned: bool = False,
) -> Tensor:
    """Each token attends to its document: to itself and the tokens before it, or as `scores` says otherwise.

    qkv: [T, (heads + 2 x kv_heads) x width], T = batch x sequence: a token's query heads, then its key heads, then
    its value heads; query head i meets key/value head i // (heads / kv_heads) (arXiv 2305.13245).
    rotary: turns queries and keys before they meet. documents: None where each of the `batch` rows is one. owned:
    whether qkv may be written to: nobody else needs it.
    Returns [T, heads x width].
    """
    lengths = documents.lengths if documents is not None else (qkv.shape[0] // batch,) * batch
    whole = qkv.device.type == "cpu" and kernels.attention == "auto"
    if rotary is not None and not (whole and kernels.rope == "auto"):
        tokens = (qkv if owned else qkv.clone()).unflatten(1, (heads + 2 * kv_heads, -1))
        cos, sin = (t.flatten(0, -2) for t in rotary)
        qkv, rotary = rope_(tokens, cos, sin, heads=heads + kv_heads, impl=kernels.rope).flatten(1), None
    if whole:
        return _Attention.apply(qkv, batch, heads, kv_heads, *(rotary or (None, None)), scores, lengths)
    cut = None if documents is None else documents.lengths
    spec = AttentionSpec(scores.causal, scores.window, scores.scale, scores.softcap, cut)
    q, k, v = _heads(qkv, batch, heads, kv_heads)
    y = kernel_attention(q, k, v, spec, impl=kernels.attention)
    return y.flatten(0, 1).flatten(1)


class _Run:
    """Neighbouring documents of equal length: one call of a kernel as a batch."""

    def __init__(self, start: int, count: int, length: int) -> None:
        self.tokens = slice(start, start + count * length)
        self.shape = count, length


def _runs(lengths: Sequence[int]) -> Iterator[_Run]:
    start = 0
    for length, same in groupby(lengths):
        count = len(list(same))
        yield _Run(start, count, length)
        start += count * length


def _heads(qkv: Tensor, batch: int, heads: int, kv_heads: int) -> tuple[Tensor, ...]:
    """q, k, v as views [B, S, heads, width]."""
    return qkv.unflatten(0, (batch, -1)).unflatten(2, (heads + 2 * kv_heads, -1)).split([heads, kv_heads, kv_heads], 2)


class _Attention(Function):
    """The CPU's flash kernel (arXiv 2205.14135), or `blockwise`, on the projection's own layout.

    Turning while copying, and writing all gradients into one tensor, spare the copies, zero fills and sums that
    autograd makes of views.
    """

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        batch: int,
        heads: int,
        kv_heads: int,
        cos: Tensor | None,
        sin: Tensor | None,
        scores: Scores,
        lengths: tuple[int, ...],
    ) -> Tensor:
        ctx.sizes, ctx.scores, ctx.lengths = (batch, heads, kv_heads), scores, lengths
        q, k, v = _heads(qkv, *ctx.sizes)
        if cos is not None and sin is not None:
            q, k, v = _turned((q, k, v), torch.empty_like(qkv), ctx.sizes, (cos, sin))
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        runs = list(_runs(lengths))
        out = q.new_empty(q.shape) if len(runs) > 1 else None
        sums = []
        for run in runs:
            y, lse = _attend(scores, *(_as_batch(t, run) for t in (q, k, v)))
            sums.append(lse)
            if out is None:
                out = y.transpose(1, 2).flatten(0, 1)
            else:
                _as_batch(out, run).copy_(y)
        assert out is not None
        ctx.save_for_backward(q, k, v, out, cos, sin, *sums)
        return out.flatten(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        q, k, v, out, cos, sin, *sums = ctx.saved_tensors
        dy = grad.reshape(out.shape)
        gradients: list[tuple[Tensor, ...]] = []
        for run, lse in zip(_runs(ctx.lengths), sums, strict=True):
            made = _attend_backward(ctx.scores, lse, *(_as_batch(t, run) for t in (dy, q, k, v, out)))
            gradients.append(tuple(g.transpose(1, 2).flatten(0, 1) for g in made))
        batch, heads, kv_heads = ctx.sizes
        together = gradients[0] if len(gradients) == 1 else tuple(map(torch.cat, zip(*gradients, strict=True)))
        dq, dk, dv = (g.unflatten(0, (batch, -1)) for g in together)
        dqkv = grad.new_empty(grad.shape[0], (heads + 2 * kv_heads) * dq.shape[-1])
        if cos is None:
            torch.cat([dq, dk, dv], dim=2, out=dqkv.view(batch, -1, heads + 2 * kv_heads, dq.shape[-1]))
        else:
            _turned((dq, dk, dv), dqkv, ctx.sizes, (cos, -sin))
        return dqkv, None, None, None, None, None, None, None


def _attend(scores: Scores, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """A run's attention, and what its backward needs beside: the logs of the softmax's denominators."""
    if scores.softcap is not None:
        return attend(q, k, v, scores)
    if scores.windowed(q.shape[2]):
        return attend_in_window(q, k, v, scores)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    y, lse = flash(q, k, v, 0.0, scores.causal, scale=scores.scale)
    return y, lse


def _attend_backward(
    scores: Scores, lse: Tensor, dy: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    if scores.softcap is not None:
        return attend_backward(dy, q, k, v, out, lse, scores)
    if scores.windowed(q.shape[2]):
        return attend_in_window_backward(dy, q, k, v, out, lse, scores)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    dq, dk, dv = flash(dy, q, k, v, out, lse, 0.0, scores.causal, scale=scores.scale)
    return dq, dk, dv


def _as_batch(t: Tensor, run: _Run) -> Tensor:
    """The run's tokens of t [T, heads, width] as a view [documents, heads, length, width]."""
    return t[run.tokens].unflatten(0, run.shape).transpose(1, 2)


def _turned(
    qkv: tuple[Tensor, ...], out: Tensor, sizes: tuple[int, int, int], rotary: Rotary
) -> tuple[Tensor, ...]:
    """Write queries and keys turned and values as they are into `out` [T, ...]; returns its views."""
    views = _heads(out, *sizes)
    turn(qkv[0], rotary, views[0])
    turn(qkv[1], rotary, views[1])
    views[2].copy_(qkv[2])
    return views
