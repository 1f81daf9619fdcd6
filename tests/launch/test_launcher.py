"""What a rank's environment is completed with, and the command that starts local ranks."""

from __future__ import annotations

import base64
import json
import socket

import pytest

from megapt import launcher
from megapt.errors import UserError


def _world(command: list[str]) -> dict[str, list[int | str]]:
    encoded = next(word for word in command if word.startswith("--world_info="))
    return json.loads(base64.urlsafe_b64decode(encoded.partition("=")[2]))


def test_local_command_on_the_cpu() -> None:
    command = launcher.local_command(
        "pretrain.sh", ["--config", "c.yaml", "a=b"], ranks=3, devices=[], port=1234
    )
    assert _world(command) == {"localhost": [0, 1, 2]}
    assert command[-4:] == ["pretrain.sh", "--config", "c.yaml", "a=b"]
    assert "--master_port=1234" in command


def test_local_command_keeps_device_names() -> None:
    command = launcher.local_command("p", [], ranks=2, devices=["3", "MIG-abc", "7"], port=1)
    assert _world(command) == {"localhost": [3, "MIG-abc"]}


@pytest.mark.parametrize(("ranks", "devices"), [(0, []), (-1, ["0"]), (0, ["0"]), (3, ["0", "1"])])
def test_local_command_refuses_impossible_ranks(ranks: int, devices: list[str]) -> None:
    with pytest.raises(UserError, match=f"not {ranks}"):
        launcher.local_command("p", [], ranks=ranks, devices=devices, port=1)


def test_local_port() -> None:
    assert launcher.local_port({"MASTER_PORT": "4321"}) == 4321
    with pytest.raises(UserError, match="MASTER_PORT"):
        launcher.local_port({"MASTER_PORT": "x"})
    with socket.socket() as server:
        server.bind(("127.0.0.1", launcher.local_port({})))


@pytest.fixture
def six_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "usable_cores", lambda: 6)


CPU = {"DS_ACCELERATOR": "cpu"}
TWO_RANKS = {
    "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "h", "MASTER_PORT": "9",
}  # fmt: skip


@pytest.mark.usefixtures("six_cores")
@pytest.mark.parametrize(
    ("given", "threads"),
    [
        ({}, "6"),
        (TWO_RANKS, "3"),
        ({**TWO_RANKS, "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}, "1"),
        ({**TWO_RANKS, "OMP_NUM_THREADS": "5"}, "5"),
        ({"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "2", "SLURM_CPUS_PER_TASK": "4"}, "4"),
        ({"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "2"}, "3"),
    ],
)
def test_ranks_share_the_cores(given: dict[str, str], threads: str) -> None:
    environ = {**CPU, **given}
    launcher.prepare_rank(environ)
    assert environ["OMP_NUM_THREADS"] == threads


def test_slurm_rank_gets_the_variables_of_torch() -> None:
    environ = {**CPU, "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NTASKS": "2", "MASTER_PORT": "7"}
    launcher.prepare_rank(environ)
    expected = {
        "RANK": "1",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
    }
    assert environ.items() >= expected.items()


def test_a_single_process_gets_no_rank() -> None:
    environ = dict(CPU)
    assert launcher.prepare_rank(environ).launcher == "single"
    assert "RANK" not in environ and "WORLD_SIZE" not in environ


def test_a_cpu_run_hides_cuda_devices() -> None:
    # DeepSpeed's launcher sets CUDA_VISIBLE_DEVICES to the numbers of the local ranks even on the CPU.
    environ = {**CPU, **TWO_RANKS, "CUDA_VISIBLE_DEVICES": "0,1"}
    launcher.prepare_rank(environ)
    assert environ["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize(
    ("given", "count", "devices"),
    [
        ({}, 0, []),
        ({}, 2, ["0", "1"]),
        ({"CUDA_VISIBLE_DEVICES": "3,5"}, 2, ["3", "5"]),
        ({"CUDA_VISIBLE_DEVICES": "GPU-1a,GPU-2b"}, 2, ["GPU-1a", "GPU-2b"]),
        ({"CUDA_VISIBLE_DEVICES": "1,99"}, 1, ["1"]),
        ({"CUDA_VISIBLE_DEVICES": ""}, 0, []),
        ({"DS_ACCELERATOR": "cpu"}, 2, []),
    ],
)
def test_visible_devices(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], count: int, devices: list[str]
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    assert launcher.visible_devices(given) == devices
