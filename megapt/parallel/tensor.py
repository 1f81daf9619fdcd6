"""Tensor and sequence parallelism: linear layers cut by columns or rows, and the vocabulary cut by rows.

Megatron's scheme (arXiv 1909.08053, 2205.05198). Activations are flat over tokens: x_TH with T = batch x sequence.
With sequence parallelism each tensor rank holds T / tp consecutive tokens between the parallel regions: a region
starts with an all-gather over tokens and ends with a reduce-scatter, where without it the region ends with an
all-reduce. In the backward pass the collectives run while the weight gradient is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from megapt.mesh import Axis, all_gather, all_reduce, reduce_scatter
from megapt.parallel.weight_gradients import Finish, WeightGradient, WeightGradients
from megapt.parameters import Parameter, ParameterTable, initialise_


@dataclass(frozen=True)
class TensorParallel:
    """How the layers of this rank are cut: its place on the tp axis, and whether tokens are cut between regions.

    weight_gradients: whether their weights' gradients are computed in the backward pass or put off.
    """

    axis: Axis
    sequence: bool = False
    weight_gradients: WeightGradients = field(default_factory=WeightGradients, compare=False)

    def _gathered(self, x: Tensor) -> Tensor:
        return x.new_empty(x.shape[0] * self.axis.size, *x.shape[1:])

    def start_gather(self, x: Tensor) -> tuple[Tensor, Callable[[], Any]]:
        """All tokens of all ranks, and the wait after which they are there."""
        out = self._gathered(x)
        return out, all_gather(out, x.contiguous(), group=self.axis.group, async_op=True).wait

    def start_reduce(self, x: Tensor) -> tuple[Tensor, Callable[[], Any]]:
        """The sum over ranks (in place), or this rank's tokens of it under sequence parallelism."""
        if self.axis.size == 1:
            return x, _nothing
        if not self.sequence:
            return x, all_reduce(x, group=self.axis.group, async_op=True).wait
        out = x.new_empty(x.shape[0] // self.axis.size, *x.shape[1:])
        return out, reduce_scatter(out, x, group=self.axis.group, async_op=True).wait

    def gather(self, x: Tensor) -> Tensor:
        """What a region starts from: all tokens. Without sequence parallelism they are there already."""
        if self.axis.size == 1 or not self.sequence:
            return x
        out, wait = self.start_gather(x)
        wait()
        return out

    def reduce(self, x: Tensor) -> Tensor:
        out, wait = self.start_reduce(x)
        wait()
        return out

    def total(self, x: Tensor) -> Tensor:
        """The sum over ranks, in place, whether tokens are cut or not."""
        return self.axis.all_reduce(x)

    def local_tokens(self, x: Tensor) -> Tensor:
        """This rank's slice of a tensor over all tokens (dim 0)."""
        if self.axis.size == 1 or not self.sequence:
            return x
        return x.chunk(self.axis.size)[self.axis.rank]


def _nothing() -> None:
    return None


class ParameterFactory:
    """Makes this rank's shards of parameters from the table; asking twice for a name gives the same parameter.

    A tied name gives its owner's parameter where the owner lives on this rank, else a copy marked `owner = False`.
    """

    def __init__(
        self,
        table: ParameterTable,
        tp: TensorParallel,
        seed: int,
        dtype: torch.dtype,
        device: torch.device,
        vocabulary_multiple: int = 1,
    ) -> None:
        self.table, self.tp, self.seed, self.dtype, self.device = table, tp, seed, dtype, device
        self.vocabulary_multiple = vocabulary_multiple
        self.made: dict[str, Parameter] = {}

    def __call__(self, *names: str) -> list[Parameter]:
        """Parameters with equal trailing dimensions, neighbours in one allocation so that they multiply as one."""
        shards = []
        for name in names:
            spec = self.table[name]
            if spec.tied_to in self.made:
                return [self.made[spec.tied_to]]  # type: ignore[index]
            shards.append(spec.shard(self.tp.axis.rank, self.tp.axis.size, self.vocabulary_multiple))
        whole = torch.empty(
            sum(s.shape[0] for s in shards), *shards[0].shape[1:], dtype=self.dtype, device=self.device
        )
        parameters = []
        for name, shard, data in zip(names, shards, whole.split([s.shape[0] for s in shards]), strict=True):
            parameter = Parameter(data)
            parameter.spec, parameter.shard = self.table[name], shard
            parameter.owner = parameter.spec.tied_to is None
            if data.device.type != "meta":
                initialise_(data, parameter.spec, shard, self.seed)
            self.made[name] = parameter
            parameters.append(parameter)
        return parameters

    def optional(self, *names: str) -> list[Parameter]:
        """As above, or nothing if the model has no such parameters (biases)."""
        return self(*names) if names[0] in self.table else []


def fused(tensors: Sequence[Tensor]) -> Tensor:
    """One tensor over the rows of all, without a copy where they are neighbours in memory."""
    whole = neighbours(tensors)
    return torch.cat(list(tensors)) if whole is None else whole


def neighbours(tensors: Sequence[Tensor]) -> Tensor | None:
    """A view over the rows of all, if they lie in memory one after the other."""
    first = tensors[0]
    if len(tensors) == 1:
        return first
    offset = first.storage_offset()
    for t in tensors:
        same = t.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (same and t.is_contiguous() and t.storage_offset() == offset):
            return None
        offset += t.numel()
    return first.as_strided((sum(t.shape[0] for t in tensors), *first.shape[1:]), first.stride())


Again = Callable[[], Tensor]
"""Computes an activation again that was not kept."""


def _kept(ctx: Any, x: Tensor, again: Again | None, *parameters: Tensor) -> None:
    """Keep a linear layer's input, or only the way to it."""
    ctx.again = again
    ctx.save_for_backward(*parameters, *([x] if again is None else []))


def _input(ctx: Any) -> Tensor:
    if ctx.again is None:
        return ctx.saved_tensors[-1]
    x, ctx.again = ctx.again(), None
    return x


class _Column(Function):
    """y = gather(x) [W1; W2; ...]^T + [b1; b2; ...]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, tp: TensorParallel, again: Again | None, weights: int, *parameters: Tensor
    ) -> Tensor:
        ctx.tp, ctx.weights, ctx.parameters = tp, weights, len(parameters)
        _kept(ctx, x, again, *parameters)
        bias = fused(parameters[weights:]) if len(parameters) > weights else None
        return F.linear(tp.gather(x), fused(parameters[:weights]), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        parameters = ctx.saved_tensors[: ctx.parameters]
        tp: TensorParallel = ctx.tp
        weights, biases = parameters[: ctx.weights], parameters[ctx.weights :]
        start = partial(_column_weights, tp, _input(ctx), grad, weights)
        dw: Sequence[Tensor | None] = [None] * len(weights)
        dx, wait_dx = None, _nothing
        finish = None
        if tp.weight_gradients.deferred:
            tp.weight_gradients.push(WeightGradient(weights, start))
        else:
            finish = start()
        if ctx.needs_input_grad[0]:
            dx, wait_dx = tp.start_reduce(grad @ fused(weights))
        if finish is not None:
            dw = finish()
        db = grad.sum(0).split([b.shape[0] for b in biases]) if biases else ()
        wait_dx()
        return dx, None, None, None, *dw, *db


def _column_weights(tp: TensorParallel, x: Tensor, grad: Tensor, weights: Sequence[Tensor]) -> Finish:
    """Gradients of weights for their input x (this rank's tokens) and their output's gradient."""
    wait: Callable[[], Any] = _nothing
    if tp.axis.size > 1 and tp.sequence:
        x, wait = tp.start_gather(x)

    def finish() -> Sequence[Tensor | None]:
        wait()
        return tp.weight_gradients.of(weights, grad, x)

    return finish


class _Row(Function):
    """y = reduce(x W^T): the sum over tensor ranks."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, tp: TensorParallel, again: Again | None, graph_only: bool, weight: Tensor
    ) -> Tensor:
        ctx.tp = tp
        _kept(ctx, x, again, weight)
        if graph_only:
            return x.new_zeros(()).expand(tp.local_tokens(x).shape[0], weight.shape[0])
        return tp.reduce(F.linear(x, weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        weight, tp = ctx.saved_tensors[0], ctx.tp
        local, wait = grad, _nothing
        if tp.axis.size > 1 and tp.sequence:
            grad, wait = tp.start_gather(grad)
        x = _input(ctx)  # computed again, where it is, while the gradient is on its way
        wait()
        if not tp.weight_gradients.deferred:
            return grad @ weight, None, None, None, *tp.weight_gradients.of([weight], grad, x)
        tp.weight_gradients.push(WeightGradient([weight], partial(_row_weight, tp, x, local, weight)))
        return grad @ weight, None, None, None, None


def _row_weight(tp: TensorParallel, x: Tensor, grad: Tensor, weight: Tensor) -> Finish:
    """Gradient of a weight for the input x and the output's gradient (this rank's tokens)."""
    wait: Callable[[], Any] = _nothing
    if tp.axis.size > 1 and tp.sequence:
        grad, wait = tp.start_gather(grad)

    def finish() -> Sequence[Tensor | None]:
        wait()
        return tp.weight_gradients.of([weight], grad, x)

    return finish


class ColumnParallelLinear(nn.Module):
    """Several projections of one input, each cut by output rows, multiplied as one: x_TH -> y_TN, N local.

    `names` are global prefixes such as `layers.3.attention.q`. The backward all-reduce (or reduce-scatter) of the
    input's gradient overlaps with the weight gradients. Where the input can be had `again`, it is not kept.
    """

    def __init__(self, factory: ParameterFactory, *names: str) -> None:
        super().__init__()
        self.tp = factory.tp
        self.weights = len(names)
        weights = factory(*(f"{name}.weight" for name in names))
        biases = factory.optional(*(f"{name}.bias" for name in names))
        self.widths = [w.shape[0] for w in weights]
        for index, parameter in enumerate([*weights, *biases]):
            self.register_parameter(f"p{index}", parameter)

    def forward(self, x: Tensor, again: Again | None = None) -> Tensor:
        return _Column.apply(x, self.tp, again, self.weights, *self._parameters.values())


class RowParallelLinear(nn.Module):
    """A projection cut by input columns, x_TK (K local) -> y_TH summed over tensor ranks, plus a whole bias.

    Where the input can be had `again`, it is not kept. With `graph_only` the product is left out (the result is zeros):
    for a layer computed again in the backward pass, which needs what leads to its output, not the output.
    """

    def __init__(self, factory: ParameterFactory, name: str) -> None:
        super().__init__()
        self.tp = factory.tp
        (self.weight,) = factory(f"{name}.weight")
        bias = factory.optional(f"{name}.bias")
        self.bias = bias[0] if bias else None

    def forward(self, x: Tensor, again: Again | None = None, graph_only: bool = False) -> Tensor:
        y = _Row.apply(x, self.tp, again, graph_only, self.weight)
        return y if self.bias is None else y + self.bias


class _Reduce(Function):
    """Sum over tensor ranks; the gradient goes to every rank's term."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel) -> Tensor:
        ctx.tp = tp
        return tp.reduce(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        return ctx.tp.gather(grad), None


class VocabularyEmbedding(nn.Module):
    """Token embeddings cut by vocabulary rows: tokens [T] int64 -> x_TH (this rank's tokens under sequence parallel).

    Every rank looks up the tokens that it holds and gives zero for the others; the sum over ranks is the embedding.
    """

    def __init__(self, factory: ParameterFactory) -> None:
        super().__init__()
        self.tp = factory.tp
        (self.weight,) = factory("embedding.weight")
        self.shard = self.weight.shard

    def forward(self, tokens: Tensor) -> Tensor:
        if self.tp.axis.size == 1:
            return F.embedding(tokens, self.weight)
        local = tokens - self.shard.start
        outside = (local < 0) | (local >= self.shard.length)
        x = F.embedding(local.masked_fill(outside, 0), self.weight)
        return _Reduce.apply(x.masked_fill(outside.unsqueeze(-1), 0), self.tp)
