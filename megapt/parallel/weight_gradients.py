"""Weight gradients put off: the second half of a backward that a schedule has cut in two (arXiv 2401.10241).

While a BACKWARD_INPUT action runs, the linear layers leave here what their weights' gradients are made of instead of
computing them; the BACKWARD_WEIGHT action of the same (micro-batch, chunk) computes them. Everything else gets its
gradient at once: norms, biases and embeddings cost next to nothing, and the head's projection has its gradient since
the forward pass.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

Finish = Callable[[], Sequence[Tensor | None]]
AddProduct = Callable[[Sequence[Tensor], Tensor, Tensor], None]
"""Adds to the gradients of weights [N1, K], [N2, K], ... what dy [T, N1 + N2 + ...] and x [T, K] give: dy^T x."""


@dataclass(frozen=True)
class WeightGradient:
    """`start` begins the transfers that the gradients of `parameters` need; what it returns waits for them and
    computes.

    Under sequence parallelism what is held are this rank's tokens only; the others are gathered again.
    """

    parameters: Sequence[Tensor]
    start: Callable[[], Finish]


Queue = deque[WeightGradient]
"""The weight gradients of one backward, in the order in which it came by them."""


class WeightGradients:
    """Where the linear layers of a rank ask whether to compute their weights' gradients now, and leave them.

    add: where gradients accumulate, if products can be added there at once; else they go the way of autograd.
    """

    def __init__(self) -> None:
        self._queue: Queue | None = None
        self.add: AddProduct | None = None

    def of(self, weights: Sequence[Tensor], dy: Tensor, x: Tensor) -> Sequence[Tensor | None]:
        """Gradients of weights that multiply as one, for their input x and their outputs' gradient; None for those that
        were added to the sums."""
        if self.add is None:
            return (dy.t() @ x).split([w.shape[0] for w in weights])
        self.add(weights, dy, x)
        return [None] * len(weights)

    @property
    def deferred(self) -> bool:
        return self._queue is not None

    def push(self, gradient: WeightGradient) -> None:
        assert self._queue is not None, "weight gradients are computed at once outside of `deferring`"
        self._queue.append(gradient)

    @contextmanager
    def deferring(self) -> Iterator[Queue]:
        """Within it, weight gradients go to the queue that it gives."""
        assert self._queue is None, "a backward runs within another one"
        self._queue = deque()
        try:
            yield self._queue
        finally:
            self._queue = None


def compute(queue: Queue) -> None:
    """Compute the gradients of a queue and empty it. Each one's transfers begin before the one ahead is computed."""
    ahead: tuple[Sequence[Tensor], Finish] | None = None
    while queue or ahead is not None:
        current = ahead
        ahead = None
        if queue:
            gradient = queue.popleft()
            with torch.no_grad():
                ahead = gradient.parameters, gradient.start()
        if current is not None:
            parameters, finish = current
            token = _Deliver.apply(finish, *parameters)
            torch.autograd.backward(token, token.detach())


class _Deliver(Function):
    """Hands gradients to their parameters through autograd, so that whoever listens there (the ZeRO backends do) meets
    them as in an undivided backward."""

    @staticmethod
    def forward(ctx: Any, finish: Finish, *parameters: Tensor) -> Tensor:
        ctx.finish = finish
        return parameters[0].new_empty(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        return None, *ctx.finish()
