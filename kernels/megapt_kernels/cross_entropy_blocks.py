"""The softmax of cross entropy for one block of logits at a time, and what the ranks of a cut vocabulary exchange.

Between the ranks' statistics and the gradient, each token has four numbers, `tokens` [4, T]: the highest logit; the
softmax's denominator, relative to it; the weight of the softmax in the gradient (one plus the z-loss' share; 0 for an
ignored token); the gradient at the target. An implementation of the softmax offers

    stats(logits, target) -> [3, T]: this rank's maximum, sum of exponentials relative to it, and target logit (NaN if
        it is another rank's);
    combine(every [ranks, 3, T], target) -> (losses [T], tokens [4, T]);
    gradient_(logits, target, tokens, slope): the gradient written over the logits; slope [T]: the losses' own, or None.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megapt_kernels import library

AllGather = Callable[[Tensor, Tensor], Any]
"""all_gather(out [ranks x n, ...], tensor [n, ...]): the ranks' tensors one after the other; ended when it returns."""


@dataclass(frozen=True)
class Rules:
    """This rank's columns of the logits, of which those from `length` on are padding, and what a loss is."""

    start: int
    length: int
    ignore_index: int
    softcap: float | None
    z_loss: float


class PlainSoftmax:
    """By PyTorch's operators, in fp32 or wider.

    The memory that it works in serves all blocks, since memory fresh from the system costs more than what is done in
    it. consume: stats may work in the logits themselves, where they are wide enough. gradient_ needs the stats of the
    same block right before it.
    """

    needs_stats = True

    def __init__(self, rules: Rules, block: Tensor, training: bool, consume: bool) -> None:
        wide = torch.promote_types(block.dtype, torch.float32)
        apart = block.dtype != wide or not consume
        self.rules = rules
        self.scores = torch.empty_like(block, dtype=wide) if apart else None
        self.bends = torch.empty_like(block, dtype=wide) if rules.softcap is not None and training else None

    def stats(self, logits: Tensor, target: Tensor) -> Tensor:
        length, cap = self.rules.length, self.rules.softcap
        at, mine = self._at(target)
        scores = logits if self.scores is None else self.scores[: len(logits)].copy_(logits)
        if cap is not None:
            scores.div_(cap).tanh_()
            if self.bends is not None:
                torch.mul(scores, scores, out=self.bends[: len(logits)]).neg_().add_(1)
            scores.mul_(cap)
        scores[:, length:] = float("-inf")  # padding takes no part
        picked = scores[at].masked_fill(~mine, float("nan"))
        # A rank may hold padding only: its maximum is then -inf, which must not reach a difference of infinities.
        self.top = scores.amax(1).clamp_min(torch.finfo(scores.dtype).min)
        scores.sub_(self.top.unsqueeze(1)).exp_()
        self.sums = scores.sum(1)
        return torch.stack([self.top, self.sums, picked])

    def combine(self, every: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        highest = every[:, 0].amax(0)
        denominator = (every[:, 1] * (every[:, 0] - highest).exp()).sum(0)
        found = ~every[:, 2].isnan()
        picked = every[:, 2].masked_fill(~found, 0).sum(0)
        ignored = target == self.rules.ignore_index
        lost = ~ignored & ~found.any(0)
        if target.device.type == "cpu" and not torch.compiler.is_compiling():
            _refuse(lost & ~highest.isnan(), target)
        losses = (highest - picked) + denominator.log()
        losses = losses.masked_fill(lost, float("nan")).masked_fill(ignored, 0)
        # d/dlogits of loss + z_loss log(Z)^2: softmax x (1 + 2 z_loss log Z), less one at the target, where the
        # difference of two numbers close to each other is taken without cancellation.
        extra = 2 * self.rules.z_loss * (highest + denominator.log())
        weight = (1 + extra).masked_fill(lost, float("nan"))
        at_target = (-losses).expm1() + extra * (-losses).exp()
        tokens = (highest, 0), (denominator, 1), (weight, 0), (at_target, 0)
        return losses, torch.stack([numbers.masked_fill(ignored, value) for numbers, value in tokens])

    def gradient_(self, logits: Tensor, target: Tensor, tokens: Tensor, slope: Tensor | None = None) -> None:
        highest, denominator, weight, at_target = tokens.unbind()
        ignored = target == self.rules.ignore_index
        scores = logits if self.scores is None else self.scores[: len(logits)]
        factor = (self.top - highest).exp() / denominator * weight
        if slope is not None:
            factor, at_target = factor * slope, at_target * slope
        factor, at_target = factor.masked_fill(ignored, 0), at_target.masked_fill(ignored, 0)
        scores.mul_(factor.unsqueeze(1))
        at, mine = self._at(target)
        scores[at] = torch.where(mine, at_target, scores[at])
        if self.bends is not None:
            scores.mul_(self.bends[: len(logits)])
        # Zero times what is not finite is not zero; looking whether there is any is free on a CPU only.
        if scores.device.type != "cpu" or torch.compiler.is_compiling() or (ignored & ~self.sums.isfinite()).any():
            scores.masked_fill_(ignored.unsqueeze(1), 0)
        if scores is not logits:
            logits.copy_(scores)

    def _at(self, target: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Where in its row each target is, or would be, and whether it is one of this rank's columns."""
        column = target - self.rules.start
        mine = (column >= 0) & (column < self.rules.length)
        rows = torch.arange(len(target), device=target.device)
        return (rows, column.clamp(0, max(self.rules.length - 1, 0))), mine


def _refuse(lost: Tensor, target: Tensor) -> None:
    if lost.any():
        token = int(lost.nonzero()[0])
        raise IndexError(
            f"cross entropy: target {int(target[token])} of token {token} is neither ignore_index nor in the vocabulary"
        )


class CudaSoftmax:
    """By our CUDA kernels: one read of the logits for the stats, one read and one write for the gradient."""

    needs_stats = False

    def __init__(self, rules: Rules, block: Tensor, training: bool, consume: bool) -> None:
        self.rules, self.softcap = rules, rules.softcap or 0.0

    def stats(self, logits: Tensor, target: Tensor) -> Tensor:
        rules = self.rules
        return torch.ops.megapt_kernels.cross_entropy_stats(
            logits, target, rules.start, rules.length, rules.ignore_index, self.softcap
        )

    def combine(self, every: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.megapt_kernels.cross_entropy_combine(every, target, self.rules.ignore_index, self.rules.z_loss)

    def gradient_(self, logits: Tensor, target: Tensor, tokens: Tensor, slope: Tensor | None = None) -> None:
        rules = self.rules
        torch.ops.megapt_kernels.cross_entropy_gradient_(
            logits, target, tokens, slope, rules.start, rules.length, rules.ignore_index, self.softcap
        )
        if not torch.compiler.is_compiling():
            torch.autograd.graph.increment_version(logits)  # as PyTorch's own operators do, for autograd to notice

    @staticmethod
    def supports(block: Tensor) -> str | None:
        """None, or why the kernels do not take a block of logits like this one."""
        if reason := library.missing(block.device):
            return reason
        if block.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            return f"takes bf16, fp16 and fp32, not {block.dtype}"
        rows, columns = block.shape
        if columns >= (1 << 31) - 1 or rows >= 1 << 31:
            return f"takes fewer than 2^31 - 1 columns and 2^31 rows, not {rows} x {columns}"
        if (columns > 1 and block.stride(1) != 1) or (rows > 1 and block.stride(0) < columns):
            return f"takes rows that lie apart with neighbouring columns, not strides {block.stride()}"
        return None


@library.on_load
def _register_fakes() -> None:
    @torch.library.register_fake("megapt_kernels::cross_entropy_stats")
    def _(logits: Tensor, target: Tensor, start: int, length: int, ignore_index: int, softcap: float) -> Tensor:
        return logits.new_empty(3, logits.shape[0], dtype=torch.float32)

    @torch.library.register_fake("megapt_kernels::cross_entropy_combine")
    def _(every: Tensor, target: Tensor, ignore_index: int, z_loss: float) -> tuple[Tensor, Tensor]:
        return every.new_empty(every.shape[2]), every.new_empty(4, every.shape[2])

    @torch.library.register_fake("megapt_kernels::cross_entropy_gradient_")
    def _(*arguments: Any) -> None:
        return None


def gathered(stats: Tensor, ranks: int, all_gather: AllGather | None) -> Tensor:
    """Every rank's stats, [ranks, 3, T]."""
    if ranks == 1 or all_gather is None:
        return stats.unsqueeze(0)
    every = stats.new_empty(ranks, *stats.shape)
    all_gather(every.view(-1, stats.shape[1]), stats)
    return every


def gather_of(group: Any) -> tuple[int, AllGather | None]:
    """How many ranks a process group has, and their all-gather; None is a rank alone."""
    if group is None:
        return 1, None
    import torch.distributed as dist

    # torch 2.13 renamed it and warns at the old name; torch 2.11 has only that.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return group.size(), lambda out, tensor: gather(out, tensor, group=group)
