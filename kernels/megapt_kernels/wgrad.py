"""Weight gradients added to an fp32 buffer by the product itself, without a gradient of its own in between."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

from megapt_kernels.arguments import check_flags, check_tensors, check_written
from megapt_kernels.registry import Implementation, Operation, Unsupported
from megapt_kernels.tracing import constant

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def wgrad_accumulate_(main_grad: Tensor, dy: Tensor, x: Tensor, *, fresh: bool = False, impl: str = "auto") -> Tensor:
    """main_grad += dy^T x in place, or = if `fresh`; returns main_grad.

    main_grad [N, K] fp32 (fp64 for fp64 operands), dy [T, N] and x [T, K] of one dtype: bf16, fp16, fp32. Products of
    16-bit operands are summed in fp32 and reach main_grad without being rounded. A fresh main_grad is not read. No
    gradient flows through it. Raises Unsupported for shapes, dtypes or devices that do not go together.
    """
    return OPERATIONS["wgrad_accumulate_"](main_grad, dy, x, fresh=fresh, impl=impl)


def _check(main_grad: Tensor, dy: Tensor, x: Tensor, *, fresh: bool = False) -> None:
    op = "wgrad_accumulate_"
    check_tensors(op, main_grad=main_grad, dy=dy, x=x)
    check_flags(op, fresh=fresh)
    for name, tensor in (("main_grad", main_grad), ("dy", dy), ("x", x)):
        if tensor.dim() != 2:
            raise Unsupported(f"{op}: {name} has two dimensions, not shape {tuple(tensor.shape)}")
        if tensor.device != main_grad.device:
            raise Unsupported(f"{op}: {name} is on {tensor.device}, main_grad on {main_grad.device}; all share one")
    if dy.dtype not in _DTYPES:
        raise Unsupported(f"{op}: dy is bf16, fp16, fp32 or fp64, not {dy.dtype}")
    if x.dtype != dy.dtype:
        raise Unsupported(f"{op}: x has the dtype of dy, {dy.dtype}, not {x.dtype}")
    wide = torch.promote_types(dy.dtype, torch.float32)
    if main_grad.dtype != wide:
        raise Unsupported(f"{op}: main_grad is {wide} for operands in {dy.dtype}, not {main_grad.dtype}")
    if x.shape[0] != dy.shape[0]:
        raise Unsupported(f"{op}: x has as many tokens as dy, {dy.shape[0]}, not {x.shape[0]}")
    check_written(op, main_grad=main_grad)
    if main_grad.shape != (dy.shape[1], x.shape[1]):
        shape = (dy.shape[1], x.shape[1])
        raise Unsupported(f"{op}: main_grad is {shape} for this dy and x, not {tuple(main_grad.shape)}")


# Elements of an operand that are widened at a time where no product of 16-bit operands leaves its sums in fp32.
_WIDENED = 1 << 22


@torch.no_grad()
def _reference(main_grad: Tensor, dy: Tensor, x: Tensor, *, fresh: bool = False) -> Tensor:
    tokens = len(dy)
    if dy.dtype != main_grad.dtype:
        tokens = max(1, _WIDENED // max(dy.shape[1], x.shape[1], 1))
    if len(dy) == 0:
        return main_grad.zero_() if fresh else main_grad
    for at in range(0, len(dy), tokens):
        a, b = (t[at : at + tokens].to(main_grad.dtype) for t in (dy, x))
        torch.addmm(main_grad, a.t(), b, beta=0 if fresh and at == 0 else 1, out=main_grad)
    return main_grad


def _on_gpu(main_grad: Tensor, dy: Tensor) -> str | None:
    if main_grad.device.type not in ("cuda", "meta"):  # the latter stands for a GPU where memory is counted
        return f"runs on CUDA devices, not on {main_grad.device.type}"
    if dy.dtype not in (torch.bfloat16, torch.float16):
        return f"takes operands of 16 bits, not {dy.dtype}"
    if not main_grad.is_contiguous():
        return f"main_grad must be contiguous, not strided {main_grad.stride()}"
    return None


def _torch_supports(main_grad: Tensor, dy: Tensor, x: Tensor, *, fresh: bool = False) -> str | None:
    if not _adds_to_wide_sums():
        return f"products that add to fp32 need torch 2.11, this is {torch.__version__}"
    return _on_gpu(main_grad, dy)


@constant
def _adds_to_wide_sums() -> bool:
    # The operator is older, but before 2.11 wanted the sum that it adds to in the operands' dtype.
    release = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    return release >= (2, 11) and "dtype_out" in torch.ops.aten.addmm.overloads()


@torch.no_grad()
def _torch(main_grad: Tensor, dy: Tensor, x: Tensor, *, fresh: bool = False) -> Tensor:
    beta = 0 if fresh else 1
    torch.ops.aten.addmm.dtype_out(main_grad, dy.t(), x, main_grad.dtype, beta=beta, out=main_grad)
    return main_grad


_APEX = "fused_weight_gradient_mlp_cuda"


def _apex_supports(main_grad: Tensor, dy: Tensor, x: Tensor, *, fresh: bool = False) -> str | None:
    # Never `apex` itself: the package of that name in the public index is another project.
    if importlib.util.find_spec(_APEX) is None:
        return f"NVIDIA apex built with its module {_APEX} is not installed"
    if not (dy.is_contiguous() and x.is_contiguous()):
        return "dy and x must be contiguous"
    return _on_gpu(main_grad, dy)


def _apex(main_grad: Tensor, dy: Tensor, x: Tensor, *, fresh: bool = False) -> Tensor:
    module: Any = importlib.import_module(_APEX)
    if fresh:
        main_grad.zero_()
    module.wgrad_gemm_accum_fp32(x, dy, main_grad)
    return main_grad


OPERATIONS = {
    "wgrad_accumulate_": Operation(
        "wgrad_accumulate_",
        _check,
        (
            Implementation("library", "torch", _torch_supports, _torch),
            Implementation("library", "apex", _apex_supports, _apex),
            Implementation("reference", "reference", lambda *_, **__: None, _reference),
        ),
    )
}
