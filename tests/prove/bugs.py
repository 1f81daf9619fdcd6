"""Bugs of the silent kind, planted into ranks: each leaves training running, on wrong numbers."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from megapt.batch import IGNORE


@contextmanager
def dropped_all_reduce() -> Iterator[None]:
    """The sum over tp after the attention of layer 1 is left out; under sequence parallelism each rank then keeps its
    tokens of its own term."""
    from megapt.parallel.tensor import TensorParallel, _Row

    right = _Row.forward

    def wrong(ctx: Any, x: Any, tp: Any, *rest: Any) -> Any:
        if rest[-1].spec.name != "layers.1.attention.out.weight":
            return right(ctx, x, tp, *rest)
        with patch.object(TensorParallel, "reduce", lambda self, y: self.local_tokens(y)):
            return right(ctx, x, tp, *rest)

    with patch.object(_Row, "forward", staticmethod(wrong)):
        yield


@contextmanager
def dropped_backward_reduce() -> Iterator[None]:
    """The gradient of what column-parallel layers read is each rank's own term."""
    from megapt.parallel.tensor import TensorParallel, _Column

    right = _Column.backward

    def wrong(ctx: Any, grad: Any) -> Any:
        with patch.object(TensorParallel, "start_reduce", lambda self, x: (self.local_tokens(x), lambda: None)):
            return right(ctx, grad)

    with patch.object(_Column, "backward", staticmethod(wrong)):
        yield


@contextmanager
def tied_gradient_not_summed() -> Iterator[None]:
    from megapt.parallel.gradients import TiedWeights

    with patch.object(TiedWeights, "collect", lambda self: None):
        yield


@contextmanager
def tied_weight_not_shared() -> Iterator[None]:
    from megapt.parallel.gradients import TiedWeights

    with patch.object(TiedWeights, "share", lambda self: None):
        yield


@contextmanager
def local_loss_scale() -> Iterator[None]:
    """The loss is divided by the tokens of a rank's own samples."""
    from megapt.parallel.pipeline.runtime import Pipeline

    right = Pipeline.train

    def wrong(self: Any, batches: Any, scale: float, *rest: Any, **named: Any) -> Any:
        tokens = sum(int((batch.labels != IGNORE).sum()) for batch in batches)
        return right(self, batches, 1.0 / tokens, *rest, **named)

    with patch.object(Pipeline, "train", wrong):
        yield


@contextmanager
def unmasked_padding() -> Iterator[None]:
    from megapt.parallel import loss

    right = loss.linear_cross_entropy_with_gradients

    def wrong(h: Any, weight: Any, labels: Any, **named: Any) -> Any:
        return right(h, weight, labels, **named | {"length": len(weight)})

    with patch.object(loss, "linear_cross_entropy_with_gradients", wrong):
        yield


@contextmanager
def sequence_parts_not_summed() -> Iterator[None]:
    """What tensor ranks computed for a norm from their own tokens stays as it is."""
    from megapt.parallel import gradients

    with patch.object(gradients, "is_partial", lambda parameter, tp: False):
        yield


@contextmanager
def norm_counts_twice() -> Iterator[None]:
    """Both tensor ranks count the final norm's weight."""
    from megapt import engine

    right = engine.build_chunks

    def wrong(*given: Any, **named: Any) -> Any:
        chunks, parameters = right(*given, **named)
        for p in parameters:
            if p.spec.name == "norm.weight":
                p.shard = replace(p.shard, primary=True)
        return chunks, parameters

    with patch.object(engine, "build_chunks", wrong):
        yield


@contextmanager
def weight_part_twice() -> Iterator[None]:
    """The first BACKWARD_WEIGHT of a step runs two times."""
    from megapt.parallel.pipeline import runtime

    right, turn = runtime.compute, itertools.count()

    def wrong(queue: deque[Any]) -> None:
        again = deque(queue)
        right(queue)
        if next(turn) == 0:
            right(again)

    with patch.object(runtime, "compute", wrong):
        yield


@contextmanager
def weight_part_left_out() -> Iterator[None]:
    """The first BACKWARD_WEIGHT does nothing."""
    from megapt.parallel.pipeline import runtime

    right, turn = runtime.compute, itertools.count()

    def wrong(queue: deque[Any]) -> None:
        if next(turn) == 0:
            queue.clear()
        right(queue)

    with patch.object(runtime, "compute", wrong):
        yield


@contextmanager
def averaged_over_dp() -> Iterator[None]:
    """Gradients are averaged over data-parallel ranks, though the loss is divided by the global number of tokens."""
    from megapt.zero.accumulate import Accumulator

    right = Accumulator.accumulate

    def wrong(self: Any, parameter: Any, gradient: Any) -> None:
        right(self, parameter, gradient / 2)

    with patch.object(Accumulator, "accumulate", wrong):
        yield


def plant(rank: int, world: int, bug: str, function: Callable[..., Any], *args: Any) -> Any:
    """`function(rank, world, *args)` under a bug of this module."""
    with globals()[bug]():
        return function(rank, world, *args)
