"""The estimate of memory and the dry run, held against what ranks really allocate.

`python -m megapt.plan.measure --out docs/results/planner` runs small layouts over gloo on this machine and writes
memory.json, memory.md and memory.png. What is measured is the peak of torch's CPU allocator during a whole step, as its
profiler reports every allocation, those within operations included.
"""

from __future__ import annotations

import gc
import itertools
import json
import math
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from megapt.config import from_tree
from megapt.files import open_whole, write_whole
from megapt.plan.memory import ITEMS, StageMemory, stage_memory
from megapt.rules import check_world

if TYPE_CHECKING:
    from megapt.plan.dry_run import DryRank
    from megapt.prove.ranks import Ranks

_LLAMA = {
    "layers": 4, "hidden": 256, "heads": 8, "kv_heads": 4, "ffn": 704, "vocabulary": 2048, "max_sequence": 256,
}  # fmt: skip
_GPT2 = _LLAMA | {
    "kv_heads": 8, "ffn": 1024, "norm": "layer_norm", "activation": "gelu_tanh", "gated": False,
    "position": "learned", "bias": "all", "tied_embeddings": True,
}  # fmt: skip


def layout(
    model: dict[str, Any] = _LLAMA,
    precision: str = "fp32",
    zero: str = "native 1",
    policy: str = "none",
    **parallel: Any,
) -> dict[str, Any]:
    """A config of 4 million parameters and 1024 tokens per step, as a plain tree."""
    backend, stage = zero.split()
    return {
        "precision": precision,
        "model": model,
        "parallel": {"vocabulary_multiple": 1, **parallel},
        "recompute": {"policy": policy},
        "zero": {"backend": backend, "stage": int(stage), "bucket": 1_000_000},
        "data": {"train": "unused"},
        "batch": {"sequence": 128, "samples": 8, "micro": 2},
        "train": {"steps": 1},
    }


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, layout()),
    "one rank, GPT-2, bf16": (1, layout(_GPT2, "bf16")),
    "dp 2, native ZeRO 0, bf16": (2, layout(precision="bf16", zero="native 0")),
    "dp 2, native ZeRO 1": (2, layout()),
    "dp 2, native ZeRO 2": (2, layout(zero="native 2")),
    "dp 2, DeepSpeed ZeRO 1, bf16": (2, layout(precision="bf16", zero="deepspeed 1")),
    "dp 2, DeepSpeed ZeRO 2, bf16": (2, layout(precision="bf16", zero="deepspeed 2")),
    "dp 2, DeepSpeed ZeRO 3, bf16": (2, layout(precision="bf16", zero="deepspeed 3")),
    "tp 2": (2, layout(tensor=2, sequence=False)),
    "tp 2, sequence parallel": (2, layout(tensor=2)),
    "pp 2": (2, layout(pipeline=2)),
    "pp 2, selective recompute": (2, layout(pipeline=2, policy="selective")),
    "pp 2, full recompute": (2, layout(pipeline=2, policy="full")),
    "pp 2, interleaved": (2, layout(pipeline=2, schedule="interleaved", chunks=2)),
    "pp 2, zb-h1": (2, layout(pipeline=2, schedule="zb-h1")),
    "pp 2, zb-v": (2, layout(pipeline=2, schedule="zb-v", chunks=2)),
    "pp 2, GPT-2, tied, 3 + 1 layers": (2, layout(_GPT2, pipeline=2, layers_per_stage="3,1")),
    "tp 2, pp 2, fp16": (4, layout(precision="fp16", tensor=2, pipeline=2)),
    "dp 2, pp 2, bf16": (4, layout(precision="bf16", pipeline=2)),
}


@dataclass(frozen=True)
class Measured:
    """Of one rank, in bytes.

    allocated: the peak of torch's allocator during a step, the least of several; tensors: that of live tensors'
    storages in another one; resident: what the process' memory grew by at most, None where the system does not say.
    """

    allocated: int
    tensors: int
    resident: int | None


def measure(rank: int, world: int, tree: dict[str, Any]) -> Measured:
    """Steps of a real engine. Collective over the world."""
    from megapt.engine import Engine
    from megapt.model.positions import rotary_table
    from megapt.plan.dry_run import step_batch
    from megapt.plan.live import LiveBytes

    config = from_tree(tree).config
    gc.collect()
    before = _resident(restart=True)
    live = LiveBytes()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        with live:
            engine = Engine(config, world, torch.device("cpu"))
            count = config.batch.global_samples // (config.batch.micro * engine.mesh.dp.size)
            batch = step_batch(config, count, torch.device("cpu"))
            engine.train_step(batch, 1e-3)  # in which buffers are made that stay
        held = []
        for _ in range(_STEPS):
            _settle(live)
            held.append(live.now)
            with torch.profiler.record_function(_MARK):
                engine.train_step(batch, 1e-3)
    with live:
        live.restart()
        engine.train_step(batch, 1e-3)
    after = _resident()
    tensors, allocated = live.peak, min(_peaks(profile, held))
    del engine, batch, profile
    rotary_table.cache_clear()
    gc.collect()
    return Measured(allocated, tensors, None if before is None or after is None else after - before)


_MARK = "a step that is measured"
_STEPS = 3  # of which the least counts: what other threads free late, or unseen, only adds


def _settle(live: Any) -> None:
    """Wait until gloo's threads have let go of the tensors of collectives that are over."""
    before = None
    while before != live.now:
        before = live.now
        time.sleep(0.1)


def _peaks(profile: Any, held: Sequence[int]) -> Iterator[int]:
    """The most bytes during each marked step, at whose beginning `held` were allocated.

    The profiler does not see what other threads free: memory that is given out again must have been freed.
    """
    from torch._C._profiler import _EventType

    starts, events = [], []
    todo = list(profile.profiler.kineto_results.experimental_event_tree())
    while todo:
        event = todo.pop()
        todo += event.children
        kind, extra = event.typed
        if event.name == _MARK:
            starts.append(event.start_time_ns)
        elif kind == _EventType.Allocation:
            events.append((event.start_time_ns, extra.ptr, extra.alloc_size))
    events.sort(key=lambda event: event[0])
    bounds = [0, *sorted(starts), math.inf]
    earlier: dict[int, int] = {}  # what a step finds
    for base, (start, end) in zip((0, *held), itertools.pairwise(bounds), strict=True):
        sizes: dict[int, int] = {}  # what it makes
        now = peak = base
        for _, address, size in (event for event in events if start <= event[0] < end):
            if size > 0:
                earlier.pop(address, None)  # freed before the step began, unseen, and not among what was held
                now += size - sizes.pop(address, 0)
                sizes[address] = size
                peak = max(peak, now)
            else:
                now -= sizes.pop(address, 0) or earlier.pop(address, 0)
        earlier |= sizes
        if start:
            yield peak


def _resident(restart: bool = False) -> int | None:
    """The most memory that the process had resident since the last restart; now, if it restarts."""
    try:
        if restart:
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:")), None)


@dataclass(frozen=True)
class Row:
    """A pipeline stage of a layout. measured: of its first rank."""

    layout: str
    stage: int
    estimate: StageMemory
    dry: DryRank
    measured: Measured

    @property
    def errors(self) -> tuple[float, float, float]:
        """Estimate against dry run, estimate against measured, dry run against measured."""
        estimate, dry, measured = self.estimate.allocated, self.dry.peak, self.measured.allocated
        return estimate / dry - 1, estimate / measured - 1, dry / measured - 1


def rows(name: str, ranks: Ranks, tree: dict[str, Any]) -> Iterator[Row]:
    """Each stage of a layout, estimated, run dry and run on `ranks`."""
    from megapt.plan.dry_run import dry_run

    config, world = from_tree(tree).config, ranks.world
    estimates = stage_memory(config, check_world(config, world), cpu=True)
    measured = ranks.run(measure, tree)
    for stage, (estimate, dry) in enumerate(zip(estimates, dry_run(config, world), strict=True)):
        yield Row(name, stage, estimate, dry, measured[dry.rank])


def main(
    out: Annotated[Path, typer.Option(help="Folder for memory.json, memory.md and memory.png.")],
    only: Annotated[str, typer.Option(help="Layouts whose names hold this; default: all.")] = "",
) -> None:
    """Hold the estimate of memory and the dry run against real steps of small layouts over gloo."""
    from megapt.prove.ranks import Ranks

    found: list[Row] = []
    for world in sorted({world for world, _ in LAYOUTS.values()}):
        chosen = {name: tree for name, (size, tree) in LAYOUTS.items() if size == world and only in name}
        if not chosen:
            continue
        with Ranks(world, timeout=500.0) as ranks:
            for name, tree in chosen.items():
                for row in rows(name, ranks, tree):
                    found.append(row)
                    typer.echo(_line(row))
    write_whole(out / "memory.json", _json(found).encode())
    write_whole(out / "memory.md", _markdown(found).encode())
    _picture(found, out / "memory.png")


def _line(row: Row) -> str:
    sizes = (row.estimate.allocated, row.dry.peak, row.measured.allocated, row.measured.tensors, row.measured.resident)
    cells = [row.layout, str(row.stage), *("" if size is None else f"{size / 2**20:.2f}" for size in sizes)]
    when = row.dry.when.partition(" (")[0]
    return "| " + " | ".join([*cells, *(f"{error:+.1%}" for error in row.errors), when]) + " |"


def _environment() -> str:
    return f"torch {torch.__version__}, Python {platform.python_version()}, gloo, one thread per rank"


def _json(found: list[Row]) -> str:
    out = []
    for row in found:
        errors = dict(zip(("estimate_dry", "estimate_measured", "dry_measured"), row.errors, strict=True))
        out.append(
            {
                "layout": row.layout,
                "stage": row.stage,
                "estimate": {"bytes": row.estimate.allocated, "items": row.estimate.items, "when": row.estimate.when},
                "dry_run": {"bytes": row.dry.peak, "items": row.dry.items, "when": row.dry.when},
                "measured": asdict(row.measured),
                "errors": {name: round(error, 5) for name, error in errors.items()},
            }
        )
    return json.dumps({"environment": _environment(), "stages": out}, indent=1) + "\n"


_HEAD = """# Memory: estimated, run dry, measured

Peak MiB of a rank of each pipeline stage in a training step of small layouts: 4 million parameters, 1024 tokens per
step. **estimate**: `plan.memory.stage_memory`, in a millisecond. **dry run**: `plan.dry_run`, the real program on
tensors without data. **allocator**: the peak of torch's CPU allocator in a real step over gloo, as its profiler reports
every allocation. **tensors**: the peak of live tensors' storages in another real step. **resident**: what the process
grew by since before the engine was built, with libraries, code and what the allocator keeps.

Made by `python -m megapt.plan.measure --out docs/results/planner`: {environment}.

| layout | stage | estimate | dry run | allocator | tensors | resident | est./dry | est./all. | dry/all. | peak in |
|---|---|---|---|---|---|---|---|---|---|---|
"""


def _markdown(found: list[Row]) -> str:
    lines = [_line(row) for row in found]
    worst = [max((abs(row.errors[i]) for row in found), default=0.0) for i in range(3)]
    mean = [sum(abs(row.errors[i]) for row in found) / max(len(found), 1) for i in range(3)]
    pairs = ("estimate against dry run", "estimate against allocator", "dry run against allocator")
    said = [f"- {pair}: mean error {m:.2%}, worst {w:.2%}" for pair, m, w in zip(pairs, mean, worst, strict=True)]
    return _HEAD.format(environment=_environment()) + "\n".join([*lines, "", *said]) + "\n"


def _picture(found: list[Row], path: Path) -> None:
    """The estimate's items as stacked bars, with the dry run and the measured peak as marks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.3 * len(found) + 1.6), dpi=120, layout="constrained")
    axis = figure.subplots()
    places, left = range(len(found)), [0.0] * len(found)
    colours = (
        "#4c72b0 #dd8452 #55a868 #c44e52 #8172b3 #937860 #da8bc3 #8c8c8c #ccb974 #64b5cd #b0c4de #e7a977 #9ad0a5"
    ).split()
    for item, colour in zip((name for name in ITEMS if name not in ("fragmentation", "context")), colours, strict=True):
        widths = [row.estimate.items.get(item, 0) / 2**20 for row in found]
        if any(widths):
            axis.barh(places, widths, 0.75, left, label=item.replace("_", " "), color=colour)
        left = [low + width for low, width in zip(left, widths, strict=True)]
    axis.plot([row.dry.peak / 2**20 for row in found], places, "k|", markersize=11, label="dry run")
    axis.plot([row.measured.allocated / 2**20 for row in found], places, "kx", markersize=5, label="allocator's peak")
    axis.set_yticks(places, [f"{row.layout}: stage {row.stage}" for row in found], fontsize=7)
    axis.invert_yaxis()
    axis.set_xlabel("MiB of a rank at the peak of a step")
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", fontsize=7, frameon=False)
    with open_whole(path) as file:
        figure.savefig(file, format="png")


if __name__ == "__main__":
    typer.run(main)
