"""The native backend, stages 0 and 1, against one process with torch.optim.AdamW and clip_grad_norm_."""

from __future__ import annotations

import functools
import sys
from typing import Any

import pytest
import torch

from tests.distributed.spawn import run_ranks
from tests.zero import runs
from tests.zero.harness import OPTIMIZER, STEPS, TABLE, TOLERANCES, Case, Job, Solution, assert_close, solve

F64 = torch.float64


def _cases(**layout: int) -> list[Case]:
    return [Case("native", stage, dtype=F64, **layout) for stage in (0, 1)]


JOBS: dict[int, list[Job]] = {
    2: [
        *[("train", case) for case in _cases(dp=2, micro=1)],
        *[("train", case) for case in _cases(dp=2, micro=4)],
        *[("train", case) for case in _cases(tp=2)],
        *[("train", case) for case in _cases(pp=2)],
        ("train", Case("native", 1, tp=2, dtype=F64, sequence=False)),
        ("train", Case("native", 1, dp=2)),
        ("train", Case("native", 1, dp=2, dtype=torch.bfloat16)),
        *[("fine", Case("native", stage, dp=2, micro=4, dtype=torch.bfloat16)) for stage in (0, 1)],
        *[("skip", case) for case in _cases(dp=2)],
        *[("skip", case) for case in _cases(pp=2)],
        *[
            ("resume", Case("native", stage, dp=2, dtype=dtype))
            for stage in (0, 1)
            for dtype in (F64, torch.bfloat16)
        ],
    ],
    4: [
        *[("train", case) for case in _cases(dp=4)],  # the last shard is empty
        *[("train", case) for case in _cases(dp=2, pp=2)],
        *[("train", case) for case in _cases(dp=2, tp=2)],
        ("llama", Case("native", 1, dp=2, tp=2, model="llama")),
    ],
}
EVERYTHING = [(world, what, case) for world, jobs in JOBS.items() for what, case in jobs]
ALL = [job for job in EVERYTHING if job[1] != "fine"]


def ranks(world: int) -> list[dict[tuple[str, str], Any]]:
    return runs.ranks_of(world, tuple(JOBS[world]))


@functools.cache
def expected(what: str, dtype: torch.dtype) -> Solution:
    if what in runs.MODELS:
        return runs.solve_decoder(what)
    return solve() if dtype != torch.bfloat16 else solve(compute=torch.bfloat16)


@pytest.mark.parametrize(("world", "what", "case"), ALL, ids=[f"{w}-{c.id}" for _, w, c in ALL])
def test_equals_one_process(world: int, what: str, case: Case) -> None:
    found = runs.solution(ranks(world), what, case)
    assert_close(found, expected(what, case.dtype), TOLERANCES[case.dtype])


FINE = [case for _, what, case in EVERYTHING if what == "fine"]


@pytest.mark.parametrize("case", FINE, ids=[c.id for c in FINE])
def test_sums_bf16_gradients_in_fp32(case: Case) -> None:
    """Micro-batches and ranks: the sum of one 256 and seven 1 is 263 and not 256 or 264."""
    clip = OPTIMIZER.clip
    elements = {n: s.numel for n, s in TABLE.items()}
    tied = elements.pop("head.weight")  # its copy adds the same once more
    squares = sum(n * 263.0**2 for n in elements.values()) + tied * 3 * 263.0**2
    for rank in ranks(2):
        found = rank["fine", case.id]
        assert found["norm"] == pytest.approx(squares**0.5, rel=1e-6)
        for name, values in found["moment"].items():
            size = 263.0 * (2 if name == "embedding.weight" else 1) * clip / (found["norm"] + 1e-6)
            assert values == pytest.approx([size * (1 - OPTIMIZER.betas[0])] * len(values), rel=1e-6)


def test_reference_clips_some_steps_only() -> None:
    """The problem must be able to tell a wrong scale: clipped steps hide one in the weights, others in nothing."""
    norms = solve().norms
    assert len(norms) == STEPS and norms[0] > 10.0 > norms[1] and norms[2] > 10.0
    assert {name for name in TABLE if TABLE[name].tied_to} == {"head.weight"}


def _alone(rank: int, world: int) -> tuple[dict[tuple[str, str], Any], bool]:
    return runs.work(rank, world, [("train", case) for case in _cases()]), "deepspeed" in sys.modules


def test_alone_needs_no_deepspeed() -> None:
    ((found, imported),) = run_ranks(1, _alone)
    assert not imported
    for case in _cases():
        assert_close(runs.solution([found], "train", case), expected("train", F64), TOLERANCES[F64])
