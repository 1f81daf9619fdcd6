"""RMSNorm (arXiv 1910.07467) and LayerNorm, with weights that every tensor rank holds whole."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from megapt.config import ModelConfig
from megapt.model.blocks import row_blocks
from megapt.model.compiled import chain, layer_norm, rms_norm
from megapt.parallel.tensor import ParameterFactory


class RMSNorm(nn.Module):
    def __init__(self, model: ModelConfig, factory: ParameterFactory, name: str, compiled: bool = False) -> None:
        super().__init__()
        self.eps, self.compiled = model.norm_eps, compiled
        (self.weight,) = factory(f"{name}.weight")

    def forward(self, x: Tensor) -> Tensor:
        if self.compiled:
            return chain(rms_norm)(x, self.weight, self.eps)
        if x.device.type == "cpu":
            return _CpuRMSNorm.apply(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class _CpuRMSNorm(Function):
    """y = x w / rms(x) per row of x [T, H], computed in at least fp32 and rounded once.

    PyTorch has no fused kernel for it on CPUs, only a chain of whole-tensor operations. Here the chain runs over blocks
    of rows, saves one number per row, and sums over rows and columns as matrix-vector products.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        w = weight.to(wide)
        y, scale = torch.empty_like(x), x.new_empty(x.shape[0], 1, dtype=wide)
        for x_part, y_part, r in row_blocks(x, y, scale):
            x_wide = x_part.to(wide)
            torch.linalg.vector_norm(x_wide, dim=1, keepdim=True, out=r)
            r.square_().div_(x.shape[1]).add_(eps).rsqrt_()
            y_part.copy_((x_wide * r).mul_(w))
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, weight, scale = ctx.saved_tensors
        w = weight.to(scale.dtype)
        dx, dw = torch.empty_like(x), torch.zeros_like(w)
        for x_part, g_part, dx_part, r in row_blocks(x, grad, dx, scale):
            x_wide, g = x_part.to(w.dtype), g_part.to(w.dtype)
            product = g * x_wide
            dw.addmv_(product.t(), r.squeeze(1))
            # dx = r (g w - x r^2 mean(g w x))
            along = torch.mv(product, w).unsqueeze(1).mul_(r.square()).div_(x.shape[1])
            dx_part.copy_(torch.mul(g, w, out=product).addcmul_(x_wide, along, value=-1).mul_(r))
        return dx, dw.to(weight.dtype), None


class LayerNorm(nn.Module):
    def __init__(self, model: ModelConfig, factory: ParameterFactory, name: str, compiled: bool = False) -> None:
        super().__init__()
        self.eps, self.compiled = model.norm_eps, compiled
        (self.weight,) = factory(f"{name}.weight")
        (self.bias,) = factory(f"{name}.bias")

    def forward(self, x: Tensor) -> Tensor:
        if self.compiled:
            return chain(layer_norm)(x, self.weight, self.bias, self.eps)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def make_norm(model: ModelConfig, factory: ParameterFactory, name: str, compiled: bool = False) -> nn.Module:
    return (RMSNorm if model.norm == "rms_norm" else LayerNorm)(model, factory, name, compiled)
