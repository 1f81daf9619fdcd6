"""kill -9 of a rank that no launcher watches over, and what a second start makes of it."""

from __future__ import annotations

import runpy
import shutil
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from megapt import checkpoint
from tests.end_to_end import runs
from tests.end_to_end.runs import Ranks

EX_TEMPFAIL = 75
TENSOR_PIPELINE = ("parallel.tensor=2", "parallel.pipeline=2")
PIPELINE_DATA = ("parallel.tensor=1", "parallel.pipeline=2")


@dataclass
class Case:
    """One run of four ranks that loses one of them, beside the same run left in peace."""

    name: str
    layout: tuple[str, ...]
    victim: int
    place: str
    survivors: list[int | None] = field(default_factory=list)
    seconds: float = 0.0
    pids: list[int] = field(default_factory=list)

    def arguments(self, root: Path, kind: str) -> list[str]:
        folder = self.run(root, kind)
        return ["--config", str(root / "config.yaml"), *self.layout, f"run.folder={folder}"]

    def run(self, root: Path, kind: str) -> Path:
        return root / self.name / kind / "run"


CASES = {
    case.name: case
    for case in (
        Case("tensor-pipeline", TENSOR_PIPELINE, 0, "pp 0, dp 0, tp 0"),
        # A checkpoint after every step: the kill falls into or next to a save.
        Case("pipeline-data", (*PIPELINE_DATA, "checkpoint.every=1"), 3, "pp 1, dp 1, tp 0"),
        Case("deepspeed", (*PIPELINE_DATA, "zero.backend=deepspeed"), 1, "pp 0, dp 1, tp 0"),
    )
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases, killed: while their survivors find out, the uninterrupted runs go their way."""
    root = tmp_path_factory.mktemp("kill")
    runs.write_config(root / "config.yaml", runs.corpus(root / "corpus"), train={"steps": 30})
    killed = []
    for case in CASES.values():
        folder = case.run(root, "killed")
        ranks = Ranks(root / case.name / "killed", 4, case.arguments(root, "killed"))
        runs.until(lambda folder=folder: runs.reached(folder, 6), f"step 6 of {case.name}")
        ranks.signal(signal.SIGKILL, case.victim)
        case.pids = [process.pid or 0 for process in ranks.processes]
        killed.append((case, ranks, time.time()))
    for case in CASES.values():
        Ranks(root / case.name / "whole", 4, case.arguments(root, "whole")).finish()
    for case, ranks, since in killed:
        case.survivors = ranks.wait()
        # Their last words tell when they left, however long the runs in between took.
        case.seconds = max(path.stat().st_mtime for path in ranks.folder.glob("err.*")) - since
    return root


@pytest.mark.parametrize("name", CASES)
def test_the_others_leave_within_a_minute_and_name_the_dead(root: Path, name: str) -> None:
    case, folder = CASES[name], root / name / "killed"
    assert case.seconds < 60
    for rank, status in enumerate(case.survivors):
        if rank == case.victim:
            assert status == -signal.SIGKILL
            continue
        said = (folder / f"err.{rank}").read_text()
        assert status == EX_TEMPFAIL, said
        leaving = [line for line in said.splitlines() if "leaving with status" in line]
        assert len(leaving) == 1, said
        assert f"leaving with status 75: rank {case.victim} ({case.place})" in leaving[0]
    assert not [pid for pid in case.pids if psutil.pid_exists(pid)]


@pytest.mark.parametrize("name", CASES)
def test_what_is_left_is_whole(root: Path, name: str) -> None:
    run = CASES[name].run(root, "killed")
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) >= 6 and all(line.endswith(b"}\n") for line in lines)
    steps = checkpoint.committed(run / "checkpoints")
    assert steps
    for step in steps:
        checkpoint.read_index(step)
    assert {path.name for path in run.iterdir() if not path.name.startswith(".")} == {
        "checkpoints", "config.yaml", "environment.json", "metrics.jsonl",
    }  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_started_again_it_is_the_run_that_was_never_killed(root: Path, name: str) -> None:
    case = CASES[name]
    whole, killed, resumed = (case.run(root, kind) for kind in ("whole", "killed", "resumed"))
    shutil.copytree(killed, resumed)
    ranks = Ranks(root / name / "resumed", 4, case.arguments(root, "resumed")).finish()
    assert "resumed from" in ranks.out() and "fresh weights" not in ranks.out()
    assert "Traceback" not in ranks.errors() and "watchdog" not in ranks.errors()
    runs.assert_same_run(whole, resumed)
    left = {path.name for path in (resumed / "checkpoints").iterdir()}
    assert left == {path.name for path in (whole / "checkpoints").iterdir()}


@pytest.mark.parametrize(
    ("name", "world", "layout"),
    [
        ("tensor-pipeline", 1, ["parallel.tensor=1", "parallel.pipeline=1", "batch.micro=4"]),
        ("pipeline-data", 2, ["parallel.tensor=2", "parallel.pipeline=1", "zero.backend=deepspeed"]),
    ],
)
def test_started_again_in_another_layout_it_is_the_same_run_to_rounding(
    root: Path, name: str, world: int, layout: list[str]
) -> None:
    case = CASES[name]
    whole, moved = case.run(root, "whole"), case.run(root, "moved")
    shutil.copytree(case.run(root, "killed"), moved)
    Ranks(root / name / "moved", world, [*case.arguments(root, "moved"), *layout]).finish()
    mine, theirs = runs.curve(moved), runs.curve(whole)
    assert [line.keys() for line in mine] == [line.keys() for line in theirs]
    for one, other in zip(mine, theirs, strict=True):
        assert one == pytest.approx(other, rel=2e-4)
    # The last line is the validation at the end: the loss at pp = 1 is that at pp = 2.
    assert "valid_loss" in mine[-1]


def test_a_finished_run_started_again_changes_nothing(root: Path) -> None:
    case = CASES["tensor-pipeline"]
    run = case.run(root, "whole")
    before = {p: p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file()}
    ranks = Ranks(root / case.name / "again", 4, case.arguments(root, "whole")).finish()
    assert "step 30 of 30" in ranks.out()
    after = {p: p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file()}
    assert {p.name for p in after.keys() - before.keys()} <= {"environment.1.json"}
    assert all(after[path] == data for path, data in before.items())


def test_killed_again_and_again_at_random_moments(tmp_path: Path) -> None:
    """The script whose result stands in docs/results/checkpoint, shorter: saves go on in the background, of both kinds,
    and runs are compared at their end."""
    script = runs.ROOT / "docs" / "results" / "checkpoint" / "kill.py"
    kill = runpy.run_path(str(script))["kill"]
    result = kill(tmp_path, kills=3, steps=16, seed=1, layouts=["pipeline 2 x data 2"])
    assert result.kills == 3 and sum(result.finished.values()) >= 1 and result.checkpoints_read > 0
