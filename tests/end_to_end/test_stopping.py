"""Stops in good order (signals, a time limit), a batch that grows across them, and steps that are not finite."""

from __future__ import annotations

import errno
import math
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megapt import checkpoint
from megapt.config import load
from megapt.generate import load_engine
from megapt.mesh import ParallelMesh
from megapt.model.table import parameter_table
from megapt.pretrain import RunPlan, _StopAgreement
from megapt.prove.ranks import run_ranks
from megapt.zero.base import Fragment
from tests.end_to_end import runs
from tests.end_to_end.runs import Ranks

RAMP = {"start": 2, "increment": 2, "samples": 150}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return runs.write_config(
        tmp_path / "config.yaml",
        runs.corpus(tmp_path / "corpus"),
        parallel={"pipeline": 2},
        batch={"micro": 1, "ramp": RAMP},
        train={"steps": 90, "validate_every": 25},
        checkpoint={"every": 0},
    )


def test_signals_stop_the_run_and_it_goes_on_where_it_was(tmp_path: Path, config: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    Ranks(tmp_path / "w", 2, ["--config", config, f"run.folder={whole}"]).finish()
    arguments = ["--config", config, f"run.folder={stopped}"]
    reached = 0
    for number, (kind, ranks) in enumerate([(signal.SIGTERM, (1,)), (signal.SIGINT, (0, 1)), (None, ())]):
        run = Ranks(tmp_path / f"s{number}", 2, arguments)
        if kind is not None:
            after = reached + 12
            runs.until(lambda after=after: runs.reached(stopped, after), f"step {after}")
            run.signal(kind, *ranks)
        run.finish()
        assert "Traceback" not in run.errors()
        if kind is None:
            break
        step = runs.meta(stopped)["step"]
        assert after <= step < 90
        who = f"received {kind.name}" if 0 in ranks else "asked for on another rank"
        assert f"stopped at step {step}: {who}" in run.out()
        assert runs.curve(stopped)[-1]["step"] == step
        reached = step
    sizes = [line["tokens"] for line in runs.curve(whole) if "tokens" in line]
    assert set(np.diff(sizes)) == {2 * 16, 4 * 16, 6 * 16, 8 * 16}  # the ramp was gone through
    runs.assert_same_run(whole, stopped)


def test_a_time_limit_stops_the_run(tmp_path: Path, config: Path) -> None:
    began = time.monotonic()
    limits = ["train.steps=1000000", "run.time_limit=0.03", "run.log_every=1000000"]
    run = Ranks(tmp_path / "t", 2, ["--config", config, *limits]).finish()
    assert time.monotonic() - began > 0.03 * 60
    step = runs.meta(tmp_path / "run")["step"]
    assert f"stopped at step {step}: reached the time limit of 1.8 s" in run.out()


def test_a_checkpoint_that_cannot_be_written_stops_only_a_run_that_would_end_without_one(
    tmp_path: Path, config: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("a file where the folder should be")
    run = Ranks(tmp_path / "r", 2, ["--config", config, "train.steps=6", "checkpoint.every=4"])
    assert run.wait() == [2, 2], run.errors()
    assert "WARNING: the checkpoint of step 4 was not saved" in run.out() and "step 6/6" in run.out()
    assert run.errors().startswith("megapt: error: the checkpoint of step 6 was not saved")
    assert run.errors().count("error:") == 1 and "Traceback" not in run.errors()


def _break_removal() -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy", "step-00000002")

    shutil.rmtree = refuse  # type: ignore[assignment]


def test_older_checkpoints_that_cannot_be_removed_stop_nothing(tmp_path: Path, config: Path) -> None:
    arguments = ["--config", config, "train.steps=6", "checkpoint.every=2", "checkpoint.keep=1"]
    run = Ranks(tmp_path / "r", 2, arguments, before={0: _break_removal}).finish()
    assert "could not be removed" in run.out() and "Device or resource busy" in run.out()
    assert runs.meta(tmp_path / "run")["step"] == 6


def _stopping(rank: int, world: int) -> list[list[bool]]:
    """What two agreements say, step by step, when rank 1 asks at step 2: on the CPU, and beside a GPU's group."""
    mesh = ParallelMesh.create(1, world, 1, torch.device("cpu"))
    said = []
    for device in ("cpu", "cuda"):  # nothing is put on the GPU, so that none need be there
        stop = _StopAgreement(replace(mesh, device=torch.device(device)))
        assert (stop.group is None) == (device == "cpu")
        said.append([stop.agreed("asked" if (rank, step) == (1, 2) else None) for step in range(5)])
    return said


def test_all_ranks_stop_at_the_step_after_one_asked() -> None:
    one = [False, False, False, True, False]
    assert run_ranks(2, _stopping) == [[one, one], [one, one]]


def test_steps_that_are_not_finite_are_skipped_and_counted(tmp_path: Path) -> None:
    """A token whose embedding is infinite spoils exactly the steps that read it."""
    data = runs.corpus(tmp_path / "corpus")
    config = runs.write_config(
        tmp_path / "config.yaml",
        data,
        model={"tied_embeddings": False},
        optimizer={"warmup_steps": 0},
        train={"steps": 1},
        batch={"samples": 2},
    )
    Ranks(tmp_path / "first", 1, ["--config", config, f"run.folder={tmp_path / 'first-run'}"]).finish()

    loaded = load(config, ["train.steps=20"]).config
    plan = RunPlan.of(loaded)
    steps = [plan.train.gather(np.arange(2 * s, 2 * s + 2))[0] for s in range(20)]
    counts = {token: sum(token in rows[:, :-1] for rows in steps) for token in range(256)}
    rare = next(token for token, count in counts.items() if 2 <= count <= 8)
    spoilt = [step + 1 for step, rows in enumerate(steps) if rare in rows[:, :-1]]

    engine = load_engine(tmp_path / "first-run", loaded, 1, torch.device("cpu"))
    fragments = []
    for p in engine.parameters:
        if p.spec.name == "embedding.weight":
            p.data[rare] = math.inf
        zeros = {kind: torch.zeros(p.numel()) for kind in ("exp_avg", "exp_avg_sq")}
        fragments.append(Fragment(p, 0, p.numel(), {"weight": p.data.view(-1), **zeros}))
    table = parameter_table(loaded.model)
    source = checkpoint.save(
        tmp_path / "spoilt", 1, fragments, engine.mesh, runs.meta(tmp_path / "first-run"), table
    )

    arguments = ["--config", config, "train.steps=20", f"checkpoint.load={source}", "parallel.tensor=2"]
    run = Ranks(tmp_path / "second", 2, arguments).finish()
    assert "weights of" in run.out()
    lines = [line for line in runs.curve(tmp_path / "run") if "loss" in line]
    assert [line["step"] for line in lines if line.get("skipped")] == spoilt
    assert [line["step"] for line in lines if not math.isfinite(line["grad_norm"])] == spoilt
    assert runs.meta(tmp_path / "run")["skipped"] == len(spoilt)
    assert runs.meta(tmp_path / "run")["updates"] == 20 - len(spoilt)
    assert f"skipped {len(spoilt)}" in run.out()
