"""The real launchers: two emulated nodes, and a rank that dies under them."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.end_to_end import runs
from tests.end_to_end.runs import SCRIPT, Ranks


def _rank_of(process: psutil.Process) -> int | None:
    """Which rank of launch/pretrain.sh a process is, if any."""
    try:
        if SCRIPT not in process.cmdline() or "-m" in process.cmdline():
            return None
        return int(process.environ()["RANK"])
    except (psutil.Error, KeyError):
        return None


def _ranks(launcher: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    children = psutil.Process(launcher.pid).children(recursive=True)
    return {rank: child for child in children if (rank := _rank_of(child)) is not None}


def test_two_nodes_compute_what_one_process_does(tmp_path: Path) -> None:
    """Tensor 2 x pipeline 2 over two nodes of two ranks: the pipeline crosses the nodes."""
    config = runs.write_config(
        tmp_path / "config.yaml", runs.corpus(tmp_path / "corpus"), train={"steps": 6}, zero={"backend": "deepspeed"}
    )
    (tmp_path / "hosts").write_text("node-0 slots=2\nnode-1 slots=2\n")
    port = runs.port()
    nodes = [
        runs.start(
            "deepspeed", "--hostfile", tmp_path / "hosts", "--no_ssh", "--node_rank", node,
            "--master_addr", "127.0.0.1", "--master_port", port, SCRIPT, "--config", config,
            "parallel.tensor=2", "parallel.pipeline=2",
        )
        for node in "01"
    ]  # fmt: skip
    one = tmp_path / "one"
    Ranks(tmp_path / "1", 1, ["--config", config, f"run.folder={one}", "zero.backend=native"]).finish()
    for node in nodes:
        output, errors = node.communicate(timeout=runs.TIMEOUT)
        assert node.returncode == 0, output + errors
    together, alone = runs.curve(tmp_path / "run"), runs.curve(one)
    assert len(together) == len(alone) == 7  # six steps and the validation
    for line, reference in zip(together, alone, strict=True):
        assert line == pytest.approx(reference, rel=1e-4)


def test_a_killed_rank_ends_the_run_under_every_launcher(tmp_path: Path) -> None:
    config = runs.write_config(
        tmp_path / "config.yaml", runs.corpus(tmp_path / "corpus"), parallel={"pipeline": 2}, train={"steps": 10**6}
    )
    torchrun = ["torchrun", "--nproc-per-node", "2", "--master-port", runs.port()]
    starts = {}
    for name, command in {"torchrun": torchrun, "bash": ["bash"]}.items():
        starts[name] = runs.start(*command, SCRIPT, "--config", config, f"run.folder={tmp_path / name}")
    ranks, killed = {}, {}
    for name, launcher in starts.items():
        runs.until(lambda name=name: runs.reached(tmp_path / name, 3), f"step 3 under {name}")
        ranks[name] = _ranks(launcher)
        assert sorted(ranks[name]) == [0, 1]
        ranks[name][1].kill()
        killed[name] = time.monotonic()
    for name, launcher in starts.items():
        output, errors = launcher.communicate(timeout=60)
        assert time.monotonic() - killed[name] < 60 + 5
        assert launcher.returncode != 0, output + errors
        assert "leaving with status 75: rank 1 (pp 1, dp 0, tp 0)" in errors, errors
        assert not any(rank.is_running() for rank in ranks[name].values())


def test_stopping_a_launcher_saves(tmp_path: Path) -> None:
    """Ctrl-C reaches everybody; a scheduler's SIGTERM reaches the launcher, which passes it on."""
    config = runs.write_config(
        tmp_path / "config.yaml", runs.corpus(tmp_path / "corpus"), parallel={"data": 2}, train={"steps": 10**6}
    )
    torchrun = ["torchrun", "--nproc-per-node", "2", "--master-port", runs.port()]
    starts = {}
    for name, command in {"ctrl-c": ["bash"], "torchrun": torchrun, "bash": ["bash"]}.items():
        starts[name] = runs.start(*command, SCRIPT, "--config", config, f"run.folder={tmp_path / name}")
    for name, launcher in starts.items():
        runs.until(lambda name=name: runs.reached(tmp_path / name, 3), f"step 3 under {name}")
        if name == "ctrl-c":
            os.killpg(launcher.pid, signal.SIGINT)
        else:
            launcher.terminate()
    for name, launcher in starts.items():
        output, errors = launcher.communicate(timeout=runs.TIMEOUT)
        step = runs.meta(tmp_path / name)["step"]
        assert f"stopped at step {step}: received SIG" in output, errors
        assert "watchdog" not in errors and "megapt: error" not in errors
