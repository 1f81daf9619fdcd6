"""Watches one training step of a rank through module hooks: every activation, its gradient, every weight gradient.

The model knows nothing of it. What a rank sees is named and placed as in the whole model: rows are tokens of the global
batch, columns those of the uncut projection. Activations are taken where a linear layer reads or writes them, so that
recomputation, which runs modules again within the backward, sees the same tensors.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from megapt.batch import IGNORE
from megapt.config import Config
from megapt.model.decoder import DecoderChunk, Layer
from megapt.parallel.gradients import is_partial
from megapt.parallel.tensor import ColumnParallelLinear, RowParallelLinear
from megapt.parameters import Parameter, Shard, initialise_
from megapt.prove.trainer import Piece, Report, Trainer


@dataclass(frozen=True)
class Seen:
    """A block of an operation's output, [rows, columns] of the global tensor, or of its gradient."""

    operation: str
    backward: bool
    rows: tuple[int, int]
    columns: tuple[int, int]
    values: Tensor


@dataclass
class Trace:
    """One rank's step. place: its coordinates pp, dp, tp; report: pieces `local`, `finalized`, weights and moments."""

    place: tuple[int, int, int]
    report: Report
    seen: list[Seen] = field(default_factory=list)
    parts: list[Seen] = field(default_factory=list)  # of what is summed over tp, this rank's term
    computed: dict[str, int] = field(default_factory=dict)  # how often each weight's gradient was computed
    micro_batches: int = 0
    loss_tokens: int = 0  # of this data-parallel rank's samples
    padding: int = 0  # rows of this rank's vocabulary beyond its end
    clipped_by: float = 1.0
    partial: set[str] = field(default_factory=set)  # parameters of whose `local` gradients tp ranks hold terms
    copies: set[str] = field(default_factory=set)  # tied copies, whose gradient belongs to their owner
    logits: list[Seen] = field(default_factory=list)


Cut = Callable[[Tensor], list[tuple[str, tuple[int, int], Tensor]]]
"""Takes a local activation apart: (operation, columns, values)."""

Term = Callable[[int, Tensor], None]
"""Is given the gradient of a column-parallel output and its micro-batch."""


class Probe:
    """Hooks on all chunks of a trainer's engine."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        engine = trainer.engine
        self.sequence = engine.tp.sequence
        self.seen: list[Seen] = []
        self.parts: list[Seen] = []
        self.logits: list[Seen] = []
        self._values: dict[str, dict[int, Tensor]] = defaultdict(dict)  # by point of observation and micro-batch
        self._weights: dict[nn.Module, Tensor] = {}  # of column-parallel layers
        self._micro: dict[nn.Module, int] = {}  # the micro-batch that each chunk computes
        self._starts: dict[int, int] = {}  # by a micro-batch's memory
        self.rows: list[tuple[int, int]] = []  # tokens of each micro-batch in the global batch
        for chunk in engine.chunks:
            assert isinstance(chunk, DecoderChunk)
            chunk.register_forward_pre_hook(self._enter)
            self._watch_chunk(chunk)

    def begin(self, step: int) -> Any:
        """The batch of a step, whose micro-batches will be known by their memory."""
        batch = self.trainer.batch(step)
        mesh = self.trainer.mesh
        samples, sequence = self.trainer.config.batch.global_samples, self.trainer.config.batch.sequence
        at = samples // mesh.dp.size * mesh.dp.rank * sequence
        self.rows.clear()
        for number, micro_batch in enumerate(batch.micro_batches):
            self._starts[micro_batch.tokens.data_ptr()] = number
            self.rows.append((at, at + micro_batch.tokens.numel()))
            at += micro_batch.tokens.numel()
        return batch

    def end(self) -> None:
        """What runs from now on is of no interest."""
        self.rows.clear()
        self._values.clear()

    def _enter(self, chunk: nn.Module, arguments: tuple[Any, ...]) -> None:
        if self.rows:
            self._micro[chunk] = self._starts[arguments[1].tokens.data_ptr()]

    def _watch_chunk(self, chunk: DecoderChunk) -> None:
        if chunk.embedding is not None:
            self._output(chunk, chunk.embedding, _whole("embedding"))
        for layer in chunk.layers:
            assert isinstance(layer, Layer)
            at = _layer_name(layer)
            self._column(chunk, layer.attention.qkv, _read(layer.attention_norm, at, "attention"))
            self._row(chunk, layer.attention.out, f"{at}.attention.core", _shard_of(layer.attention.qkv, 0))
            self._column(chunk, layer.mlp.up, _read(layer.mlp_norm, at, "mlp"))
            last = layer.mlp.up.weights - 1
            self._row(chunk, layer.mlp.down, f"{at}.mlp.activation", _shard_of(layer.mlp.up, last))
            self._output(chunk, layer, _whole(at))
        if chunk.head is not None:
            self._input(chunk, chunk.head.output, _whole("norm"))
            chunk.head.output.register_forward_pre_hook(lambda module, h: self._logits(chunk, module, h[0]))
            self._output(chunk, chunk.head, _whole("loss"))

    def _column(self, chunk: nn.Module, module: ColumnParallelLinear, reads: str) -> None:
        names = [_name_of(w) for w in list(module.parameters())[: module.weights]]
        shards = [_shard_of(module, index) for index in range(module.weights)]

        def cut(local: Tensor) -> list[tuple[str, tuple[int, int], Tensor]]:
            parts = local.split(module.widths, dim=1)
            return [(n, _columns(s), part) for n, s, part in zip(names, shards, parts, strict=True)]

        def remember(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            # Stage 3 has weights within the forward and backward of a module only.
            self._weights[module] = torch.cat([w.detach() for w in list(module.parameters())[: module.weights]])

        def term(micro: int, gradient: Tensor) -> None:
            # The term of the input's gradient on this rank: what that gradient is if the sum is left out.
            product = gradient @ self._weights[module]
            self.parts.append(Seen(reads, True, self.rows[micro], (0, product.shape[1]), product))

        module.register_forward_pre_hook(remember)
        self._input(chunk, module, _whole(reads))
        self._output(chunk, module, cut, term)

    def _row(self, chunk: nn.Module, module: RowParallelLinear, reads: str, shard: Shard) -> None:
        name = _name_of(module.weight)
        self._input(chunk, module, lambda local: [(reads, _columns(shard), local)])
        self._output(chunk, module, _whole(name))

        def part(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            if not self.rows:
                return
            # The sum's own term on this rank, over all tokens: what the output is if the sum is left out.
            micro = self._micro[chunk]
            with torch.no_grad():
                product = torch.nn.functional.linear(arguments[0].detach(), module.weight)
            self.parts.append(Seen(name, False, self.rows[micro], (0, product.shape[1]), product))

        module.register_forward_pre_hook(part)

    def _logits(self, chunk: nn.Module, module: nn.Module, h: Tensor) -> None:
        """Which the loss never makes whole. Collective over tp, as the module itself."""
        if self.rows:
            with torch.no_grad():
                logits = module.logits(h.detach())  # type: ignore[operator]
            rows = self.rows[self._micro[chunk]]
            self.logits.append(Seen("logits", False, rows, (0, logits.shape[1]), logits.clone()))

    def _input(self, chunk: nn.Module, module: nn.Module, cut: Cut) -> None:
        key = f"{id(module)} input"
        module.register_forward_pre_hook(lambda _, arguments: self._take(chunk, key, arguments[0], cut))

    def _output(self, chunk: nn.Module, module: nn.Module, cut: Cut, term: Term | None = None) -> None:
        key = f"{id(module)} output"
        module.register_forward_hook(lambda _m, _a, output: self._take(chunk, key, output, cut, term))

    def _take(self, chunk: nn.Module, key: str, value: Tensor, cut: Cut, term: Term | None = None) -> None:
        """Keep a value the first time that it is made; when it is made again, in a backward, only listen to it."""
        if not self.rows:
            return
        known, micro = self._values[key], self._micro[chunk]
        if micro in known:
            # Made again: the same bits tell which micro-batch it belongs to, else it is that of what came before.
            micro = next((m for m, v in known.items() if torch.equal(v, value)), micro)
            self._micro[chunk] = micro
        else:
            known[micro] = value.detach().clone()
            self._record(micro, False, cut, known[micro])
        if value.requires_grad:
            value.register_hook(lambda gradient: self._gradient(micro, cut, gradient.detach().clone(), term))

    def _gradient(self, micro: int, cut: Cut, gradient: Tensor, term: Term | None) -> None:
        self._record(micro, True, cut, gradient)
        if term is not None:
            term(micro, gradient)

    def _record(self, micro: int, backward: bool, cut: Cut, value: Tensor) -> None:
        rows = self.rows[micro]
        if value.dim() == 0:
            value = value.view(1, 1)
        elif self.sequence and value.shape[0] < rows[1] - rows[0]:
            rank, share = self.trainer.mesh.tp.rank, value.shape[0]
            rows = rows[0] + rank * share, rows[0] + (rank + 1) * share
        for name, columns, part in cut(value):
            self.seen.append(Seen(name, backward, rows, columns, part.contiguous()))


def trace(rank: int, world: int, config: Config) -> Trace:
    """One training step of this rank, watched."""
    torch.use_deterministic_algorithms(True)
    trainer = Trainer(config, world)
    engine, mesh = trainer.engine, trainer.mesh
    computed: Counter[str] = Counter()
    for p in trainer.parameters:
        p.register_hook(lambda g, p=p: None if g is None else computed.update([p.spec.name]))
    probe = Probe(trainer)
    found = Trace(mesh.coordinates, trainer.report, probe.seen, probe.parts, logits=probe.logits)
    for p in trainer.parameters:
        found.report.pieces.append(_piece("initial", p, _value(p, config.seed)))
        if not trainer.watch.complete and (is_partial(p, engine.tp) or p.shard.sharers > 1):
            found.partial.add(p.spec.name)
        if not p.owner:
            found.copies.add(p.spec.name)
        if p.spec.split is not None and p.spec.split.padded:
            found.padding = p.shard.shape[0] - p.shard.length
    batch = probe.begin(0)
    loss, done = engine.train_step(batch, config.optimizer.lr)
    probe.end()
    norm, clip = float(done.grad_norm), config.optimizer.clip
    found.clipped_by = max(1.0, (norm + 1e-6) / clip) if clip else 1.0
    found.report.numbers["norm", ""] = norm
    found.report.numbers["mean loss", ""] = engine.mean_losses([loss])[0]
    local = trainer.watch.local()
    for quantity, gradients in (("local", local), ("finalized", trainer.watch.finalized(local))):
        found.report.pieces += [_piece(quantity, p, g) for p, g in gradients.items()]
    trainer.state()
    labels = [micro_batch.labels for micro_batch in batch.micro_batches]
    found.computed, found.micro_batches = dict(computed), len(labels)
    found.loss_tokens = sum(int((y != IGNORE).sum()) for y in labels if y is not None)
    return found


def _value(p: Parameter, seed: int) -> Tensor:
    """A parameter's values, made anew where stage 3 has them elsewhere."""
    if p.shape == p.shard.shape:
        return p.data
    value = torch.empty(p.shard.shape, dtype=p.dtype)
    initialise_(value, p.spec, p.shard, seed)
    return value


def _piece(quantity: str, p: Parameter, values: Tensor) -> Piece:
    return Piece(quantity, p.spec.name, p.spec.shape, p.shard, 0, values.detach().flatten().clone())


def _whole(name: str) -> Cut:
    return lambda local: [(name, (0, local.shape[1]), local)]


def _shard_of(module: ColumnParallelLinear, index: int) -> Shard:
    parameter = list(module.parameters())[index]
    assert isinstance(parameter, Parameter)
    return parameter.shard


def _columns(shard: Shard) -> tuple[int, int]:
    return shard.start, shard.start + shard.length


def _name_of(weight: nn.Parameter) -> str:
    assert isinstance(weight, Parameter)
    return weight.spec.name.removesuffix(".weight")


def _read(norm: nn.Module | None, at: str, branch: str) -> str:
    """What a branch's first linear layer reads: its norm's output, or the stream itself."""
    return f"{at}.{branch}.input" if norm is None else f"{at}.{branch}_norm"


def _layer_name(layer: Layer) -> str:
    return _name_of(layer.attention.out.weight).removesuffix(".attention.out")
