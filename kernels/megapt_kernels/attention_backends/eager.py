"""The CPU's flash kernel, and the reference: `blockwise`, on any device with memory linear in the sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megapt_kernels.attention_backends.case import Case
from megapt_kernels.attention_backends.documents import documents_of, runs
from megapt_kernels.blockwise import (
    Scores,
    attend,
    attend_backward,
    attend_in_window,
    attend_in_window_backward,
    undefined_as_nan,
)
from megapt_kernels.registry import without_autocast

if TYPE_CHECKING:
    from megapt_kernels.attention_dispatch import AttentionSpec


def supports_flash(case: Case) -> str | None:
    """torch's own kernel for a CPU (arXiv 2205.14135); where windows are wanted, a block of queries at a time."""
    if case.machine.device != "cpu":
        return f"runs on a CPU, not on {case.machine.device}"
    return "has no soft cap" if case.softcap else None


def supports_blockwise(case: Case) -> str | None:
    if case.machine.device not in ("cpu", "cuda", "meta"):
        return f"runs on CPUs and CUDA devices, not on {case.machine.device}"
    return None


def run_flash(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
    return _run(q, k, v, spec, True)


def run_blockwise(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
    return _run(q, k, v, spec, False)


def _run(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, flash: bool) -> Tensor:
    lengths = documents_of(spec.lengths, q.shape[0], q.shape[1])
    flat = (t.flatten(0, 1) for t in (q, k, v))
    out, _ = _forward(*flat, lengths, spec.causal, spec.window, spec.scale, spec.softcap, flash)
    return out.view(q.shape)


# Operators of their own, so that torch.compile takes the loops over blocks and documents as one node.
@torch.library.custom_op("megapt_kernels::attention_by_runs", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    causal: bool,
    window: int | None,
    scale: float | None,
    softcap: float | None,
    flash: bool,
) -> tuple[Tensor, Tensor]:
    """q [T, heads, width], k, v [T, kv_heads, width] -> the result as q, and the logs of the softmax's denominators
    [T x heads] run after run, in at least fp32."""
    scores = Scores(causal, window, scale, softcap)
    out, sums = torch.empty(q.shape, dtype=q.dtype, device=q.device), []
    for run in runs(tuple(lengths)):
        with without_autocast():
            y, lse = _attend(scores, flash, run.of(q), run.of(k), run.of(v))
        run.of(out).copy_(y)
        sums.append(lse.flatten())
    return out, torch.cat(sums) if sums else _sums(q)


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), _sums(q)


def _sums(q: Tensor) -> Tensor:
    return q.new_empty(q.shape[0] * q.shape[1], dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.custom_op("megapt_kernels::attention_by_runs_backward", mutates_args=())
def _backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    sums: Tensor,
    lengths: Sequence[int],
    causal: bool,
    window: int | None,
    scale: float | None,
    softcap: float | None,
    flash: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    scores, made = Scores(causal, window, scale, softcap), tuple(t.new_empty(t.shape) for t in (q, k, v))
    done = 0
    for run in runs(tuple(lengths)):
        size = run.count * run.length * q.shape[1]
        lse = sums[done : done + size]
        done += size
        with without_autocast():
            gradients = _attend_backward(scores, flash, lse, *(run.of(t) for t in (dy, q, k, v, out)))
        for whole, part in zip(made, gradients, strict=True):
            run.of(whole).copy_(part)
    dq, dk, dv = made
    return dq, dk, dv


@_backward.register_fake
def _(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output)


def _differentiate(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    return *_backward(dy, *ctx.saved_tensors, *ctx.options), *(None for _ in ctx.options)


_forward.register_autograd(_differentiate, setup_context=_setup)


def _attend(scores: Scores, flash: bool, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """A run's attention, and the logs of the softmax's denominators."""
    if not flash:
        return attend(q, k, v, scores)
    if scores.windowed(q.shape[2]):
        return attend_in_window(q, k, v, scores)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    y, lse = kernel(q, k, v, 0.0, scores.causal, scale=scores.scale)
    return undefined_as_nan(y, lse, q, k)


def _attend_backward(
    scores: Scores, flash: bool, lse: Tensor, dy: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    documents, heads, length, _ = q.shape
    if not flash:
        sums = lse.view(documents * k.shape[1], heads // k.shape[1], length)
        return attend_backward(dy, q, k, v, out, sums, scores)
    sums = lse.view(documents, heads, length)
    if scores.windowed(length):
        return attend_in_window_backward(dy, q, k, v, out, sums, scores)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    dq, dk, dv = kernel(dy, q, k, v, out, sums, 0.0, scores.causal, scale=scores.scale)
    return dq, dk, dv
