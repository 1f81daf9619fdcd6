"""Activations computed again in the backward pass instead of kept (arXiv 1604.06174, 2205.05198).

`full` keeps a layer's input only. `selective` keeps what the large products make and drops what is cheap to make from
it: the norms' outputs, the attention core with its output, the activation's output. The gradients are those of an
undivided pass bit for bit: the same operations run on the same numbers. Nothing here is random (the model has no
dropout), so no generator's state is kept.

Where a schedule cuts the backward in two, BACKWARD_INPUT computes again and BACKWARD_WEIGHT uses what it made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import Function

from megapt.parallel.tensor import Again

Policy = Literal["none", "selective", "full"]
"""What a layer computes again."""

Operation = Callable[[Tensor], Tensor]


def drop_output(operation: Operation, x: Tensor, drop: bool) -> tuple[Tensor, Again | None]:
    """operation(x), and if its output is to be dropped the way to it, for the linear layer that takes it.

    For an operation whose own backward needs x and not its output, as that of norms and activation functions does.
    """
    if not drop or not torch.is_grad_enabled():
        return operation(x), None
    kept = x.detach()

    def again() -> Tensor:
        with torch.no_grad():
            return operation(kept)

    return operation(x), again


def drop_all(operation: Operation, x: Tensor, drop: bool) -> tuple[Tensor, Again | None]:
    """As `drop_output`, for an operation whose backward needs more than x: all of it is dropped."""
    if not drop or not torch.is_grad_enabled():
        return operation(x), None
    part = _Part(operation, x.detach())
    return _Recomputed.apply(x, operation, part), part.output


def keep_input(operation: Operation, again: Operation, x: Tensor) -> Tensor:
    """operation(x), of which only x is kept; `again` is the same operation, whose result's graph counts alone."""
    return _Recomputed.apply(x, operation, _Part(again, x.detach()))


class _Part:
    """What was dropped: made again once in a backward pass, for the linear layer behind and for its own backward."""

    def __init__(self, operation: Operation, x: Tensor) -> None:
        self.operation = operation
        self.x: Tensor | None = x
        self.made: tuple[Tensor, Tensor] | None = None

    def output(self) -> Tensor:
        return self._make()[1].detach()

    def take(self) -> tuple[Tensor, Tensor]:
        """The input as a leaf and the output with its graph, which are forgotten."""
        made = self._make()
        self.x = self.made = None
        return made

    def _make(self) -> tuple[Tensor, Tensor]:
        if self.made is None:
            assert self.x is not None, "what was dropped is computed again for one backward only"
            leaf = self.x.detach().requires_grad_()
            with torch.enable_grad():
                self.made = leaf, self.operation(leaf)
        return self.made


class _Recomputed(Function):
    """An operation without its graph, which the backward builds again. Gradients of parameters within reach them from
    there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, operation: Operation, part: _Part) -> Tensor:
        ctx.part = part
        ctx.save_for_backward(x)  # the part has it too; so autograd knows what is kept, and allows one backward
        return operation(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, y = ctx.part.take()
        torch.autograd.backward(y, grad)
        return x.grad, None, None
