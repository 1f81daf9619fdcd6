"""The DeepSpeed backend, stages 0 to 3, against one process with torch.optim.AdamW and clip_grad_norm_."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn

from megapt.errors import UserError
from megapt.mesh import Axis, ParallelMesh
from megapt.prove.ranks import run_ranks
from megapt.zero import deepspeed
from tests.zero import runs
from tests.zero.harness import OPTIMIZER, TABLE, TOLERANCES, Case, Job, Problem, Solution, assert_close, solve

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16


def _cases(stages: range, dtypes: tuple[torch.dtype, ...] = (F32,), **layout: Any) -> list[Case]:
    return [Case("deepspeed", stage, dtype=dtype, **layout) for stage in stages for dtype in dtypes]


EVERY, PIPELINE, OFFLOAD = range(4), range(2), range(1, 4)
JOBS: dict[int, list[Job]] = {
    2: [
        *[("train", case) for micro in (1, 2, 4) for case in _cases(EVERY, dp=2, micro=micro)],
        *[("train", case) for case in _cases(EVERY, (BF16,), dp=2, micro=4)],
        *[("train", case) for case in _cases(EVERY, (F64,), dp=2)],
        *[("train", case) for case in _cases(EVERY, tp=2, micro=4)],
        *[("train", case) for case in _cases(PIPELINE, (F32, BF16), pp=2)],
        *[("fine", case) for case in _cases(EVERY, (BF16,), dp=2, micro=4)],
        ("train", Case("deepspeed", 2, tp=2, sequence=False)),
        *[("skip", case) for case in _cases(EVERY, (F32, BF16), dp=2)],
        *[("skip", case) for case in _cases(PIPELINE, (F32, BF16), pp=2)],
        *[("resume", case) for case in _cases(EVERY, (F32, BF16), dp=2)],
        *[("train", case) for case in _cases(EVERY, dp=2, optimizer="scaled")],
        *[("train", case) for case in _cases(PIPELINE, pp=2, optimizer="scaled")],
        *[("train", case) for case in _cases(OFFLOAD, dp=2, micro=4, offload=True)],
        *[("train", case) for case in _cases(OFFLOAD, tp=2, offload=True)],
        *[("fine", case) for case in _cases(OFFLOAD, (BF16,), dp=2, micro=4, offload=True)],
        *[("skip", case) for case in _cases(OFFLOAD, (BF16,), dp=2, offload=True)],
        *[("resume", case) for case in _cases(OFFLOAD, (BF16,), dp=2, offload=True)],
    ],
    3: [("train", case) for case in _cases(EVERY, dp=3)],
    4: [
        *[("train", case) for case in _cases(PIPELINE, (F32, BF16), pp=2, dp=2)],
        *[("train", case) for case in _cases(PIPELINE, pp=2, tp=2)],
        *[("train", case) for case in _cases(EVERY, dp=2, tp=2)],
        *[(name, Case("deepspeed", stage, dp=2, tp=2, model=name)) for name in runs.MODELS for stage in (2, 3)],
        ("llama", Case("deepspeed", 3, dp=2, tp=2, sequence=False, model="llama")),
    ],
}
EVERYTHING = [(world, what, case) for world, jobs in JOBS.items() for what, case in jobs]
ALL = [job for job in EVERYTHING if job[1] != "fine"]


def ranks(world: int) -> list[dict[tuple[str, str], Any]]:
    return runs.ranks_of(world, tuple(JOBS[world]))


@functools.cache
def expected(what: str, dtype: torch.dtype, optimizer: str) -> Solution:
    if what in runs.MODELS:
        return runs.solve_decoder(what)
    return solve(compute=dtype if dtype == BF16 else None, optimizer=optimizer)


@pytest.mark.parametrize(("world", "what", "case"), ALL, ids=[f"{w}-{c.id}" for _, w, c in ALL])
def test_equals_one_process(world: int, what: str, case: Case) -> None:
    found = runs.solution(ranks(world), what, case)
    kept = F32 if case.dtype == F64 else case.dtype  # DeepSpeed's masters, moments and reduced gradients
    assert_close(found, expected(what, case.dtype, case.optimizer), TOLERANCES[kept])


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


ALONE = _cases(EVERY, (F32, BF16))


def _alone(rank: int, world: int) -> tuple[dict[tuple[str, str], Any], list[str]]:
    """A world of one, which has no process group until DeepSpeed needs one."""
    found = runs.work(rank, world, [("train", case) for case in ALONE])
    mesh = ParallelMesh.create(1, 1, 1, torch.device("cpu"))
    lines = [Problem(case, mesh).backend.describe() for case in (*ALONE, Case("deepspeed", 1, dtype=F64))]
    deepspeed._PRIVATE["BF16_Optimizer"] = (*deepspeed._PRIVATE["BF16_Optimizer"], "not_there")
    with pytest.raises(UserError) as error:
        Problem(Case("deepspeed", 1, dtype=BF16), mesh)
    return found, [*lines, str(error.value)]


def test_alone_needs_no_compiler_and_prints_nothing(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    ((found, lines),) = run_ranks(1, _alone)
    assert capfd.readouterr().out == ""
    for case in ALONE:
        solution = runs.solution([found], "train", case)
        assert_close(solution, expected("train", case.dtype, "adamw"), TOLERANCES[case.dtype])
    assert "ZeRO 0: nothing sharded" in lines[0]
    assert "ZeRO 3: optimizer state and gradients and weights sharded over 1 ranks" in lines[-3]
    assert "fp32 masters of fp64 weights" in lines[-2]
    assert all(line.startswith("DeepSpeed 0.19") for line in lines)
    assert "BF16_Optimizer has no not_there" in lines[-1]


def test_refuses_gradient_sharding_under_a_pipeline() -> None:
    one, pipeline = Axis(0, 1, None), Axis(0, 2, None)
    mesh = ParallelMesh(pipeline, one, one, pipeline, 0, 2, torch.device("cpu"))
    with pytest.raises(UserError, match="use stage 0 or 1, or pipeline = 1"):
        deepspeed._check(2, mesh, nn.ModuleList(), [])
