"""Our flash attention in CUDA C++ (csrc/flash.cuh): bfloat16 and float16, heads of 64 and 128, from sm_80 on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megapt_kernels import library
from megapt_kernels.attention_backends.case import Case
from megapt_kernels.attention_backends.documents import documents_of, starts_and_ends
from megapt_kernels.attention_backends.torch_sdpa import from_ampere, half_only

if TYPE_CHECKING:
    from megapt_kernels.attention_dispatch import AttentionSpec

_MOST_HEADS = 65535  # of a grid's second dimension


def supports(case: Case) -> str | None:
    reason = library.missing(torch.device(case.machine.device)) or half_only(case)
    if reason is None and case.machine.device == "cuda":
        reason = from_ampere(case)
    if reason is None and case.width not in (64, 128):
        reason = f"head width {case.width} of q is neither 64 nor 128"
    if reason is None and case.heads > _MOST_HEADS:
        reason = f"q has {case.heads} heads, more than {_MOST_HEADS}"
    return reason


def run(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
    lengths = documents_of(spec.lengths, q.shape[0], q.shape[1])
    scale = q.shape[3] ** -0.5 if spec.scale is None else spec.scale
    y: Tensor = _Flash.apply(
        *(t.flatten(0, 1) for t in (q, k, v)),
        *starts_and_ends(lengths, q.device),
        spec.causal,
        spec.window or 0,
        scale,
        spec.softcap or 0.0,
    )
    return y.view(q.shape)


def _by_vectors(t: Tensor) -> Tensor:
    """t [T, heads, width] as the kernels read it, 16 bytes at once: a copy where its strides or address forbid that."""
    fits = t.stride(2) == 1 and t.stride(0) % 8 == 0 and t.stride(1) % 8 == 0
    if fits and not torch.compiler.is_compiling():
        fits = t.data_ptr() % 16 == 0
    return t if fits else t.clone(memory_format=torch.contiguous_format)


class _Flash(Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, ends: Tensor, *options: Any) -> Tensor:
        ctx.options = options
        q, k, v = map(_by_vectors, (q, k, v))
        y, lse = torch.ops.megapt_kernels.flash(q, k, v, starts, ends, *options)
        ctx.save_for_backward(q, k, v, starts, ends, y, lse)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        made = torch.ops.megapt_kernels.flash_backward(_by_vectors(dy), *ctx.saved_tensors, *ctx.options)
        return *made, *(None,) * 6


def _register_fakes() -> None:
    torch.library.register_fake(
        "megapt_kernels::flash",
        lambda q, *rest: (q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)),
    )
    torch.library.register_fake(
        "megapt_kernels::flash_backward",
        lambda dy, q, k, v, *rest: (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)),
    )


library.on_load(_register_fakes)
