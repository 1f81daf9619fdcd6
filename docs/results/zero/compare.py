"""The ZeRO backends side by side on this machine's CPU: bytes moved, memory, time per step.

Run it where megapt and deepspeed can be imported; it takes about five minutes on two quiet cores:

    cd docs/results/zero && python compare.py --output result.json --readme README.md

Each side (a backend and a stage) trains the same Llama on random tokens in ranks of its own over gloo. The sides of a
stage take turns, a few steps at a time, and their order changes from round to round, so that what else the machine
does burdens them alike. Bytes are counted call by call in one further step (megapt.zero.traffic), whoever makes the
call; memory is what a rank's tensors hold between steps, and by how much its resident memory grew at its peak.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

SIDES = {
    0: ["native-0", "deepspeed-0"],
    1: ["native-1", "deepspeed-1", "native-1-muon"],
    2: ["native-2", "deepspeed-2"],
    3: ["native-2", "deepspeed-3"],
}
MODEL = {
    "layers": 6, "hidden": 384, "heads": 6, "kv_heads": 2, "ffn": 1024, "vocabulary": 8192, "max_sequence": 512,
}  # fmt: skip
MIB = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="steps of a side in a round")
    parser.add_argument("--micro-batches", type=int, default=2, help="of each rank in a step, one sequence each")
    parser.add_argument("--sequence", type=int, default=256)
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--stages", type=int, nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--output", type=Path, help="write the result there as JSON")
    parser.add_argument("--readme", type=Path, help="put the table there in the place of the one it has")
    options = parser.parse_args()
    result = {"environment": environment(options), "stages": {s: compare(SIDES[s], options) for s in options.stages}}
    lines = table(result["stages"])
    print("\n".join(lines))
    if options.output is not None:
        write(options.output, json.dumps(result, indent=2) + "\n")
    if options.readme is not None:
        before, _, rest = options.readme.read_text(encoding="utf-8").partition(lines[0])
        after = rest[rest.index("\n\n") :]
        write(options.readme, before + "\n".join(lines) + after)


def write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def environment(options: argparse.Namespace) -> dict[str, Any]:
    import deepspeed
    import torch

    given = {k: v for k, v in vars(options).items() if k not in ("output", "readme")}
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "python": platform.python_version(),
        "cpu": names[0].partition(": ")[2] if names else platform.processor(),
        "cores": os.cpu_count(),
        "model": MODEL,
        "options": given,
    }


def compare(sides: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Rounds of all sides in turn; what each gave, and the ratio of its time to the first side's within rounds."""
    with tempfile.TemporaryDirectory(prefix="zero-") as folder:
        teams = {side: Team(side, options, folder) for side in sides}
        for team in teams.values():
            team.ask("steps", 2)  # warm
        times: dict[str, list[float]] = {side: [] for side in sides}
        for number in range(options.rounds):
            for side in sides[number % len(sides) :] + sides[: number % len(sides)]:
                times[side].append(max(teams[side].ask("steps", options.steps)) / options.steps)
        found = {}
        for side, team in teams.items():
            ratios = [a / b for a, b in zip(times[side], times[sides[0]], strict=True)]
            traffic = team.ask("traffic", 0)
            found[side] = {
                "says": team.ask("says", 0)[0],
                "seconds": {"all": times[side], "least": min(times[side])},
                "ratio": {"median": median(ratios), "least": min(ratios), "most": max(ratios)},
                "held": max(team.ask("held", 0)),
                "peak": max(team.ask("peak", 0)),
                "sent": traffic[0]["sent"],
                "needed": traffic[0]["needed"],
            }
        for team in teams.values():
            team.leave()
    return found


class Team:
    """The ranks of one side, which work when they are asked to."""

    def __init__(self, side: str, options: argparse.Namespace, folder: str) -> None:
        import torch.multiprocessing as mp

        context = mp.get_context("spawn")
        self.lines: list[Connection] = []
        self.ranks = []
        for rank in range(options.ranks):
            ours, theirs = context.Pipe()
            store = f"{folder}/{side}"
            process = context.Process(target=serve, args=(side, rank, options, store, theirs), daemon=True)
            process.start()
            self.lines.append(ours)
            self.ranks.append(process)
        for line in self.lines:
            line.recv()

    def ask(self, what: str, number: int) -> list[Any]:
        for line in self.lines:
            line.send((what, number))
        return [line.recv() for line in self.lines]

    def leave(self) -> None:
        for line in self.lines:
            line.send(("leave", 0))
        for rank in self.ranks:
            rank.join()


def serve(side: str, rank: int, options: argparse.Namespace, store: str, line: Connection) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(options.ranks), LOCAL_RANK=str(rank), OMP_NUM_THREADS="1")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, options.ranks), rank=rank, world_size=options.ranks)
    work = Work(side, options)
    line.send("ready")
    while True:
        what, number = line.recv()
        if what == "leave":
            break
        line.send(getattr(work, what)(number))
    dist.destroy_process_group()


class Work:
    """A rank of one side: an engine, and what can be asked of it."""

    def __init__(self, side: str, options: argparse.Namespace) -> None:
        import torch

        from megapt.engine import Engine

        self.options = options
        if side.startswith("deepspeed"):
            import deepspeed  # noqa: F401 (not a part of what the engine takes)
        self.before = status("VmRSS")
        self.config = configuration(side, options)
        self.engine = Engine(self.config, options.ranks, torch.device("cpu"))
        self.number = 0

    def batch(self) -> Any:
        import numpy as np
        import torch

        from megapt.batch import MicroBatch, StepBatch

        self.number += 1
        dp, count, length = self.engine.mesh.dp, self.options.micro_batches, self.options.sequence
        generator = torch.Generator().manual_seed(1000 * self.number + dp.rank)
        text = torch.randint(0, MODEL["vocabulary"], (count, 1, length + 1), generator=generator)
        batches = [MicroBatch(t[:, :-1].contiguous(), t[:, 1:].contiguous()) for t in text]
        samples = count * dp.size
        return StepBatch(batches, np.arange(samples), samples * length)

    def steps(self, number: int) -> float:
        """Seconds of so many steps, all ranks starting together."""
        import torch.distributed as dist

        batches = [self.batch() for _ in range(number)]
        dist.barrier()
        start = time.perf_counter()
        for batch in batches:
            float(self.engine.train_step(batch, 1e-4)[1].grad_norm)
        return time.perf_counter() - start

    def traffic(self, _: int) -> dict[str, Any]:
        from megapt.zero.traffic import Traffic, needed

        mesh, config = self.engine.mesh, self.config
        batch = self.batch()
        with Traffic({"tensor": mesh.tp.group, "data": mesh.dp.group}) as counted:
            float(self.engine.train_step(batch, 1e-4)[1].grad_norm)
        sent = {g: {k: vars(v) for k, v in kinds.items()} for g, kinds in counted.by_group.items()}
        least = needed(self.shapes(), mesh.dp.size, min(config.zero.stage, 2), self.options.micro_batches)
        return {"sent": sent, "needed": least}

    def shapes(self) -> Any:
        """Parameters as they are without sharding: DeepSpeed's stage 3 empties them."""
        import torch

        from megapt.parameters import Parameter

        whole = []
        for p in self.engine.parameters:
            whole.append(Parameter(torch.empty(p.shard.shape, dtype=p.dtype, device="meta")))
            whole[-1].owner = p.owner
        return whole

    def held(self, _: int) -> int:
        """Bytes of all tensors that live between steps."""
        import torch

        gc.collect()
        found = {}
        for thing in gc.get_objects():
            if issubclass(type(thing), torch.Tensor):
                storage = thing.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
        return sum(found.values())

    def peak(self, _: int) -> int:
        """Growth of the resident memory up to its peak, since before the engine was built."""
        return status("VmHWM") - self.before

    def says(self, _: int) -> str:
        return self.engine.backend.describe()


def configuration(side: str, options: argparse.Namespace) -> Any:
    from megapt.config import from_tree

    backend, stage, *optimizer = side.split("-")
    data = options.ranks // options.tensor
    return from_tree(
        {
            "precision": options.precision,
            "model": MODEL,
            "parallel": {"tensor": options.tensor},
            "zero": {"backend": backend, "stage": int(stage), "bucket": 4_000_000},
            "data": {"train": "random"},
            "batch": {"sequence": options.sequence, "samples": data * options.micro_batches},
            "optimizer": {"kind": optimizer[0] if optimizer else "adamw"},
            "train": {"steps": 1000},
        }
    ).config


def status(field: str) -> int:
    """Bytes, from the kernel's account of this process."""
    for row in Path("/proc/self/status").read_text().splitlines():
        if row.startswith(field):
            return int(row.split()[1]) << 10
    raise RuntimeError(f"/proc/self/status has no {field}")


def table(stages: dict[int, dict[str, Any]]) -> list[str]:
    lines = [
        "| | sent over data-parallel ranks | ZeRO needs | of it | tensors held | peak growth | s/step | time / first |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for sides in stages.values():
        for side, found in sides.items():
            kinds = found["sent"]["data"]
            sent = sum(volume["sent"] for volume in kinds.values())
            words = ", ".join(f"{kind} {volume['sent'] / MIB:.1f}" for kind, volume in kinds.items())
            ratio = found["ratio"]
            lines.append(
                f"| {side} | {sent / MIB:.1f} MiB ({words}) | {sum(found['needed'].values()) / MIB:.1f} MiB | "
                f"{sent / sum(found['needed'].values()):.2f} | {found['held'] / MIB:.0f} MiB | "
                f"{found['peak'] / MIB:.0f} MiB | {found['seconds']['least']:.2f} | {ratio['median']:.2f} "
                f"({ratio['least']:.2f} to {ratio['most']:.2f}) |"
            )
    return lines


if __name__ == "__main__":
    main()
