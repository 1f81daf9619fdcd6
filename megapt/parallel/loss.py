"""The output projection with its loss: the vocabulary cut over tensor ranks, logits for a block of tokens at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from megapt.batch import IGNORE
from megapt.mesh import all_gather
from megapt.parallel.tensor import ParameterFactory, TensorParallel


@dataclass(frozen=True)
class LossSettings:
    """softcap: logits become cap x tanh(logits / cap) (Gemma 2, arXiv 2408.00118). z_loss: weight of log(Z)^2, Z the
    softmax's denominator, in what is trained (PaLM, arXiv 2204.02311); the loss that is reported leaves it out."""

    softcap: float | None = None
    z_loss: float = 0.0


class _LinearCrossEntropy(Function):
    """Sum over tokens of -log softmax(h W^T)[label], the vocabulary cut over tensor ranks.

    Logits exist for one block of tokens at a time. Their gradient is known as soon as they are, so it takes their
    place and is turned into those of h and W at once, and the backward pass only scales: no logits are kept or
    computed twice. The gradient is that of the sum of the losses plus z_loss x log(Z)^2.
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
    ) -> Tensor:
        h = tp.gather(h)
        wide = torch.promote_types(h.dtype, torch.float32)
        dh = torch.empty_like(h) if training else None
        dw: Tensor | None = None
        total = torch.zeros((), dtype=wide, device=h.device)
        block = min(max(1, _BLOCK_ELEMENTS[h.device.type == "cuda"] // weight.shape[0]), h.shape[0])
        # Blocks share their memory: memory fresh from the system costs more than what is done in it.
        buffer = h.new_empty(block, weight.shape[0])
        scores = buffer if h.dtype == wide else torch.empty_like(buffer, dtype=wide)
        slopes = torch.empty_like(scores) if settings.softcap is not None and training else None
        for at in range(0, h.shape[0], block):
            rows = slice(at, at + block)
            size = h[rows].shape[0]
            logits = torch.mm(h[rows], weight.t(), out=buffer[:size])
            wide_logits = logits if scores is buffer else scores[:size]
            slope = None if slopes is None else slopes[:size]
            total += _softmax_loss_(
                logits, wide_logits, slope, labels[rows], tp, start, length, settings, training
            )
            if dh is not None:
                torch.mm(logits, weight, out=dh[rows])
                product = _wide_product(logits.t(), h[rows], wide)
                dw = product if dw is None else dw.add_(product)
        ctx.tp = tp
        if dh is not None and dw is not None:
            ctx.save_for_backward(tp.reduce(dh), dw)
            ctx.dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        dh, dw = ctx.saved_tensors
        # The scale, one over the number of tokens, must not be rounded to bf16: it would bias every gradient.
        dh, dw = (dh.to(dw.dtype) * grad).to(dh.dtype), (dw * grad).to(ctx.dtype)
        return dh, dw, None, None, None, None, None, None


# Logits per block, on the CPU and on a GPU: small enough for a cache, or large enough that reading the weight and
# adding to its gradient once per block costs little beside the products.
_BLOCK_ELEMENTS = (1 << 23, 1 << 28)


def _wide_product(a: Tensor, b: Tensor, wide: torch.dtype) -> Tensor:
    """a @ b in `wide`: of 16-bit numbers summed and left in fp32, where a sum over many tokens may not fit fp16."""
    if a.dtype == wide:
        return a @ b
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=wide)
    if a.dtype == torch.float16:
        return a.to(wide) @ b.to(wide)
    return (a @ b).to(wide)


def _softmax_loss_(
    logits: Tensor,
    scores: Tensor,
    slope: Tensor | None,
    labels: Tensor,
    tp: TensorParallel,
    start: int,
    length: int,
    settings: LossSettings,
    training: bool,
) -> Tensor:
    """Loss summed over the tokens of a block of logits [T, V local], in whose place their gradient is left if training.

    scores: memory [T, V local] in fp32 or wider to work in; logits itself if that is wide enough. slope: the same
    beside it, where training needs the soft cap's derivative. Each rank's maximum, sum of exponentials and target logit
    travel in one all-gather of [3, T].
    """
    target = labels - start
    mine = (target >= 0) & (target < length)
    at = torch.arange(len(labels), device=labels.device), target.clamp(0, max(length - 1, 0))
    if scores is not logits:
        scores.copy_(logits)
    if settings.softcap is not None:
        scores.div_(settings.softcap).tanh_()
        if slope is not None:
            torch.mul(scores, scores, out=slope).neg_().add_(1)
        scores.mul_(settings.softcap)
    scores[:, length:] = float("-inf")  # padded rows take no part
    picked = scores[at].masked_fill(~mine, 0)
    # A rank may hold padding only: its maximum is then -inf, which must not reach a difference of infinities.
    top = scores.amax(1).clamp_min(torch.finfo(scores.dtype).min)
    scores.sub_(top.unsqueeze(1)).exp_()
    stats = torch.stack([top, scores.sum(1), picked])
    if tp.axis.size > 1:
        every = stats.new_empty(tp.axis.size, *stats.shape)
        all_gather(every.view(-1, stats.shape[1]), stats, group=tp.axis.group)
    else:
        every = stats.unsqueeze(0)
    highest = every[:, 0].amax(0)
    denominator = (every[:, 1] * (every[:, 0] - highest).exp()).sum(0)
    log_z = highest + denominator.log()
    losses = (highest - every[:, 2].sum(0)) + denominator.log()
    counted = labels != IGNORE
    if training:
        # d/dlogits of loss + z_loss log(Z)^2: softmax x (1 + 2 z_loss log Z), less one at the target, where the
        # difference of two numbers close to each other is taken without cancellation.
        extra = 2 * settings.z_loss * log_z
        scores *= ((top - highest).exp() / denominator * (1 + extra) * counted).unsqueeze(1)
        at_target = (-losses).expm1() + extra * (-losses).exp()
        scores[at] = torch.where(mine & counted, at_target, scores[at])
        if slope is not None:
            scores *= slope
        if scores is not logits:
            logits.copy_(scores)
    return (losses * counted).sum()


class VocabularyHead(nn.Module):
    """The output projection cut by vocabulary rows, with its loss."""

    def __init__(self, factory: ParameterFactory, settings: LossSettings = LossSettings()) -> None:
        super().__init__()
        self.tp, self.settings = factory.tp, settings
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
            h, self.weight, labels, self.tp, shard.start, shard.length, self.settings, training
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
