"""A training step of chosen ranks of any world on one machine, with nothing computed: peak memory and collectives.

The rank's real engine is built on fake tensors under a fake process group (see `fake`), and takes a real step: the
schedule's actions, the ZeRO backend, everything that the program does. Only the numbers are missing.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from megapt.batch import MicroBatch, StepBatch
from megapt.config import Config
from megapt.engine import Engine
from megapt.errors import UserError
from megapt.mesh import ParallelMesh
from megapt.plan.fake import FakeLive, fake_rank
from megapt.plan.live import LiveBytes
from megapt.prove.collectives import Operation
from megapt.rules import check_world


@dataclass(frozen=True)
class Collective:
    """Collectives or transfers of a rank's step that are alike.

    axis: of the mesh (`tp`, `dp`, `pp`, `pp x tp`, `world`, or another group by its ranks); ranks: members of the
    group; bytes: of the whole tensor that one of them moves, gathered or before it is scattered; count: how many;
    sent: bytes that a rank must send at least for all of them together, by the best algorithms.
    """

    kind: str
    axis: str
    ranks: int
    bytes: int
    count: int

    @property
    def sent(self) -> float:
        share = (self.ranks - 1) / self.ranks
        factor = {"all-reduce": 2 * share, "send": 1.0, "receive": 0.0, "barrier": 0.0}.get(self.kind, share)
        return factor * self.bytes * self.count


@dataclass(frozen=True)
class DryRank:
    """What a rank's step took.

    coordinates: on pp, dp, tp. peak: bytes of live tensors at most, from the start of a step to its end; items: those
    bytes by what they are, or by the phase of the step that made them; when: the action in which they were reached;
    phases: the most in each phase of the step. held: bytes between steps. micro_batches: how many were run, of how many
    of the step: more of them change no peak; collectives count as in the whole step.
    """

    rank: int
    coordinates: tuple[int, int, int]
    peak: int
    items: dict[str, int]
    when: str
    phases: dict[str, int]
    held: int
    micro_batches: tuple[int, int]
    collectives: list[Collective]


def stage_ranks(config: Config, world: int) -> list[int]:
    """One rank for each pipeline stage, the first of it. UserError if the layout does not fit the world."""
    check_world(config, world)
    return list(range(0, world, world // config.parallel.pipeline))


def dry_run(
    config: Config,
    world: int,
    ranks: Sequence[int] | None = None,
    device: str = "cpu",
    progress: Callable[[int], object] | None = None,
) -> list[DryRank]:
    """A step of some ranks of a world on fake tensors; default: one rank for each pipeline stage.

    device: whose path the program takes, `cpu` or `cuda`; no GPU is needed. Compiling is left out. progress: called
    with the number of ranks done.

    Raises UserError if the layout does not fit the world, for a rank outside of it, within a process group, and for
    DeepSpeed on a GPU's path: it asks its accelerator, which must be there.
    """
    data = check_world(config, world)
    chosen = stage_ranks(config, world) if ranks is None else list(ranks)
    wrong = [rank for rank in chosen if not 0 <= rank < world]
    if wrong:
        raise UserError(f"rank {wrong[0]} is not in a world of {world} ranks: give ranks from 0 to {world - 1}")
    if device not in ("cpu", "cuda"):
        raise UserError(f"a dry run takes the path of cpu or cuda, not {device!r}")
    if device == "cuda" and config.zero.backend == "deepspeed":
        raise UserError(
            "DeepSpeed asks its accelerator about everything, so that its path on a GPU cannot be taken without one: "
            "take device = cpu, or zero.backend = native"
        )
    if dist.is_initialized():
        raise UserError("a dry run has a world of its own: no process group may exist")
    config = config.model_copy(update={"compile": False})
    all_micro_batches = config.batch.global_samples // (config.batch.micro * data)
    done = []
    for rank in chosen:
        with fake_rank(rank, world, torch.device(device), config.zero.backend == "deepspeed") as live:
            done.append(_step(config, world, rank, torch.device(device), live, all_micro_batches))
        if progress is not None:
            progress(len(done))
    return done


def _micro_batches(config: Config, most: int) -> int:
    """As many as fill the pipeline, after which a step repeats itself; gpipe never does: it keeps them all."""
    return most if config.parallel.schedule == "gpipe" else min(most, 2 * config.parallel.pipeline)


def _step(config: Config, world: int, rank: int, device: torch.device, live: FakeLive, most: int) -> DryRank:
    engine = Engine(config, world, device)
    count = _micro_batches(config, most)
    batch = step_batch(config, count, device)
    name_states(live, engine, batch)
    if config.zero.backend == "deepspeed":
        engine.train_step(batch, 1e-3)  # in which it makes buffers that it keeps
    # Gradients leave with every micro-batch, or weights are gathered for it; else once, beside the last backward.
    each = ("tp", "pp", "dp") if config.zero.stage > 1 else ("tp", "pp")
    live.operations.clear()
    held = live.now
    live.restart()
    engine.train_step(batch, 1e-3)
    return DryRank(
        rank,
        engine.mesh.coordinates,
        live.peak,
        {item: size for item, size in live.at_peak.most_common() if size},
        live.peak_action,
        dict(live.peaks),
        held,
        (count, most),
        _collectives(live.operations, engine.mesh, most / count, each),
    )


def step_batch(config: Config, micro_batches: int, device: torch.device) -> StepBatch:
    """A step's tokens, all the same, each micro-batch in memory of its own."""

    def zeros() -> torch.Tensor:
        return torch.zeros(config.batch.micro, config.batch.sequence, dtype=torch.int64, device=device)

    made = [MicroBatch(zeros(), zeros()) for _ in range(micro_batches)]
    return StepBatch(made, np.zeros(1, np.int64), made[0].tokens.numel() * micro_batches)


def name_states(live: LiveBytes, engine: Engine, batch: StepBatch) -> None:
    """Say of what is held between steps what it is."""
    live.name((p.data for p in engine.parameters), "weights")
    gradients = (getattr(p, "main_grad", None) for p in engine.parameters)
    live.name((g for g in gradients if g is not None), "main_grad")
    for fragment in engine.backend.fragments():
        for name, tensor in fragment.tensors.items():
            live.name([tensor], "masters" if name == "weight" else "moments")
    for micro_batch in batch.micro_batches:
        live.name([t for t in (micro_batch.tokens, micro_batch.labels) if t is not None], "batch")


def _collectives(
    operations: Iterable[Operation], mesh: ParallelMesh, times: float, each: Container[str]
) -> list[Collective]:
    """Those of a step, alike ones together; those on axes in `each` are issued for every micro-batch of the pipeline's
    actions, and count `times` as often."""
    axes = {"tp": mesh.tp, "dp": mesh.dp, "pp": mesh.pp, "pp x tp": mesh.model}
    names: dict[tuple[int, ...], str] = {}
    for name, axis in reversed(axes.items()):
        if axis.group is not None:
            names[tuple(dist.get_process_group_ranks(axis.group))] = name
    names.setdefault(tuple(range(mesh.world)), "world")
    found: dict[tuple[str, str, int, int], float] = defaultdict(float)
    for operation in operations:
        group = operation.group
        where = "pp" if operation.peer is not None else names.get(group.ranks, str(group))
        again = "micro-batch" in operation.action and where in each
        found[operation.kind, where, len(group.ranks), moved(operation)] += times if again else 1
    made = [Collective(*key, count=round(count)) for key, count in found.items()]
    return sorted(made, key=lambda one: -one.sent)


def moved(operation: Operation) -> int:
    """Bytes of the whole tensor that an operation moves."""
    if not operation.dtype:
        return 0
    width = getattr(torch, operation.dtype).itemsize
    total = sum(math.prod(shape) for shape in operation.shapes) * width
    ranks = len(operation.group.ranks)
    if operation.kind in ("all-gather", "reduce-scatter"):  # the whole and one member's part
        return total * ranks // (ranks + 1)
    return total // 2 if operation.kind == "all-to-all" else total
