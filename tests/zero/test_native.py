"""The native backend, stages 0 to 2, against one process with torch.optim.AdamW and clip_grad_norm_."""

from __future__ import annotations

import functools
import sys
from typing import Any

import pytest
import torch

from megapt.parameters import Parameter
from megapt.prove.ranks import run_ranks
from megapt.zero.rounding import StochasticRounding
from megapt_kernels.adamw import squared_norm
from tests.zero import runs
from tests.zero.harness import (
    OPTIMIZER,
    SEED,
    STEPS,
    TABLE,
    TOLERANCES,
    Case,
    Job,
    Solution,
    Tolerance,
    assert_close,
    solve,
)

F64, BF16, F16 = torch.float64, torch.bfloat16, torch.float16


def _cases(stages: range = range(3), **layout: int) -> list[Case]:
    return [Case("native", stage, dtype=F64, **layout) for stage in stages]


# Buckets of one parameter or two, among them one larger than a bucket.
_SMALL = 16


PIPELINE = range(2)
JOBS: dict[int, list[Job]] = {
    2: [
        *[("train", case) for case in _cases(dp=2, micro=1)],
        *[("train", case) for case in _cases(dp=2, micro=4, bucket=_SMALL)],
        *[("train", case) for case in _cases(tp=2)],
        *[("train", case) for case in _cases(PIPELINE, pp=2)],
        ("train", Case("native", 1, tp=2, dtype=F64, sequence=False)),
        *[("train", Case("native", stage, dp=2)) for stage in (1, 2)],
        *[("train", Case("native", stage, dp=2, dtype=BF16)) for stage in (1, 2)],
        *[("fine", Case("native", stage, dp=2, micro=4, dtype=BF16)) for stage in range(3)],
        *[("train", case) for case in _cases(dp=2, optimizer="muon")],
        *[("train", case) for case in _cases(tp=2, optimizer="muon")],
        ("train", Case("native", 1, dp=2, dtype=F64, optimizer="heavy", bucket=_SMALL)),
        ("train", Case("native", 1, pp=2, dtype=F64, optimizer="muon")),
        *[("train", Case("native", stage, dp=2, dtype=BF16, optimizer="rounding")) for stage in range(3)],
        ("train", Case("native", 1, dp=2, dtype=F16)),
        *[("skip", Case("native", 1, dp=2, dtype=dtype, optimizer="muon")) for dtype in (F64, F16)],
        *[("resume", Case("native", 1, dp=2, dtype=F64, optimizer="muon")) for dtype in (F64,)],
        ("resume", Case("native", 1, dp=2, dtype=BF16, optimizer="rounding")),
        ("resume", Case("native", 1, dp=2, dtype=F16)),
        *[("overlap", Case("native", stage, dp=2, model="llama", bucket=1200)) for stage in range(3)],
        *[("skip", case) for case in _cases(dp=2)],
        *[("skip", case) for case in _cases(PIPELINE, pp=2)],
        *[("resume", Case("native", stage, dp=2, dtype=dtype)) for stage in range(3) for dtype in (F64, BF16)],
    ],
    4: [
        *[("train", case) for case in _cases(dp=4)],  # the last shard is empty
        *[("train", case) for case in _cases(PIPELINE, dp=2, pp=2)],
        *[("train", case) for case in _cases(dp=2, tp=2, bucket=_SMALL)],
        *[("train", case) for case in _cases(dp=2, tp=2, optimizer="muon", bucket=_SMALL)],
        ("train", Case("native", 1, dp=2, tp=2, dtype=BF16, optimizer="rounding")),
        *[(n, Case("native", 1, dp=2, tp=2, model=n, dtype=F64, optimizer="muon")) for n in runs.MODELS],
        *[(n, Case("native", stage, dp=2, tp=2, model=n, bucket=600)) for n in runs.MODELS for stage in (1, 2)],
    ],
}
EVERYTHING = [(world, what, case) for world, jobs in JOBS.items() for what, case in jobs]
ALL = [job for job in EVERYTHING if job[1] not in ("fine", "overlap")]


def ranks(world: int) -> list[dict[tuple[str, str], Any]]:
    return runs.ranks_of(world, tuple(JOBS[world]))


@functools.cache
def expected(what: str, dtype: torch.dtype, optimizer: str) -> Solution:
    if what in runs.MODELS:
        return runs.solve_decoder(what, dtype, optimizer)
    return solve(optimizer=optimizer, compute=dtype if dtype in (BF16, F16) else None)


@pytest.mark.parametrize(("world", "what", "case"), ALL, ids=[f"{w}-{c.id}" for _, w, c in ALL])
def test_equals_one_process(world: int, what: str, case: Case) -> None:
    found = runs.solution(ranks(world), what, case)
    if case.optimizer == "rounding":
        assert_rounded_alike(found)
        assert_close(found, expected(what, case.dtype, "adamw"), ROUNDED)
        return
    # The iteration of Muon lifts rounding errors with the small singular values.
    limit = MUON if case.optimizer in ("muon", "heavy") and case.dtype == F64 else TOLERANCES[case.dtype]
    assert_close(found, expected(what, case.dtype, case.optimizer), limit)


MUON = Tolerance(1e-12, 1e-11, 1e-11)
# Weights are up to a bf16 step off the masters, and gradients depend on them.
ROUNDED = Tolerance(1e-2, 2e-3, 3e-2)


def assert_rounded_alike(found: Solution) -> None:
    """Weights of any layout are what one process makes of the same masters, and not the nearest ones."""
    rounding, nearest = StochasticRounding(SEED), 0
    for name, tensors in found.state.items():
        spec = TABLE[name]
        whole = Parameter(torch.empty(spec.shape, dtype=BF16))
        whole.spec, whole.shard = spec, spec.shard(0, 1)
        out, master = torch.empty(spec.numel, dtype=BF16), tensors["weight"].flatten()
        rounding.round(out, master, whole, 0, torch.tensor(float(STEPS)))
        weights = tensors.pop("rounded").flatten()
        assert torch.equal(out, weights.to(BF16)), name
        nearest += int((master.to(BF16) == weights.to(BF16)).sum())
    assert 0.3 < nearest / sum(s.numel for s in TABLE.values() if not s.tied_to) < 0.9


OVERLAP = [case for _, what, case in EVERYTHING if what == "overlap"]


@pytest.mark.parametrize("case", OVERLAP, ids=[c.id for c in OVERLAP])
def test_moves_data_beside_the_passes(case: Case) -> None:
    """Two micro-batches. Buckets leave before the backward pass ends, and only once they hold both micro-batches or,
    in stage 2, with each; weights are awaited by the layer that needs them."""
    found = ranks(2)[0]["overlap", case.id]
    assert ranks(2)[1]["overlap", case.id] == found, "ranks of one dp group must queue collectives alike"
    events, buckets = found["events"], found["buckets"]
    assert buckets == 6
    end = len(events) - 1 - events[::-1].index("step")
    second = events[events.index("step") + 1 : end]
    sent = "release" if case.stage == 2 else "reduce"
    first, last = (i for i, event in enumerate(second) if event == "backward ended")
    assert second[:first].count(sent) == (4 if case.stage == 2 else 0)
    assert second[first:last].count(sent) == 4 + (2 if case.stage == 2 else 0)
    assert second[last:].count(sent) == 2
    if case.stage > 0:
        awaited = [event for event in second[:first] if event.startswith(("forward", "gathered"))]
        assert second.count("gather") == buckets  # started in the first step's update
        assert awaited[: awaited.index("forward layer 0")] == ["gathered"] * 4
        assert awaited[awaited.index("forward layer 0") :].count("gathered") == 2
    # In elements of all gradients; at stage 2 the shard alone, and little beside it on the way.
    assert found["kept"] == {0: 1.0, 1: 1.0, 2: 0.5}[case.stage]
    if case.stage == 2:
        assert found["open"] == 1 and found["memory"] <= 3


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
        assert_close(runs.solution([found], "train", case), expected("train", F64, "adamw"), TOLERANCES[F64])


@pytest.mark.parametrize("cut", [1, 3])
def test_the_norm_of_millions_of_elements_keeps_its_digits(cut: int) -> None:
    """Summed one by one in fp32 it would be off by a thousandth, and by another one where it is cut elsewhere."""
    gradient = torch.full((3_000_000,), 0.00123)
    found = squared_norm(list(gradient.chunk(cut)))
    assert found.dtype == F64 and float(found) == pytest.approx(float(gradient.double().square().sum()), rel=5e-5)
    assert squared_norm([], device=gradient.device) == 0
