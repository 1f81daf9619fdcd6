"""torch.nn.attention.varlen.varlen_attn: torch's own flash kernel over documents of any lengths, in one call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from megapt_kernels.attention_backends.case import Case, machine
from megapt_kernels.attention_backends.documents import cu_seqlens, documents_of
from megapt_kernels.attention_backends.known_wrong import known_wrong
from megapt_kernels.attention_backends.torch_sdpa import (
    from_ampere,
    half_only,
    loose_sums,
    narrow_shared_memory,
    width_limits,
)

if TYPE_CHECKING:
    from megapt_kernels.attention_dispatch import AttentionSpec


def supports(case: Case) -> str | None:
    library = case.machine.varlen
    if case.machine.device != "cuda":
        return f"runs on CUDA devices, not on {case.machine.device}"
    reason = library.problem or half_only(case) or from_ampere(case) or width_limits(case, 256)
    if reason is not None:
        return reason
    if not {"scale", "window_size"} <= library.options:
        return "this torch's has no windows and no scale: they came with torch 2.11"
    if case.softcap:
        return "has no soft cap"
    return narrow_shared_memory(case) or loose_sums(case) or known_wrong("torch varlen", case)


def run(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    lengths = documents_of(spec.lengths, q.shape[0], q.shape[1])
    before = -1 if spec.window is None else spec.window - 1
    options: dict[str, Any] = {"scale": spec.scale, "window_size": (before, 0 if spec.causal else -1)}
    group = q.shape[2] // k.shape[2]
    if group > 1:
        if "enable_gqa" in machine(q.device).varlen.options:
            options["enable_gqa"] = True
        else:  # torch 2.11 does not say that it groups heads
            k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    bounds, longest = cu_seqlens(lengths, q.device), max(lengths)
    query, key, value = (t.flatten(0, 1) for t in (q, k, v))
    y = varlen_attn(query, key, value, bounds, bounds, longest, longest, **options)
    assert isinstance(y, Tensor)  # no second result was asked for
    return y.view(q.shape)
