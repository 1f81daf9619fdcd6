"""torch.nn.functional.scaled_dot_product_attention on CUDA, each of its fused kernels a back end of its own.

A kernel is chosen by name: where it cannot run torch raises, it never falls to the matrix of all scores.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megapt_kernels.attention_backends.case import Case
from megapt_kernels.attention_backends.documents import documents_of, runs
from megapt_kernels.attention_backends.known_wrong import known_wrong

if TYPE_CHECKING:
    from megapt_kernels.attention_dispatch import AttentionSpec


def _supports(case: Case) -> str | None:
    """What all three have in common."""
    if case.machine.device != "cuda":
        return f"runs on CUDA devices, not on {case.machine.device}"
    if case.softcap:
        return "has no soft cap"
    if case.windowed:
        return "has no window without a mask of S x S"
    return None


def supports_cudnn(case: Case) -> str | None:
    reason = _supports(case) or _half_of_width(case, 128)
    if reason is not None:
        return reason
    if case.machine.cudnn == 0:
        return "needs cuDNN, which this torch is built without"
    if case.varied:
        return "would plan anew for each length of a document"
    if case.grad and (case.repeatable or case.strict):
        return "its backward pass is not deterministic"
    return known_wrong("torch cudnn", case)


def supports_flash(case: Case) -> str | None:
    reason = _supports(case) or _half_of_width(case, 256)
    if reason is not None:
        return reason
    if case.varied:
        return "would run once for each length of a document"
    return narrow_shared_memory(case) or loose_sums(case)


def supports_efficient(case: Case) -> str | None:
    reason = _supports(case)
    if reason is not None:
        return reason
    if not case.half and case.dtype != torch.float32:
        return f"takes bfloat16, float16 and float32, not {case.dtype}"
    if case.dtype == torch.bfloat16 and case.machine.capability < (8, 0):
        return f"takes bfloat16 from compute capability 8.0 on; this is {shown(case.machine.capability)}"
    multiple = 8 if case.half else 4
    if case.width % multiple:
        return f"head width {case.width} of q is not a multiple of {multiple}"
    return loose_sums(case)


def _half_of_width(case: Case, most: int) -> str | None:
    return half_only(case) or from_ampere(case) or width_limits(case, most)


def half_only(case: Case) -> str | None:
    return None if case.half else f"takes bfloat16 and float16, not {case.dtype}"


def from_ampere(case: Case) -> str | None:
    found = case.machine.capability
    return None if found >= (8, 0) else f"needs compute capability 8.0; this is {shown(found)}"


def width_limits(case: Case, most: int) -> str | None:
    if case.width % 8:
        return f"head width {case.width} of q is not a multiple of 8"
    return f"head width {case.width} of q is above {most}" if case.width > most else None


def narrow_shared_memory(case: Case) -> str | None:
    """The flash kernel's backward pass of wide heads wants the shared memory of a data centre's GPU."""
    if case.grad and case.width > 192 and case.machine.capability not in ((8, 0), (9, 0), (10, 0), (10, 3)):
        return f"has no backward pass for heads above 192 on compute capability {shown(case.machine.capability)}"
    return None


def loose_sums(case: Case) -> str | None:
    """Kernels of torch's that add up the gradient of q in a fixed order only if all of torch is told to."""
    if case.grad and case.repeatable and not case.strict:
        return "its gradients are deterministic only under torch.use_deterministic_algorithms(True)"
    return None


def shown(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def run_cudnn(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
    return _run(SDPBackend.CUDNN_ATTENTION, q, k, v, spec)


def run_flash(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
    return _run(SDPBackend.FLASH_ATTENTION, q, k, v, spec)


def run_efficient(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
    # It wants as many key and value heads as query heads, in memory.
    group = q.shape[2] // k.shape[2]
    if group > 1:
        k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    return _run(SDPBackend.EFFICIENT_ATTENTION, q, k, v, spec)


def _run(kernel: SDPBackend, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
    grouped = q.shape[2] != k.shape[2]
    flat, parts = [t.flatten(0, 1) for t in (q, k, v)], []
    with sdpa_kernel(kernel):
        for run in runs(documents_of(spec.lengths, q.shape[0], q.shape[1])):
            query, key, value = (run.of(t) for t in flat)
            y = F.scaled_dot_product_attention(
                query, key, value, is_causal=spec.causal, scale=spec.scale, enable_gqa=grouped
            )
            parts.append(y.transpose(1, 2).flatten(0, 1))
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(q.shape)
