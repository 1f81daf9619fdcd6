"""Flash attention forward and backward in Triton, after FlashAttention-2 (arXiv 2307.08691).

All T = B x S tokens are one sequence of documents. Two numbers for each token say where its document begins and ends;
from those of its first and last token, a block knows which blocks it meets, in whole (no mask) or in part. So documents
of any lengths, windows and rows cost one kernel and no compilation of their own.

Queries meet keys in blocks whose products never leave the chip; the forward pass keeps the logs (base 2) of the
softmax's denominators, fp32, and the backward pass computes the products again. A block of keys sums its gradients over
all queries that see it, a block of queries over all keys, each by itself: no atomic sums, the same bits on every run.

Importing this module imports triton.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _tile(base, first, stride, tokens, ROWS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Tokens [first, first + ROWS) of a head; zeros after the last token and beyond the head's width."""
    row, column = tl.arange(0, ROWS), tl.arange(0, PADDED)
    inside = (first + row < tokens)[:, None]
    if WIDTH != PADDED:
        inside = inside & (column < WIDTH)[None, :]
    # The place of the tile takes 64 bits, places inside of it 32.
    start = base + tl.cast(first, tl.int64) * stride
    return tl.load(start + (row[:, None] * stride + column[None, :]), mask=inside, other=0.0)


@triton.jit
def _store(base, first, stride, tokens, tile, ROWS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    row, column = tl.arange(0, ROWS), tl.arange(0, PADDED)
    inside = (first + row < tokens)[:, None] & (column < WIDTH)[None, :]
    start = base + tl.cast(first, tl.int64) * stride
    tl.store(start + (row[:, None] * stride + column[None, :]), tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _clear(low, clear_from, clear_to, BLOCK: tl.constexpr):
    """Bounds as multiples of BLOCK: where to begin, and the blocks [from, to) that need no mask, none if from = to."""
    low = low // BLOCK * BLOCK
    clear_from = (clear_from + BLOCK - 1) // BLOCK * BLOCK
    clear_to = clear_to // BLOCK * BLOCK
    nothing = clear_from >= clear_to
    return low, tl.where(nothing, low, clear_from), tl.where(nothing, low, clear_to)


@triton.jit
def _keys_of(
    STARTS, ENDS, first, tokens, window,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The keys that the queries from `first` on meet: all in [low, high); every query sees those in [from, to)."""
    last = tl.minimum(first + QUERIES, tokens) - 1
    low = tl.load(STARTS + first)
    clear_from = tl.load(STARTS + last)
    if CAUSAL:
        high = last + 1
        clear_to = first + 1
    else:
        high = tl.load(ENDS + last)
        clear_to = tl.load(ENDS + first)
    if WINDOW:
        low = tl.maximum(low, first + 1 - window)
        clear_from = tl.maximum(clear_from, last + 1 - window)
    low, clear_from, clear_to = _clear(low, clear_from, clear_to, KEYS)
    return low, clear_from, clear_to, high


@triton.jit
def _queries_of(
    STARTS, ENDS, first, tokens, window,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The queries that the keys from `first` on meet: all in [low, high); those in [from, to) see every key."""
    last = tl.minimum(first + KEYS, tokens) - 1
    high = tl.load(ENDS + last)
    clear_to = tl.load(ENDS + first)
    if CAUSAL:
        low = first
        clear_from = last
    else:
        low = tl.load(STARTS + first)
        clear_from = tl.load(STARTS + last)
    if WINDOW:
        high = tl.minimum(high, last + window)
        clear_to = tl.minimum(clear_to, first + window)
    low, clear_from, clear_to = _clear(low, clear_from, clear_to, QUERIES)
    return low, clear_from, clear_to, high


@triton.jit
def _masked(number, low, clear_from, clear_to, BLOCK: tl.constexpr):
    """Where the block of that number begins, of those before the clear ones and behind them."""
    before = (clear_from - low) // BLOCK
    return tl.where(number < before, low + number * BLOCK, clear_to + (number - before) * BLOCK)


@triton.jit
def _masked_blocks(low, clear_from, clear_to, high, BLOCK: tl.constexpr):
    return (clear_from - low) // BLOCK + (high - clear_to + BLOCK - 1) // BLOCK


@triton.jit
def _seen(row, column, start, end, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Whether queries `row`, whose documents are [start, end), see keys `column`; all shaped to broadcast."""
    seen = column >= start
    if CAUSAL:
        # Later tokens of the document are hidden, and with them what lies behind its end.
        seen = seen & (column <= row)
    else:
        seen = seen & (column < end)
    if WINDOW:
        seen = seen & (row - column < window)
    return seen


@triton.jit
def _scores(product, inner, outer, SOFTCAP: tl.constexpr):
    """Scores in units of log 2, and the tanh of a soft cap, whose derivative is 1 - tanh^2."""
    bent = product * inner
    if SOFTCAP:
        # tanh by exp2, exact at both ends; Triton's own is missing from its interpreter.
        bent = 1.0 - 2.0 / (tl.exp2(bent * 2.8853900817779268) + 1.0)
        scores = bent * outer
    else:
        scores = bent
    return scores, bent


@triton.jit
def _forward_step(
    query, top, total, sums, K, V, k_token, v_token, n, row, start, end, tokens, inner, outer, window,
    MASKED: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Let a block of queries meet the keys from n on: running maximum, sum of exponentials and weighted values."""
    key = _tile(K, n, k_token, tokens, KEYS, WIDTH, PADDED)
    product = tl.dot(query, tl.trans(key), input_precision=PRECISION)
    scores, _ = _scores(product, inner, outer, SOFTCAP)
    if MASKED:
        column = n + tl.arange(0, KEYS)
        seen = _seen(row[:, None], column[None, :], start[:, None], end[:, None], window, CAUSAL, WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1))
    # A row that has seen nothing yet has a maximum of -inf, which must not meet itself.
    shift = tl.where(higher == float("-inf"), 0.0, higher) if MASKED else higher
    p = tl.exp2(scores - shift[:, None])
    fade = tl.exp2(top - shift)
    value = _tile(V, n, v_token, tokens, KEYS, WIDTH, PADDED)
    total = total * fade + tl.sum(p, 1)
    sums = sums * fade[:, None] + tl.dot(p.to(value.dtype), value, input_precision=PRECISION)
    return higher, total, sums


@triton.jit(do_not_specialize=["tokens", "window"])
def _forward(
    Q, K, V, OUT, LSE, STARTS, ENDS, q_token, q_head, k_token, k_head, v_token, v_head, o_token, o_head,
    tokens, inner, outer, window,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """A block of queries of a head: OUT [T, heads, WIDTH] and LSE [heads, T]."""
    first, head = tl.program_id(0) * QUERIES, tl.program_id(1).to(tl.int64)
    K += head // GROUP * k_head
    V += head // GROUP * v_head
    row = first + tl.arange(0, QUERIES)
    start = tl.load(STARTS + row, mask=row < tokens, other=0)
    end = tl.load(ENDS + row, mask=row < tokens, other=0)
    query = _tile(Q + head * q_head, first, q_token, tokens, QUERIES, WIDTH, PADDED)
    top = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    sums = tl.zeros([QUERIES, PADDED], tl.float32)
    low, clear_from, clear_to, high = _keys_of(STARTS, ENDS, first, tokens, window, CAUSAL, WINDOW, QUERIES, KEYS)
    for n in range(clear_from, clear_to, KEYS):
        top, total, sums = _forward_step(
            query, top, total, sums, K, V, k_token, v_token, n, row, start, end, tokens, inner, outer, window,
            False, WIDTH, PADDED, CAUSAL, WINDOW, SOFTCAP, PRECISION, KEYS,
        )  # fmt: skip
    for number in range(_masked_blocks(low, clear_from, clear_to, high, KEYS)):
        n = _masked(number, low, clear_from, clear_to, KEYS)
        top, total, sums = _forward_step(
            query, top, total, sums, K, V, k_token, v_token, n, row, start, end, tokens, inner, outer, window,
            True, WIDTH, PADDED, CAUSAL, WINDOW, SOFTCAP, PRECISION, KEYS,
        )  # fmt: skip
    _store(OUT + head * o_head, first, o_token, tokens, sums / total[:, None], QUERIES, WIDTH, PADDED)
    tl.store(LSE + head * tokens + row, top + tl.log2(total), mask=row < tokens)


@triton.jit(do_not_specialize=["tokens"])
def _along(
    OUT, DOUT, ALONG, o_token, o_head, d_token, d_head, tokens,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ALONG [heads, T]: what the softmax takes from a row's gradient, the sum of its products with the result."""
    first, head = tl.program_id(0) * ROWS, tl.program_id(1).to(tl.int64)
    out = _tile(OUT + head * o_head, first, o_token, tokens, ROWS, WIDTH, PADDED).to(tl.float32)
    slope = _tile(DOUT + head * d_head, first, d_token, tokens, ROWS, WIDTH, PADDED).to(tl.float32)
    row = first + tl.arange(0, ROWS)
    tl.store(ALONG + head * tokens + row, tl.sum(out * slope, 1), mask=row < tokens)


@triton.jit
def _keys_step(
    key, value, dk, dv, Q, DOUT, LSE, ALONG, STARTS, ENDS, q_token, d_token, m, column, tokens, inner, outer, window,
    MASKED: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """Add to the gradients of a block of keys and values what the queries from m on give; p, ds [keys, queries]."""
    row = m + tl.arange(0, QUERIES)
    query = _tile(Q, m, q_token, tokens, QUERIES, WIDTH, PADDED)
    product = tl.dot(key, tl.trans(query), input_precision=PRECISION)
    scores, bent = _scores(product, inner, outer, SOFTCAP)
    # Behind the last token, a denominator of infinity makes probabilities of 0.
    lse = tl.load(LSE + row, mask=row < tokens, other=float("inf"))
    along = tl.load(ALONG + row, mask=row < tokens, other=0.0)
    p = tl.exp2(scores - lse[None, :])
    slope = _tile(DOUT, m, d_token, tokens, QUERIES, WIDTH, PADDED)
    ds = tl.dot(value, tl.trans(slope), input_precision=PRECISION) - along[None, :]
    if SOFTCAP:
        ds *= 1.0 - bent * bent
    if MASKED:
        start = tl.load(STARTS + row, mask=row < tokens, other=tokens)
        end = tl.load(ENDS + row, mask=row < tokens, other=0)
        seen = _seen(row[None, :], column[:, None], start[None, :], end[None, :], window, CAUSAL, WINDOW)
        p = tl.where(seen, p, 0.0)
        ds = tl.where(seen, ds, 0.0)
    dv += tl.dot(p.to(slope.dtype), slope, input_precision=PRECISION)
    dk += tl.dot((p * ds).to(query.dtype), query, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["tokens", "window"])
def _backward_keys(
    Q, K, V, DOUT, LSE, ALONG, DK, DV, STARTS, ENDS, q_token, q_head, k_token, k_head, v_token, v_head,
    d_token, d_head, g_token, g_head, tokens, scale, inner, outer, window,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """A block of keys of a key/value head: DK and DV [T, kv_heads, WIDTH], summed over its GROUP of query heads."""
    first, kv_head = tl.program_id(0) * KEYS, tl.program_id(1).to(tl.int64)
    column = first + tl.arange(0, KEYS)
    key = _tile(K + kv_head * k_head, first, k_token, tokens, KEYS, WIDTH, PADDED)
    value = _tile(V + kv_head * v_head, first, v_token, tokens, KEYS, WIDTH, PADDED)
    dk = tl.zeros([KEYS, PADDED], tl.float32)
    dv = tl.zeros([KEYS, PADDED], tl.float32)
    low, clear_from, clear_to, high = _queries_of(STARTS, ENDS, first, tokens, window, CAUSAL, WINDOW, QUERIES, KEYS)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        query, slope, lse, along = Q + head * q_head, DOUT + head * d_head, LSE + head * tokens, ALONG + head * tokens
        for m in range(clear_from, clear_to, QUERIES):
            dk, dv = _keys_step(
                key, value, dk, dv, query, slope, lse, along, STARTS, ENDS, q_token, d_token, m, column, tokens,
                inner, outer, window, False, WIDTH, PADDED, CAUSAL, WINDOW, SOFTCAP, PRECISION, QUERIES,
            )  # fmt: skip
        for number in range(_masked_blocks(low, clear_from, clear_to, high, QUERIES)):
            m = _masked(number, low, clear_from, clear_to, QUERIES)
            dk, dv = _keys_step(
                key, value, dk, dv, query, slope, lse, along, STARTS, ENDS, q_token, d_token, m, column, tokens,
                inner, outer, window, True, WIDTH, PADDED, CAUSAL, WINDOW, SOFTCAP, PRECISION, QUERIES,
            )  # fmt: skip
    _store(DK + kv_head * g_head, first, g_token, tokens, dk * scale, KEYS, WIDTH, PADDED)
    _store(DV + kv_head * g_head, first, g_token, tokens, dv, KEYS, WIDTH, PADDED)


@triton.jit
def _queries_step(
    query, slope, lse, along, dq, K, V, k_token, v_token, n, row, start, end, tokens, inner, outer, window,
    MASKED: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Add to the gradient of a block of queries what the keys from n on give; p, ds [queries, keys]."""
    key = _tile(K, n, k_token, tokens, KEYS, WIDTH, PADDED)
    product = tl.dot(query, tl.trans(key), input_precision=PRECISION)
    scores, bent = _scores(product, inner, outer, SOFTCAP)
    p = tl.exp2(scores - lse[:, None])
    value = _tile(V, n, v_token, tokens, KEYS, WIDTH, PADDED)
    ds = p * (tl.dot(slope, tl.trans(value), input_precision=PRECISION) - along[:, None])
    if SOFTCAP:
        ds *= 1.0 - bent * bent
    if MASKED:
        column = n + tl.arange(0, KEYS)
        seen = _seen(row[:, None], column[None, :], start[:, None], end[:, None], window, CAUSAL, WINDOW)
        ds = tl.where(seen, ds, 0.0)
    return dq + tl.dot(ds.to(key.dtype), key, input_precision=PRECISION)


@triton.jit(do_not_specialize=["tokens", "window"])
def _backward_queries(
    Q, K, V, DOUT, LSE, ALONG, DQ, STARTS, ENDS, q_token, q_head, k_token, k_head, v_token, v_head,
    d_token, d_head, g_token, g_head, tokens, scale, inner, outer, window,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """A block of queries of a head: DQ [T, heads, WIDTH]."""
    first, head = tl.program_id(0) * QUERIES, tl.program_id(1).to(tl.int64)
    K += head // GROUP * k_head
    V += head // GROUP * v_head
    row = first + tl.arange(0, QUERIES)
    start = tl.load(STARTS + row, mask=row < tokens, other=0)
    end = tl.load(ENDS + row, mask=row < tokens, other=0)
    lse = tl.load(LSE + head * tokens + row, mask=row < tokens, other=float("inf"))
    along = tl.load(ALONG + head * tokens + row, mask=row < tokens, other=0.0)
    query = _tile(Q + head * q_head, first, q_token, tokens, QUERIES, WIDTH, PADDED)
    slope = _tile(DOUT + head * d_head, first, d_token, tokens, QUERIES, WIDTH, PADDED)
    dq = tl.zeros([QUERIES, PADDED], tl.float32)
    low, clear_from, clear_to, high = _keys_of(STARTS, ENDS, first, tokens, window, CAUSAL, WINDOW, QUERIES, KEYS)
    for n in range(clear_from, clear_to, KEYS):
        dq = _queries_step(
            query, slope, lse, along, dq, K, V, k_token, v_token, n, row, start, end, tokens, inner, outer, window,
            False, WIDTH, PADDED, CAUSAL, WINDOW, SOFTCAP, PRECISION, KEYS,
        )  # fmt: skip
    for number in range(_masked_blocks(low, clear_from, clear_to, high, KEYS)):
        n = _masked(number, low, clear_from, clear_to, KEYS)
        dq = _queries_step(
            query, slope, lse, along, dq, K, V, k_token, v_token, n, row, start, end, tokens, inner, outer, window,
            True, WIDTH, PADDED, CAUSAL, WINDOW, SOFTCAP, PRECISION, KEYS,
        )  # fmt: skip
    _store(DQ + head * g_head, first, g_token, tokens, dq * scale, QUERIES, WIDTH, PADDED)


class Tiles(NamedTuple):
    """Queries and keys of a block, warps that work on it, and blocks under way from memory."""

    queries: int
    keys: int
    warps: int
    stages: int


# For 16 bits, by kernel and padded width. Chosen by what the compiler reports (no spills, the shared memory of the
# smallest card); nobody has timed them yet.
_TILES = {
    "forward": {64: Tiles(128, 64, 8, 3), 128: Tiles(128, 64, 8, 3), 256: Tiles(64, 32, 8, 2)},
    "keys": {64: Tiles(32, 64, 8, 2), 128: Tiles(32, 64, 8, 2), 256: Tiles(32, 32, 8, 1)},
    "queries": {64: Tiles(64, 64, 8, 2), 128: Tiles(64, 64, 8, 2), 256: Tiles(32, 64, 8, 1)},
}
# Blackwell keeps sums in a memory of their own, and its stages cost registers.
_BLACKWELL = {("keys", 128): Tiles(32, 64, 8, 1), ("queries", 128): Tiles(64, 64, 8, 1)}
_WIDE = Tiles(32, 32, 4, 1)  # for fp32


def tiles(kernel: str, width: int, dtype: torch.dtype, capability: tuple[int, int]) -> Tiles:
    """Block sizes of `kernel` ("forward", "keys", "queries") for heads of a width on a card."""
    if dtype == torch.float32:
        return _WIDE
    step = min(n for n in _TILES[kernel] if n >= width)
    chosen = _TILES[kernel][step]
    return _BLACKWELL.get((kernel, step), chosen) if capability[0] == 10 else chosen


def padded(width: int) -> int:
    """The power of two that a head's columns are computed as."""
    return max(16, triton.next_power_of_2(width))


_LOG2E = 1 / math.log(2)


class _Call(NamedTuple):
    """What the three kernels of a call have in common."""

    scale: float
    inner: float
    outer: float
    window: int
    switches: dict[str, Any]


def _call(q: Tensor, k: Tensor, causal: bool, window: int, scale: float, softcap: float) -> _Call:
    width = q.shape[2]
    # Scores leave the products in units of log 2; with a cap, the products are first brought to the units of the cap.
    inner, outer = (scale / softcap, softcap * _LOG2E) if softcap else (scale * _LOG2E, 1.0)
    switches = {
        "GROUP": q.shape[1] // k.shape[1],
        "WIDTH": width,
        "PADDED": padded(width),
        "CAUSAL": causal,
        "WINDOW": window > 0,
        "SOFTCAP": softcap > 0,
        "PRECISION": "ieee",
    }
    return _Call(scale, inner, outer, window, switches)


def _launch(q: Tensor, kernel: str) -> tuple[Tiles, dict[str, Any]]:
    capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else (8, 0)
    made = tiles(kernel, q.shape[2], q.dtype, capability)
    return made, {"QUERIES": made.queries, "KEYS": made.keys, "num_warps": made.warps, "num_stages": made.stages}


def _on(q: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(q.device) if q.is_cuda else nullcontext()


@torch.library.custom_op("megapt_kernels::flash_attention", mutates_args=())
def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    ends: Tensor,
    causal: bool,
    window: int,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """q [T, heads, D], k, v [T, kv_heads, D], unit stride in D; starts, ends int32 [T], the bounds of each token's
    document; window, softcap: 0 for none. Returns the result [T, heads, D] and the logs, base 2, of the softmax's
    denominators [heads, T] fp32."""
    tokens, heads, width = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty(heads, tokens, dtype=torch.float32)
    call = _call(q, k, causal, window, scale, softcap)
    size, options = _launch(q, "forward")
    with _on(q):
        _forward[(triton.cdiv(tokens, size.queries), heads)](
            q, k, v, out, lse, starts, ends, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *out.stride()[:2],
            tokens, call.inner, call.outer, call.window, **call.switches, **options,
        )  # fmt: skip
    return out, lse


@flash_attention.register_fake
def _(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@torch.library.custom_op("megapt_kernels::flash_attention_backward", mutates_args=())
def flash_attention_backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    ends: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    window: int,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    tokens, heads, width = q.shape
    dy = dy if dy.stride(2) == 1 else dy.contiguous()
    dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
    along = torch.empty_like(lse)
    call = _call(q, k, causal, window, scale, softcap)
    bounds = *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *dy.stride()[:2]
    numbers = tokens, call.scale, call.inner, call.outer, call.window
    with _on(q):
        _along[(triton.cdiv(tokens, 64), heads)](
            out, dy, along, *out.stride()[:2], *dy.stride()[:2], tokens, width, padded(width), 64
        )
        size, options = _launch(q, "keys")
        _backward_keys[(triton.cdiv(tokens, size.keys), k.shape[1])](
            q, k, v, dy, lse, along, dk, dv, starts, ends, *bounds, *dk.stride()[:2], *numbers,
            **call.switches, **options,
        )  # fmt: skip
        size, options = _launch(q, "queries")
        _backward_queries[(triton.cdiv(tokens, size.queries), heads)](
            q, k, v, dy, lse, along, dq, starts, ends, *bounds, *dq.stride()[:2], *numbers,
            **call.switches, **options,
        )  # fmt: skip
    return dq, dk, dv


@flash_attention_backward.register_fake
def _(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.causal, ctx.window, ctx.scale, ctx.softcap = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    made = flash_attention_backward(dy, *ctx.saved_tensors, ctx.causal, ctx.window, ctx.scale, ctx.softcap)
    return *made, None, None, None, None, None, None


flash_attention.register_autograd(_differentiate, setup_context=_setup)
