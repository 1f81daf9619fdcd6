"""Orders of the schedules, where communication stands in them, and refusals."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed.pipelining import schedules as torch_schedules

from megapt.errors import UserError
from megapt.parallel.pipeline.actions import Action, Kind, Placement
from megapt.parallel.pipeline.check import check
from megapt.parallel.pipeline.schedules import (
    NAMES,
    Schedule,
    forward_only,
    interleaved,
    one_f_one_b,
    schedule,
    with_communication,
)


def text(actions: list[Action]) -> str:
    return " ".join(map(str, actions))


def short(actions: list[Action]) -> str:
    """Without chunk numbers, for schedules of one chunk."""
    assert all(action.chunk == 0 for action in actions)
    return " ".join(str(action).removesuffix(".0") for action in actions)


def warm_up(order: list[Action]) -> int:
    """Forwards before the first steady-state pair, which is one forward and the first backward."""
    kinds = [action.kind for action in order]
    leading = kinds.index(Kind.BACKWARD)
    return leading if leading == kinds.count(Kind.FORWARD) else leading - 1


def test_known_1f1b_order_of_four_stages_and_eight_micro_batches() -> None:
    order = one_f_one_b(4, 8)
    assert short(order[0]) == "F0 F1 F2 F3 B0 F4 B1 F5 B2 F6 B3 F7 B4 B5 B6 B7"
    assert short(order[3]) == "F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5 F6 B6 F7 B7"


def test_known_interleaved_order_of_two_stages_two_chunks_and_four_micro_batches() -> None:
    order = interleaved(2, 2, 4)
    assert text(order[0]) == (
        "F0.0 F1.0 F0.1 F1.1 F2.0 B0.1 F3.0 B1.1 F2.1 B0.0 F3.1 B1.0 B2.1 B3.1 B2.0 B3.0"
    )
    assert text(order[1]) == (
        "F0.0 F1.0 F0.1 B0.1 F1.1 B1.1 F2.0 B0.0 F3.0 B1.0 F2.1 B2.1 F3.1 B3.1 B2.0 B3.0"
    )


@pytest.mark.parametrize("stages", range(1, 9))
@pytest.mark.parametrize("chunks", range(2, 5))
@pytest.mark.parametrize("groups", [1, 2, 5])
def test_interleaved_warm_up_is_that_of_the_paper(stages: int, chunks: int, groups: int) -> None:
    total = stages * groups * chunks
    for rank, order in enumerate(interleaved(stages, chunks, stages * groups)):
        paper = (stages - rank - 1) * 2 + (chunks - 1) * stages
        # When a single pair follows the warm-up, it cannot be told apart from a warm-up of all forwards.
        expected = total if paper >= total - 1 else paper
        assert warm_up(order) == expected


def test_interleaved_with_one_chunk_is_1f1b() -> None:
    assert interleaved(4, 1, 8) == one_f_one_b(4, 8)


def test_forward_only_takes_an_incomplete_last_group() -> None:
    assert text(forward_only(2, 2, 3)[0]) == "F0.0 F1.0 F0.1 F1.1 F2.0 F2.1"


def torch_text(order: Sequence[torch_schedules._Action | None], stages: int) -> str:
    """torch's global stage index as our local chunk, its idle slots left out."""
    return " ".join(
        f"{action.computation_type.value}{action.microbatch_index}.{action.stage_index // stages}"
        for action in order
        if action is not None
    )


@pytest.mark.parametrize("stages", range(1, 9))
@pytest.mark.parametrize("chunks", range(2, 5))
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_interleaved_is_that_of_torch(stages: int, chunks: int, groups: int) -> None:
    sizes: Any = SimpleNamespace(
        n_local_stages=chunks,
        microbatches_per_round=stages,
        pp_group_size=stages,
        _n_microbatches=stages * groups,
    )
    for rank, order in enumerate(interleaved(stages, chunks, stages * groups)):
        theirs = torch_schedules.ScheduleInterleaved1F1B._calculate_single_rank_operations(sizes, rank)
        assert text(order) == torch_text(theirs, stages)


@pytest.mark.parametrize("stages", range(1, 9))
@pytest.mark.parametrize("extra", [0, 1, 7])
def test_1f1b_is_that_of_torch(stages: int, extra: int) -> None:
    micro_batches = stages + extra
    sizes: Any = SimpleNamespace(_num_stages=stages, _n_microbatches=micro_batches)
    theirs = torch_schedules.Schedule1F1B._get_pipeline_order(sizes)
    assert theirs is not None
    # torch's listing for its last rank starts with micro-batch 1 (its runtime does not), so it is left out.
    for rank in range(stages - 1):
        compute = [a for a in theirs[rank] if a and a.computation_type.value in "FB"]
        assert text(one_f_one_b(stages, micro_batches)[rank]) == torch_text(compute, stages)


@pytest.mark.parametrize(
    "name, chunks", [("1f1b", 1), ("interleaved", 2), ("interleaved", 3), ("forward", 1), ("forward", 2)]
)
def test_torch_finds_no_deadlock_in_our_orders(name: str, chunks: int) -> None:
    stages = 4
    made = schedule(name, stages, chunks, 8)
    compute = {
        rank: [
            torch_schedules._Action.from_str(
                f"{made.placement.virtual(rank, a.chunk)}{a.kind.value}{a.micro_batch}"
            )
            for a in actions
            if a.kind.is_compute
        ]
        for rank, actions in enumerate(made.actions)
    }
    sizes = (lambda stage: stage % stages, stages * chunks)
    theirs = torch_schedules._add_send_recv(compute, *sizes)
    torch_schedules._simulate_comms_compute(theirs, *sizes)
    for rank, actions in enumerate(made.actions):
        assert len(theirs[rank]) == len(actions)


def test_communication_of_1f1b_on_the_first_middle_and_last_rank() -> None:
    actions = schedule("1f1b", 3, 1, 3).actions
    assert short(actions[0]) == "F0 sF0 F1 rB0 sF1 F2 rB1 sF2 B0 rB2 B1 B2"
    assert short(actions[1]) == "rF0 rF1 F0 rB0 sF0 F1 rF2 sF1 B0 rB1 sB0 F2 rB2 sF2 B1 sB1 B2 sB2"
    assert short(actions[2]) == "rF0 F0 rF1 B0 sB0 F1 rF2 B1 sB1 F2 B2 sB2"


@pytest.mark.parametrize("name, chunks", [("1f1b", 1), ("interleaved", 3), ("forward", 3)])
def test_sends_follow_their_compute_and_receives_come_one_compute_ahead(name: str, chunks: int) -> None:
    made = schedule(name, 4, chunks, 8)
    for rank, actions in enumerate(made.actions):
        compute = [action for action in actions if action.kind.is_compute]
        for position, action in enumerate(actions):
            if action.kind.is_send:
                before = next(a for a in reversed(actions[:position]) if not a.kind.is_recv)
                assert before.send() == action
            if action.kind.is_recv:
                consumer = next(i for i, candidate in enumerate(compute) if candidate.recv() == action)
                following = next(a for a in actions[position:] if a.kind.is_compute)
                assert following == compute[max(consumer - 1, 0)], f"{action} on rank {rank}"


def test_receives_keep_the_senders_order_when_computes_do_not() -> None:
    placement = Placement(2, 1)
    kinds = {"F": Kind.FORWARD, "B": Kind.BACKWARD}
    lines = ["F0 F1 F2 B2 B1 B0", "F2 B2 F1 B1 F0 B0"]
    compute = [[Action(kinds[word[0]], int(word[1]), 0) for word in line.split()] for line in lines]
    actions = with_communication(compute, placement)
    assert short(actions[1]) == "rF0 rF1 rF2 F2 B2 sB2 F1 B1 sB1 F0 B0 sB0"
    check(Schedule("last first", placement, 3, actions), outstanding=0)


def test_one_rank_communicates_with_nobody() -> None:
    for name, chunks in [("1f1b", 1), ("interleaved", 3), ("forward", 3)]:
        (actions,) = schedule(name, 1, chunks, 4).actions
        assert all(action.kind.is_compute for action in actions)


@pytest.mark.parametrize(
    "micro_batches, nearest", [(10, "8 or 12 micro-batches"), (3, "nearest legal: 4 micro-batches")]
)
def test_interleaved_refuses_and_names_the_nearest(micro_batches: int, nearest: str) -> None:
    with pytest.raises(UserError, match=nearest) as caught:
        schedule("interleaved", 4, 2, micro_batches)
    assert f"{micro_batches} micro-batches for 4 stages" in str(caught.value)


def test_unknown_name_lists_the_legal_ones() -> None:
    with pytest.raises(UserError, match="'2f2b'") as caught:
        schedule("2f2b", 2, 1, 4)
    assert all(name in str(caught.value) for name in NAMES)


def test_1f1b_refuses_chunks() -> None:
    with pytest.raises(UserError, match="got 2; set chunks to 1, or use the interleaved"):
        schedule("1f1b", 2, 2, 4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sizes, word", [((0, 1, 4), "stages"), ((2, 1, 0), "micro_batches")])
def test_sizes_below_one_are_refused(name: str, sizes: tuple[int, int, int], word: str) -> None:
    with pytest.raises(UserError, match=f"{word} of at least 1, got 0"):
        schedule(name, *sizes)
