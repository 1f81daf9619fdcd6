"""Cross entropy over a vocabulary that may be cut over ranks, alone and with the projection that makes the logits.

    loss[t] = log(sum over v of exp(logits[t, v])) - logits[t, target[t]]

Each rank reduces its columns to three numbers per token (maximum, sum of exponentials, target logit), one all-gather of
[3, T] makes the loss of them, and the gradient takes the logits' place. Nothing else of the size of the logits is made.

What a row of logits with NaN, with +inf, or of -inf alone gives is NaN, as PyTorch's own cross entropy does. A target
that is neither `ignore_index` nor in any rank's columns raises IndexError on a CPU with the reference; elsewhere, where
looking would hold up the device, its loss and the row's gradient are NaN. Ignored tokens have a loss and a gradient of
exactly zero, whatever their logits.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megapt_kernels.arguments import check_numbers, check_tensors, check_whole, check_written
from megapt_kernels.cross_entropy_blocks import (
    AllGather,
    CudaSoftmax,
    PlainSoftmax,
    Rules,
    gather_of,
    gathered,
)
from megapt_kernels.registry import Implementation, Operation, Unsupported, without_autocast
from megapt_kernels.wgrad import wgrad_accumulate_

_Softmax = type[PlainSoftmax] | type[CudaSoftmax]

# Logits per block, on the CPU and on a GPU: small enough for a cache, or large enough that reading the weight and
# adding to its gradient once per block costs little beside the products.
_BLOCK_ELEMENTS = (1 << 23, 1 << 28)


def block_tokens(tokens: int, columns: int, gpu: bool) -> int:
    """Tokens whose logits exist at a time, at least 1: whole tiles of a GPU's products, where there are so many."""
    most = max(1, _BLOCK_ELEMENTS[gpu] // columns)
    if gpu and most > 128:
        most -= most % 128
    return max(1, min(most, tokens))


def vocab_parallel_cross_entropy(
    logits: Tensor,
    target: Tensor,
    group: Any = None,
    *,
    start: int | None = None,
    length: int | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    z_loss: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """Loss [T] of each token in fp32, 0 where it is ignored, of logits [T, V_local]: this rank's columns.

    THE LOGITS ARE CONSUMED: their gradient is written over them, so that nothing may read them after the backward pass,
    and a second one is refused. (Not under torch.compile, which has its own way to share memory.)

    logits: bf16, fp16 or fp32. target [T] int64: ids of the whole vocabulary, the same on all ranks. group: the process
    group over which the vocabulary is cut; None for a vocabulary that is whole. start: the id of this rank's first
    column (default: rank x V_local). length: how many columns are real; those behind are padding, take no part and get
    a gradient of zero (default: all). softcap: logits become cap x tanh(logits / cap) (Gemma 2, arXiv 2408.00118).
    z_loss: weight of log(Z)^2, Z the softmax's denominator (PaLM, arXiv 2204.02311): in the gradient only, not in the
    value. The gradient is exact; nothing small is filtered out of it.
    """
    check_tensors("vocab_parallel_cross_entropy", logits=logits)
    start, length = _columns("vocab_parallel_cross_entropy", logits, -1, group, start, length)
    return OPERATIONS["vocab_parallel_cross_entropy"](
        logits, target, group, start=start, length=length, ignore_index=ignore_index, softcap=softcap, z_loss=z_loss,
        impl=impl,
    )  # fmt: skip


def linear_cross_entropy(
    h: Tensor,
    weight: Tensor,
    target: Tensor,
    group: Any = None,
    *,
    start: int | None = None,
    length: int | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    z_loss: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """The cross entropy of logits h W^T summed over tokens, a scalar in fp32; the logits never exist as a whole.

    h [T, H], weight [V_local, H] of one dtype; the rest as in `vocab_parallel_cross_entropy`. Logits are made for one
    block of tokens at a time, in the forward pass, and turned at once into the gradients of h and of the weight (summed
    in fp32), which the backward pass only scales. With a group, h is the same on all ranks and so is its gradient.
    """
    check_tensors("linear_cross_entropy", weight=weight)
    start, length = _columns("linear_cross_entropy", weight, 0, group, start, length)
    return OPERATIONS["linear_cross_entropy"](
        h, weight, target, group, start=start, length=length, ignore_index=ignore_index, softcap=softcap, z_loss=z_loss,
        impl=impl,
    )  # fmt: skip


def _columns(
    op: str, tensor: Tensor, dimension: int, group: Any, start: int | None, length: int | None
) -> tuple[int, int]:
    if tensor.dim() != 2:
        name = "logits" if dimension else "weight"
        raise Unsupported(f"{op}: {name} has two dimensions, not shape {tuple(tensor.shape)}")
    if group is not None and not (hasattr(group, "rank") and hasattr(group, "size")):
        raise Unsupported(f"{op}: group is a process group or None, not {type(group).__name__}")
    columns = tensor.shape[dimension]
    if start is None:
        start = 0 if group is None else group.rank() * columns
    return start, columns if length is None else length


@torch.no_grad()
def linear_cross_entropy_with_gradients(
    h: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    all_gather: AllGather | None = None,
    ranks: int = 1,
    start: int = 0,
    length: int | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    z_loss: float = 0.0,
    training: bool = True,
    impl: str = "auto",
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What `linear_cross_entropy` computes, without autograd: (loss summed over tokens, a scalar in fp32; dh [T, H] in
    h's dtype: this rank's part, still to be summed over ranks; dw [V_local, H] in fp32). No gradients unless training.
    """
    start, length = _columns("linear_cross_entropy", weight, 0, None, start, length)
    keywords = dict(start=start, length=length, ignore_index=ignore_index, softcap=softcap, z_loss=z_loss)
    softmax_type: _Softmax = _SOFTMAX.choose(h, weight, labels, impl=impl, **keywords).run  # type: ignore[assignment]
    rules = Rules(start, length, ignore_index, softcap, z_loss)
    with without_autocast():
        return _with_gradients(softmax_type, rules, h, weight, labels, all_gather, ranks, training)


def _with_gradients(
    softmax_type: _Softmax, rules: Rules, h: Tensor, weight: Tensor, labels: Tensor, all_gather: AllGather | None,
    ranks: int, training: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    wide = torch.promote_types(h.dtype, torch.float32)
    dh = torch.empty_like(h) if training else None
    dw: Tensor | None = None
    total = torch.zeros((), dtype=wide, device=h.device)
    block = block_tokens(len(h), len(weight), h.device.type != "cpu")
    buffer = h.new_empty(block, len(weight))
    softmax = softmax_type(rules, buffer, training, consume=True)
    for at in range(0, len(h), block):
        part, target = h[at : at + block], labels[at : at + block]
        logits = torch.mm(part, weight.t(), out=buffer[: len(part)])
        losses, tokens = softmax.combine(gathered(softmax.stats(logits, target), ranks, all_gather), target)
        total += losses.sum()
        if dh is not None:
            softmax.gradient_(logits, target, tokens)
            torch.mm(logits, weight, out=dh[at : at + block])
            dw = _with_product(dw, logits, part, wide)
    if training and dw is None:
        dw = torch.zeros_like(weight, dtype=wide)
    return total, dh, dw


def _with_product(dw: Tensor | None, dy: Tensor, x: Tensor, wide: torch.dtype) -> Tensor:
    """dw + dy^T x in `wide`, in dw's place. On a CPU by a product of its own, which is what is fastest there."""
    if dy.device.type != "cpu":
        out = dy.new_empty(dy.shape[1], x.shape[1], dtype=wide) if dw is None else dw
        return wgrad_accumulate_(out, dy, x, fresh=dw is None)
    if dy.dtype == torch.float16:
        product = dy.t().to(wide) @ x.to(wide)  # a sum over many tokens may not fit fp16
    else:
        product = (dy.t() @ x).to(wide)
    return product if dw is None else dw.add_(product)


class _VocabParallelCrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, group: Any, softmax_type: _Softmax, rules: Rules) -> Tensor:
        ranks, all_gather = gather_of(group)
        block = _block(logits, softmax_type)
        softmax = softmax_type(rules, logits[:block], training=False, consume=False)
        parts = [softmax.stats(*part) for part in zip(logits.split(block), target.split(block), strict=True)]
        stats = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        losses, tokens = softmax.combine(gathered(stats, ranks, all_gather), target)
        ctx.save_for_backward(logits, target, tokens)
        ctx.softmax_type, ctx.rules = softmax_type, rules
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        logits, target, tokens = _saved(ctx)
        # A compiler decides itself what is written over what, and takes no backward pass that changes its inputs.
        gradient = logits.clone() if torch.compiler.is_compiling() else logits.detach()
        block = _block(gradient, ctx.softmax_type)
        softmax = ctx.softmax_type(ctx.rules, gradient[:block], training=True, consume=True)
        split = [t.split(block) for t in (gradient, target, slope)]
        for rows, ids, slopes, numbers in zip(*split, tokens.split(block, 1), strict=True):
            if softmax.needs_stats:
                softmax.stats(rows, ids)
            softmax.gradient_(rows, ids, numbers, slopes)
        return gradient, None, None, None, None


def _block(logits: Tensor, softmax_type: _Softmax) -> int:
    """Tokens at a time: with memory to work in, as many as a block has."""
    tokens, columns = logits.shape
    return block_tokens(tokens, columns, logits.device.type != "cpu") if softmax_type.needs_stats else max(1, tokens)


def _saved(ctx: Any) -> tuple[Tensor, ...]:
    if torch.compiler.is_compiling():
        return ctx.saved_tensors
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise RuntimeError(
            "vocab_parallel_cross_entropy: the logits are no longer what the forward pass read. Their gradient takes "
            "their place: there is one backward pass, and nobody else may write to them before it"
        ) from error


class _LinearCrossEntropy(Function):
    @staticmethod
    def forward(
        ctx: Any, h: Tensor, weight: Tensor, target: Tensor, group: Any, softmax_type: _Softmax, rules: Rules,
        training: bool,
    ) -> Tensor:  # fmt: skip
        ranks, all_gather = gather_of(group)
        total, dh, dw = _with_gradients(softmax_type, rules, h, weight, target, all_gather, ranks, training)
        if dh is not None and dw is not None:
            if ranks > 1:
                torch.distributed.all_reduce(dh, group=group)
            ctx.save_for_backward(dh, dw)
            ctx.dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        dh, dw = ctx.saved_tensors
        return *scaled_gradients(dh, dw, slope, ctx.dtype), None, None, None, None, None


def scaled_gradients(dh: Tensor, dw: Tensor, slope: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """dh and dw times the loss' slope (a scalar in dw's dtype): dh in its own dtype, dw in the weight's, each rounded
    once, without a copy of dw in fp32."""
    # The slope, often one over a number of tokens, must not be rounded to 16 bits: it would bias every gradient.
    return (dh.to(dw.dtype) * slope).to(dh.dtype), torch.mul(dw, slope, out=torch.empty_like(dw, dtype=dtype))


_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def _check_rules(
    op: str, columns: int, start: int, length: int, ignore_index: int, softcap: float | None, z_loss: float
) -> None:
    check_whole(op, start=start, length=length, ignore_index=ignore_index)
    check_numbers(op, z_loss=z_loss, **({} if softcap is None else {"softcap": softcap}))
    if columns < 1:
        raise Unsupported(f"{op}: a rank has at least one column of logits, not 0")
    if start < 0:
        raise Unsupported(f"{op}: start is 0 or more, not {start}")
    if not 0 <= length <= columns:
        raise Unsupported(f"{op}: length is from 0 to the number of columns, {columns}, not {length}")
    if softcap is not None and not softcap > 0:
        raise Unsupported(f"{op}: softcap is above 0, or None for none; not {softcap}")
    if not z_loss >= 0:
        raise Unsupported(f"{op}: z_loss is 0 or more, not {z_loss}")


def _check_target(op: str, target: Tensor, tokens: int, device: torch.device) -> None:
    check_tensors(op, target=target)
    if target.dtype != torch.int64:
        raise Unsupported(f"{op}: target is int64, not {target.dtype}")
    if target.shape != (tokens,):
        raise Unsupported(f"{op}: target has shape {(tokens,)}, one id for each token, not {tuple(target.shape)}")
    if target.device != device:
        raise Unsupported(f"{op}: target is on {target.device}, the rest on {device}; all share one")


def _check_logits(
    logits: Tensor, target: Tensor, group: Any = None, *, start: int, length: int, ignore_index: int,
    softcap: float | None, z_loss: float,
) -> None:  # fmt: skip
    op = "vocab_parallel_cross_entropy"
    check_tensors(op, logits=logits)
    if logits.dim() != 2:
        raise Unsupported(f"{op}: logits has two dimensions, tokens and columns, not shape {tuple(logits.shape)}")
    if logits.dtype not in _DTYPES:
        raise Unsupported(f"{op}: logits is bf16, fp16, fp32 or fp64, not {logits.dtype}")
    _check_target(op, target, logits.shape[0], logits.device)
    _check_rules(op, logits.shape[1], start, length, ignore_index, softcap, z_loss)
    if logits.requires_grad:
        check_written(op, logits=logits)


def _check_linear(
    h: Tensor, weight: Tensor, target: Tensor, group: Any = None, *, start: int, length: int, ignore_index: int,
    softcap: float | None, z_loss: float,
) -> None:  # fmt: skip
    op = "linear_cross_entropy"
    check_tensors(op, h=h, weight=weight)
    for name, tensor in (("h", h), ("weight", weight)):
        if tensor.dim() != 2:
            raise Unsupported(f"{op}: {name} has two dimensions, not shape {tuple(tensor.shape)}")
    if h.dtype not in _DTYPES:
        raise Unsupported(f"{op}: h is bf16, fp16, fp32 or fp64, not {h.dtype}")
    if weight.dtype != h.dtype:
        raise Unsupported(f"{op}: weight has the dtype of h, {h.dtype}, not {weight.dtype}")
    if weight.device != h.device:
        raise Unsupported(f"{op}: weight is on {weight.device}, h on {h.device}; all share one")
    if weight.shape[1] != h.shape[1]:
        raise Unsupported(f"{op}: weight has rows as wide as those of h, {h.shape[1]}, not {weight.shape[1]}")
    _check_target(op, target, h.shape[0], h.device)
    _check_rules(op, weight.shape[0], start, length, ignore_index, softcap, z_loss)


def _fill(
    first: Tensor, second: Tensor, *rest: Any, start: int | None = None, length: int | None = None, **keywords: Any
) -> dict[str, Any]:
    """Of (logits, target, group) or (h, weight, target, group)."""
    check_tensors("cross entropy", logits=first, target=second)
    linear = second.dim() == 2
    group = rest[linear] if len(rest) > linear else keywords.get("group")
    op = "linear_cross_entropy" if linear else "vocab_parallel_cross_entropy"
    start, length = _columns(op, second if linear else first, 0 if linear else -1, group, start, length)
    return {"ignore_index": -100, "softcap": None, "z_loss": 0.0, **keywords, "start": start, "length": length}


def _by_blocks(softmax_type: _Softmax) -> Callable[..., Tensor]:
    def run(logits: Tensor, target: Tensor, group: Any = None, **keywords: Any) -> Tensor:
        return _VocabParallelCrossEntropy.apply(logits, target, group, softmax_type, Rules(**keywords))

    return run


def _linear(softmax_type: _Softmax) -> Callable[..., Tensor]:
    def run(h: Tensor, weight: Tensor, target: Tensor, group: Any = None, **keywords: Any) -> Tensor:
        # Asked here, since inside of the function gradients are always off.
        training = torch.is_grad_enabled() and (h.requires_grad or weight.requires_grad)
        return _LinearCrossEntropy.apply(h, weight, target, group, softmax_type, Rules(**keywords), training)

    return run


def _kernel_takes_logits(logits: Tensor, target: Tensor, group: Any = None, **keywords: Any) -> str | None:
    return CudaSoftmax.supports(logits)


def _kernel_takes_linear(h: Tensor, weight: Tensor, target: Tensor, group: Any = None, **keywords: Any) -> str | None:
    return CudaSoftmax.supports(h.new_empty(0, weight.shape[0]))


def _always(*arguments: Any, **keywords: Any) -> None:
    return None


def _alone(group: Any, start: int, z_loss: float) -> str | None:
    if group is not None and group.size() > 1:
        return f"takes a vocabulary that is whole, not cut over {group.size()} ranks"
    if start != 0:
        return f"takes a vocabulary from id 0 on, not from {start}"
    return None if z_loss == 0 else "has no z-loss that stays out of the loss' value"


def _torch_supports(logits: Tensor, target: Tensor, group: Any = None, *, start: int, softcap: float | None,
                    z_loss: float, **keywords: Any) -> str | None:  # fmt: skip
    return "has no soft cap" if softcap is not None else _alone(group, start, z_loss)


def _torch(logits: Tensor, target: Tensor, group: Any = None, *, length: int, ignore_index: int, **_: Any) -> Tensor:
    """In fp32, since it would round the loss of each token to the logits' dtype: a copy of them twice their size."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits[:, :length].to(wide), target, ignore_index=ignore_index, reduction="none")


def _liger(device: torch.device, dtype: torch.dtype, padding: int, group: Any, start: int, z_loss: float) -> str | None:
    if importlib.util.find_spec("liger_kernel") is None or importlib.util.find_spec("triton") is None:
        return "liger-kernel is not installed"
    if device.type != "cuda":
        return f"runs on CUDA devices, not on {device.type}"
    if dtype == torch.float64:
        return "takes bf16, fp16 and fp32, not torch.float64"
    return "takes no columns of padding" if padding else _alone(group, start, z_loss)


def _liger_takes_logits(logits: Tensor, target: Tensor, group: Any = None, *, start: int, length: int, z_loss: float,
                        **_: Any) -> str | None:  # fmt: skip
    return _liger(logits.device, logits.dtype, logits.shape[1] - length, group, start, z_loss)


def _liger_takes_linear(h: Tensor, weight: Tensor, target: Tensor, group: Any = None, *, start: int, length: int,
                        z_loss: float, **_: Any) -> str | None:  # fmt: skip
    return _liger(h.device, h.dtype, weight.shape[0] - length, group, start, z_loss)


def _liger_logits(logits: Tensor, target: Tensor, group: Any = None, *, ignore_index: int, softcap: float | None,
                  **_: Any) -> Tensor:  # fmt: skip
    """Consumes the logits in the forward pass, rounds losses to their dtype, and waits for the device."""
    from liger_kernel.transformers.functional import liger_cross_entropy

    keywords = dict(ignore_index=ignore_index, softcap=softcap, reduction="none")
    return liger_cross_entropy(logits, target, **keywords).float()


def _liger_linear(h: Tensor, weight: Tensor, target: Tensor, group: Any = None, *, ignore_index: int,
                  softcap: float | None, **_: Any) -> Tensor:  # fmt: skip
    """Would sum the weight's gradient in the weight's dtype unless told; waits for the device."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    keywords = dict(ignore_index=ignore_index, softcap=softcap, reduction="sum", accum_dtype=torch.float32)
    return liger_fused_linear_cross_entropy(h, weight, target, **keywords).float()


# The libraries' come last, by name only: they wait for the device, and round what ours leave in fp32.
OPERATIONS = {
    "vocab_parallel_cross_entropy": Operation(
        "vocab_parallel_cross_entropy",
        _check_logits,
        (
            Implementation("cuda", "cuda", _kernel_takes_logits, _by_blocks(CudaSoftmax)),
            Implementation("reference", "reference", _always, _by_blocks(PlainSoftmax)),
            Implementation("library", "liger", _liger_takes_logits, _liger_logits),
            Implementation("library", "torch", _torch_supports, _torch),
        ),
        _fill,
    ),
    "linear_cross_entropy": Operation(
        "linear_cross_entropy",
        _check_linear,
        (
            Implementation("cuda", "cuda", _kernel_takes_linear, _linear(CudaSoftmax)),
            Implementation("reference", "reference", _always, _linear(PlainSoftmax)),
            Implementation("library", "liger", _liger_takes_linear, _liger_linear),
        ),
        _fill,
    ),
}

_SOFTMAX = Operation(
    "linear_cross_entropy",
    _check_linear,
    (
        Implementation("cuda", "cuda", _kernel_takes_linear, CudaSoftmax),
        Implementation("reference", "reference", _always, PlainSoftmax),
    ),
)
