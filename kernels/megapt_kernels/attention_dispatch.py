"""Attention by whichever kernel is fastest here and right: libraries, our Triton kernel, or blocks of plain operations.

No back end keeps the matrix of all scores. Which one runs follows from the machine, the call and what is installed
(`Operation.explain` says why); it is logged once for each kind of call.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megapt_kernels.arguments import check_flags, check_numbers, check_tensors, check_whole
from megapt_kernels.attention_backends import (
    cuda_flash,
    eager,
    flash_attn,
    torch_flex,
    torch_sdpa,
    torch_varlen,
    triton_flash,
)
from megapt_kernels.attention_backends.case import Case, Supports, case_of
from megapt_kernels.attention_backends.documents import remembered
from megapt_kernels.registry import Explanation, Implementation, Operation, Unsupported, without_autocast
from megapt_kernels.tracing import constant

_log = logging.getLogger("megapt_kernels")

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


_TOKENS = (1 << 31) - (1 << 16)  # in 32 bits, with room for the rest of a block


@dataclass(frozen=True)
class AttentionSpec:
    """Which tokens meet, and what becomes of their products before the softmax.

    causal: a token attends to itself and those before it, else to its whole document. window: tokens that a token
    attends to, itself included; None for all; with `causal` alone (Mistral 7B, arXiv 2310.06825). scale: factor on the
    products of queries and keys; None for 1 / sqrt(D). softcap: scaled products become cap x tanh(products / cap)
    (Gemma 2, arXiv 2408.00118). lengths: tokens of each document, in order, over the B x S tokens of a call row after
    row; attention ends with a document, and no document reaches over the end of a row; None where each row is one.
    deterministic: gradients are the same bit for bit on every run.
    """

    causal: bool = True
    window: int | None = None
    scale: float | None = None
    softcap: float | None = None
    lengths: tuple[int, ...] | None = None
    deterministic: bool = False


CAUSAL = AttentionSpec()


def attention(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec = CAUSAL, *, impl: str = "auto") -> Tensor:
    """softmax(scale x q k^T) v for every head, inside of documents (arXiv 1706.03762), differentiable in q, k and v.

    q: [B, S, heads, D]; k, v: [B, S, kv_heads, D], where query head i meets key/value head i // (heads / kv_heads)
    (arXiv 2305.13245); bfloat16, float16, float32 or float64, any strides. impl: a kind of implementation or the name
    of one. Returns [B, S, heads, D]. A NaN or an infinity in a token spreads at most over its document and the
    neighbours that a kernel computes together with it.

    Raises Unsupported where the arguments are wrong, or where nothing that `impl` allows takes them.
    """
    check_tensors("attention", q=q, k=k, v=v)
    chosen = _OPERATION.choose(q, k, v, spec, impl=impl)
    case = case_of(q, k, v, spec)
    _announce(chosen.name, str(q.device), str(q.dtype), case.causal, case.windowed, case.softcap, case.varied)
    if q.numel() == 0:
        return q + (k.sum() + v.sum())  # nothing, with gradients of nothing
    with without_autocast():
        return chosen.run(*(t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v)), spec)


def _check(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec = CAUSAL) -> None:
    for name, t in (("q", q), ("k", k), ("v", v)):
        if len(t.shape) != 4:
            raise Unsupported(f"attention: {name} is [B, S, heads, D]; its shape is {tuple(t.shape)}")
        if t.dtype not in _DTYPES:
            raise Unsupported(f"attention: {name} is bfloat16, float16, float32 or float64, not {t.dtype}")
        if t.dtype != q.dtype:
            raise Unsupported(f"attention: {name} is {t.dtype}, but q is {q.dtype}; all are of one dtype")
        if t.device != q.device:
            raise Unsupported(f"attention: {name} is on {t.device}, but q is on {q.device}; all are on one device")
    batch, length, heads, width = q.shape
    if k.shape != v.shape:
        raise Unsupported(f"attention: k is {tuple(k.shape)}, but v is {tuple(v.shape)}; their shapes are equal")
    if k.shape[:2] != q.shape[:2] or k.shape[3] != width:
        raise Unsupported(f"attention: k is {tuple(k.shape)}, but q is {tuple(q.shape)}; only heads may differ")
    if width == 0 or heads == 0 or k.shape[2] == 0 or heads % k.shape[2]:
        raise Unsupported(
            f"attention: q has {heads} heads, which are no multiple of k's {k.shape[2]}"
            if width
            else "attention: q has heads of width 0"
        )
    if batch * length > _TOKENS:
        raise Unsupported(f"attention: q has B x S = {batch} x {length} tokens; kernels count at most {_TOKENS}")
    _check_spec(spec, batch, length)


def _check_spec(spec: AttentionSpec, batch: int, length: int) -> None:
    if not isinstance(spec, AttentionSpec):
        raise Unsupported(f"attention: spec is an AttentionSpec, not {type(spec).__name__}")
    check_flags("attention", **{"spec.causal": spec.causal, "spec.deterministic": spec.deterministic})
    optional = {"spec.scale": spec.scale, "spec.softcap": spec.softcap}
    check_numbers("attention", **{name: value for name, value in optional.items() if value is not None})
    if spec.window is not None:
        check_whole("attention", **{"spec.window": spec.window})
        if not spec.causal:
            raise Unsupported("attention: spec.window looks back, so that spec.causal must be True")
        if spec.window < 1:
            raise Unsupported(f"attention: spec.window counts the token itself and is at least 1, not {spec.window}")
    if spec.softcap is not None and not spec.softcap > 0:
        raise Unsupported(f"attention: spec.softcap is positive, not {spec.softcap}")
    if spec.lengths is not None:
        if not (isinstance(spec.lengths, tuple) and all(type(size) is int for size in spec.lengths)):
            raise Unsupported(f"attention: spec.lengths is a tuple of whole numbers, not {spec.lengths!r}")
        _check_lengths(spec.lengths, batch, length)


@remembered
def _check_lengths(lengths: tuple[int, ...], batch: int, length: int) -> None:
    total = sum(lengths)
    if total != batch * length:
        raise Unsupported(
            f"attention: spec.lengths sums to {total} tokens; q has B x S = {batch} x {length} = {batch * length}"
        )
    end = 0
    for number, size in enumerate(lengths):
        if size < 0:
            raise Unsupported(f"attention: spec.lengths has a document of {size} tokens")
        if size and end // length != (end + size - 1) // length:
            raise Unsupported(
                f"attention: document {number} of spec.lengths, tokens {end} to {end + size - 1}, reaches over the end "
                f"of a row of {length}"
            )
        end += size


_BACK_ENDS: dict[str, tuple[str, Supports, Callable[..., Tensor]]] = {
    "flash-attn 4": ("library", flash_attn.supports_4, flash_attn.run_4),
    "flash-attn 3": ("library", flash_attn.supports_3, flash_attn.run_3),
    "flash-attn 2": ("library", flash_attn.supports_2, flash_attn.run_2),
    "torch cudnn": ("library", torch_sdpa.supports_cudnn, torch_sdpa.run_cudnn),
    "torch flash": ("library", torch_sdpa.supports_flash, torch_sdpa.run_flash),
    "torch varlen": ("library", torch_varlen.supports, torch_varlen.run),
    "torch efficient": ("library", torch_sdpa.supports_efficient, torch_sdpa.run_efficient),
    "triton": ("triton", triton_flash.supports, triton_flash.run),
    "cuda": ("cuda", cuda_flash.supports, cuda_flash.run),
    "torch flex": ("library", torch_flex.supports, torch_flex.run),
    "torch": ("library", eager.supports_flash, eager.run_flash),
    "blockwise": ("reference", eager.supports_blockwise, eager.run_blockwise),
}

# Fastest first where documents are equally long and where they are not; what is not named follows in the order above.
_Table = tuple[tuple[str, ...], tuple[str, ...]]
_HOPPER: _Table = (
    ("flash-attn 3", "flash-attn 4", "torch cudnn", "torch flash", "flash-attn 2", "triton", "cuda", "torch efficient"),
    ("flash-attn 3", "flash-attn 4", "flash-attn 2", "torch varlen", "triton", "cuda", "torch flex", "torch efficient"),
)
_BLACKWELL: _Table = (
    ("flash-attn 4", "torch cudnn", "torch flash", "flash-attn 2", "triton", "cuda", "torch efficient"),
    ("flash-attn 4", "flash-attn 2", "torch varlen", "triton", "cuda", "torch flex", "torch efficient"),
)
_OTHER_GPU: _Table = (
    ("flash-attn 2", "torch flash", "torch cudnn", "triton", "cuda", "torch efficient"),
    ("flash-attn 2", "torch varlen", "triton", "cuda", "torch flex", "torch efficient"),
)
# In fp32 our kernel multiplies without tensor cores.
_WIDE: _Table = (("torch efficient", "triton"), ("triton", "torch efficient"))
_CPU: _Table = (("torch", "blockwise"), ("torch", "blockwise"))


def order(case: Case) -> tuple[str, ...]:
    """The names of all back ends, the preferred ones for this case first; the reference is last on a GPU."""
    if case.machine.device != "cuda":
        table = _CPU
    elif case.half:
        table = {9: _HOPPER, 10: _BLACKWELL}.get(case.machine.capability[0], _OTHER_GPU)
    else:
        table = _WIDE
    first = table[case.varied or case.windowed]
    return *first, *(name for name in _BACK_ENDS if name not in first)


class _ByMachine(Operation):
    """An operation whose order of preference follows from the machine and the call."""

    def explain(self, *arguments: Any, impl: str = "auto", **keywords: Any) -> Explanation:
        self.check(*arguments, **keywords)
        by_name = {i.name: i for i in self.implementations}
        names = order(_case(*arguments, **keywords))
        ordered = Operation(self.name, self.check, [by_name[name] for name in names])
        return ordered.explain(*arguments, impl=impl, **keywords)


def _case(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec = CAUSAL) -> Case:
    return case_of(q, k, v, spec)


def _implementation(name: str, kind: str, supports: Supports, run: Callable[..., Tensor]) -> Implementation:
    return Implementation(kind, name, lambda *arguments, **keywords: supports(_case(*arguments, **keywords)), run)


_OPERATION = _ByMachine("attention", _check, [_implementation(name, *parts) for name, parts in _BACK_ENDS.items()])
OPERATIONS: dict[str, Operation] = {"attention": _OPERATION}

_announced: set[tuple[str, ...]] = set()


@constant
def _announce(name: str, device: str, dtype: str, causal: bool, windowed: bool, softcap: bool, varied: bool) -> None:
    """Log once which back end computes a kind of call on a device."""
    kind = (name, device, dtype, *map(str, (causal, windowed, softcap, varied)))
    if kind in _announced:
        return
    _announced.add(kind)
    words = [
        dtype.removeprefix("torch."),
        "causal" if causal else "bidirectional",
        *(word for word, holds in (("windows", windowed), ("soft cap", softcap), ("documents", varied)) if holds),
    ]
    _log.info("attention on %s (%s): %s", device, ", ".join(words), name)
