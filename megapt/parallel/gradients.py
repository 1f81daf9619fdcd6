"""What the tensor and pipeline layout owes the gradients before the optimizer may use them.

Tensor ranks that hold the same parameter may each have computed a part of its gradient (`Partial`); a tied
parameter's copy on another stage has computed another part. After `finalize` every owner's `main_grad` is the
gradient of the whole model, up to the sum over data-parallel ranks, which is the ZeRO backend's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megapt.mesh import Axis, receive, send
from megapt.parallel.tensor import TensorParallel
from megapt.parameters import Parameter, Partial


def is_partial(parameter: Parameter, tp: TensorParallel) -> bool:
    """Whether tensor ranks hold parts of this parameter's gradient that must be summed."""
    if tp.axis.size == 1:
        return False
    partial = parameter.spec.partial
    return partial is Partial.ALWAYS or (partial is Partial.SEQUENCE and tp.sequence)


def sum_sharers(gradient: Tensor, parameter: Parameter, axis: Axis) -> None:
    """Sum, in place, over the tensor ranks that hold the same key/value heads."""
    shard = parameter.shard
    every = gradient.new_zeros(axis.size // shard.sharers, *gradient.shape)
    every[axis.rank // shard.sharers] = gradient
    gradient.copy_(axis.all_reduce(every)[axis.rank // shard.sharers])


def finalize(parameters: Sequence[Parameter], tp: TensorParallel, ties: TiedWeights) -> None:
    """Complete every `main_grad` in place. Collective over tp and, for tied copies, between two stages."""
    ties.collect()
    parts = [p.main_grad for p in parameters if is_partial(p, tp)]
    if parts:
        flat = torch.cat([g.flatten() for g in parts])
        tp.axis.all_reduce(flat)
        for gradient, total in zip(parts, flat.split([g.numel() for g in parts]), strict=True):
            gradient.copy_(total.view_as(gradient))
    for parameter in parameters:
        if parameter.shard.sharers > 1:
            sum_sharers(parameter.main_grad, parameter, tp.axis)


class TiedWeights:
    """The bond between a tied parameter on its owner's stage, the first, and its copy where the model ends.

    The copy sends its gradient, the owner alone is optimized and sends its new value: the two cannot drift apart,
    and the copy costs no optimizer state. Where the model begins and ends on one rank there is one parameter.

    last: the pipeline rank where the model ends; default: the last.
    """

    def __init__(self, parameters: Sequence[Parameter], pp: Axis, tied: bool, last: int | None = None) -> None:
        self.axis, self.last = pp, pp.size - 1 if last is None else last
        self.parameter: Parameter | None = None
        if tied and self.last != 0 and self.axis.rank in (0, self.last):
            (self.parameter,) = (p for p in parameters if p.spec.has_copy or p.spec.tied_to is not None)

    def collect(self) -> None:
        """Add the copy's gradient to the owner's."""
        self._send(lambda p: p.main_grad, back=True, take=lambda p, got: p.main_grad.add_(got))

    def share(self) -> None:
        """Give the owner's value to the copy."""
        self._send(lambda p: p.data, back=False, take=lambda p, got: p.data.copy_(got))

    def _send(
        self, what: Callable[[Parameter], Tensor], back: bool, take: Callable[[Parameter, Tensor], Tensor]
    ) -> None:
        if self.parameter is None:
            return
        tensor = what(self.parameter).contiguous()
        source, target = (self.last, 0) if back else (0, self.last)
        content = "gradient of the tied weight" if back else "tied weight"
        if self.axis.rank == source:
            send(tensor, self.axis.global_rank(target), self.axis.group, content).wait()
        else:
            buffer = torch.empty_like(tensor)
            receive(buffer, self.axis.global_rank(source), self.axis.group, content).wait()
            take(self.parameter, buffer)
