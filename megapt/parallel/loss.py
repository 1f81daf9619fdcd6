"""The output projection with its loss: the vocabulary cut over tensor ranks, logits for a block of tokens at a time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from megapt.batch import IGNORE
from megapt.mesh import all_gather
from megapt.parallel.tensor import ParameterFactory, TensorParallel
from megapt_kernels.cross_entropy import linear_cross_entropy_with_gradients, scaled_gradients


@dataclass(frozen=True)
class LossSettings:
    """softcap: logits become cap x tanh(logits / cap) (Gemma 2, arXiv 2408.00118). z_loss: weight of log(Z)^2, Z the
    softmax's denominator, in what is trained (PaLM, arXiv 2204.02311); the loss that is reported leaves it out."""

    softcap: float | None = None
    z_loss: float = 0.0


class _LinearCrossEntropy(Function):
    """Sum over tokens of -log softmax(h W^T)[label], the vocabulary cut over tensor ranks.

    Its gradient is known in the forward pass (see `megapt_kernels.cross_entropy`), and the backward pass only scales.
    """

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        weight: Tensor,
        labels: Tensor,
        tp: TensorParallel,
        start: int,
        length: int,
        settings: LossSettings,
        training: bool,
        kernel: str,
    ) -> Tensor:
        total, dh, dw = linear_cross_entropy_with_gradients(
            tp.gather(h),
            weight,
            labels,
            all_gather=partial(all_gather, group=tp.axis.group) if tp.axis.size > 1 else None,
            ranks=tp.axis.size,
            start=start,
            length=length,
            ignore_index=IGNORE,
            softcap=settings.softcap,
            z_loss=settings.z_loss,
            training=training,
            impl=kernel,
        )
        ctx.tp = tp
        if dh is not None and dw is not None:
            ctx.save_for_backward(tp.reduce(dh), dw)
            ctx.dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        dh, dw = ctx.saved_tensors
        dh, dw = scaled_gradients(dh, dw, grad, ctx.dtype)
        return dh, dw, None, None, None, None, None, None, None


class VocabularyHead(nn.Module):
    """The output projection cut by vocabulary rows, with its loss."""

    def __init__(
        self, factory: ParameterFactory, settings: LossSettings = LossSettings(), kernel: str = "auto"
    ) -> None:
        super().__init__()
        self.tp, self.settings, self.kernel = factory.tp, settings, kernel
        (self.weight,) = factory("head.weight")
        self.shard, self.vocabulary = self.weight.shard, self.weight.spec.shape[0]

    def forward(self, h: Tensor, labels: Tensor) -> Tensor:
        """Loss SUMMED over tokens whose label is not -100: h_TH, labels [T] int64 of all tokens -> scalar (fp32).

        Its gradient includes the z-loss, its value does not.
        """
        # Asked here, since inside of the function gradients are always off.
        training = torch.is_grad_enabled()
        shard = self.shard
        return _LinearCrossEntropy.apply(
            h, self.weight, labels, self.tp, shard.start, shard.length, self.settings, training, self.kernel
        )

    def logits(self, h: Tensor) -> Tensor:
        """Whole logits [T, vocabulary] of all tokens on every tensor rank, for generation; no gradient."""
        logits = self.tp.gather(h) @ self.weight.t()
        if self.tp.axis.size > 1:
            every = logits.new_empty(self.tp.axis.size, *logits.shape)
            all_gather(every.view(-1, logits.shape[1]), logits, group=self.tp.axis.group)
            logits = every.movedim(0, 1).flatten(1)
        logits = logits[:, : self.vocabulary]
        cap = self.settings.softcap
        return logits if cap is None else (logits / cap).tanh() * cap
