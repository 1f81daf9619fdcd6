"""Gated activations (arXiv 2002.05202): activation(gate) x up of one tensor [gate, up], as a fused projection makes it.

The activation is computed again in the backward pass rather than kept, and both gradients land in one tensor. Infinite
or NaN gates give what PyTorch's activations give: silu and gelu of -inf are NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megapt_kernels import library
from megapt_kernels.blocks import row_blocks
from megapt_kernels.norms import (
    KERNEL_FLOATS,
    LIGER_WIDEST,
    check_floats,
    gpu_library,
    installed,
    kernel_rows,
    unequal_rows,
)
from megapt_kernels.registry import Implementation, Operation, Unsupported


def swiglu(xy: Tensor, *, impl: str = "auto") -> Tensor:
    """silu(gate) x up [..., F] of xy = [gate, up] [..., 2F], bf16, fp16, fp32 or fp64; Unsupported for others."""
    return OPERATIONS["swiglu"](xy, impl=impl)


def geglu(xy: Tensor, *, approximate: str = "tanh", impl: str = "auto") -> Tensor:
    """gelu(gate) x up, as `swiglu`; approximate: "tanh", or "none" for the exact gelu by the error function."""
    return OPERATIONS["geglu"](xy, approximate=approximate, impl=impl)


def _check(op: str, xy: Tensor) -> None:
    check_floats(op, "xy", xy)
    if xy.dim() == 0 or xy.shape[-1] == 0 or xy.shape[-1] % 2:
        raise Unsupported(f"{op}: xy must have rows of gate and up, of one length, not the shape {list(xy.shape)}")


def _check_swiglu(xy: Tensor) -> None:
    _check("swiglu", xy)


def _check_geglu(xy: Tensor, *, approximate: str = "tanh") -> None:
    _check("geglu", xy)
    if not isinstance(approximate, str) or approximate not in ("tanh", "none"):
        raise Unsupported(f"geglu: approximate is tanh or none, not {approximate!r}")


# The reference. Activations are named as torch's gelu names its approximations, or "silu".


def _always(xy: Tensor, **keywords: Any) -> None:
    return None


def _glu_reference(xy: Tensor, activation: str) -> Tensor:
    if torch.compiler.is_compiling():  # which makes blocks of its own of a chain
        gate, up = xy.chunk(2, dim=-1)
        return _activate(gate, activation) * up
    rows, width = xy.shape[:-1], xy.shape[-1]
    return _GLUReference.apply(xy.reshape(-1, width), activation).view(*rows, width // 2)


class _GLUReference(Function):
    """The gated activation of xy [T, 2F], in place of a compiler: over blocks of rows."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, activation: str) -> Tensor:
        ctx.activation = activation
        ctx.save_for_backward(y)
        gate, up = y.chunk(2, dim=-1)
        out = y.new_empty(up.shape)
        for g, u, o in row_blocks(gate, up, out):
            torch.mul(_activate(g, activation), u, out=o)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        (y,) = ctx.saved_tensors
        dy = torch.empty_like(y)
        for g, u, dg, du, d in row_blocks(*y.chunk(2, dim=-1), *dy.chunk(2, dim=-1), grad):
            torch.mul(_activate(g, ctx.activation), d, out=du)
            _activate_backward(d * u, g, ctx.activation, dg)
        return dy, None


def _activate(x: Tensor, kind: str) -> Tensor:
    return F.silu(x) if kind == "silu" else F.gelu(x, approximate=kind)


def _activate_backward(grad: Tensor, x: Tensor, kind: str, out: Tensor) -> None:
    if kind == "silu":
        torch.ops.aten.silu_backward.grad_input(grad, x, grad_input=out)
    else:
        torch.ops.aten.gelu_backward.grad_input(grad, x, approximate=kind, grad_input=out)


# Our CUDA kernels: csrc/glu.cuh.

_ACTIVATIONS = {"silu": 0, "tanh": 1, "none": 2}  # as csrc/glu.h numbers them


def _cuda_supports(xy: Tensor, **keywords: Any) -> str | None:
    reason = library.missing(xy.device)
    if reason is not None:
        return reason
    if xy.dtype not in KERNEL_FLOATS:
        return f"xy must be bfloat16, float16 or float32, not {xy.dtype}"
    return unequal_rows("xy", xy)


def _glu_cuda(xy: Tensor, activation: str) -> Tensor:
    rows, width = xy.shape[:-1], xy.shape[-1]
    return _GLU.apply(xy.view(-1, width), _ACTIVATIONS[activation]).view(*rows, width // 2)


class _GLU(Function):
    @staticmethod
    def forward(ctx: Any, xy: Tensor, activation: int) -> Tensor:
        ctx.activation = activation
        ctx.save_for_backward(xy)
        return torch.ops.megapt_kernels.glu(xy, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        (xy,) = ctx.saved_tensors
        return torch.ops.megapt_kernels.glu_backward(kernel_rows(dy), xy, ctx.activation), None


def _register_fakes() -> None:
    torch.library.register_fake(
        "megapt_kernels::glu", lambda xy, activation: xy.new_empty(xy.shape[0], xy.shape[1] // 2)
    )
    torch.library.register_fake("megapt_kernels::glu_backward", lambda dy, xy, activation: xy.new_empty(xy.shape))


library.on_load(_register_fakes)


# Liger's Triton kernels.


def _liger_supports(xy: Tensor, home: tuple[str, str]) -> str | None:
    reason = gpu_library(xy) or installed(*home)[1]
    if reason is None and xy.shape[-1] // 2 > LIGER_WIDEST:
        reason = f"rows of gate must be of at most {LIGER_WIDEST} elements, not {xy.shape[-1] // 2}"
    return reason


_LIGER_SWIGLU = "liger_kernel.ops.swiglu", "LigerFusedGateUpSiLUMulFunction"
_LIGER_GEGLU = "liger_kernel.ops.geglu"


def _liger_supports_swiglu(xy: Tensor) -> str | None:
    return _liger_supports(xy, _LIGER_SWIGLU)


def _liger_swiglu(xy: Tensor) -> Tensor:
    return installed(*_LIGER_SWIGLU)[0].apply(xy)


def _liger_supports_geglu(xy: Tensor, *, approximate: str = "tanh") -> str | None:
    if approximate != "tanh":
        return f"it has the tanh approximation alone, not {approximate}"
    return _liger_supports(xy, (_LIGER_GEGLU, "geglu_forward"))


def _liger_geglu(xy: Tensor, *, approximate: str = "tanh") -> Tensor:
    return _LigerGeGLU.apply(xy)


class _LigerGeGLU(Function):
    """Its kernels want gate and up as tensors of their own, and its backward writes the gradients over them: here over
    copies, for they belong to the caller."""

    @staticmethod
    def forward(ctx: Any, xy: Tensor) -> Tensor:
        ctx.save_for_backward(xy)
        gate, up = (half.contiguous() for half in xy.chunk(2, dim=-1))
        return installed(_LIGER_GEGLU, "geglu_forward")[0](gate, up)[2]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:  # type: ignore[override]
        (xy,) = ctx.saved_tensors
        gate, up = (half.clone(memory_format=torch.contiguous_format) for half in xy.chunk(2, dim=-1))
        return torch.cat(installed(_LIGER_GEGLU, "geglu_backward")[0](gate, up, dy.contiguous()), dim=-1)


def _by_approximation(run: Callable[[Tensor, str], Tensor]) -> Callable[..., Tensor]:
    return lambda xy, *, approximate="tanh": run(xy, approximate)


OPERATIONS = {
    "swiglu": Operation(
        "swiglu",
        _check_swiglu,
        (
            Implementation("cuda", "cuda", _cuda_supports, partial(_glu_cuda, activation="silu")),
            Implementation("library", "liger", _liger_supports_swiglu, _liger_swiglu),
            Implementation("reference", "reference", _always, partial(_glu_reference, activation="silu")),
        ),
    ),
    "geglu": Operation(
        "geglu",
        _check_geglu,
        (
            Implementation("cuda", "cuda", _cuda_supports, _by_approximation(_glu_cuda)),
            Implementation("library", "liger", _liger_supports_geglu, _liger_geglu),
            Implementation("reference", "reference", _always, _by_approximation(_glu_reference)),
        ),
    ),
}
