"""Rotary positions (RoFormer, arXiv 2104.09864) in place, in the rotate-half convention of GPT-NeoX and Hugging Face.

No library's kernel computes this: Liger's wants queries and keys as separate tensors that are turned as a whole,
flash-attn's wants the angles in the dtype of what it turns, and bf16 angles are another position after some hundred
tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megapt_kernels import library
from megapt_kernels.arguments import check_tensors, check_whole, check_written
from megapt_kernels.blocks import row_blocks
from megapt_kernels.registry import Implementation, Operation, Unsupported, without_data


def rope_(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    *,
    heads: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """Turn the first `heads` of the N heads of x [T, N, D] (all by default) in place, by their tokens' positions.

    x: bf16, fp16 or fp32 (fp64 by the reference), with unit stride in D; a view of a projection's [T, N x D] will do.
    cos, sin: fp32 [S, R / 2], R <= D; dimensions from R on stay as they are. positions: int32 or int64 [T], each
    token's row of the table; None: token t has row t mod S. Dimension i < R / 2 of a head pairs with i + R / 2:
    (a, b) -> (a cos - b sin, b cos + a sin), computed in fp32 and rounded once.

    Returns x. Differentiable: the gradient is turned back into new memory. A position outside of the table is an error
    in the reference; on a GPU, which is not waited for, it turns that token's heads into NaN.
    """
    return _rope(x, cos, sin, positions, heads=heads, impl=impl)


def _check(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None, *, heads: int | None = None) -> None:
    check_tensors("rope_", x=x, cos=cos, sin=sin)
    if x.dim() != 3 or (x.shape[2] > 1 and x.stride(2) != 1):
        raise Unsupported(f"rope_: x is [T, N, D] with unit stride in D, not {list(x.shape)} strided {x.stride()}")
    check_written("rope_", x=x)
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise Unsupported(f"rope_: x is bfloat16, float16, float32 or float64, not {x.dtype}")
    table = torch.float64 if x.dtype == torch.float64 else torch.float32
    for name, t in (("cos", cos), ("sin", sin)):
        if t.dtype != table and t.dtype != torch.float32:
            raise Unsupported(f"rope_: {name} is {table} for x of {x.dtype}, not {t.dtype}")
        if t.dim() != 2 or t.shape != cos.shape or not 2 <= 2 * t.shape[1] <= x.shape[2]:
            raise Unsupported(
                f"rope_: cos and sin are [S, R / 2] alike with 2 <= R <= D = {x.shape[2]}; {name} is {list(t.shape)}"
            )
        if t.device != x.device:
            raise Unsupported(f"rope_: {name} is on {x.device} as x, not on {t.device}")
    if cos.shape[0] < 1:
        raise Unsupported("rope_: the table has at least one row, not 0")
    if positions is not None:
        check_tensors("rope_", positions=positions)
        if positions.dtype not in (torch.int32, torch.int64) or positions.shape != x.shape[:1]:
            raise Unsupported(
                f"rope_: positions are int32 or int64 [{x.shape[0]}], not {positions.dtype} {list(positions.shape)}"
            )
        if positions.device != x.device:
            raise Unsupported(f"rope_: positions are on {x.device} as x, not on {positions.device}")
    if heads is not None:
        check_whole("rope_", heads=heads)
        if not 0 <= heads <= x.shape[1]:
            raise Unsupported(f"rope_: heads is a number from 0 to N = {x.shape[1]}, not {heads}")


# ---- reference


def _takes_all(*arguments: Any, **keywords: Any) -> None:
    return None


def _reference(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None, *, heads: int | None = None
) -> Tensor:
    heads = x.shape[1] if heads is None else heads
    if positions is not None:
        _check_positions(positions, cos.shape[0])
        cos, sin = cos[positions], sin[positions]
    elif x.shape[0] <= cos.shape[0]:
        cos, sin = cos[: x.shape[0]], sin[: x.shape[0]]
    else:
        rows = torch.arange(x.shape[0], device=x.device) % cos.shape[0]
        cos, sin = cos[rows], sin[rows]
    if torch.compiler.is_compiling():
        return _turned(x, cos, sin, heads)
    return _ReferenceInPlace.apply(x, cos, sin, heads)


def _check_positions(positions: Tensor, rows: int) -> None:
    inside = ((positions >= 0) & (positions < rows)).all()
    if torch.compiler.is_compiling() or without_data((inside,)):
        torch._assert_async(inside, f"rope_: positions lie in [0, {rows}), the table's rows")
    elif not inside:
        low, high = positions.min().item(), positions.max().item()
        raise Unsupported(f"rope_: positions lie in [0, {rows}), the table's rows, not in [{low}, {high}]")


def _turned(x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """For a compiler, which differentiates it and finds out what can be done in place."""
    half = cos.shape[1]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    a, b = x[:, :heads, :half].to(cos.dtype), x[:, :heads, half : 2 * half].to(cos.dtype)
    left, right = a * cos - b * sin, b * cos + a * sin
    x[:, :heads, : 2 * half] = torch.cat([left, right], dim=2).to(x.dtype)
    return x


class _ReferenceInPlace(Function):
    """cos, sin [T, R / 2]: of each token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.heads = heads
        ctx.mark_dirty(x)
        return _turn(x, x, cos, sin, heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, grad.new_empty(grad.shape), cos, -sin, ctx.heads), None, None, None


def _turn(x: Tensor, out: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """Write x turned into `out`, which may be x, and return it."""
    width = 2 * cos.shape[1]
    if out is not x:
        out[:, heads:].copy_(x[:, heads:])
        out[:, :heads, width:].copy_(x[:, :heads, width:])
    if heads == 0:
        return out
    tensors = x[:, :heads, :width], out[:, :heads, :width], cos.unsqueeze(1), sin.unsqueeze(1)
    for source, target, c, s in row_blocks(*tensors):
        a, b = source.to(c.dtype).chunk(2, dim=2)
        left, right = (a * c).addcmul_(b, s, value=-1), (b * c).addcmul_(a, s)
        target[..., : width // 2].copy_(left)
        target[..., width // 2 :].copy_(right)
    return out


# ---- ours (csrc/rope.cu)


def _cuda_supports(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None, *, heads: int | None = None
) -> str | None:
    if x.dtype == torch.float64:
        return "x is torch.float64; the kernel computes in float32"
    if max(cos.shape[0], x.shape[1] * x.shape[2]) >= 1 << 30:
        return "the table's rows, and a token's elements, must be fewer than 2^30"
    return library.missing(x.device)


def _cuda(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None, *, heads: int | None = None) -> Tensor:
    heads = x.shape[1] if heads is None else heads
    cos, sin = cos.contiguous(), sin.contiguous()
    positions = None if positions is None else positions.contiguous()
    if torch.compiler.is_compiling():
        # A compiler knows no in-place functions of autograd; it finds out itself what can be done in place.
        return x.copy_(torch.ops.megapt_kernels.rope(x, cos, sin, positions, heads, False))
    return _CudaInPlace.apply(x, cos, sin, positions, heads)


class _CudaInPlace(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, heads: int) -> Tensor:
        ctx.save_for_backward(cos, sin, positions)
        ctx.heads = heads
        ctx.mark_dirty(x)
        torch.ops.megapt_kernels.rope_(x, cos, sin, positions, heads, False)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        cos, sin, positions = ctx.saved_tensors
        dx = torch.ops.megapt_kernels.rope(_with_unit_stride(grad), cos, sin, positions, ctx.heads, True)
        return dx, None, None, None, None


def _with_unit_stride(grad: Tensor) -> Tensor:
    return grad if grad.stride(2) == 1 else grad.contiguous()


def _register() -> None:
    @torch.library.register_fake("megapt_kernels::rope")
    def _(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, heads: int, back: bool) -> Tensor:
        return x.new_empty(x.shape)

    @torch.library.register_fake("megapt_kernels::rope_")
    def _(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, heads: int, back: bool) -> None:
        return None

    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, cos, sin, positions, ctx.heads, ctx.back = inputs
        ctx.save_for_backward(cos, sin, positions)

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        cos, sin, positions = ctx.saved_tensors
        dx = torch.ops.megapt_kernels.rope(_with_unit_stride(grad), cos, sin, positions, ctx.heads, not ctx.back)
        return dx, None, None, None, None, None

    torch.library.register_autograd("megapt_kernels::rope", backward, setup_context=save)


library.on_load(_register)

_rope = Operation(
    "rope_",
    _check,
    (
        Implementation("cuda", "cuda", _cuda_supports, _cuda),
        Implementation("reference", "reference", _takes_all, _reference),
    ),
)
OPERATIONS = {"rope_": _rope}
