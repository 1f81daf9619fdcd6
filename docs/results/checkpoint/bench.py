"""Saving and loading against the disk's own speed, in the background against in the foreground, beside PyTorch's DCP.

Run it from a checkout, with --folder on the disk in question; about five minutes on two quiet cores:

    python docs/results/checkpoint/bench.py --output docs/results/checkpoint/result.json

Two ranks hold the state of a Llama (fp32 masters and both moments) as ZeRO 1 cuts it: buckets, each halved. For DCP the
same numbers are DTensors cut along their first dimension, as FSDP cuts them, which needs no sending. Everything takes
its turn in every round, in an order that changes from round to round: the raw disk (each rank writes its share of the
bytes with large writes, with one fsync at the end or one every 64 MiB, of which the faster counts, and reads it back),
megapt and DCP, saving at once and in the background, and loading. Before anything is read, its pages are dropped from
the cache. What is told is the median of the rounds.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[3]))
from megapt import checkpoint
from megapt.checkpoint import Saver
from megapt.config import ModelConfig
from megapt.files import write_whole
from megapt.mesh import ParallelMesh
from megapt.model.table import parameter_table
from megapt.parameters import Parameter
from megapt.prove.ranks import run_ranks
from megapt.zero.base import Fragment

MODEL = ModelConfig(layers=12, hidden=768, heads=12, ffn=2048, vocabulary=32768, max_sequence=1024)
KINDS = ("weight", "exp_avg", "exp_avg_sq")
META = {"config": {"model": MODEL.model_dump()}}
BUCKET = 50_000_000
BLOCK = 8 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write; default: the folder for temporary files")
    parser.add_argument("--output", type=Path, help="write the result there as JSON")
    options = parser.parse_args()
    with TemporaryDirectory(prefix="bench-", dir=options.folder) as folder:
        rounds = run_ranks(options.ranks, work, folder, options.rounds, timeout=3600.0)[0]
    tree = {"environment": environment(options), "summary": summary(rounds), "rounds": rounds}
    print(json.dumps(tree["summary"], indent=2))
    if options.output is not None:
        write_whole(options.output, (json.dumps(tree, indent=2) + "\n").encode())


def work(rank: int, world: int, folder: str, rounds: int) -> list[dict[str, float]]:
    """One rank: every round's seconds by what was done, the slowest rank's."""
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # DCP wants a child
    bench = Bench(Path(folder), ParallelMesh.create(1, world, 1, torch.device("cpu")))
    jobs = [bench.raw, bench.foreground, bench.background, bench.dcp, bench.dcp_thread, bench.dcp_process]
    found = []
    for number in range(rounds + 1):
        times: dict[str, float] = {}
        for job in jobs[number % len(jobs) :] + jobs[: number % len(jobs)]:
            times |= job()
        found.append(times)
    bench.saver.close()
    return [{"bytes": bench.nbytes} | times for times in found[1:]]  # the first round has pages made and files opened


class Bench:
    """This rank's part of the state, and what is done with it."""

    def __init__(self, folder: Path, mesh: ParallelMesh) -> None:
        self.folder, self.mesh, self.step = folder, mesh, 0
        self.table = parameter_table(MODEL)
        self.fragments = list(fragments(mesh))
        self.saver = Saver(mesh, self.table)
        self.saver.reserve(self.fragments)
        self.nbytes = 4 * len(KINDS) * self.table.count()

    def raw(self) -> dict[str, float]:
        """The disk: as many bytes as a checkpoint has, from all ranks at once."""
        path = self.folder / f"raw-{self.mesh.rank}"
        block = torch.rand(BLOCK // 4).numpy().tobytes()
        count = self.nbytes // self.mesh.world // BLOCK

        def write(flush_every: int) -> None:
            with open(path, "wb", buffering=0) as file:
                for number in range(1, count + 1):
                    file.write(block)
                    if number % flush_every == 0:
                        os.fdatasync(file.fileno())
                os.fsync(file.fileno())

        def read() -> None:
            buffer = bytearray(BLOCK)
            with open(path, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

        at_once = self.timed(lambda: write(count))
        path.unlink()
        times = {"raw write": min(at_once, self.timed(lambda: write(8)))}  # as fast as this disk can
        drop(path)
        times["raw read"] = self.timed(read)
        path.unlink()
        return times

    def foreground(self) -> dict[str, float]:
        times = {"save": self.timed(self.save)}
        path = self.path()
        self.drop_all(path)
        times["load"] = self.timed(lambda: checkpoint.load(path, self.fragments, self.mesh, MODEL))
        self.clear()
        return times

    def background(self) -> dict[str, float]:
        begun = time.perf_counter()
        stall = self.timed(lambda: self.save(background=True))
        self.saver.finish()
        total = self.slowest(time.perf_counter() - begun)
        self.clear()
        return {"background stall": stall, "background until committed": total}

    def save(self, background: bool = False) -> None:
        self.step += 1
        self.saver.save(self.folder / "ours", self.step, self.fragments, META, background=background)

    def path(self) -> Path:
        return self.folder / "ours" / f"step-{self.step:08d}"

    def dcp(self) -> dict[str, float]:
        import torch.distributed.checkpoint as dcp

        state, path = self.dtensors(), str(self.folder / "dcp")
        times = {"DCP save": self.timed(lambda: dcp.save(state, checkpoint_id=path))}
        self.drop_all(Path(path))
        times["DCP load"] = self.timed(lambda: dcp.load(state, checkpoint_id=path))
        self.clear()
        return times

    def dcp_thread(self) -> dict[str, float]:
        return self.dcp_async("thread")

    def dcp_process(self) -> dict[str, float]:
        return self.dcp_async("process")

    def dcp_async(self, kind: str) -> dict[str, float]:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

        state, futures = self.dtensors(), []
        begun = time.perf_counter()
        save = lambda: futures.append(  # noqa: E731
            dcp.async_save(
                state, checkpoint_id=str(self.folder / "dcp"), async_checkpointer_type=AsyncCheckpointerType(kind)
            )
        )
        stall = self.timed(save)
        futures[0].result()  # type: ignore[union-attr]
        total = self.slowest(time.perf_counter() - begun)
        self.clear()
        return {f"DCP async_save ({kind}) stall": stall, f"DCP async_save ({kind}) until done": total}

    def dtensors(self) -> dict[str, Any]:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import DTensor, Shard

        if not hasattr(self, "_state"):
            axis = init_device_mesh("cpu", (self.mesh.world,))
            self._state = {
                f"{kind}/{name}": DTensor.from_local(torch.rand(_half(spec.shape, self.mesh)), axis, [Shard(0)])
                for name, spec in self.table.items()
                for kind in KINDS
            }
        return self._state

    def timed(self, job: Callable[[], Any]) -> float:
        """Seconds of the slowest rank, from a common start."""
        dist.barrier()
        started = time.perf_counter()
        job()
        return self.slowest(time.perf_counter() - started)

    def slowest(self, seconds: float) -> float:
        most = torch.tensor(seconds, dtype=torch.float64)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return most.item()

    def drop_all(self, folder: Path) -> None:
        if self.mesh.rank == 0:
            for path in folder.iterdir():
                drop(path)
        dist.barrier()

    def clear(self) -> None:
        dist.barrier()
        if self.mesh.rank == 0:
            for name in ("ours", "dcp"):
                for path in (self.folder / name).glob("*"):
                    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=path.name == ".lock")
        dist.barrier()


def fragments(mesh: ParallelMesh) -> Iterator[Fragment]:
    """Buckets of whole parameters, each cut evenly over dp."""
    bucket: list[Parameter] = []
    size = 0
    for spec in parameter_table(MODEL).values():
        parameter = Parameter(torch.empty(spec.shape, device="meta"))
        parameter.spec, parameter.shard, parameter.owner = spec, spec.shard(0, 1), spec.tied_to is None
        if bucket and size + spec.numel > BUCKET:
            yield from _cut(bucket, size, mesh)
            bucket, size = [], 0
        bucket.append(parameter)
        size += spec.numel
    yield from _cut(bucket, size, mesh)


def _cut(bucket: list[Parameter], size: int, mesh: ParallelMesh) -> Iterator[Fragment]:
    share = -(-size // mesh.dp.size)
    state = {kind: torch.rand(share) for kind in KINDS}
    first, at = mesh.dp.rank * share, 0
    for parameter in bucket:
        numel = parameter.spec.numel
        start, stop = max(first, at), min(first + share, at + numel)
        if start < stop:
            views = {kind: flat[start - first : stop - first] for kind, flat in state.items()}
            yield Fragment(parameter, start - at, stop - start, views)
        at += numel


def _half(shape: tuple[int, ...], mesh: ParallelMesh) -> tuple[int, ...]:
    assert shape[0] % mesh.world == 0
    return (shape[0] // mesh.world, *shape[1:])


def drop(path: Path) -> None:
    """Out of the page cache."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def summary(rounds: list[dict[str, float]]) -> dict[str, Any]:
    """Medians over the rounds; shares are taken within each round first."""

    def share(one: str, other: str) -> float:
        return round(median(times[one] / times[other] for times in rounds), 3)

    seconds = {name: round(median(times[name] for times in rounds), 3) for name in rounds[0] if name != "bytes"}
    gigabytes = rounds[0]["bytes"] / 1e9
    speeds = ("raw write", "raw read", "save", "load", "DCP save", "DCP load")
    return {
        "state, GB": round(gigabytes, 3),
        "seconds": seconds,
        "GB/s": {name: round(gigabytes / seconds[name], 3) for name in speeds},
        "save, share of the disk's bandwidth": share("raw write", "save"),
        "load, share of the disk's bandwidth": share("raw read", "load"),
        "DCP save, share of the disk's bandwidth": share("raw write", "DCP save"),
        "DCP load, share of the disk's bandwidth": share("raw read", "DCP load"),
        "stall in the background, share of a save": share("background stall", "save"),
        "stall of DCP async_save (thread), share of a DCP save": share("DCP async_save (thread) stall", "DCP save"),
        "stall of DCP async_save (process), share of a DCP save": share("DCP async_save (process) stall", "DCP save"),
    }


def environment(options: argparse.Namespace) -> dict[str, Any]:
    import psutil

    return {
        "ranks": options.ranks,
        "rounds": options.rounds,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "load_before": os.getloadavg()[0],
    }


if __name__ == "__main__":
    main()
