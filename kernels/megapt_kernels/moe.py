"""Bringing tokens to their experts and back: rows sorted by expert, and the weighted sum of what the experts made.

A counting sort that keeps the order of tokens; no result depends on the order in which threads run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megapt_kernels import library
from megapt_kernels.arguments import check_tensors, check_whole
from megapt_kernels.registry import Implementation, Operation, Unsupported, without_data

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def moe_permute(x: Tensor, experts: Tensor, num_experts: int, *, impl: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """Copy each token's row once for each of its experts, sorted by expert and within one by token.

    x: [T, H], bf16, fp16 or fp32 (fp64 by the reference). experts: int32 or int64 [T, k], in [0, num_experts); -1 drops
    that copy. Returns rows [T k, H]; order [T k], int64: row p is that of slot order[p], token order[p] // k and its
    choice order[p] % k; and counts [num_experts], int64: rows of each expert. Rows that were dropped come after all
    others: they are zero, and their order is -1. Differentiable in x; a token's gradients are added up in fp32.

    Another expert is an error in the reference. On a GPU, which is not waited for, its row is NaN, comes last as if it
    had been dropped, and has order -2 - slot, by which `moe_unpermute` makes its token NaN.
    """
    return _permute(x, experts, num_experts, impl=impl)


def moe_unpermute(rows: Tensor, order: Tensor, weights: Tensor, *, impl: str = "auto") -> Tensor:
    """Each token's sum of its rows times their weights: [T, H] in the rows' dtype, added up in fp32, rounded once.

    rows: [T k, H], what experts made of `moe_permute`'s rows. order: as `moe_permute` returned it. weights: fp32 [T, k]
    (fp64 for fp64 rows). Dropped rows take no part, whatever they hold. Differentiable in rows and weights.
    """
    return _unpermute(rows, order, weights, impl=impl)


def _check_permute(x: Tensor, experts: Tensor, num_experts: int) -> None:
    check_tensors("moe_permute", x=x, experts=experts)
    check_whole("moe_permute", num_experts=num_experts)
    if x.dim() != 2 or x.dtype not in _DTYPES:
        raise Unsupported(
            f"moe_permute: x is [T, H] of {', '.join(map(str, _DTYPES))}, not {list(x.shape)} of {x.dtype}"
        )
    if experts.dtype not in (torch.int32, torch.int64):
        raise Unsupported(f"moe_permute: experts are int32 or int64, not {experts.dtype}")
    if experts.dim() != 2 or experts.shape[0] != x.shape[0] or experts.shape[1] < 1:
        raise Unsupported(f"moe_permute: experts are [T = {x.shape[0]}, k >= 1], not {list(experts.shape)}")
    if experts.device != x.device:
        raise Unsupported(f"moe_permute: experts are on {x.device} as x, not on {experts.device}")
    if num_experts < 1:
        raise Unsupported(f"moe_permute: num_experts is at least 1, not {num_experts}")


def _check_unpermute(rows: Tensor, order: Tensor, weights: Tensor) -> None:
    check_tensors("moe_unpermute", rows=rows, order=order, weights=weights)
    if rows.dim() != 2 or rows.dtype not in _DTYPES:
        raise Unsupported(
            f"moe_unpermute: rows are [T k, H] of {', '.join(map(str, _DTYPES))}, not {list(rows.shape)} of "
            f"{rows.dtype}"
        )
    if order.dtype != torch.int64 or order.shape != rows.shape[:1]:
        raise Unsupported(f"moe_unpermute: order is int64 [{rows.shape[0]}], not {order.dtype} {list(order.shape)}")
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    if weights.dtype != wide or weights.dim() != 2 or weights.numel() != len(rows) or weights.shape[1] < 1:
        raise Unsupported(
            f"moe_unpermute: weights are {wide} [T, k >= 1] with T k = {len(rows)}, not {weights.dtype} "
            f"{list(weights.shape)}"
        )
    for name, t in (("order", order), ("weights", weights)):
        if t.device != rows.device:
            raise Unsupported(f"moe_unpermute: {name} is on {rows.device} as rows, not on {t.device}")


# ---- reference


def _takes_all(*arguments: Any, **keywords: Any) -> None:
    return None


def _insist(holds: Tensor, message: str) -> None:
    if torch.compiler.is_compiling() or without_data((holds,)):
        torch._assert_async(holds, message)
    elif not holds:
        raise Unsupported(message)


def _reference_permute(x: Tensor, experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    bin_of = experts.reshape(-1).long()
    inside = ((bin_of >= -1) & (bin_of < num_experts)).all()
    _insist(inside, f"moe_permute: experts lie in [0, {num_experts}), or are -1 to drop a token's copy")
    bin_of = torch.where(bin_of < 0, num_experts, bin_of)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=x.device)
    counts.scatter_add_(0, bin_of, torch.ones_like(bin_of))
    order = torch.argsort(bin_of, stable=True)
    dropped = bin_of[order] == num_experts
    rows = x.index_select(0, order // experts.shape[1]).masked_fill(dropped.unsqueeze(1), 0)
    return rows, torch.where(dropped, -1, order), counts[:num_experts]


def _reference_unpermute(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    slots = len(order)
    _insist((order >= -1).all(), "moe_unpermute: order has marks of experts that there are not")
    _insist(
        (order < slots).all(), f"moe_unpermute: order has slots in [0, {slots}), the rows, and -1 for those dropped"
    )
    place = torch.full((slots + 1,), -1, dtype=torch.int64, device=order.device)
    place.scatter_(0, torch.where(order < 0, slots, order), torch.arange(slots, device=order.device))
    _insist((place[:slots] >= 0).sum() == (order >= 0).sum(), "moe_unpermute: order has a slot more than once")
    last = (order[:-1] >= 0) | (order[1:] < 0)
    _insist(last.all(), "moe_unpermute: order has a dropped row before one that is not")
    place = place[:slots].view(weights.shape)
    y = torch.zeros(weights.shape[0], rows.shape[1], dtype=weights.dtype, device=rows.device)
    if slots == 0:
        return y.to(rows.dtype)
    for at, weight in zip(place.unbind(1), weights.unbind(1), strict=True):
        row = rows.index_select(0, at.clamp_min(0)).masked_fill((at < 0).unsqueeze(1), 0)
        y = y + row.to(weights.dtype) * weight.unsqueeze(1)
    return y.to(rows.dtype)


# ---- ours (csrc/moe.cu)

MAX_EXPERTS = 1024


def _cuda_permute_supports(x: Tensor, experts: Tensor, num_experts: int) -> str | None:
    if num_experts > MAX_EXPERTS:
        return f"num_experts is {num_experts}; the kernel takes up to {MAX_EXPERTS}"
    return _cuda_supports(x, experts.numel())


def _cuda_unpermute_supports(rows: Tensor, order: Tensor, weights: Tensor) -> str | None:
    return _cuda_supports(rows, order.numel())


def _cuda_supports(x: Tensor, slots: int) -> str | None:
    if x.dtype == torch.float64:
        return "rows are torch.float64; the kernel computes in float32"
    if slots >= 1 << 30:
        return f"T x k is {slots}; the kernel takes fewer than 2^30"
    return library.missing(x.device)


def _cuda_permute(x: Tensor, experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    rows, order, _, counts = torch.ops.megapt_kernels.moe_permute(x.contiguous(), experts.contiguous(), num_experts)
    return rows, order, counts


def _cuda_unpermute(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    y, _ = torch.ops.megapt_kernels.moe_unpermute(rows.contiguous(), order.contiguous(), weights.contiguous())
    return y


def _register() -> None:
    @torch.library.register_fake("megapt_kernels::moe_permute")
    def _(x: Tensor, experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        slots = experts.numel()
        order, counts = (experts.new_empty(n, dtype=torch.int64) for n in (slots, num_experts))
        return x.new_empty(slots, x.shape[1]), order, experts.new_empty(experts.shape, dtype=torch.int32), counts

    @torch.library.register_fake("megapt_kernels::moe_unpermute")
    def _(rows: Tensor, order: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        y = rows.new_empty(weights.shape[0], rows.shape[1])
        return y, order.new_empty(weights.shape, dtype=torch.int32)

    @torch.library.register_fake("megapt_kernels::moe_sum")
    def _(rows: Tensor, place: Tensor) -> Tensor:
        return rows.new_empty(place.shape[0], rows.shape[1])

    @torch.library.register_fake("megapt_kernels::moe_unpermute_backward")
    def _(dy: Tensor, rows: Tensor, order: Tensor, place: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        return torch.empty_like(rows), torch.empty_like(weights)

    ops = torch.ops.megapt_kernels

    def save_permute(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(output[2])

    def permute_backward(ctx: Any, grad: Tensor, *others: Any) -> tuple[Any, ...]:
        return ops.moe_sum(grad.contiguous(), *ctx.saved_tensors), None, None

    def save_unpermute(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        rows, order, weights = inputs
        ctx.save_for_backward(rows, order, output[1], weights)

    def unpermute_backward(ctx: Any, grad: Tensor, *others: Any) -> tuple[Any, ...]:
        drows, dweights = ops.moe_unpermute_backward(grad.contiguous(), *ctx.saved_tensors)
        return drows, None, dweights

    once = once_differentiable
    torch.library.register_autograd("megapt_kernels::moe_permute", once(permute_backward), setup_context=save_permute)
    torch.library.register_autograd(
        "megapt_kernels::moe_unpermute", once(unpermute_backward), setup_context=save_unpermute
    )


library.on_load(_register)

_permute = Operation(
    "moe_permute",
    _check_permute,
    (
        Implementation("cuda", "cuda", _cuda_permute_supports, _cuda_permute),
        Implementation("reference", "reference", _takes_all, _reference_permute),
    ),
)
_unpermute = Operation(
    "moe_unpermute",
    _check_unpermute,
    (
        Implementation("cuda", "cuda", _cuda_unpermute_supports, _cuda_unpermute),
        Implementation("reference", "reference", _takes_all, _reference_unpermute),
    ),
)
OPERATIONS = {"moe_permute": _permute, "moe_unpermute": _unpermute}
