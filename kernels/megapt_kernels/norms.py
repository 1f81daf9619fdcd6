"""RMSNorm (arXiv 1910.07467) and LayerNorm (arXiv 1607.06450) of rows, alone or of a sum with a residual.

Statistics and products are fp32 (fp64 for fp64), and each result is rounded once. A row with NaN or infinities gives
what IEEE arithmetic gives of the formula: NaN where the formula is undefined, and in the weight's gradient too.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megapt_kernels import library
from megapt_kernels.arguments import check_numbers, check_tensors
from megapt_kernels.blocks import row_blocks
from megapt_kernels.registry import Implementation, Operation, Unsupported

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
KERNEL_FLOATS = FLOATS[:3]  # of the kernels, ours and the libraries'


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    *,
    offset: float = 0.0,
    impl: str = "auto",
) -> Any:
    """y = s (weight + offset) / sqrt(mean(s^2) + eps) for each row of s = x, or s = x + residual.

    x, residual: [..., H], bf16, fp16, fp32 or fp64; weight: [H], of any of these dtypes. Returns y as x, and with a
    residual (y, s); s is rounded to x's dtype before it is normalised. All are differentiable. Rows whose squares
    overflow fp32 (elements beyond about 1e19) become zeros. Raises Unsupported for other arguments.
    """
    return OPERATIONS["rms_norm"](x, weight, eps, residual, offset=offset, impl=impl)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, residual: Tensor | None = None, *, impl: str = "auto"
) -> Any:
    """y = (s - mean(s)) weight / sqrt(var(s) + eps) + bias for each row of s = x, or s = x + residual.

    Shapes, dtypes, results and errors as of `rms_norm`; bias: [H] in the weight's dtype.
    """
    return OPERATIONS["layer_norm"](x, weight, bias, eps, residual, impl=impl)


# What every implementation needs of the arguments.


def check_floats(op: str, argument: str, t: Tensor) -> None:
    """Unsupported unless the argument is a tensor of floats."""
    check_tensors(op, **{argument: t})
    if t.dtype not in FLOATS:
        raise Unsupported(f"{op}: {argument} must be {_named(FLOATS)}, not {t.dtype}")


def _check(op: str, x: Tensor, vectors: dict[str, Tensor], eps: float, residual: Tensor | None) -> None:
    check_floats(op, "x", x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise Unsupported(f"{op}: x must have rows of at least one element, not the shape {list(x.shape)}")
    for name, vector in vectors.items():
        check_floats(op, name, vector)
        if tuple(vector.shape) != (x.shape[-1],):
            raise Unsupported(f"{op}: {name} must have shape [{x.shape[-1]}] as x's rows, not {list(vector.shape)}")
        if vector.device != x.device:
            raise Unsupported(f"{op}: {name} is on {vector.device} and x on {x.device}; they must be on one device")
    check_numbers(op, eps=eps)
    if not eps >= 0:
        raise Unsupported(f"{op}: eps must be at least 0, not {eps}")
    if residual is None:
        return
    check_floats(op, "residual", residual)
    for what in ("shape", "dtype", "device"):
        mine, needed = getattr(residual, what), getattr(x, what)
        if mine != needed:
            raise Unsupported(f"{op}: residual must have x's {what}, {needed}, not {mine}")


def _check_rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, residual: Tensor | None = None, *, offset: float = 0.0
) -> None:
    _check("rms_norm", x, {"weight": weight}, eps, residual)
    check_numbers("rms_norm", offset=offset)


def _check_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, residual: Tensor | None = None
) -> None:
    _check("layer_norm", x, {"weight": weight, "bias": bias}, eps, residual)
    if bias.dtype != weight.dtype:
        raise Unsupported(f"layer_norm: bias must have the weight's dtype, {weight.dtype}, not {bias.dtype}")


def _named(dtypes: tuple[torch.dtype, ...]) -> str:
    names = [str(d).removeprefix("torch.") for d in dtypes]
    return f"{', '.join(names[:-1])} or {names[-1]}"


# The reference.


def _always(*arguments: Any, **keywords: Any) -> None:
    return None


def _rms_norm_reference(
    x: Tensor, weight: Tensor, eps: float = 1e-6, residual: Tensor | None = None, *, offset: float = 0.0
) -> Any:
    s = x if residual is None else x + residual
    y = _rms_norm_of(s, weight, eps, offset)
    return y if residual is None else (y, s)


def _rms_norm_of(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    if torch.compiler.is_compiling():  # which makes blocks of its own of a chain
        wide = torch.promote_types(x.dtype, torch.float32)
        y = x.to(wide)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * _multiplier(weight, offset, wide)
        return y.to(x.dtype)
    return _RMSNormReference.apply(x.reshape(-1, x.shape[-1]), weight, eps, offset).view(x.shape)


class _RMSNormReference(Function):
    """y = x (weight + offset) / rms(x) per row of x [T, H], computed in at least fp32 and rounded once.

    PyTorch has no fused kernel for it on CPUs, or with an offset, only a chain of whole-tensor operations. Here the
    chain runs over blocks of rows, saves one number per row, and sums over rows and columns as matrix-vector products.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        w = _multiplier(weight, offset, wide)
        y, scale = torch.empty_like(x), x.new_empty(x.shape[0], 1, dtype=wide)
        for x_part, y_part, r in row_blocks(x, y, scale):
            x_wide = x_part.to(wide)
            torch.linalg.vector_norm(x_wide, dim=1, keepdim=True, out=r)
            r.square_().div_(x.shape[1]).add_(eps).rsqrt_()
            y_part.copy_((x_wide * r).mul_(w))
        ctx.offset = offset
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, weight, scale = ctx.saved_tensors
        w = _multiplier(weight, ctx.offset, scale.dtype)
        dx, dw = torch.empty_like(x), torch.zeros_like(w)
        for x_part, g_part, dx_part, r in row_blocks(x, grad, dx, scale):
            x_wide, g = x_part.to(w.dtype), g_part.to(w.dtype)
            product = g * x_wide
            dw.addmv_(product.t(), r.squeeze(1))
            # dx = r (g w - x r^2 mean(g w x))
            along = torch.mv(product, w).unsqueeze(1).mul_(r.square()).div_(x.shape[1])
            dx_part.copy_(torch.mul(g, w, out=product).addcmul_(x_wide, along, value=-1).mul_(r))
        return dx, dw.to(weight.dtype), None, None


def _multiplier(weight: Tensor, offset: float, wide: torch.dtype) -> Tensor:
    return weight.to(wide) + offset if offset else weight.to(wide)


def _layer_norm_reference(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, residual: Tensor | None = None
) -> Any:
    s = x if residual is None else x + residual
    if weight.dtype == s.dtype:
        y = F.layer_norm(s, weight.shape, weight, bias, eps)
    else:
        wide = torch.promote_types(s.dtype, torch.float32)
        y = F.layer_norm(s.to(wide), weight.shape, weight.to(wide), bias.to(wide), eps).to(s.dtype)
    return y if residual is None else (y, s)


# Our CUDA kernels: csrc/norms.cuh.


def unequal_rows(argument: str, x: Tensor) -> str | None:
    """Why x [..., n] cannot be viewed as rows of contiguous elements at one distance; None if it can."""
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        return f"{argument} has a stride of {x.stride(-1)} between the elements of a row, not 1"
    distance = None
    for size, step in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if distance is not None and step != distance:
            return f"{argument} has rows at several distances: strides {list(x.stride())} for {list(x.shape)}"
        distance = step * size
    return None


def kernel_rows(x: Tensor) -> Tensor:
    """A gradient [T, n] as kernels read it: contiguous elements in a row, rows at one distance."""
    return x if unequal_rows("x", x) is None else x.contiguous()


def _cuda_supports(x: Tensor, weight: Tensor, residual: Tensor | None) -> str | None:
    reason = library.missing(x.device)
    if reason is not None:
        return reason
    if x.dtype not in KERNEL_FLOATS:
        return f"x must be {_named(KERNEL_FLOATS)}, not {x.dtype}"
    if weight.dtype not in (x.dtype, torch.float32):
        return f"weight must be {_named((x.dtype, torch.float32))}, not {weight.dtype}"
    if x.numel() // x.shape[-1] >= 1 << 31 or x.shape[-1] >= 1 << 31:
        return f"fewer than 2^31 rows of fewer than 2^31 elements, not {list(x.shape)}"
    return unequal_rows("x", x) or (None if residual is None else unequal_rows("residual", residual))


def _cuda_supports_rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, residual: Tensor | None = None, *, offset: float = 0.0
) -> str | None:
    return _cuda_supports(x, weight, residual)


def _cuda_supports_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, residual: Tensor | None = None
) -> str | None:
    return _cuda_supports(x, weight, residual)


def _rms_norm_cuda(
    x: Tensor, weight: Tensor, eps: float = 1e-6, residual: Tensor | None = None, *, offset: float = 0.0
) -> Any:
    rows = (-1, x.shape[-1])
    if residual is None:
        return _RMSNorm.apply(x.view(rows), None, weight, eps, float(offset)).view(x.shape)
    y, s = _RMSNorm.apply(x.view(rows), residual.view(rows), weight, eps, float(offset))
    return y.view(x.shape), s.view(x.shape)


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float) -> Any:
        weight = weight.contiguous()
        ctx.offset, ctx.added = offset, residual is not None
        if residual is None:
            y, rstd = torch.ops.megapt_kernels.rms_norm(x, weight, eps, offset)
            ctx.save_for_backward(x, weight, rstd)
            return y
        y, s, rstd = torch.ops.megapt_kernels.add_rms_norm(x, residual, weight, eps, offset)
        ctx.save_for_backward(s, weight, rstd)
        return y, s

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, ds: Tensor | None = None) -> Any:  # type: ignore[override]
        s, weight, rstd = ctx.saved_tensors
        ds = None if ds is None else kernel_rows(ds)
        dx, dw = torch.ops.megapt_kernels.rms_norm_backward(kernel_rows(dy), ds, s, weight, rstd, ctx.offset)
        return dx, dx if ctx.added else None, dw, None, None


def _layer_norm_cuda(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, residual: Tensor | None = None) -> Any:
    rows = (-1, x.shape[-1])
    if residual is None:
        return _LayerNorm.apply(x.view(rows), None, weight, bias, eps).view(x.shape)
    y, s = _LayerNorm.apply(x.view(rows), residual.view(rows), weight, bias, eps)
    return y.view(x.shape), s.view(x.shape)


class _LayerNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Any:
        weight, bias = weight.contiguous(), bias.contiguous()
        ctx.added = residual is not None
        if residual is None:
            y, mean, rstd = torch.ops.megapt_kernels.layer_norm(x, weight, bias, eps)
            ctx.save_for_backward(x, weight, mean, rstd)
            return y
        y, s, mean, rstd = torch.ops.megapt_kernels.add_layer_norm(x, residual, weight, bias, eps)
        ctx.save_for_backward(s, weight, mean, rstd)
        return y, s

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, ds: Tensor | None = None) -> Any:  # type: ignore[override]
        s, weight, mean, rstd = ctx.saved_tensors
        ds = None if ds is None else kernel_rows(ds)
        dx, dw, db = torch.ops.megapt_kernels.layer_norm_backward(kernel_rows(dy), ds, s, weight, mean, rstd)
        return dx, dx if ctx.added else None, dw, db, None


def _register_fakes() -> None:
    def per_row(x: Tensor) -> Tensor:
        return x.new_empty(x.shape[0], dtype=torch.float32)

    def like(x: Tensor) -> Tensor:
        return x.new_empty(x.shape)

    fakes: dict[str, Callable[..., Any]] = {
        "rms_norm": lambda x, weight, eps, offset: (like(x), per_row(x)),
        "add_rms_norm": lambda x, residual, weight, eps, offset: (like(x), like(x), per_row(x)),
        "rms_norm_backward": lambda dy, ds, s, weight, rstd, offset: (like(s), like(weight)),
        "layer_norm": lambda x, weight, bias, eps: (like(x), per_row(x), per_row(x)),
        "add_layer_norm": lambda x, residual, weight, bias, eps: (like(x), like(x), per_row(x), per_row(x)),
        "layer_norm_backward": lambda dy, ds, s, weight, mean, rstd: (like(s), like(weight), like(weight)),
    }
    for name, fake in fakes.items():
        torch.library.register_fake(f"megapt_kernels::{name}", fake)


library.on_load(_register_fakes)


# Libraries' kernels.


@cache
def installed(module: str, name: str) -> tuple[Any, str | None]:
    """`name` of an optional package's module, imported when it is first asked for; or None and why there is none."""
    package = module.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        return None, f"{package} is not installed"
    try:
        return getattr(importlib.import_module(module), name), None
    except Exception as error:  # whatever a package does when it meets versions that it does not know
        return None, f"{module}.{name} cannot be imported: {type(error).__name__}: {error}"


def gpu_library(x: Tensor) -> str | None:
    """Why no library's GPU kernel runs on x; None if one may."""
    if x.device.type != "cuda":
        return f"it runs on cuda, not on {x.device.type}"
    if torch.compiler.is_compiling():
        return "torch.compile does not trace it"
    if x.dtype not in KERNEL_FLOATS:
        return f"x must be {_named(KERNEL_FLOATS)}, not {x.dtype}"
    return "there are no rows" if x.numel() == 0 else None


LIGER_WIDEST = 65536


def _torch_supports_rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, residual: Tensor | None = None, *, offset: float = 0.0
) -> str | None:
    if x.device.type != "cuda":
        return f"it is fused on cuda, not on {x.device.type}"
    if offset:
        return f"it has no offset, and {offset} is asked for"
    return None if weight.dtype == x.dtype else f"weight must have x's dtype, {x.dtype}, not {weight.dtype}"


def _torch_rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, residual: Tensor | None = None, *, offset: float = 0.0
) -> Any:
    s = x if residual is None else x + residual
    y = F.rms_norm(s, weight.shape, weight, eps)
    return y if residual is None else (y, s)


def _quack_supports(
    x: Tensor, weight: Tensor, eps: float = 1e-6, residual: Tensor | None = None, *, offset: float = 0.0
) -> str | None:
    reason = gpu_library(x) or installed("quack.rmsnorm", "rmsnorm")[1]
    if reason is not None:
        return reason
    if offset:
        return f"it has no offset, and {offset} is asked for"
    major, minor = torch.cuda.get_device_capability(x.device)
    if major < 9:
        return f"it needs a GPU of compute capability 9.0 or later, not {major}.{minor}"
    if x.shape[-1] % 8:
        return f"rows must be a multiple of 8 elements, not {x.shape[-1]}"
    if not x.is_contiguous() or x.data_ptr() % 16:
        return "x must be contiguous and begin at a multiple of 16 bytes"
    return None


def _quack_rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, residual: Tensor | None = None, *, offset: float = 0.0
) -> Any:
    # Its own addition normalises the sum before it is rounded.
    s = x if residual is None else x + residual
    y = installed("quack.rmsnorm", "rmsnorm")[0](s.view(-1, s.shape[-1]), weight, eps=eps)
    if y.requires_grad:  # its backward reads gradients as contiguous
        y.register_hook(lambda dy: dy.contiguous())
    return y.view(x.shape) if residual is None else (y.view(x.shape), s)


def _liger_supports_rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, residual: Tensor | None = None, *, offset: float = 0.0
) -> str | None:
    home = ("rms_norm", "LigerRMSNormFunction")
    return _liger_supports(x, home if residual is None else ("fused_add_rms_norm", "LigerFusedAddRMSNormFunction"))


def _liger_supports(x: Tensor, home: tuple[str, str]) -> str | None:
    reason = gpu_library(x) or installed(f"liger_kernel.ops.{home[0]}", home[1])[1]
    if reason is None and x.shape[-1] > LIGER_WIDEST:
        reason = f"rows must be of at most {LIGER_WIDEST} elements, not {x.shape[-1]}"
    return reason


def _liger_rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, residual: Tensor | None = None, *, offset: float = 0.0
) -> Any:
    # "gemma" rounds once, whatever the offset; its kernels must not write into the incoming gradient.
    settings = eps, float(offset), "gemma", False
    if residual is None:
        return installed("liger_kernel.ops.rms_norm", "LigerRMSNormFunction")[0].apply(x, weight, *settings)
    add = installed("liger_kernel.ops.fused_add_rms_norm", "LigerFusedAddRMSNormFunction")[0]
    return add.apply(x, residual, weight, *settings)


def _apex_supports(
    x: Tensor, weight: Tensor, eps: float = 1e-6, residual: Tensor | None = None, *, offset: float = 0.0
) -> str | None:
    # Not `apex` first: the package of that name in the public index is another project.
    reason = gpu_library(x) or installed("fused_layer_norm_cuda", "rms_forward_affine")[1]
    reason = reason or installed("apex.normalization.fused_layer_norm", "FusedRMSNormAffineFunction")[1]
    return reason or _torch_supports_rms_norm(x, weight, eps, residual, offset=offset)


def _apex_rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, residual: Tensor | None = None, *, offset: float = 0.0
) -> Any:
    s = x if residual is None else x + residual
    norm = installed("apex.normalization.fused_layer_norm", "FusedRMSNormAffineFunction")[0]
    y = norm.apply(s, weight, weight.shape, eps, False)
    return y if residual is None else (y, s)


def _torch_supports_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, residual: Tensor | None = None
) -> str | None:
    return None if x.device.type == "cuda" else f"it is the reference itself on {x.device.type}"


def _liger_supports_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, residual: Tensor | None = None
) -> str | None:
    return _liger_supports(x, ("layer_norm", "LigerLayerNormFunction"))


def _liger_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, residual: Tensor | None = None
) -> Any:
    s = x if residual is None else x + residual
    y = installed("liger_kernel.ops.layer_norm", "LigerLayerNormFunction")[0].apply(s, weight, bias, eps)
    return y if residual is None else (y, s)


OPERATIONS = {
    "rms_norm": Operation(
        "rms_norm",
        _check_rms_norm,
        (
            Implementation("cuda", "cuda", _cuda_supports_rms_norm, _rms_norm_cuda),
            Implementation("library", "quack", _quack_supports, _quack_rms_norm),
            Implementation("library", "liger", _liger_supports_rms_norm, _liger_rms_norm),
            Implementation("library", "apex", _apex_supports, _apex_rms_norm),
            Implementation("library", "torch", _torch_supports_rms_norm, _torch_rms_norm),
            Implementation("reference", "reference", _always, _rms_norm_reference),
        ),
    ),
    "layer_norm": Operation(
        "layer_norm",
        _check_layer_norm,
        (
            Implementation("cuda", "cuda", _cuda_supports_layer_norm, _layer_norm_cuda),
            Implementation("library", "liger", _liger_supports_layer_norm, _liger_layer_norm),
            Implementation("library", "torch", _torch_supports_layer_norm, _layer_norm_reference),
            Implementation("reference", "reference", _always, _layer_norm_reference),
        ),
    ),
}
