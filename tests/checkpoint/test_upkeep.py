"""When a run saves, where to, and what it does when that fails."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megapt import checkpoint
from megapt.checkpoint.upkeep import Upkeep
from megapt.config import CheckpointConfig, EphemeralConfig, from_tree
from megapt.errors import UserError
from megapt.mesh import ParallelMesh
from megapt.model.table import parameter_table
from tests.checkpoint.fakes import LLAMA, Layout, fragments, meta_of

ONE = ParallelMesh.create(1, 1, 1, torch.device("cpu"))


class Run:
    """A run without a model: what it said and measured."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.said: list[str] = []
        self.measured: list[tuple[int, dict[str, float]]] = []
        self.folder = folder
        self.upkeep = Upkeep(
            CheckpointConfig(**settings),
            folder,
            ONE,
            parameter_table(LLAMA),
            say=self.said.append,
            measure=lambda step, figures: self.measured.append((step, figures)),
            agree=lambda reason: reason is not None,
        )
        self.upkeep.claim()
        self.upkeep.reserve(fragments(LLAMA, Layout(), 0, 0, 0))

    def go(self, first: int, last: int, final: bool = False) -> None:
        for step in range(first, last + 1):
            ending = final and step == last
            if ending or self.upkeep.due(step):
                self.upkeep.save(step, fragments(LLAMA, Layout(), 0, 0, 0), meta_of(LLAMA), ending)
            else:
                self.upkeep.watch(step)

    def steps(self, folder: str = "checkpoints") -> list[int]:
        return [int(path.name[5:]) for path in checkpoint.committed(self.folder / folder)]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_both_kinds_of_checkpoints(tmp_path: Path, asynchronous: bool) -> None:
    ephemeral = EphemeralConfig(every=2, keep=2)
    run = Run(tmp_path, every=6, keep=1, keep_every=12, ephemeral=ephemeral, asynchronous=asynchronous)
    run.go(1, 19, final=True)
    run.upkeep.close()
    assert run.steps() == [12, 19]
    assert run.steps("checkpoints/ephemeral") == [14, 16]
    told = [line for line in run.said if " | saved " in line]
    assert [int(line.split()[1]) for line in told] == [2, 4, 6, 8, 10, 12, 14, 16, 18, 19]
    assert all("stall" in line and line.endswith("in the background") for line in told[:-1]) == asynchronous
    assert [step for step, _ in run.measured] == [2, 4, 6, 8, 10, 12, 14, 16, 18, 19]
    bytes_ = sum(12 * spec.numel for spec in parameter_table(LLAMA).values())
    for _, figures in run.measured:
        assert figures.keys() == {"save_bytes", "save_stall", "save_wait", "save_write"}
        assert figures["save_bytes"] == bytes_ and figures["save_write"] > 0 and figures["save_stall"] > 0
    assert not any("WARNING" in line for line in run.said)


def test_a_run_tells_of_a_commit_while_it_goes_on(tmp_path: Path) -> None:
    run = Run(tmp_path, every=4)
    run.go(1, 4)
    deadline = time.monotonic() + 60
    while not run.said and time.monotonic() < deadline:
        run.upkeep.watch(5)
        time.sleep(0.01)
    assert len(run.said) == 1 and run.said[0].startswith("step 4 | saved ")
    run.go(5, 7)
    run.upkeep.close()
    assert len(run.said) == 1


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_save_that_fails_is_tried_again(tmp_path: Path, asynchronous: bool) -> None:
    run = Run(tmp_path, every=10, retry=3, asynchronous=asynchronous)
    folder = tmp_path / "checkpoints"
    run.go(1, 10)
    run.upkeep.saver.finish()
    folder.rename(tmp_path / "away")
    folder.write_text("in the way")
    run.go(12, 22)
    assert run.steps() == []
    folder.unlink()
    run.go(23, 24, final=True)
    run.upkeep.close()
    assert run.steps() == [23, 24]
    (warning,) = [line for line in run.said if "WARNING" in line]
    assert (
        "step 20 was not saved" in warning and "training goes on, it is tried again at step 23 at the latest" in warning
    )
    assert (20, {"save_failed": 1}) in run.measured


def test_the_last_failure_is_an_error(tmp_path: Path) -> None:
    run = Run(tmp_path, every=0)
    (tmp_path / "checkpoints" / ".lock").unlink()
    (tmp_path / "checkpoints").rmdir()
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(UserError, match="step 5 was not saved"):
        run.go(1, 5, final=True)
    assert not run.said


def test_what_fails_in_the_background_is_learnt_and_tried_again(tmp_path: Path) -> None:
    run = Run(tmp_path, every=10, retry=3)
    for _ in range(2):  # the second time it is another writer
        writer = run.upkeep.saver._writer
        assert writer is not None
        os.kill(writer.pid, signal.SIGSTOP)
        run.go(20, 20)
        os.kill(writer.pid, signal.SIGKILL)
        said = len(run.said)
        deadline = time.monotonic() + 60
        while len(run.said) == said and time.monotonic() < deadline:
            run.go(21, 21)
        assert "step 20 was not saved" in run.said[-1] and "background writer was killed by signal 9" in run.said[-1]
        assert run.said[-1].endswith("training goes on, it is tried again at step 24 at the latest")
        assert run.measured[-1] == (21, {"save_failed": 1}) and run.steps() == []
        run.upkeep.reserve(fragments(LLAMA, Layout(), 0, 0, 0))
    run.go(22, 25, final=True)
    run.upkeep.close()
    assert run.steps() == [24, 25]


def test_ephemeral_checkpoints_of_another_run_are_not_resumed(tmp_path: Path) -> None:
    settings = {"every": 4, "ephemeral": EphemeralConfig(every=2, folder=str(tmp_path / "fast")), "asynchronous": False}
    one = Run(tmp_path / "one", **settings)
    one.go(1, 6)
    one.upkeep.close()
    other = Run(tmp_path / "other", **settings)
    assert other.upkeep.choose() is None
    path = tmp_path / "fast" / "step-00000006"
    assert other.said == [f"WARNING: {path}: of another run; not resumed"]
    other.upkeep.close()
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    for name in ("one", "copy"):
        again = Run(tmp_path / name, **settings)
        assert again.upkeep.choose() == path and again.said == []
        lasting = tmp_path / name / "checkpoints" / "step-00000004"
        assert again.upkeep.without(path) == f"; move step-00000006 away to go on from {lasting}"
        again.upkeep.close()


def test_no_training_is_promised_at_the_end(tmp_path: Path) -> None:
    run = Run(tmp_path, every=10)
    writer = run.upkeep.saver._writer
    assert writer is not None
    os.kill(writer.pid, signal.SIGSTOP)
    run.go(10, 10)
    os.kill(writer.pid, signal.SIGKILL)
    run.go(11, 11, final=True)
    run.upkeep.close()
    warning = run.said[0]
    assert "step 10 was not saved" in warning and warning.endswith("; the last checkpoint follows")
    assert run.steps() == [11]


@pytest.mark.parametrize(
    ("settings", "key", "words"),
    [
        (
            {"every": 4, "keep_every": 10},
            "keep_every",
            "10 is not a multiple of checkpoint.every = 4, nearest: 8 or 12",
        ),
        ({"keep_every": 10}, "keep_every", "10 is not a multiple of checkpoint.every = 0, which is 0: give both"),
        ({"every": 4, "keep_best": 1}, "keep_best", "needs train.validate_every and validate_samples above 0, not 0"),
        ({"every": 4, "ephemeral": {"every": 4}}, "ephemeral.every", "4 must be below checkpoint.every = 4"),
        (
            {"every": 4, "ephemeral": {"every": 2, "folder": "runs/run/../run/checkpoints"}},
            "ephemeral.folder",
            "runs/run/checkpoints holds the lasting checkpoints",
        ),
        ({"load_optimizer": True}, "load_optimizer", "has no effect without checkpoint.load"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], key: str, words: str) -> None:
    tree = {
        "model": LLAMA.model_dump(),
        "data": {"train": "corpus"},
        "batch": {"sequence": 16, "samples": 4},
        "train": {"steps": 10},
        "checkpoint": settings,
    }
    with pytest.raises(UserError) as caught:
        from_tree(tree)
    assert str(caught.value).startswith(f"checkpoint.{key}: ") and words in str(caught.value)
    fitting = {"every": 4, "keep_every": 8, "keep_best": 2, "ephemeral": {"every": 2, "folder": "fast"}}
    tree |= {"train": {"steps": 10, "validate_every": 4}, "checkpoint": fitting}
    assert from_tree(tree).config.checkpoint.ephemeral is not None
