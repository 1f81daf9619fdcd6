"""kill -9 at random moments of a run that saves every few steps in the background, and what is left of it.

Run it from a checkout; on two cores it takes about half an hour:

    python docs/results/checkpoint/kill.py --kills 100 --output docs/results/checkpoint/kill.json

Four ranks train a tiny Llama with a checkpoint every 4 steps and an ephemeral one every 2. Again and again a random
rank, or all of them, are killed, at a random moment of their start or of training; a moment later the rest are too, as
a launcher would see to it, and all start again. Whenever a run gets to its end, its loss curve, weights and moments are
compared bit for bit with those of a run that nobody disturbed, and the next run begins in the other layout. After every
kill each committed checkpoint is read whole, against its checksums, and no writer may be left.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[3]))
from megapt import checkpoint
from megapt.files import write_whole
from tests.end_to_end import runs

LAYOUTS = {
    "tensor 2 x data 2": ("parallel.tensor=2", "parallel.pipeline=1"),
    "pipeline 2 x data 2": ("parallel.tensor=1", "parallel.pipeline=2"),
}
SAVES = {"every": 4, "ephemeral": {"every": 2}}
STEPS_BETWEEN = 6  # a kill and the next, on average
PATIENCE = 900.0


@dataclass
class Result:
    """What happened, counted."""

    kills: int = 0
    of: Counter[str] = field(default_factory=Counter)
    moments: Counter[str] = field(default_factory=Counter)
    finished: Counter[str] = field(default_factory=Counter)
    checkpoints_read: int = 0
    steps_repeated: list[int] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        repeated = self.steps_repeated
        return {
            "kills": self.kills,
            "killed": dict(self.of),
            "moments": dict(self.moments),
            "runs that were killed and ended bit for bit as the undisturbed one": dict(self.finished),
            "committed checkpoints read whole after a kill": self.checkpoints_read,
            "unreadable ones": 0,  # the first ends this script
            "steps repeated per kill, mean": sum(repeated) / max(1, len(repeated)),
            "steps repeated per kill, most": max(repeated, default=0),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--steps", type=int, default=120, help="of one run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="write the result there as JSON")
    options = parser.parse_args()
    started = time.time()
    with TemporaryDirectory(prefix="kill-") as folder:
        result = kill(Path(folder), options.kills, options.steps, options.seed, list(LAYOUTS))
    tree = {"environment": environment(), "seconds": round(time.time() - started), "steps": options.steps}
    text = json.dumps(tree | result.to_json(), indent=2)
    print(text)
    if options.output is not None:
        write_whole(options.output, (text + "\n").encode())


def kill(root: Path, kills: int, steps: int, seed: int, layouts: list[str]) -> Result:
    """Kill until it was done `kills` times and the run at hand has reached its end. AssertionError at the first thing
    that is not as it must be."""
    draw, result = random.Random(seed), Result()
    train = {"steps": steps, "validate_every": 30}
    config = runs.write_config(root / "config.yaml", runs.corpus(root / "corpus"), train=train, checkpoint=SAVES)
    whole = {name: root / f"whole-{number}" for number, name in enumerate(layouts)}
    for name, folder in whole.items():
        finish(runs.Ranks(root / "ranks", 4, arguments(config, name, folder)))
    number = 0
    while result.kills < kills:
        name = layouts[number % len(layouts)]
        run = root / f"run-{number}"
        number += 1
        survive(root, arguments(config, name, run), run, steps, kills, draw, result)
        runs.assert_same_run(whole[name], run)
        for place in ("checkpoints", "checkpoints/ephemeral"):
            assert names(run / place) == names(whole[name] / place), f"other checkpoints are left in {run / place}"
        result.finished[name] += 1
    return result


def arguments(config: Path, layout: str, run: Path) -> list[str]:
    return ["--config", str(config), *LAYOUTS[layout], f"run.folder={run}"]


def survive(
    root: Path, words: list[str], run: Path, steps: int, kills: int, draw: random.Random, result: Result
) -> None:
    """One run, started again after every kill until it has ended."""
    start = pace = 1.0  # seconds until the first new step, and of a step: however fast this machine is
    while True:
        before = newest(run)
        ranks = runs.Ranks(root / "ranks", 4, words)
        began = time.monotonic()
        if result.kills >= kills:
            finish(ranks)
            return
        moment = "start" if draw.random() < 0.15 else "training"
        if moment == "start":
            time.sleep(draw.uniform(0, start))
        else:
            goal = before + 1 + int(draw.expovariate(1 / STEPS_BETWEEN))
            wait(lambda ranks=ranks, before=before: reached(run) > before or ended(ranks))
            start = time.monotonic() - began
            wait(lambda ranks=ranks, goal=goal: reached(run) >= goal or ended(ranks))
            pace = (time.monotonic() - began - start) / max(1, goal - before - 1) or pace
            time.sleep(draw.uniform(0, 2 * pace))
        if ended(ranks):
            finish(ranks)
            return
        victims = draw.choice([[0], [1], [2], [3], [0, 1, 2, 3]])
        strike(ranks, victims, draw)
        result.kills += 1
        result.of["all" if len(victims) == 4 else f"rank {victims[0]}"] += 1
        partial = any(run.glob("checkpoints/.*.partial")) or any(run.glob("checkpoints/ephemeral/.*.partial"))
        result.moments["during a save" if partial else moment] += 1
        result.checkpoints_read += sum(1 for _ in read_all(run))
        result.steps_repeated.append(max(0, reached(run) - newest(run)))
        print(f"{result.kills} of {kills}: {run.name}, step {reached(run)} of {steps}, {victims}, {moment}", flush=True)


def finish(ranks: runs.Ranks) -> None:
    statuses = ranks.wait(PATIENCE)
    assert statuses == [0, 0, 0, 0], f"{statuses}\n{ranks.out()}\n{ranks.errors()}"


def strike(ranks: runs.Ranks, victims: list[int], draw: random.Random) -> None:
    """Kill some ranks and, a moment later, the rest; all of them and all their writers must be gone then."""
    pids = [process.pid for process in ranks.processes]
    writers = [child for pid in pids for child in children(pid)]
    ranks.signal(signal.SIGKILL, *victims)
    time.sleep(draw.uniform(0, 1.0))
    for process in ranks.processes:
        process.kill()
    ranks.wait(30.0)
    _, alive = psutil.wait_procs(writers, timeout=30.0)
    assert not alive, f"writers that outlived their ranks: {alive}"


def children(pid: int | None) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children()
    except psutil.NoSuchProcess:
        return []


def read_all(run: Path) -> Iterator[Path]:
    """Read every committed checkpoint of a run whole; raises where one is damaged."""
    for place in ("checkpoints", "checkpoints/ephemeral"):
        for path in checkpoint.committed(run / place):
            runs.tensors(path)
            yield path


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def newest(run: Path) -> int:
    paths = [*checkpoint.committed(run / "checkpoints"), *checkpoint.committed(run / "checkpoints" / "ephemeral")]
    return max((int(path.name[5:]) for path in paths), default=0)


def reached(run: Path) -> int:
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return 0
    whole = [json.loads(line) for line in lines if line.endswith("}")]
    return max((line["step"] for line in whole if "loss" in line), default=0)


def ended(ranks: runs.Ranks) -> bool:
    return any(process.exitcode is not None for process in ranks.processes)


def wait(what: Any) -> None:
    deadline = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < deadline, "the run does not go on"
        time.sleep(0.02)


def environment() -> dict[str, Any]:
    import torch

    memory = round(psutil.virtual_memory().total / 2**30)
    return {
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "memory_gib": memory,
    }


if __name__ == "__main__":
    main()
