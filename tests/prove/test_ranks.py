"""Ranks outlive calls, and end together when one of them fails."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest

from megapt.prove.ranks import Ranks, run_ranks


def identity(rank: int, world: int, *values: Any) -> tuple[int, int, int, tuple[Any, ...]]:
    return os.getpid(), rank, world, values


def total(rank: int, world: int) -> float:
    import torch
    import torch.distributed as dist

    value = torch.tensor([float(rank)])
    dist.all_reduce(value)
    return float(value)


def fail_on_one(rank: int, world: int) -> None:
    if rank == 1:
        raise ValueError("this rank has enough")
    time.sleep(60)


def leave(rank: int, world: int) -> None:
    if rank == 0:
        os._exit(7)
    time.sleep(60)


def test_ranks_run_one_function_after_another() -> None:
    with Ranks(2) as ranks:
        first, second = ranks.run(identity, "a"), ranks.run(identity, "b")
        assert [(r, w, v) for _, r, w, v in first] == [(0, 2, ("a",)), (1, 2, ("a",))]
        assert [pid for pid, *_ in first] == [pid for pid, *_ in second]
        assert ranks.run(total) == [1.0, 1.0]


@pytest.mark.parametrize(("function", "message"), [(fail_on_one, "this rank has enough"), (leave, "7")])
def test_a_failure_ends_all_at_once(function: Any, message: str) -> None:
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=message):
        run_ranks(2, function)
    assert time.monotonic() - start < 50
