"""Which device a rank takes."""

from __future__ import annotations

import socket

import pytest
import torch

from megapt.distributed import device_of, join
from megapt.errors import UserError
from megapt.launcher import RankEnvironment


def _rank(local: int) -> RankEnvironment:
    return RankEnvironment(8 + local, local, 16, 8, "localhost", 29500, "variables")


@pytest.fixture
def visible(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: request.param > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: request.param)


@pytest.mark.parametrize(
    ("visible", "local", "device"),
    [(0, 3, "cpu"), (1, 0, "cuda:0"), (1, 3, "cuda:0"), (4, 3, "cuda:3"), (8, 0, "cuda:0")],
    indirect=["visible"],
)
@pytest.mark.usefixtures("visible")
def test_a_rank_takes_its_own_device(local: int, device: str) -> None:
    assert device_of(_rank(local)) == torch.device(device)


@pytest.mark.parametrize("visible", [4], indirect=True)
@pytest.mark.usefixtures("visible")
def test_two_ranks_never_share_one_of_several_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="rank 12 has number 4 .* only 4 GPUs .* at most 4 ranks per node"):
        device_of(_rank(4))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert device_of(_rank(4)) == torch.device("cpu")


def test_a_port_that_another_program_holds_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    with socket.socket() as other:
        other.bind(("localhost", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"rank 0 cannot meet the others at localhost:{port} .* no other program"):
            join(RankEnvironment(0, 0, 2, 2, "localhost", port, "variables"))
