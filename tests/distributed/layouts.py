"""Trains a tiny model in any layout and brings losses, gradients, norms and state back in global shapes."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megapt.batch import IGNORE, MicroBatch, StepBatch
from megapt.config import Config, from_tree
from megapt.engine import Engine
from megapt.parallel.gradients import finalize
from megapt.parameters import Parameter
from megapt.zero.base import StepResult

LLAMA: dict[str, Any] = {
    "layers": 4, "hidden": 32, "heads": 4, "kv_heads": 2, "ffn": 48, "vocabulary": 61, "max_sequence": 32,
    "rope_scaling": {"kind": "llama3", "factor": 4.0, "original_sequence": 16},
}  # fmt: skip
GPT2: dict[str, Any] = {
    "layers": 4, "hidden": 32, "heads": 4, "ffn": 48, "vocabulary": 61, "max_sequence": 32, "norm": "layer_norm",
    "activation": "gelu_tanh", "gated": False, "position": "learned", "bias": "all", "tied_embeddings": True,
}  # fmt: skip

BATCH, SEQUENCE = 8, 16


def tree(
    model: dict[str, Any],
    tp: int = 1,
    pp: int = 1,
    precision: str = "fp64",
    zero: tuple[str, int] = ("native", 0),
    micro: int = 2,
    **parallel: Any,
) -> dict[str, Any]:
    """A config as a plain tree; `parallel` holds further keys of that section."""
    return {
        "precision": precision,
        "model": model,
        "parallel": {"tensor": tp, "pipeline": pp, "vocabulary_multiple": 1, **parallel},
        "zero": {"backend": zero[0], "stage": zero[1]},
        "data": {"train": "unused"},
        "batch": {"sequence": SEQUENCE, "samples": BATCH, "micro": micro},
        "optimizer": {"clip": 0.5, "weight_decay": 0.1, "lr": 1e-2, "eps": 1e-6},
        "train": {"steps": 5},
    }


def batch_of(step: int, config: Config) -> tuple[Tensor, Tensor]:
    """The global batch of a step: tokens and labels [BATCH, SEQUENCE], some labels without loss."""
    generator = torch.Generator().manual_seed(1000 + step)
    text = torch.randint(0, config.model.vocabulary, (BATCH, SEQUENCE + 1), generator=generator)
    labels = text[:, 1:].clone()
    labels[torch.rand(labels.shape, generator=generator) < 0.1] = IGNORE
    return text[:, :-1].contiguous(), labels


@dataclass
class Piece:
    """A rank's part of a global tensor: values to put at an index."""

    name: str
    shape: tuple[int, ...]
    index: tuple[slice, ...]
    value: Tensor


@dataclass
class Result:
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: list[list[Piece]] = field(default_factory=list)
    state: list[tuple[str, str, Any]] = field(default_factory=list)


class Trainer:
    """An engine on this rank, fed with batches that are the same whatever the layout."""

    def __init__(self, config: Config, world: int) -> None:
        self.config = config
        self.engine = Engine(config, world, torch.device("cpu"))
        self.mesh, self.backend, self.parameters = self.engine.mesh, self.engine.backend, self.engine.parameters
        self.hooked: dict[Parameter, Tensor] = {}
        if config.zero.stage > 1:
            # These backends take the gradients away inside the backward: watch them on the way.
            for p in self.parameters:
                p.register_hook(lambda g, p=p: self.hooked.__setitem__(p, self.hooked.get(p, 0) + g.double()))

    def batch(self, step: int) -> StepBatch:
        tokens, labels = batch_of(step, self.config)
        share = BATCH // self.mesh.dp.size
        mine = slice(share * self.mesh.dp.rank, share * (self.mesh.dp.rank + 1))
        micro = self.config.batch.micro
        pairs = zip(tokens[mine].split(micro), labels[mine].split(micro), strict=True)
        batches = [MicroBatch(t.contiguous(), y.contiguous()) for t, y in pairs]
        return StepBatch(batches, np.arange(BATCH), int((labels != IGNORE).sum()))

    def step(self, step: int, result: Result) -> None:
        seen: list[list[Piece]] = []
        take = self.backend.step

        def watched(lr: float) -> StepResult:
            seen.append(self.gradients())
            return take(lr)

        self.backend.step = watched  # type: ignore[method-assign]
        loss, done = self.engine.train_step(self.batch(step), self.config.optimizer.lr)
        self.backend.step = take  # type: ignore[method-assign]
        assert not bool(done.skipped)
        result.losses += self.engine.mean_losses([loss])
        result.gradients += seen
        result.norms.append(float(done.grad_norm))

    def gradients(self) -> list[Piece]:
        """The complete gradient of the global batch, of what this rank counts."""
        if self.config.zero.stage > 1:
            complete = self._hooked_gradients()
        else:
            before = [p.main_grad.clone() for p in self.parameters]
            finalize(self.parameters, self.engine.tp, self.engine.ties)
            complete = {p: p.main_grad.clone() for p in self.parameters}
            for p, g in zip(self.parameters, before, strict=True):
                p.main_grad.copy_(g)
        pieces = []
        for p, g in complete.items():
            self.mesh.dp.all_reduce(g)
            if p.owner and p.shard.primary and self.mesh.dp.rank == 0:
                pieces.append(Piece(p.spec.name, p.spec.shape, p.shard.slices(), p.shard.valid(g).clone()))
        return pieces

    def _hooked_gradients(self) -> dict[Parameter, Tensor]:
        complete = dict(self.hooked)
        self.hooked.clear()
        return complete

    def state(self) -> list[tuple[str, str, Any]]:
        """(parameter, kind, (tensor rank, global shape, shard, start, values)) of this rank's fragments."""
        rows = []
        for f in self.backend.fragments():
            if f.parameter.owner and f.parameter.shard.primary:
                for kind, tensor in f.tensors.items():
                    place = (self.mesh.tp.rank, f.parameter.spec.shape, f.parameter.shard, f.start, tensor.clone())
                    rows.append((f.parameter.spec.name, kind, place))
        return rows


def train_many(rank: int, world: int, trees: list[dict[str, Any]], steps: int = 5) -> list[Result]:
    """Several layouts of one world, one after the other in the same processes."""
    torch.use_deterministic_algorithms(True)
    gc.freeze()  # DeepSpeed collects garbage often; what was imported is none
    results = []
    for one in trees:
        trainer, result = Trainer(from_tree(one).config, world), Result()
        for step in range(steps):
            trainer.step(step, result)
        result.state = trainer.state()
        results.append(result)
    return results


@dataclass
class Whole:
    """A run in global shapes, whatever its layout was."""

    losses: list[float]
    norms: list[float]
    gradients: list[dict[str, Tensor]]
    state: dict[tuple[str, str], Tensor]


def assemble(results: list[Result]) -> Whole:
    """Put all ranks' pieces together; every element must be covered."""
    gradients = []
    for step in range(len(results[0].gradients)):
        whole: dict[str, Tensor] = {}
        for result in results:
            for piece in result.gradients[step]:
                empty = torch.full(piece.shape, float("nan"), dtype=torch.float64)
                whole.setdefault(piece.name, empty)[piece.index] = piece.value.double()
        gradients.append(whole)
    locals_: dict[tuple[str, str, int], tuple[Any, Any, Tensor]] = {}
    for result in results:
        for name, kind, (tp, shape, shard, start, values) in result.state:
            flat = torch.full((int(torch.Size(shard.shape).numel()),), float("nan"), dtype=torch.float64)
            _, _, local = locals_.setdefault((name, kind, tp), (shape, shard, flat))
            local[start : start + values.numel()] = values.double()
    state: dict[tuple[str, str], Tensor] = {}
    for (name, kind, _), (shape, shard, flat) in locals_.items():
        whole_tensor = state.setdefault((name, kind), torch.full(shape, float("nan"), dtype=torch.float64))
        whole_tensor[shard.slices()] = shard.valid(flat.view(shard.shape))
    for tensor in [*state.values(), *(t for g in gradients for t in g.values())]:
        assert not tensor.isnan().any()
    return Whole(results[0].losses, results[0].norms, gradients, state)
