"""What a rank does for a proof: train a small model in one layout, save, resume, and report all it computed.

Batches are a function of the step alone. What a rank reports are pieces of global tensors; `compare` puts them
together.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megapt.batch import IGNORE, Documents, MicroBatch, StepBatch
from megapt.config import Config
from megapt.engine import Engine
from megapt.model.table import parameter_table
from megapt.parallel.gradients import finalize
from megapt.parallel.weight_gradients import AddProduct
from megapt.parameters import Parameter, Shard
from megapt_kernels.library import load_emulated

STEPS, SAVE_AFTER = 3, 2  # steps trained; steps after which the checkpoint is written
RESUMED = "resumed "  # begins the name of every quantity found after resuming
FIRST = "first "  # of loss and gradients before any update


@dataclass(frozen=True)
class Piece:
    """A rank's part of a global tensor: elements [start, start + n) of its flattened local shard.

    quantity: what it is a value of, e.g. `gradient`; name: which one, e.g. a parameter's name.
    """

    quantity: str
    name: str
    shape: tuple[int, ...]
    shard: Shard
    start: int
    values: Tensor


@dataclass
class Report:
    """What one rank found: pieces, and numbers that every rank knows."""

    pieces: list[Piece] = field(default_factory=list)
    numbers: dict[tuple[str, str], float] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """A layout to run: its config; where to save; which checkpoint of another layout to resume from, if any."""

    config: Config
    world: int
    save: str | None = None
    resume: str | None = None


def global_batch(step: int, config: Config) -> tuple[Tensor, Tensor]:
    """Tokens and labels [samples, sequence] of a step; about a tenth of the labels have no loss, unevenly spread."""
    samples, sequence = config.batch.global_samples, config.batch.sequence
    generator = torch.Generator().manual_seed(1000 + step)
    text = torch.randint(0, config.model.vocabulary, (samples, sequence + 1), generator=generator)
    labels = text[:, 1:].clone()
    share = torch.linspace(0.0, 0.2, samples).unsqueeze(1)
    labels[torch.rand(labels.shape, generator=generator) < share] = IGNORE
    return text[:, :-1].contiguous(), labels


def documents_of(config: Config, samples: range) -> Documents | None:
    """Where documents lie in some samples of the global batch, if the model is to know: each sample ends elsewhere."""
    if not config.data.documents:
        return None
    sequence = config.batch.sequence
    lengths = [n for sample in samples for n in (1 + (5 * sample) % (sequence - 1), sequence)]
    lengths[1::2] = [sequence - n for n in lengths[::2]]
    ends = torch.tensor([0, *lengths]).cumsum(0)
    positions = torch.cat([torch.arange(n) for n in lengths])
    return Documents(tuple(lengths), ends.to(torch.int32), positions)


def step_batch(step: int, config: Config, rank: int, size: int) -> StepBatch:
    """The share of data-parallel rank `rank` of `size` in a step's global batch."""
    tokens, labels = global_batch(step, config)
    share = len(tokens) // size
    mine = slice(share * rank, share * (rank + 1))
    pairs = zip(tokens[mine].split(config.batch.micro), labels[mine].split(config.batch.micro), strict=True)
    first = range(mine.start, mine.stop, config.batch.micro)
    batches = [
        MicroBatch(t.contiguous(), y.contiguous(), documents_of(config, range(at, at + len(t))))
        for at, (t, y) in zip(first, pairs, strict=True)
    ]
    return StepBatch(batches, np.arange(len(tokens)), int((labels != IGNORE).sum()))


class GradientWatch:
    """Sums every parameter's gradients of a step as autograd makes them, whatever the ZeRO backend does with them."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        # DeepSpeed's stages 2 and 3 complete each gradient before this sees it.
        self.complete = engine.config.zero.backend == "deepspeed" and engine.config.zero.stage > 1
        self._sums: dict[Parameter, Tensor] = {}
        for p in engine.parameters:
            p.register_hook(lambda gradient, p=p: self._add(p, gradient))
        weights = engine.tp.weight_gradients
        if weights.add is not None:
            weights.add = partial(self._product, weights.add)

    def _product(self, add: AddProduct, weights: Sequence[Parameter], dy: Tensor, x: Tensor) -> None:
        """Gradients that autograd never sees."""
        for weight, gradient in zip(weights, (dy.t() @ x).split([len(w) for w in weights]), strict=True):
            self._add(weight, gradient)
        add(weights, dy, x)

    def _add(self, parameter: Parameter, gradient: Tensor | None) -> None:
        if gradient is None:
            return  # put off by a schedule that computes weights' gradients later: autograd comes by nevertheless
        if parameter in self._sums:
            self._sums[parameter] += gradient
        else:
            self._sums[parameter] = gradient.clone()

    def local(self) -> dict[Parameter, Tensor]:
        """What this rank's own micro-batches gave each parameter since the last call."""
        sums, self._sums = self._sums, {}
        shapes = {p: p.shard.shape for p in self.engine.parameters}
        return {p: sums[p] if p in sums else torch.zeros(shapes[p], dtype=p.dtype) for p in shapes}

    def finalized(self, local: dict[Parameter, Tensor]) -> dict[Parameter, Tensor]:
        """The same after what tensor and pipeline ranks owe each other is settled, by the code that training uses."""
        if self.complete:
            return local
        parameters = self.engine.parameters
        held = {p: getattr(p, "main_grad", None) for p in parameters}
        for p in parameters:
            p.main_grad = local[p].clone()
        finalize(parameters, self.engine.tp, self.engine.ties)
        found = {p: p.main_grad for p in parameters}
        for p in parameters:
            p.main_grad = held[p]  # type: ignore[assignment]
        return found

    def reduced(self, finalized: dict[Parameter, Tensor]) -> dict[Parameter, Tensor]:
        """The gradients of the global batch."""
        return {p: self.engine.mesh.dp.all_reduce(g.clone()) for p, g in finalized.items()}


class Trainer:
    """An engine on this rank, fed with batches that are the same whatever the layout."""

    def __init__(self, config: Config, world: int) -> None:
        self.config = config
        if "cuda" in config.kernels.model_dump().values():
            load_emulated()
        self.engine = Engine(config, world, torch.device("cpu"))
        self.mesh, self.backend, self.parameters = self.engine.mesh, self.engine.backend, self.engine.parameters
        self.watch = GradientWatch(self.engine)
        self.report = Report()

    def batch(self, step: int) -> StepBatch:
        return step_batch(step, self.config, self.mesh.dp.rank, self.mesh.dp.size)

    def step(self, step: int, prefix: str = "") -> None:
        """Train one step and report loss, gradients and norm."""
        loss, done = self.engine.train_step(self.batch(step), self.config.optimizer.lr)
        first = prefix + (FIRST if step == 0 else "")
        self.report.numbers[f"{first}loss", f"step {step}"] = self.engine.mean_losses([loss])[0]
        self.report.numbers[f"{prefix}norm", f"step {step}"] = float(done.grad_norm)
        gradients = self.watch.reduced(self.watch.finalized(self.watch.local()))
        for p, g in gradients.items():
            if p.owner and self.mesh.dp.rank == 0:
                self._add(f"{first}gradient", f"step {step}: {p.spec.name}", p, 0, g)

    def state(self, prefix: str = "") -> None:
        """Report masters and moments, and the weights as every rank computes with them; and the loss of one more batch.

        The forward pass comes first: a backend may gather weights while it runs.
        """
        self.report.numbers[f"{prefix}evaluation", "loss"] = self.engine.evaluate([self.batch(STEPS)])
        for f in self.backend.fragments():
            if f.parameter.owner:
                for kind, tensor in f.tensors.items():
                    self._add(prefix + kind, f.parameter.spec.name, f.parameter, f.start, tensor)
        for p in self.parameters:
            if p.shape == p.shard.shape:  # in stage 3 they have no storage now
                self._add(f"{prefix}copy", p.spec.tied_to or p.spec.name, p, 0, p.data)

    def save(self, folder: str) -> None:
        from megapt.checkpoint import save

        meta = {"config": self.config.model_dump(), "updates": self.backend.updates, "scalars": self.backend.scalars()}
        save(folder, SAVE_AFTER, self.backend.fragments(), self.mesh, meta, parameter_table(self.config.model))

    def resume(self, folder: str) -> None:
        """Load a checkpoint over state made unusable, so that what is not loaded shows."""
        from megapt.checkpoint import load

        fragments = list(self.backend.fragments())
        with torch.no_grad():
            for fragment in fragments:
                for tensor in fragment.tensors.values():
                    tensor.fill_(float("nan"))
        meta = load(folder, fragments, self.mesh, self.config.model)
        self.backend.loaded(meta["updates"], meta["scalars"])

    def _add(self, quantity: str, name: str, p: Parameter, start: int, values: Tensor) -> None:
        flat = values.detach().flatten().clone()
        self.report.pieces.append(Piece(quantity, name, p.spec.shape, p.shard, start, flat))


def run(rank: int, world: int, job: Job) -> Report:
    """All of one layout on one rank."""
    _prepare()
    if job.config.compile:
        torch.compiler.reset()  # ranks serve many layouts, and torch compiles a function for few shapes only
    trainer = Trainer(job.config, world)
    for step in range(STEPS):
        if step == SAVE_AFTER and job.save is not None:
            trainer.save(job.save)
        trainer.step(step)
    trainer.state()
    if job.resume is not None:
        trainer.resume(job.resume)
        trainer.step(SAVE_AFTER, RESUMED)
        trainer.state(RESUMED)
    return trainer.report


def reference(rank: int, world: int, config: Config, micros: list[int]) -> list[Report]:
    """The same training in one process, once for each size of micro-batch."""
    reports = []
    for micro in micros:
        batch = config.batch.model_copy(update={"micro": micro})
        reports.append(run(rank, world, Job(config.model_copy(update={"batch": batch}), world)))
    return reports


def plain(rank: int, world: int, config: Config) -> Report:
    """The reference by nothing but torch: autograd, cross_entropy, clip_grad_norm_ and torch.optim.AdamW."""
    _prepare()
    engine = Engine(config, world, torch.device("cpu"), optimize=False)
    (chunk,) = engine.chunks
    own = list(engine.parameters)
    parameters = {p.spec.name: torch.nn.Parameter(p.detach().clone()) for p in own}
    section = config.optimizer
    groups = [
        {
            "params": [parameters[p.spec.name]],
            "weight_decay": section.weight_decay if p.spec.decay else 0.0,
            "lr": section.lr * getattr(section.lr_scale, p.spec.role),
        }
        for p in own
    ]
    optimizer = torch.optim.AdamW(groups, betas=(section.betas[0], section.betas[1]), eps=section.eps)
    local = {name: p.spec.name for name, p in _named(chunk)}
    report = Report()
    for step in range(STEPS):
        first = FIRST if step == 0 else ""
        values = {name: parameters[to] for name, to in local.items()}
        loss, objective = _plain_loss(chunk, values, step, config)
        optimizer.zero_grad()
        objective.backward()
        for p in own:
            gradient = parameters[p.spec.name].grad
            assert gradient is not None
            name = f"step {step}: {p.spec.name}"
            report.pieces.append(Piece(f"{first}gradient", name, p.spec.shape, p.shard, 0, gradient.flatten().clone()))
        norm = torch.nn.utils.clip_grad_norm_(list(parameters.values()), section.clip)
        optimizer.step()
        report.numbers[f"{first}loss", f"step {step}"] = float(loss.detach())
        report.numbers["norm", f"step {step}"] = float(norm)
    for p in own:
        value = parameters[p.spec.name]
        tensors = {"weight": value, **optimizer.state[value]}
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            flat = tensors[kind].detach().flatten()
            report.pieces.append(Piece(kind, p.spec.name, p.spec.shape, p.shard, 0, flat))
    return report


def _plain_loss(chunk: torch.nn.Module, values: dict[str, Any], step: int, config: Config) -> tuple[Tensor, Tensor]:
    """The mean loss, and what is trained: with the z-loss, the squared log of the softmax denominator."""
    import torch.nn.functional as F

    tokens, labels = global_batch(step, config)
    batch = MicroBatch(tokens, None, documents_of(config, range(len(tokens))))
    logits = torch.func.functional_call(chunk, values, (None, batch), tie_weights=True)
    loss = F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE)
    log_z = logits.logsumexp(1)[labels.flatten() != IGNORE]
    return loss, loss + config.train.z_loss * log_z.square().mean()


def _named(chunk: torch.nn.Module) -> Iterator[tuple[str, Parameter]]:
    for name, parameter in chunk.named_parameters():
        assert isinstance(parameter, Parameter)
        yield name, parameter


def _prepare() -> None:
    torch.use_deterministic_algorithms(True)
    gc.freeze()  # DeepSpeed collects garbage often; what was imported is none
