"""AdamW on flat shards, and the sum of squares that clipping needs.

Decoupled weight decay (arXiv 1711.05101) in torch's arithmetic: a shard's masters, moments and the 16-bit copy of its
weights are read and written once, whatever number of shards there is, and nothing waits for the device.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from megapt_kernels import library
from megapt_kernels.arguments import check_numbers, check_tensors
from megapt_kernels.blocks import row_blocks
from megapt_kernels.registry import Implementation, Operation, Unsupported, without_data

_WEIGHTS = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class AdamWShard:
    """A run of elements under one treatment: flat, contiguous tensors of one size on one device.

    master, grad, exp_avg, exp_avg_sq: fp32, or fp64 for proofs. weights: the bf16 or fp16 copy of master to write, or
    None. weight_decay: decoupled, in units of the learning rate. lr_factor: on the learning rate.
    """

    master: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    weights: Tensor | None = None
    weight_decay: float = 0.0
    lr_factor: float = 1.0


@torch.no_grad()
def adamw_step_(
    shards: Sequence[AdamWShard],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    step: Tensor,
    scale: Tensor,
    skip: Tensor,
    impl: str = "auto",
) -> None:
    """One update of all shards in place, with gradients divided by `scale`; where `skip` is 1 nothing changes.

    step: how many updates are made with this one, at least 1. step, scale, skip: fp32 scalars on the shards' device,
    which the host does not read. The weights are the masters rounded to nearest. Gradients are used up: some
    implementations leave them divided by `scale`.
    """
    _check_list("adamw_step_", "shards", shards, AdamWShard)
    if not shards:
        return
    options: dict[str, Any] = dict(lr=lr, betas=betas, eps=eps, step=step, scale=scale, skip=skip)
    _step(shards, **options, impl=impl)
    if not torch.compiler.is_compiling():  # as PyTorch's own operators do, for autograd to notice
        written = [(s.master, s.exp_avg, s.exp_avg_sq, *(() if s.weights is None else (s.weights,))) for s in shards]
        torch.autograd.graph.increment_version([t for tensors in written for t in tensors])


@torch.no_grad()
def squared_norm(tensors: Sequence[Tensor], *, device: torch.device | None = None, impl: str = "auto") -> Tensor:
    """The sum of the squares of all elements of 1-D fp32 (or fp64) tensors: an fp64 scalar on their device.

    The same tensors give the same bits. Squares are exact and sums fp64's, but for `torch`, which adds up a block of
    elements in fp32: there elements beyond 1.8e19 give infinity. device: of the zero that no tensors give.
    """
    _check_list("squared_norm", "tensors", tensors, Tensor)
    return _norm(tensors, device=device, impl=impl)


# ---- what is asked for


def _check_list(op: str, name: str, items: Any, kind: type) -> None:
    if not isinstance(items, (list, tuple)):
        raise Unsupported(f"{op}: {name} is a list of {kind.__name__}, not {type(items).__name__}")
    for number, item in enumerate(items):
        if not isinstance(item, kind):
            raise Unsupported(f"{op}: {name}[{number}] is of type {kind.__name__}, not {type(item).__name__}")


def _check_step(
    shards: Sequence[AdamWShard],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    step: Tensor,
    scale: Tensor,
    skip: Tensor,
) -> None:
    check_numbers("adamw_step_", lr=lr, eps=eps)
    pair = isinstance(betas, (list, tuple)) and len(betas) == 2 and all(isinstance(b, (int, float)) for b in betas)
    if not (pair and all(0 <= beta < 1 for beta in betas)):
        raise Unsupported(f"adamw_step_: betas are two numbers in [0, 1), not {betas!r}")
    for name, number in (("lr", lr), ("eps", eps)):
        if number < 0:
            raise Unsupported(f"adamw_step_: {name} is a finite number of at least 0, not {number!r}")
    if not shards:
        return
    check_tensors("adamw_step_", step=step, scale=scale, skip=skip)
    check_tensors("adamw_step_", **{"shards[0].master": shards[0].master})
    device, dtype = shards[0].master.device, shards[0].master.dtype
    if dtype not in (torch.float32, torch.float64):
        raise Unsupported(f"adamw_step_: shards[0].master is float32 or float64, not {dtype}")
    for name, scalar in (("step", step), ("scale", scale), ("skip", skip)):
        if scalar.numel() != 1 or scalar.dim() > 1 or scalar.dtype != torch.float32 or scalar.device != device:
            raise Unsupported(
                f"adamw_step_: {name} is a float32 scalar on {device}, not {scalar.dtype} {list(scalar.shape)} on "
                f"{scalar.device}"
            )
    for number, shard in enumerate(shards):
        for name in ("master", "grad", "exp_avg", "exp_avg_sq"):
            _check_flat(f"shards[{number}].{name}", getattr(shard, name), shard.master.shape, device, (dtype,))
        if shard.weights is not None:
            _check_flat(f"shards[{number}].weights", shard.weights, shard.master.shape, device, _WEIGHTS)
        factors = {"weight_decay": shard.weight_decay, "lr_factor": shard.lr_factor}
        check_numbers("adamw_step_", **{f"shards[{number}].{name}": value for name, value in factors.items()})
    if not (torch.compiler.is_compiling() or without_data([shard.master for shard in shards])):
        _check_apart(shards)


def _check_apart(shards: Sequence[AdamWShard]) -> None:
    """Unsupported where tensors share memory: the kernels read and write them in no order."""
    places = []
    for number, shard in enumerate(shards):
        for name in ("master", "grad", "exp_avg", "exp_avg_sq", "weights"):
            t = getattr(shard, name)
            if t is not None and t.is_neg():
                raise Unsupported(
                    f"adamw_step_: shards[{number}].{name} is a negated view; resolve_neg() makes it plain"
                )
            if t is not None and t.numel():
                places.append((t.data_ptr(), t.data_ptr() + t.nbytes, number, name))
    places.sort()
    for (_, end, number, name), (start, _, other, another) in pairwise(places):
        if start < end:
            raise Unsupported(
                f"adamw_step_: shards[{number}].{name} and shards[{other}].{another} share memory; each has its own"
            )


def _check_flat(
    name: str,
    t: Tensor,
    shape: torch.Size,
    device: torch.device,
    dtypes: Sequence[torch.dtype],
    op: str = "adamw_step_",
) -> None:
    check_tensors(op, **{name: t})
    if t.dim() != 1 or t.shape != shape or not t.is_contiguous():
        raise Unsupported(
            f"{op}: {name} is contiguous with shape {list(shape)}, 1-D, not {list(t.shape)} with strides {t.stride()}"
        )
    if t.dtype not in dtypes:
        raise Unsupported(f"{op}: {name} is one of {', '.join(map(str, dtypes))}, not {t.dtype}")
    if t.device != device:
        raise Unsupported(f"{op}: {name} is on {device} as the others, not on {t.device}")


def _check_norm(tensors: Sequence[Tensor], *, device: torch.device | None = None) -> None:
    if device is not None and not isinstance(device, torch.device):
        raise Unsupported(f"squared_norm: device is a torch.device, not {type(device).__name__}")
    for number, t in enumerate(tensors):
        # A device may be given without an index: it is whichever of its type the tensors are on.
        expected = tensors[0].device if device is None or device.type == t.device.type else device
        dtypes = (tensors[0].dtype,) if number else (torch.float32, torch.float64)
        _check_flat(f"tensors[{number}]", t, torch.Size([t.numel()]), expected, dtypes, "squared_norm")


# ---- reference


def _takes_all(*arguments: Any, **keywords: Any) -> None:
    return None


def _reference_step(
    shards: Sequence[AdamWShard],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    step: Tensor,
    scale: Tensor,
    skip: Tensor,
) -> None:
    """As torch's fused kernel: bias corrections in fp64, the moments' arithmetic in the shards' precision."""
    beta1, beta2 = betas
    wide = step.double()
    correction1, correction2 = 1 - beta1**wide, (1 - beta2**wide).sqrt()
    kept = skip == 1
    for shard in shards:
        rate = lr * shard.lr_factor
        tensors = [shard.master, shard.grad, shard.exp_avg, shard.exp_avg_sq]
        tensors += [] if shard.weights is None else [shard.weights]
        for master, grad, exp_avg, exp_avg_sq, *weights in row_blocks(*tensors):
            g = grad / scale
            m = torch.lerp(exp_avg, g, 1 - beta1)
            v = (exp_avg_sq * beta2).addcmul_(g, g, value=1 - beta2)
            update = (m * (rate / correction1)).div_((v.sqrt() / correction2).add_(eps))
            new = (master * (1 - rate * shard.weight_decay)).sub_(update)
            for old, value in ((master, new), (exp_avg, m), (exp_avg_sq, v), *((w, new.to(w.dtype)) for w in weights)):
                old.copy_(torch.where(kept, old, value))


def _reference_norm(tensors: Sequence[Tensor], *, device: torch.device | None = None) -> Tensor:
    total = _zero(tensors, device)
    for t in tensors:
        for (block,) in row_blocks(t):
            total += block.double().square().sum()  # of fp64, double() is the gradient itself
    return total


def _zero(tensors: Sequence[Tensor], device: torch.device | None) -> Tensor:
    return torch.zeros((), dtype=torch.float64, device=tensors[0].device if tensors else device)


# ---- torch's own fused kernel, and apex's


def _grouped(shards: Sequence[AdamWShard]) -> Iterator[tuple[float, float, list[AdamWShard]]]:
    """(weight decay, factor on the learning rate, the shards that have both)."""
    groups: dict[tuple[float, float], list[AdamWShard]] = {}
    for shard in shards:
        if shard.master.numel():
            groups.setdefault((shard.weight_decay, shard.lr_factor), []).append(shard)
    for (decay, factor), members in groups.items():
        yield decay, factor, members


def _publish(shards: Sequence[AdamWShard], skip: Tensor) -> None:
    for shard in shards:
        if shard.weights is None:
            continue
        if skip.device.type == "cpu":
            shard.weights.copy_(shard.master)  # the caller has seen that nothing is skipped
        else:
            shard.weights.copy_(torch.where(skip == 1, shard.weights, shard.master.to(shard.weights.dtype)))


def _torch_supports(shards: Sequence[AdamWShard], **options: Any) -> str | None:
    return "torch.compile does not take torch's fused AdamW" if torch.compiler.is_compiling() else None


def _torch_step(
    shards: Sequence[AdamWShard],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    step: Tensor,
    scale: Tensor,
    skip: Tensor,
) -> None:
    if skip.device.type == "cpu" and skip == 1:
        return
    for decay, factor, members in _grouped(shards):
        torch._fused_adamw_(
            [m.master for m in members],
            [m.grad for m in members],
            [m.exp_avg for m in members],
            [m.exp_avg_sq for m in members],
            [],
            [step] * len(members),
            lr=lr * factor,
            beta1=betas[0],
            beta2=betas[1],
            weight_decay=decay,
            eps=eps,
            amsgrad=False,
            maximize=False,
            grad_scale=scale,
            found_inf=skip,
        )
    _publish(shards, skip)


# What a CPU adds up one by one in fp32 loses a thousandth by a million elements; a GPU's kernel works in blocks itself.
_NORM_BLOCK = 1 << 15


def _torch_norm(tensors: Sequence[Tensor], *, device: torch.device | None = None) -> Tensor:
    blocks = list(tensors)
    if blocks and blocks[0].device.type == "cpu":
        blocks = [block for tensor in tensors for block in tensor.split(_NORM_BLOCK)]
    if not blocks:
        return _zero(tensors, device)
    return torch.stack(torch._foreach_norm(blocks)).double().square().sum()


def _apex_supports(shards: Sequence[AdamWShard], **options: Any) -> str | None:
    if not shards:
        return None
    if shards[0].master.device.type != "cuda":
        return f"NVIDIA apex runs on CUDA devices, not on {shards[0].master.device.type}"
    if shards[0].master.dtype != torch.float32:
        return f"masters are {shards[0].master.dtype}; apex computes in float32"
    if any(s.master.numel() >= 1 << 31 for s in shards):
        return "apex counts elements in 32 bits: a shard has 2^31 or more"
    return _apex_missing()


@functools.cache
def _apex_missing() -> str | None:
    # Not `apex`: the package of that name in the public index is another project.
    if importlib.util.find_spec("amp_C") is None:
        return "NVIDIA apex with its CUDA extensions (amp_C) is not installed"
    try:
        module = importlib.import_module("amp_C")
    except ImportError as error:
        return f"NVIDIA apex does not load: {error}"
    return None if hasattr(module, "multi_tensor_adam_capturable") else "this apex is too old: no capturable Adam"


def _apex_step(
    shards: Sequence[AdamWShard],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    step: Tensor,
    scale: Tensor,
    skip: Tensor,
) -> None:
    """The variant that reads step, rate and scale on the device; bias corrections are of betas rounded to fp32."""
    adam = importlib.import_module("amp_C").multi_tensor_adam_capturable
    decoupled, corrected, chunk = 1, 1, 1 << 16
    number, inverse, noop = step.int(), scale.reciprocal(), (skip == 1).int().view(1)
    for decay, factor, members in _grouped(shards):
        lists = [[getattr(m, name) for m in members] for name in ("grad", "master", "exp_avg", "exp_avg_sq")]
        rate = torch.full((1,), lr * factor, dtype=torch.float32, device=step.device)
        adam(chunk, noop, lists, rate, *betas, eps, number, decoupled, corrected, decay, inverse)
    _publish(shards, skip)


# ---- ours (csrc/adamw.cu)


def _cuda_supports(shards: Sequence[AdamWShard], **options: Any) -> str | None:
    if not shards:
        return None
    if shards[0].master.dtype != torch.float32:
        return f"masters are {shards[0].master.dtype}; the kernel computes in float32"
    return library.missing(shards[0].master.device)


def _cuda_step(
    shards: Sequence[AdamWShard],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    step: Tensor,
    scale: Tensor,
    skip: Tensor,
) -> None:
    by_weights: dict[torch.dtype | None, list[AdamWShard]] = {}
    for shard in shards:
        by_weights.setdefault(None if shard.weights is None else shard.weights.dtype, []).append(shard)
    for members in by_weights.values():
        torch.ops.megapt_kernels.adamw_step_(
            [m.master for m in members],
            [m.grad for m in members],
            [m.exp_avg for m in members],
            [m.exp_avg_sq for m in members],
            [m.weights for m in members if m.weights is not None],
            [lr * m.lr_factor for m in members],
            [m.weight_decay for m in members],
            betas[0],
            betas[1],
            eps,
            step,
            scale,
            skip,
        )


def _cuda_norm_supports(tensors: Sequence[Tensor], *, device: torch.device | None = None) -> str | None:
    if not tensors:
        return "there is nothing to add up"
    if tensors[0].dtype != torch.float32:
        return f"tensors are {tensors[0].dtype}; the kernel reads float32"
    return library.missing(tensors[0].device)


def _cuda_norm(tensors: Sequence[Tensor], *, device: torch.device | None = None) -> Tensor:
    return torch.ops.megapt_kernels.squared_norm(list(tensors))


def _register_fakes() -> None:
    @torch.library.register_fake("megapt_kernels::adamw_step_")
    def _(*arguments: Any) -> None:
        return None

    @torch.library.register_fake("megapt_kernels::squared_norm")
    def _(tensors: list[Tensor]) -> Tensor:
        return tensors[0].new_empty((), dtype=torch.float64)


library.on_load(_register_fakes)

_step = Operation(
    "adamw_step_",
    _check_step,
    (
        Implementation("cuda", "cuda", _cuda_supports, _cuda_step),
        Implementation("library", "apex", _apex_supports, _apex_step),
        Implementation("library", "torch", _torch_supports, _torch_step),
        Implementation("reference", "reference", _takes_all, _reference_step),
    ),
)
_norm = Operation(
    "squared_norm",
    _check_norm,
    (
        Implementation("cuda", "cuda", _cuda_norm_supports, _cuda_norm),
        Implementation("library", "torch", _takes_all, _torch_norm),
        Implementation("reference", "reference", _takes_all, _reference_norm),
    ),
)
OPERATIONS = {"adamw_step_": _step, "squared_norm": _norm}
