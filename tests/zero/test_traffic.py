"""Bytes counted call by call, against those that ZeRO needs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megapt.mesh import ParallelMesh, all_gather, reduce_scatter
from megapt.prove.ranks import run_ranks
from megapt.zero.native import NativeBackend
from megapt.zero.traffic import Traffic, needed
from tests.zero.harness import Case, Problem

CASES = [
    *[Case("native", stage, dp=2, micro=4, dtype=torch.bfloat16) for stage in range(3)],
    *[Case("deepspeed", stage, dp=2, micro=4, dtype=torch.bfloat16) for stage in (1, 2)],
    Case("native", 1, dp=2, micro=4, dtype=torch.float64, optimizer="muon"),
]


def _rules(mesh: ParallelMesh) -> dict[str, dict[str, tuple[int, float]]]:
    """Every kind of call by hand: 1000 bytes in each."""
    traffic, group, tensor = Traffic({"pair": mesh.dp.group}), mesh.dp.group, torch.zeros(250)
    other = 1 - mesh.rank
    with traffic:
        dist.all_reduce(tensor, group=group)
        all_gather(tensor, torch.zeros(125), group=group)
        reduce_scatter(torch.zeros(125), tensor, group=group)
        dist.broadcast(tensor, 0, group=group)
        splits = [50, 200] if mesh.rank == 0 else [200, 50]
        dist.all_to_all_single(torch.zeros(250), tensor, splits, splits, group=group)
        if mesh.rank == 0:
            dist.send(tensor, other, group=group)
        else:
            dist.recv(tensor, other, group=group)
        tensor + tensor
        dist.barrier()
    return {g: {k: (v.calls, v.sent) for k, v in kinds.items()} for g, kinds in traffic.by_group.items()}


def _work(rank: int, world: int) -> Any:
    mesh = ParallelMesh.create(1, 2, 1, torch.device("cpu"))
    found: dict[str, Any] = {"rules": _rules(mesh)}
    for case in CASES:
        problem = Problem(case, mesh)
        problem.step(0)
        traffic = Traffic({"dp": mesh.dp.group})
        with traffic:
            problem.step(1)
        kinds = {k: v.sent for k, v in traffic.by_group["dp"].items()}
        least = needed(problem.parameters, 2, case.stage, case.micro)
        if isinstance(problem.backend, NativeBackend):  # shards of so small a model are mostly padding
            padded = sum(b.width * b.shards for b in problem.backend.buckets)
            least = {kind: n * padded / sum(p.numel() for p in problem.parameters) for kind, n in least.items()}
        found[case.id] = kinds, least
    return found


@pytest.fixture(scope="module")
def ranks() -> list[Any]:
    return run_ranks(2, _work)


def test_each_call_counts_what_a_rank_sends(ranks: list[Any]) -> None:
    for rank, found in enumerate(ranks):
        assert found["rules"]["pair"] == {
            "all-reduce": (1, 1000.0),
            "all-gather": (1, 500.0),
            "reduce-scatter": (1, 500.0),
            "broadcast": (1, 500.0),
            "all-to-all": (1, pytest.approx(800.0)),
            **({"send": (1, 1000.0)} if rank == 0 else {}),
        }


@pytest.mark.parametrize("case", CASES[:3], ids=[c.id for c in CASES[:3]])
def test_native_sends_what_zero_needs(ranks: list[Any], case: Case) -> None:
    """And nothing else but the norm."""
    for found in ranks:
        kinds, least = found[case.id]
        norm = 8.0 if case.stage > 0 else 0.0  # ranks that hold the same gradients need not sum it
        if case.stage > 0:
            least["all-to-all"] = least.pop("reduce-scatter")  # on a CPU
        assert kinds == {"all-reduce": least.pop("all-reduce", norm), **least}


def test_deepspeed_reduces_whole_gradients(ranks: list[Any]) -> None:
    for case in CASES[3:5]:
        kinds, least = ranks[0][case.id]
        assert kinds["all-reduce"] >= 2 * least["reduce-scatter"]


def test_muon_sends_each_momentum_there_and_back(ranks: list[Any]) -> None:
    """At most twice the matrices in the precision of the iteration, shared by the ranks."""
    matrices = 60 + 15 + 15
    sent = sum(kinds["all-to-all"] - least["reduce-scatter"] for kinds, least in (f[CASES[5].id] for f in ranks))
    assert 0 < sent <= 2 * matrices * 8
