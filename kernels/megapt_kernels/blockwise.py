"""Attention by blocks of queries, where no kernel does what a model wants of the whole: windows and capped scores.

Exact, and without a matrix of scores over the whole sequence: a block of queries meets the keys that it can see.
Windows alone are left to the CPU's flash kernel, block by block. Capped scores are computed by plain operations: the
log of a softmax's denominator is kept, and the backward pass computes the block's scores again (as FlashAttention does,
arXiv 2205.14135, with blocks of the size of a cache instead of a register file).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """Which tokens of a document meet, and what becomes of their products before the softmax.

    window: tokens that a token attends to, itself included; None for all (Mistral 7B, arXiv 2310.06825). scale: factor
    on the products; None for 1 / sqrt(width). softcap: scaled products become cap x tanh(products / cap) (Gemma 2,
    arXiv 2408.00118).
    """

    causal: bool = True
    window: int | None = None
    scale: float | None = None
    softcap: float | None = None

    def windowed(self, length: int) -> bool:
        """Whether some token of a document of that length does not see all before it."""
        return self.window is not None and self.window < length


CAUSAL = Scores()

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def undefined_as_nan(out: Tensor, lse: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """The CPU's flash kernel's result and logs [D, heads, S], with NaN where no score of a query is a number or above
    minus infinity: the kernel gives zeros there, and a NaN in training would be lost in them."""
    lost = lse == 0
    if not lost.any():
        return out, lse
    own = (q.unflatten(1, (k.shape[1], -1)).to(lse.dtype) * k.unsqueeze(2).to(lse.dtype)).sum(4).flatten(1, 2)
    lost &= (out == 0).all(3) & ~own.isfinite()
    return out.masked_fill_(lost.unsqueeze(3), float("nan")), lse.masked_fill_(lost, float("nan"))


def attend_in_window(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
    """As `attend`, on a CPU, for scores without a cap; the logs are [D, heads, S]."""
    out, lse = _like(q), torch.empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    for at, seen, mask in _spans(q, scores):
        part = q[:, :, at], k[:, :, seen], v[:, :, seen]
        out[:, :, at], lse[:, :, at] = _flash(*part, 0.0, mask is None, attn_mask=mask, scale=scores.scale)
    return undefined_as_nan(out, lse, q, k)


def attend_in_window_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scores: Scores
) -> tuple[Tensor, Tensor, Tensor]:
    """As `attend_backward`, for the result of `attend_in_window`."""
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k, dtype=lse.dtype), torch.zeros_like(v, dtype=lse.dtype)
    for at, seen, mask in _spans(q, scores):
        part = dy[:, :, at], q[:, :, at], k[:, :, seen], v[:, :, seen], out[:, :, at], lse[:, :, at]
        made = _flash_backward(*part, 0.0, mask is None, attn_mask=mask, scale=scores.scale)
        dq[:, :, at] = made[0]
        dk[:, :, seen] += made[1]
        dv[:, :, seen] += made[2]
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _spans(q: Tensor, scores: Scores) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """Queries, the keys that they can see, and which of these each one does, as a sum to its scores; None for all
    before it, as for the first queries, whose windows hold all."""
    length, window = q.shape[2], scores.window
    assert window is not None and scores.softcap is None and scores.causal
    first = slice(0, min(window, length))
    yield first, first, None
    # Shorter than the window, or as much would be masked as used; not so short that products have few rows.
    rows = max(64, min(window // 2, 256))
    seen = torch.ones(rows, rows + window - 1, dtype=torch.bool).tril_(window - 1).triu_()
    mask = torch.zeros(seen.shape, dtype=q.dtype).masked_fill_(~seen, float("-inf"))
    for start in range(window, length, rows):
        at, keys = slice(start, min(start + rows, length)), slice(start - window + 1, min(start + rows, length))
        yield at, keys, mask[None, None, : at.stop - at.start, : keys.stop - keys.start]


def _like(q: Tensor) -> Tensor:
    """Memory for a result [D, heads, S, width] with tokens outside of heads, as the layer behind wants them."""
    return torch.empty(q.transpose(1, 2).shape, dtype=q.dtype, device=q.device).transpose(1, 2)


# Scores of a block, and queries that share its keys: on the CPU and on a GPU.
_ELEMENTS = (1 << 19, 1 << 26)
_QUERIES = (128, 512)


def attend(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
    """Attention of q [D, heads, S, width] over k and v [D, kv_heads, S, width], D documents of S tokens.

    Returns the result, as q but with tokens outside of heads in memory, and the logs of the softmax's denominators,
    [D x kv_heads, heads / kv_heads, S] in at least fp32.
    """
    blocks = _Blocks(q, k, scores)
    queries, keys, values = (blocks.paired(t) for t in (q, k, v))
    out = torch.empty_like(queries, dtype=q.dtype)
    lse = queries.new_empty(queries.shape[:3], dtype=blocks.wide)
    for block in blocks:
        p, _ = blocks.scores_of(block, queries, keys)
        blocks.hide_(p, block, float("-inf"))
        top = p.amax(2, keepdim=True)
        total = p.sub_(top).exp_().sum(2, keepdim=True)
        y = blocks.product(p, values[block.pairs, 0, block.keys]).div_(total)
        shape = -1, blocks.group, block.queries.stop - block.queries.start
        lse[block.pairs, :, block.queries] = total.log_().add_(top).view(shape)
        out[block.pairs, :, block.queries] = y.unflatten(1, shape[1:])
    return _like(q).copy_(out.view(q.shape)), lse


def attend_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scores: Scores
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, shaped as they are, for the gradient of the result that `attend` gave."""
    blocks = _Blocks(q, k, scores)
    queries, keys, values, slopes = (blocks.paired(t) for t in (q, k, v, dy))
    # What the softmax takes from each row's gradient: the sum of its products with the probabilities.
    along = (dy.to(blocks.wide) * out.to(blocks.wide)).sum(3).reshape(lse.shape)
    dq = torch.empty_like(queries, dtype=blocks.wide)
    dk, dv = (torch.zeros_like(t[:, 0], dtype=blocks.wide) for t in (keys, values))
    for block in blocks:
        at = block.pairs, slice(None), block.queries
        query, slope = queries[at].flatten(1, 2), slopes[at].flatten(1, 2)
        key, value = (t[block.pairs, 0, block.keys] for t in (keys, values))
        p, bend = blocks.scores_of(block, queries, keys, bends=True)
        p.sub_(lse[at].flatten(1).unsqueeze(2)).exp_()
        blocks.hide_(p, block, 0.0)
        ds = blocks.product(slope, value.mT).sub_(along[at].flatten(1).unsqueeze(2)).mul_(p)
        if bend is not None:
            ds.mul_(bend)
        dv[block.pairs, block.keys] += blocks.product(p.mT, slope)
        dk[block.pairs, block.keys] += blocks.product(ds.mT, query)
        dq[at] = blocks.product(ds, key).view_as(dq[at])
    dq, dk = dq.mul_(blocks.scale), dk.mul_(blocks.scale)
    return dq.view(q.shape).to(q.dtype), dk.view(k.shape).to(k.dtype), dv.view(v.shape).to(v.dtype)


@dataclass(frozen=True)
class _Block:
    """Some pairs of a document and a key/value head, some queries of theirs, and the keys that these can see."""

    pairs: slice
    queries: slice
    keys: slice


class _Blocks:
    """The blocks of attention of q [D, heads, S, width] over k [D, kv_heads, S, width], and what is done with one."""

    def __init__(self, q: Tensor, k: Tensor, scores: Scores) -> None:
        self.scores = scores
        self.pairs, self.group, self.length = q.shape[0] * k.shape[1], q.shape[1] // k.shape[1], q.shape[2]
        self.scale = q.shape[3] ** -0.5 if scores.scale is None else scores.scale
        self.wide = torch.promote_types(q.dtype, torch.float32)
        # A GPU's product of 16 bits can give its sums in fp32; a CPU's would round them.
        self.gpu = q.device.type == "cuda"
        self.operand = q.dtype if self.gpu else self.wide

    def __iter__(self) -> Iterator[_Block]:
        causal, window = self.scores.causal, self.scores.window or self.length
        queries = min(_QUERIES[self.gpu], self.length)
        pairs = max(1, _ELEMENTS[self.gpu] // (self.group * queries * min(self.length, window + queries - 1)))
        for pair in range(0, self.pairs, pairs):
            for start in range(0, self.length, queries):
                stop = min(start + queries, self.length)
                keys = slice(max(0, start - window + 1) if causal else 0, stop if causal else self.length)
                yield _Block(slice(pair, min(pair + pairs, self.pairs)), slice(start, stop), keys)

    def paired(self, t: Tensor) -> Tensor:
        """Heads [D, heads, S, width] as [pairs, heads of the pair, S, width] to multiply with."""
        return t.to(self.operand).contiguous().view(self.pairs, -1, *t.shape[2:])

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """a @ b of matrices [pairs, ..], in at least fp32."""
        if self.operand == self.wide:
            return torch.bmm(a, b)
        return torch.bmm(a.to(self.operand), b.to(self.operand), out_dtype=self.wide)

    def scores_of(
        self, block: _Block, queries: Tensor, keys: Tensor, bends: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Scores [pairs, heads of the pair x queries, keys] of a block, and if asked for the soft cap's derivative."""
        query = queries[block.pairs, :, block.queries].flatten(1, 2)
        s = self.product(query, keys[block.pairs, 0, block.keys].mT)
        cap = self.scores.softcap
        if cap is None:
            return s.mul_(self.scale), None
        s.mul_(self.scale / cap).tanh_()
        bend = torch.mul(s, s).neg_().add_(1) if bends else None
        return s.mul_(cap), bend

    def hide_(self, s: Tensor, block: _Block, value: float) -> None:
        """Set what a query must not see, which lies in two corners of its block: later tokens, and those before its
        window."""
        if not self.scores.causal:
            return
        start, rows, first = block.queries.start, block.queries.stop - block.queries.start, block.keys.start
        by_head = s.unflatten(1, (self.group, rows))
        later = torch.ones(rows, rows, dtype=torch.bool, device=s.device).triu_(1)
        by_head[..., start - first :].masked_fill_(later, value)
        # Of the first query, keys up to number `before` lie before its window; one more for each further query.
        before = start - first - (self.scores.window or self.length)
        if before + rows > 0:
            left = torch.ones(rows, before + rows, dtype=torch.bool, device=s.device).tril_(before)
            by_head[..., : before + rows].masked_fill_(left, value)
