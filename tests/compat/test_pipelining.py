"""Our orders against those of torch.distributed.pipelining: plain lists, no process group."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed.pipelining import schedules as theirs

from megapt.parallel.pipeline.actions import Action, Kind, Placement
from megapt.parallel.pipeline.check import check
from megapt.parallel.pipeline.schedules import Schedule, placement, schedule, with_communication
from megapt.parallel.pipeline.simulate import Costs, simulate


def from_torch(order: Sequence[theirs._Action | None], where: Placement) -> list[Action]:
    """torch's global stage as our local chunk; idle slots and what is no forward or backward left out."""
    return [
        Action(Kind(action.computation_type.value), action.microbatch_index, where.chunk(action.stage_index))
        for action in order
        if action is not None and action.microbatch_index is not None and action.computation_type.value in "FBIW"
    ]


def cut(order: Sequence[Action]) -> list[Action]:
    """With every whole backward as I and W: torch cuts those on the first virtual stage too."""
    result: list[Action] = []
    for action in order:
        kinds = [action.kind]
        if action.kind is Kind.BACKWARD:
            kinds = [Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT]
        result += [Action(kind, action.micro_batch, action.chunk) for kind in kinds]
    return result


def compute(made: Schedule, rank: int) -> list[Action]:
    return [action for action in made.actions[rank] if action.kind.is_compute]


def torch_order(name: str, stages: int, chunks: int, micro_batches: int) -> list[list[Action]]:
    """What torch makes, per rank."""
    where = placement(name, stages, chunks)
    rounds = max(1, micro_batches // stages)
    sizes: Any = SimpleNamespace(
        _num_stages=stages,
        num_stages=stages * chunks,
        n_local_stages=chunks,
        pp_group_size=stages,
        microbatches_per_round=micro_batches // rounds,
        _n_microbatches=micro_batches,
    )
    per_rank: dict[str, Any] = {
        "interleaved": theirs.ScheduleInterleaved1F1B,
        "zb-h1": theirs.ScheduleInterleavedZeroBubble,
        "zb-v": theirs.ScheduleZBVZeroBubble,
    }
    if name in per_rank:
        orders = [per_rank[name]._calculate_single_rank_operations(sizes, rank) for rank in range(stages)]
    else:
        whole = {"gpipe": theirs.ScheduleGPipe, "1f1b": theirs.Schedule1F1B}[name]._get_pipeline_order(sizes)
        assert whole is not None
        orders = [whole[rank] for rank in range(stages)]
    return [from_torch(order, where) for order in orders]


@pytest.mark.parametrize("stages", range(1, 9))
@pytest.mark.parametrize("name, chunks", [("interleaved", 2), ("interleaved", 3), ("interleaved", 4), ("zb-v", 2)])
def test_orders_of_several_chunks_are_those_of_torch(name: str, chunks: int, stages: int) -> None:
    for micro_batches in [stages, 2 * stages, 3 * stages] + ([1, 2, 2 * stages + 1] if name == "zb-v" else []):
        made = schedule(name, stages, chunks, micro_batches)
        expected = torch_order(name, stages, chunks, micro_batches)
        for rank in range(stages):
            ours = compute(made, rank)
            assert (cut(ours) if name == "zb-v" else ours) == expected[rank]


@pytest.mark.parametrize("stages", range(1, 9))
@pytest.mark.parametrize("extra", [0, 1, 7])
def test_orders_of_one_chunk_are_those_of_torch(stages: int, extra: int) -> None:
    micro_batches = stages + extra
    for name in ("gpipe", "1f1b"):
        made, expected = schedule(name, stages, 1, micro_batches), torch_order(name, stages, 1, micro_batches)
        # torch's listing of 1F1B for its last rank starts with micro-batch 1 (its runtime does not), so it is left out.
        for rank in range(stages - (name == "1f1b")):
            assert compute(made, rank) == expected[rank]


@pytest.mark.parametrize("stages", range(1, 9))
def test_zb_h1_is_torchs_zero_bubble_of_one_chunk(stages: int) -> None:
    """What torch calls ZB1P: the same order, hence the same peaks and times."""
    for micro_batches in (stages, 2 * stages, 4 * stages):
        made, expected = schedule("zb-h1", stages, 1, micro_batches), torch_order("zb-h1", stages, 1, micro_batches)
        assert [cut(compute(made, rank)) for rank in range(stages)] == expected
        other = Schedule("torch", made.placement, micro_batches, with_communication(expected, made.placement))
        assert check(other, outstanding=0).peak_held == check(made).peak_held
        costs = Costs.even(stages, 1, 1.0, 1.25, 0.75)
        assert simulate(other, costs).timeline.step == simulate(made, costs).timeline.step


@pytest.mark.parametrize(
    "name, chunks",
    [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("interleaved", 3), ("zb-h1", 1), ("zb-v", 2), ("forward", 2)],
)
def test_torch_finds_no_deadlock_in_our_orders(name: str, chunks: int) -> None:
    stages = 4
    made = schedule(name, stages, chunks, 8)
    orders = {
        rank: [
            theirs._Action.from_str(f"{made.placement.virtual(rank, a.chunk)}{a.kind.value}{a.micro_batch}")
            for a in compute(made, rank)
        ]
        for rank in range(stages)
    }
    sizes = (made.placement.rank, stages * chunks)
    complete = theirs._add_send_recv(orders, *sizes)
    theirs._simulate_comms_compute(complete, *sizes)
    for rank, actions in enumerate(made.actions):
        assert len(complete[rank]) == len(actions)
