"""Our own flash attention in Triton, for whatever the libraries do not take."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megapt_kernels.attention_backends.case import Case
from megapt_kernels.attention_backends.documents import documents_of, starts_and_ends
from megapt_kernels.attention_backends.torch_sdpa import from_ampere

if TYPE_CHECKING:
    from megapt_kernels.attention_dispatch import AttentionSpec


def supports(case: Case) -> str | None:
    machine = case.machine
    if machine.triton.problem is not None:
        return f"triton {machine.triton.problem}"
    if machine.interpreted:
        # Triton's interpreter rounds bfloat16 wrongly.
        return None if case.dtype in (torch.float16, torch.float32) and case.width <= 256 else "Triton is interpreted"
    if machine.device != "cuda":
        return f"runs on CUDA devices, not on {machine.device}, where TRITON_INTERPRET=1 would interpret it"
    if not case.half and case.dtype != torch.float32:
        return f"takes bfloat16, float16 and float32, not {case.dtype}"
    if case.width > 256:
        return f"head width {case.width} of q is above 256"
    return from_ampere(case)


def run(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
    from megapt_kernels.flash_triton import flash_attention

    lengths = documents_of(spec.lengths, q.shape[0], q.shape[1])
    scale = q.shape[3] ** -0.5 if spec.scale is None else spec.scale
    # The kernel steps from token to token inside of a block in 32 bits.
    flat = (t.contiguous() if t.stride(0) >= 1 << 24 else t for t in (x.flatten(0, 1) for x in (q, k, v)))
    options = spec.causal, spec.window or 0, scale, spec.softcap or 0.0
    y, _ = flash_attention(*flat, *starts_and_ends(lengths, q.device), *options)
    return y.view(q.shape)
