"""launch/pretrain.sh under every launcher, in a tree of its own whose training is one sum over all ranks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).parents[2]
TIMEOUT = 120

TRAINING = """
import json, os, sys, time
from megapt.errors import UserError
from megapt.launcher import rank_environment

class RunPlan:
    of = staticmethod(lambda config: None)  # its data would be looked for

def main(argv):
    place = rank_environment(os.environ)
    if "run.folder=refuse" in argv:
        raise UserError("a rule was broken")
    if "run.folder=status" in argv:
        return 7
    if "run.folder=wait" in argv:
        os.write(1, (json.dumps({"pid": os.getpid()}) + "\\n").encode())
        time.sleep(600)
    total = None
    if place.world > 1:
        import torch
        import torch.distributed as dist
        address = f"tcp://{place.master_addr}:{place.master_port}"
        dist.init_process_group("gloo", init_method=address, rank=place.rank, world_size=place.world)
        one = torch.tensor(place.rank + 1)
        dist.all_reduce(one)
        total = one.item()
        dist.destroy_process_group()
    names = ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS", "DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES")
    found = {name: os.environ.get(name) for name in names}
    found |= {"argv": argv, "total": total, "rank": place.rank, "local_rank": place.local_rank}
    found |= {"local_world": place.local_world, "launcher": place.launcher, "path": sys.path[:2]}
    os.write(1, (json.dumps(found) + "\\n").encode())
"""

CONFIG = """
model: {layers: 2, hidden: 8, heads: 2, ffn: 16, vocabulary: 32}
batch: {sequence: 8, samples: 4}
data: {train: corpus}
train: {steps: 1}
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The launch script, what it imports, and a training that says where it stands."""
    tree = tmp_path_factory.mktemp("tree with a space")
    (tree / "launch").mkdir()
    (tree / "megapt").mkdir()
    shutil.copy(ROOT / "launch" / "pretrain.sh", tree / "launch")
    for name in ("__init__", "cli", "config", "errors", "files", "launcher", "rules"):
        shutil.copy(ROOT / "megapt" / f"{name}.py", tree / "megapt")
    shutil.copytree(ROOT / "megapt" / "commands", tree / "megapt" / "commands")
    (tree / "megapt" / "pretrain.py").write_text(TRAINING)
    (tree / "config.yaml").write_text(CONFIG)
    return tree


def _environ(**more: str) -> dict[str, str]:
    """No launcher's variables, this interpreter first on the PATH, and the CPU."""
    launchers = ("SLURM_", "OMPI_", "PYTHON", "VIRTUAL_ENV", "CONDA_PREFIX", "MASTER_", "LOCAL_", "CUDA_")
    names = {"RANK", "WORLD_SIZE", "OMP_NUM_THREADS"}
    clean = {k: v for k, v in os.environ.items() if k not in names and not k.startswith(launchers)}
    path = f"{Path(sys.executable).parent}{os.pathsep}{clean['PATH']}"
    return {**clean, "PATH": path, "DS_ACCELERATOR": "cpu", **more}


def _start(command: Sequence[str], cwd: Path, environ: Mapping[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, cwd=cwd, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def _finish(process: subprocess.Popen[str], status: int = 0) -> tuple[str, str]:
    try:
        output, errors = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        for child in [*psutil.Process(process.pid).children(recursive=True), process]:
            child.kill()
        raise
    assert process.returncode == status, output + errors
    return output, errors


def _ranks(*outputs: str) -> list[dict[str, Any]]:
    lines = [line for output in outputs for line in output.splitlines() if line.startswith("{")]
    return sorted((json.loads(line) for line in lines), key=lambda rank: rank["rank"])


def _port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def _assert_two_ranks(ranks: list[dict[str, Any]], launcher: str, local_world: int = 2) -> None:
    assert [rank["rank"] for rank in ranks] == [0, 1]
    assert [rank["total"] for rank in ranks] == [3, 3]
    assert [rank["local_rank"] for rank in ranks] == ([0, 1] if local_world == 2 else [0, 0])
    for rank in ranks:
        assert (rank["launcher"], rank["local_world"]) == (launcher, local_world)
        assert (rank["DS_ACCELERATOR"], rank["CUDA_VISIBLE_DEVICES"]) == ("cpu", "")
        arguments = [word for word in rank["argv"] if not word.startswith("--local_rank=")]
        assert arguments == ["--config", "config.yaml", "seed=5"]


ARGUMENTS = ("launch/pretrain.sh", "--config", "config.yaml", "seed=5")


def test_deepspeed(tree: Path) -> None:
    command = ["deepspeed", "--num_gpus", "2", "--master_port", _port(), *ARGUMENTS]
    output, _ = _finish(_start(command, tree, _environ()))
    ranks = _ranks(output)
    _assert_two_ranks(ranks, "deepspeed")
    assert [rank["argv"][0] for rank in ranks] == ["--local_rank=0", "--local_rank=1"]


def test_two_nodes_of_a_hostfile(tree: Path) -> None:
    (tree / "hostfile").write_text("node-0 slots=1\nnode-1 slots=1\n")
    common = ["--hostfile", "hostfile", "--no_ssh", "--master_addr", "127.0.0.1", "--master_port", _port()]
    nodes = [
        _start(["deepspeed", *common, "--node_rank", node, *ARGUMENTS], tree, _environ()) for node in "01"
    ]
    _assert_two_ranks(_ranks(*(_finish(node)[0] for node in nodes)), "deepspeed", local_world=1)


def test_torchrun(tree: Path) -> None:
    command = ["torchrun", "--nproc-per-node", "2", "--master-port", _port(), *ARGUMENTS]
    output, _ = _finish(_start(command, tree, _environ()))
    _assert_two_ranks(_ranks(output), "torchrun")


def test_bash_starts_the_ranks_that_the_layout_needs(tree: Path, tmp_path: Path) -> None:
    config = str(tree / "config.yaml")
    command = ["bash", str(tree / "launch" / "pretrain.sh"), "parallel.tensor=2", "--config", config]
    # From another folder, without being told that there are no CUDA devices.
    environ = {k: v for k, v in _environ(CUDA_VISIBLE_DEVICES="").items() if k != "DS_ACCELERATOR"}
    output, _ = _finish(_start(command, tmp_path, environ))
    ranks = _ranks(output)
    assert [(rank["launcher"], rank["total"]) for rank in ranks] == [("deepspeed", 3)] * 2
    cores = len(os.sched_getaffinity(0))
    for rank in ranks:
        assert rank["argv"][1:] == ["--config", config, "parallel.tensor=2"]
        assert rank["path"] == [str(tree), str(tree / "kernels")]
        assert (rank["DS_ACCELERATOR"], rank["OMP_NUM_THREADS"]) == ("cpu", str(max(1, cores // 2)))


def test_the_status_of_a_rank_is_passed_on(tree: Path) -> None:
    command = ["sh", *ARGUMENTS[:3], "run.folder=status"]
    _finish(_start(command, tree, _environ()), status=7)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config", "config.yaml", "parallel.tensor=3"], "parallel.tensor"),
        (["--config", "nothing.yaml"], "nothing.yaml does not exist"),
        (["--config", "config.yaml", "--ranks", "0"], "must be at least 1, not 0"),
        (["--config", "config.yaml", "parallel.tensor=2", "--ranks", "3"], "world of 3 ranks"),
        (["seed=1"], "--config"),
    ],
)
def test_what_cannot_run_is_told_once_before_any_rank_starts(
    tree: Path, arguments: list[str], words: str
) -> None:
    output, errors = _finish(_start(["sh", ARGUMENTS[0], *arguments], tree, _environ()), status=2)
    assert output == "" and errors.count("error: ") == 1 and words in errors
    assert "Traceback" not in errors


def test_slurm_tasks(tree: Path) -> None:
    job = {
        "SLURM_NTASKS": "2",
        "SLURM_NNODES": "1",
        "SLURM_TASKS_PER_NODE": "2",
        "SLURM_JOB_ID": str(os.getpid()),
    }
    job |= {"SLURM_JOB_NODELIST": "localhost", "SLURM_NODEID": "0"}
    tasks = [
        # srun runs the file itself; DeepSpeed's Slurm runner puts Python in front of it.
        _start([*front, *ARGUMENTS], tree, _environ(**job, SLURM_PROCID=rank, SLURM_LOCALID=rank))
        for rank, front in (("0", ["sh"]), ("1", [sys.executable, "-u"]))
    ]
    ranks = _ranks(*(_finish(task)[0] for task in tasks))
    _assert_two_ranks(ranks, "variables")
    assert [rank["RANK"] for rank in ranks] == ["0", "1"]


def test_a_rank_tells_a_broken_rule_without_a_traceback(tree: Path) -> None:
    environ = _environ(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    _, errors = _finish(_start(["sh", *ARGUMENTS, "run.folder=refuse"], tree, environ), status=2)
    assert errors == "megapt: error: rank 1 of 2: a rule was broken\n"


@pytest.fixture
def waiting(tree: Path) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A run of two ranks that does nothing, and the ranks' process ids."""
    process = _start(
        ["./launch/pretrain.sh", "--ranks", "2", *ARGUMENTS[1:], "run.folder=wait"], tree, _environ()
    )
    assert process.stdout is not None
    pids = [int(json.loads(process.stdout.readline())["pid"]) for _ in range(2)]
    yield process, pids
    for pid in (process.pid, *pids):
        if psutil.pid_exists(pid):
            os.kill(pid, signal.SIGKILL)
    process.communicate()


def test_ending_the_script_ends_its_ranks(waiting: tuple[subprocess.Popen[str], list[int]]) -> None:
    process, pids = waiting
    process.send_signal(signal.SIGTERM)
    assert process.wait(TIMEOUT) != 0
    deadline = time.monotonic() + 10
    while any(psutil.pid_exists(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in pids if psutil.pid_exists(pid)]
