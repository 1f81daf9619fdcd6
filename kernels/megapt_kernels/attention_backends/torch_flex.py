"""FlexAttention (arXiv 2412.05496): a Triton kernel that torch.compile writes for a mask and a function of scores.

Its mask is built from the bounds of documents, block by block: create_block_mask would look at all pairs of tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megapt_kernels.attention_backends.case import Case
from megapt_kernels.attention_backends.documents import documents_of, starts_and_ends
from megapt_kernels.attention_backends.known_wrong import known_wrong
from megapt_kernels.attention_backends.torch_sdpa import from_ampere, half_only

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from megapt_kernels.attention_dispatch import AttentionSpec

_BLOCK = 128


def supports(case: Case) -> str | None:
    if case.machine.device != "cuda":
        return f"runs on CUDA devices, not on {case.machine.device}"
    if case.machine.triton.problem is not None:
        return f"triton {case.machine.triton.problem}"
    reason = half_only(case) or from_ampere(case)
    if reason is not None:
        return reason
    if case.width % 8 or not 16 <= case.width <= 256:
        return f"head width {case.width} of q is not a multiple of 8 from 16 to 256"
    return known_wrong("torch flex", case)


def run(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
    return attend(_compiled(), q, k, v, spec)


def attend(kernel: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
    """All rows as one sequence of documents, by `kernel`, which is flex_attention, compiled or not."""
    lengths = documents_of(spec.lengths, q.shape[0], q.shape[1])
    mask = block_mask(lengths, spec.causal, spec.window, q.device)
    sequence = (t.flatten(0, 1).transpose(0, 1).unsqueeze(0) for t in (q, k, v))
    y = kernel(
        *sequence,
        score_mod=None if spec.softcap is None else _capped(spec.softcap),
        block_mask=mask,
        scale=spec.scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return y.squeeze(0).transpose(0, 1).reshape(q.shape)


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


@lru_cache(maxsize=8)
def _capped(softcap: float) -> Callable[..., Tensor]:
    def score_mod(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return score_mod


@lru_cache(maxsize=16)
def block_mask(lengths: tuple[int, ...], causal: bool, window: int | None, device: torch.device) -> BlockMask:
    """Which blocks of 128 keys a block of 128 queries meets, in whole or in part: (T / 128)^2 entries at most."""
    from torch.nn.attention.flex_attention import BlockMask

    starts, ends = starts_and_ends(lengths, torch.device("cpu"))
    tokens = len(starts)
    first = torch.arange(0, tokens, _BLOCK)
    last = (first + _BLOCK).clamp_(max=tokens) - 1
    # Of each block of queries, the keys that some query sees and those that every one does: [low, high), [from, to).
    low, clear_from = starts[first], starts[last]
    if window is not None:
        low = low.maximum(first + 1 - window)
        clear_from = clear_from.maximum(last + 1 - window)
    high, clear_to = (last + 1, first + 1) if causal else (ends[last], ends[first])
    key = torch.arange(len(first)) * _BLOCK
    met = (key + _BLOCK > low[:, None]) & (key < high[:, None])
    clear = (key >= clear_from[:, None]) & (key + _BLOCK <= clear_to[:, None]) & (last - first == _BLOCK - 1)[:, None]
    starts, ends = starts_and_ends(lengths, device)

    def mask_mod(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (key >= starts[query]) & (key < ends[query])
        if causal:
            seen = seen & (key <= query)
        if window is not None:
            seen = seen & (query - key < window)
        return seen

    return BlockMask.from_kv_blocks(
        *_listed(met & ~clear, device),
        *_listed(clear, device),
        BLOCK_SIZE=_BLOCK,
        mask_mod=mask_mod,
        seq_lengths=(tokens, tokens),
    )


def _listed(blocks: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of each row of a matrix of blocks, how many there are, and their numbers, then the others': int32."""
    counts = blocks.sum(1, dtype=torch.int32)
    numbers = blocks.to(torch.int8).argsort(dim=1, descending=True, stable=True).to(torch.int32)
    return counts[None, None].to(device), numbers[None, None].to(device)
