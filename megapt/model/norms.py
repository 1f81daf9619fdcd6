"""RMSNorm (arXiv 1910.07467) and LayerNorm of the residual stream, and RMSNorm of queries and keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from megapt.config import ModelConfig
from megapt.model import compiled
from megapt.model.compiled import chain
from megapt.model.kernels import AUTO, Kernels
from megapt.parallel.tensor import ParameterFactory, TensorParallel
from megapt_kernels.blocks import row_blocks
from megapt_kernels.norms import layer_norm, rms_norm


class RMSNorm(nn.Module):
    def __init__(
        self, model: ModelConfig, factory: ParameterFactory, name: str, kernels: Kernels = AUTO
    ) -> None:
        super().__init__()
        self.eps, self.offset, self.kernel = model.norm_eps, float(model.norm_offset), kernels.norm
        (self.weight,) = factory(f"{name}.weight")

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel == "compiled":
            return chain(compiled.rms_norm)(x, self.weight, self.eps, self.offset)
        return rms_norm(x, self.weight, self.eps, offset=self.offset, impl=self.kernel)

    def of_sum(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of x + residual, and the sum."""
        if self.kernel == "compiled":
            stream = x + residual
            return self(stream), stream
        return rms_norm(x, self.weight, self.eps, residual, offset=self.offset, impl=self.kernel)


class LayerNorm(nn.Module):
    def __init__(
        self, model: ModelConfig, factory: ParameterFactory, name: str, kernels: Kernels = AUTO
    ) -> None:
        super().__init__()
        self.eps, self.kernel = model.norm_eps, kernels.norm
        (self.weight,) = factory(f"{name}.weight")
        (self.bias,) = factory(f"{name}.bias")

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel == "compiled":
            return chain(compiled.layer_norm)(x, self.weight, self.bias, self.eps)
        return layer_norm(x, self.weight, self.bias, self.eps, impl=self.kernel)

    def of_sum(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of x + residual, and the sum."""
        if self.kernel == "compiled":
            stream = x + residual
            return self(stream), stream
        return layer_norm(x, self.weight, self.bias, self.eps, residual, impl=self.kernel)


class QKNorm(nn.Module):
    """RMSNorm of this rank's query heads and key heads in a projection [T, (heads + 2 x kv_heads) x width]: of each
    head by itself with one weight for all (Qwen3, arXiv 2505.09388), or of all heads of all tensor ranks as one vector
    with a weight for each (OLMo 2, arXiv 2501.00656)."""

    def __init__(
        self, model: ModelConfig, factory: ParameterFactory, at: str, heads: int, kv_heads: int, kernels: Kernels = AUTO
    ) -> None:
        super().__init__()
        self.whole, self.eps, self.offset = model.qk_norm == "whole", model.norm_eps, float(model.norm_offset)
        self.groups, self.width = (heads, kv_heads), model.head_width
        (self.q,) = factory(f"{at}.q_norm.weight")
        (self.k,) = factory(f"{at}.k_norm.weight")
        over = (model.heads, model.num_kv_heads) if self.whole else (1, 1)
        self.sums = _Sums(self.groups, over, self.width, self.whole, self.k.shard.primary, factory.tp)
        # Sums over ranks cannot be compiled.
        self.compiled = kernels.norm == "compiled" and not (self.whole and factory.tp.axis.size > 1)

    def forward(self, qkv: Tensor) -> Tensor:
        weight = self._weight()
        if self.compiled:
            return chain(compiled.qk_norm)(qkv, weight, self.groups, self.width, self.whole, self.eps)
        return _QKNorm.apply(qkv, weight, self.eps, self.sums)

    def _weight(self) -> Tensor:
        """What each of the query and key heads is multiplied by: [heads + kv_heads, width] in at least fp32."""
        wide = torch.promote_types(self.q.dtype, torch.float32)
        q, k = (w.to(wide).view(-1, self.width) for w in (self.q, self.k))
        return torch.cat([q.expand(self.groups[0], -1), k.expand(self.groups[1], -1)]) + self.offset


@dataclass(frozen=True)
class _Sums:
    """Which of a rank's query and key heads, `groups` of each, are normalised together: each alone, or all queries and
    all keys of all ranks. over: how many heads those are. counts: whether this rank is the one that counts its key
    heads, which others may hold too."""

    groups: tuple[int, int]
    over: tuple[int, int]
    width: int
    whole: bool
    counts: bool
    tp: TensorParallel

    def mean(self, sums: Tensor, once: bool) -> Tensor:
        """Means [T, heads] over what is normalised together, of the heads' own sums [T, heads].

        once: ranks that share key heads have the same sums of them, rather than each a part.
        """
        if not self.whole:
            return sums.div_(self.width)
        both = torch.stack([part.sum(1) for part in sums.split(self.groups, dim=1)], dim=1)
        if once and not self.counts:
            both[:, 1] = 0
        both = self.tp.total(both) / both.new_tensor([n * self.width for n in self.over])
        return torch.cat([b.expand(-1, n) for b, n in zip(both.split(1, dim=1), self.groups, strict=True)], dim=1)


class _QKNorm(Function):
    """y = x w / rms(x) for query and key heads x, in blocks of rows; value heads stay as they are."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, weight: Tensor, eps: float, sums: _Sums) -> Tensor:
        count, width = weight.shape
        heads, out = qkv.unflatten(1, (-1, width)), torch.empty_like(qkv)
        results = out.unflatten(1, (-1, width))
        results[:, count:].copy_(heads[:, count:])
        squares = qkv.new_empty(qkv.shape[0], count, dtype=weight.dtype)
        for x, s in row_blocks(heads[:, :count], squares):
            torch.linalg.vector_norm(x.to(weight.dtype), dim=2, out=s)
        scale = sums.mean(squares.square_(), once=True).add_(eps).rsqrt_()
        for x, y, r in row_blocks(heads[:, :count], results[:, :count], scale):
            y.copy_((x.to(weight.dtype) * r.unsqueeze(2)).mul_(weight))
        ctx.sums = sums
        ctx.save_for_backward(qkv, weight, scale)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        qkv, weight, scale = ctx.saved_tensors
        count, width = weight.shape
        dqkv = torch.empty_like(qkv)
        heads, slopes, gradients = (t.unflatten(1, (-1, width)) for t in (qkv, grad, dqkv))
        gradients[:, count:].copy_(slopes[:, count:])
        x_all, g_all, d_all = (t[:, :count] for t in (heads, slopes, gradients))
        dw, along = torch.zeros_like(weight), torch.empty_like(scale)
        for x, g, a, r in row_blocks(x_all, g_all, along, scale):
            product = g.to(weight.dtype) * x
            dw += torch.einsum("tnw,tn->nw", product, r)
            torch.sum(product.mul_(weight), dim=2, out=a)
        # dx = r (g w - x r^2 mean(g w x)); where ranks share key heads, each has a part of g, and one takes the mean.
        along = ctx.sums.mean(along, once=False).mul_(scale.square())
        if ctx.sums.whole and not ctx.sums.counts:
            along[:, ctx.sums.groups[0] :] = 0
        for x, g, d, a, r in row_blocks(x_all, g_all, d_all, along, scale):
            own = (g.to(weight.dtype) * weight).sub_(x.to(weight.dtype) * a.unsqueeze(2))
            d.copy_(own.mul_(r.unsqueeze(2)))
        return dqkv, dw, None, None


Norm = RMSNorm | LayerNorm


def make_norm(model: ModelConfig, factory: ParameterFactory, name: str, kernels: Kernels = AUTO) -> Norm:
    return (RMSNorm if model.norm == "rms_norm" else LayerNorm)(model, factory, name, kernels)
