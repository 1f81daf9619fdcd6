"""Tensor and sequence parallelism: linear layers cut by columns or rows, and the vocabulary cut by rows.

Megatron's scheme (arXiv 1909.08053, 2205.05198). Activations are flat over tokens: x_TH with T = batch x sequence.
With sequence parallelism each tensor rank holds T / tp consecutive tokens between the parallel regions: a region
starts with an all-gather over tokens and ends with a reduce-scatter, where without it the region ends with an
all-reduce. In the backward pass the collectives run while the weight gradient is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from megapt.batch import IGNORE
from megapt.mesh import Axis, all_gather, reduce_scatter
from megapt.parameters import Parameter, ParameterTable, initialise_


@dataclass(frozen=True)
class TensorParallel:
    """How the layers of this rank are cut: its place on the tp axis, and whether tokens are cut between regions."""

    axis: Axis
    sequence: bool = False

    def _gathered(self, x: Tensor) -> Tensor:
        return x.new_empty(x.shape[0] * self.axis.size, *x.shape[1:])

    def start_gather(self, x: Tensor) -> tuple[Tensor, Callable[[], Any]]:
        """All tokens of all ranks, and the wait after which they are there."""
        out = self._gathered(x)
        work = all_gather(out, x.contiguous(), group=self.axis.group, async_op=True)
        return out, work.wait

    def start_reduce(self, x: Tensor) -> tuple[Tensor, Callable[[], Any]]:
        """The sum over ranks (in place), or this rank's tokens of it under sequence parallelism."""
        if self.axis.size == 1:
            return x, _nothing
        if not self.sequence:
            return x, dist.all_reduce(x, group=self.axis.group, async_op=True).wait
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
    first = tensors[0]
    if len(tensors) == 1:
        return first
    offset = first.storage_offset()
    for t in tensors:
        same = t.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (same and t.is_contiguous() and t.storage_offset() == offset):
            return torch.cat(list(tensors))
        offset += t.numel()
    return first.as_strided((sum(t.shape[0] for t in tensors), *first.shape[1:]), first.stride())


class _Column(Function):
    """y = gather(x) [W1; W2; ...]^T + [b1; b2; ...]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel, weights: int, *parameters: Tensor) -> Tensor:
        ctx.tp, ctx.weights = tp, weights
        ctx.save_for_backward(x, *parameters)
        bias = fused(parameters[weights:]) if len(parameters) > weights else None
        return F.linear(tp.gather(x), fused(parameters[:weights]), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, *parameters = ctx.saved_tensors
        tp: TensorParallel = ctx.tp
        weights, biases = parameters[: ctx.weights], parameters[ctx.weights :]
        wait_x: Callable[[], Any] = _nothing
        if tp.axis.size > 1 and tp.sequence:
            x, wait_x = tp.start_gather(x)
        dx, wait_dx = tp.start_reduce(grad @ fused(weights)) if ctx.needs_input_grad[0] else (None, _nothing)
        wait_x()
        dw = (grad.t() @ x).split([w.shape[0] for w in weights])
        db = grad.sum(0).split([b.shape[0] for b in biases]) if biases else ()
        wait_dx()
        return dx, None, None, *dw, *db


class _Row(Function):
    """y = reduce(x W^T): the sum over tensor ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel, weight: Tensor) -> Tensor:
        ctx.tp = tp
        ctx.save_for_backward(x, weight)
        return tp.reduce(F.linear(x, weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        grad = ctx.tp.gather(grad)
        return grad @ weight, None, grad.t() @ x


class ColumnParallelLinear(nn.Module):
    """Several projections of one input, each cut by output rows, multiplied as one: x_TH -> y_TN, N local.

    `names` are global prefixes such as `layers.3.attention.q`. The backward all-reduce (or reduce-scatter) of the
    input's gradient overlaps with the weight gradients.
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

    def forward(self, x: Tensor) -> Tensor:
        return _Column.apply(x, self.tp, self.weights, *self._parameters.values())


class RowParallelLinear(nn.Module):
    """A projection cut by input columns, x_TK (K local) -> y_TH summed over tensor ranks, plus a whole bias."""

    def __init__(self, factory: ParameterFactory, name: str) -> None:
        super().__init__()
        self.tp = factory.tp
        (self.weight,) = factory(f"{name}.weight")
        bias = factory.optional(f"{name}.bias")
        self.bias = bias[0] if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = _Row.apply(x, self.tp, self.weight)
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


class _LinearCrossEntropy(Function):
    """Sum over tokens of -log softmax(h W^T)[label], the vocabulary cut over tensor ranks.

    Logits exist for one block of tokens at a time. Their gradient is known as soon as they are, so it takes their
    place and is turned into those of h and W at once, and the backward pass only scales: no logits are kept or
    computed twice.
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
        for at in range(0, h.shape[0], block):
            rows = slice(at, at + block)
            size = h[rows].shape[0]
            logits = torch.mm(h[rows], weight.t(), out=buffer[:size])
            wide_logits = logits if scores is buffer else scores[:size]
            total += _softmax_loss_(logits, wide_logits, labels[rows], tp, start, length, training)
            if dh is not None:
                torch.mm(logits, weight, out=dh[rows])
                product = logits.t() @ h[rows]
                dw = product.to(wide) if dw is None else dw.add_(product)
        ctx.tp = tp
        if dh is not None and dw is not None:
            ctx.save_for_backward(tp.reduce(dh), dw)
            ctx.dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        dh, dw = ctx.saved_tensors
        # The scale, one over the number of tokens, must not be rounded to bf16: it would bias every gradient.
        return (dh.to(dw.dtype) * grad).to(dh.dtype), (dw * grad).to(ctx.dtype), None, None, None, None, None, None


# Logits per block, on the CPU and on a GPU: small enough for a cache, or large enough that reading the weight and
# adding to its gradient once per block costs little beside the products.
_BLOCK_ELEMENTS = (1 << 23, 1 << 28)


def _softmax_loss_(
    logits: Tensor, scores: Tensor, labels: Tensor, tp: TensorParallel, start: int, length: int, training: bool
) -> Tensor:
    """Loss summed over the tokens of a block of logits [T, V local], in whose place their gradient is left if training.

    scores: memory [T, V local] in fp32 or wider to work in; logits itself if that is wide enough. Each rank's maximum,
    sum of exponentials and target logit travel in one all-gather of [3, T].
    """
    logits[:, length:] = float("-inf")  # padded rows take no part
    target = labels - start
    mine = (target >= 0) & (target < length)
    at = torch.arange(len(labels), device=labels.device), target.clamp(0, max(length - 1, 0))
    picked = logits[at].to(scores.dtype).masked_fill(~mine, 0)
    # A rank may hold padding only: its maximum is then -inf, which must not reach a difference of infinities.
    top = logits.amax(1).to(scores.dtype).clamp_min(torch.finfo(scores.dtype).min)
    if scores is not logits:
        scores.copy_(logits)
    scores.sub_(top.unsqueeze(1)).exp_()
    stats = torch.stack([top, scores.sum(1), picked])
    if tp.axis.size > 1:
        every = stats.new_empty(tp.axis.size, *stats.shape)
        all_gather(every.view(-1, stats.shape[1]), stats, group=tp.axis.group)
    else:
        every = stats.unsqueeze(0)
    highest = every[:, 0].amax(0)
    denominator = (every[:, 1] * (every[:, 0] - highest).exp()).sum(0)
    losses = (highest - every[:, 2].sum(0)) + denominator.log()
    counted = labels != IGNORE
    if training:
        scores *= ((top - highest).exp() / denominator * counted).unsqueeze(1)
        scores[at] = torch.where(mine & counted, (-losses).expm1(), scores[at])
        if scores is not logits:
            logits.copy_(scores)
    return (losses * counted).sum()


class VocabularyHead(nn.Module):
    """The output projection cut by vocabulary rows, with its loss."""

    def __init__(self, factory: ParameterFactory) -> None:
        super().__init__()
        self.tp = factory.tp
        (self.weight,) = factory("head.weight")
        self.shard, self.vocabulary = self.weight.shard, self.weight.spec.shape[0]

    def forward(self, h: Tensor, labels: Tensor) -> Tensor:
        """Loss SUMMED over tokens whose label is not -100: h_TH, labels [T] int64 of all tokens -> scalar (fp32)."""
        # Asked here, since inside of the function gradients are always off.
        training = torch.is_grad_enabled()
        shard = self.shard
        return _LinearCrossEntropy.apply(h, self.weight, labels, self.tp, shard.start, shard.length, training)

    def logits(self, h: Tensor) -> Tensor:
        """Whole logits [T, vocabulary] of all tokens on every tensor rank, for generation; no gradient."""
        logits = self.tp.gather(h) @ self.weight.t()
        if self.tp.axis.size > 1:
            every = logits.new_empty(self.tp.axis.size, *logits.shape)
            all_gather(every.view(-1, logits.shape[1]), logits, group=self.tp.axis.group)
            logits = every.movedim(0, 1).flatten(1)
        return logits[:, : self.vocabulary]
