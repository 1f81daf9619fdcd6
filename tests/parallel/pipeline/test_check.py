"""Legal schedules pass the check; each way to break one is caught and named."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megapt.parallel.pipeline.actions import Action, Kind, Placement
from megapt.parallel.pipeline.check import ScheduleError, check
from megapt.parallel.pipeline.schedules import (
    Schedule,
    forward_schedule,
    placement,
    schedule,
    with_communication,
)

F, B = Kind.FORWARD, Kind.BACKWARD


def text(actions: list[Action]) -> str:
    return " ".join(map(str, actions))


@pytest.mark.parametrize("stages", range(1, 9))
def test_1f1b_passes_and_holds_what_it_promises(stages: int) -> None:
    for micro_batches in [1, 2, 3, 5, 8, 13, 2 * stages]:
        report = check(schedule("1f1b", stages, 1, micro_batches), outstanding=0)
        assert report.peak_live == [min(stages - rank, micro_batches) for rank in range(stages)]


@pytest.mark.parametrize("stages", range(1, 9))
@pytest.mark.parametrize("chunks", range(2, 5))
def test_interleaved_passes_and_holds_what_it_promises(stages: int, chunks: int) -> None:
    for groups in [1, 2, 3]:
        micro_batches = stages * groups
        report = check(schedule("interleaved", stages, chunks, micro_batches), outstanding=0)
        paper = [2 * (stages - rank - 1) + (chunks - 1) * stages + 1 for rank in range(stages)]
        assert report.peak_live == [min(live, micro_batches * chunks) for live in paper]


@pytest.mark.parametrize("stages", range(1, 9))
@pytest.mark.parametrize("chunks", range(1, 5))
def test_forward_only_passes_and_holds_nothing(stages: int, chunks: int) -> None:
    for micro_batches in [1, 3, 7, 2 * stages]:
        report = check(schedule("forward", stages, chunks, micro_batches), outstanding=0)
        assert report.peak_live == [0] * stages


@pytest.mark.parametrize("stages", range(1, 9))
def test_gpipe_holds_all_micro_batches(stages: int) -> None:
    for micro_batches in [1, 5, 2 * stages]:
        assert check(schedule("gpipe", stages, 1, micro_batches), outstanding=0).peak_live == [micro_batches] * stages


@pytest.mark.parametrize("stages", range(1, 9))
def test_zb_h1_passes_and_holds_as_much_as_the_first_rank_of_1f1b(stages: int) -> None:
    for micro_batches in [1, 2, 3, 5, 8, 13, 2 * stages]:
        report = check(schedule("zb-h1", stages, 1, micro_batches), outstanding=0)
        assert report.peak_live == [min(stages - rank, micro_batches) for rank in range(stages)]
        assert report.peak_held == [min(stages, micro_batches)] * stages
        # One more than the paper's rank - 1 just before a W; the first rank cuts no backward.
        assert report.peak_weight == [0] + [min(rank + 1, micro_batches) for rank in range(1, stages)]


@pytest.mark.parametrize("stages", range(1, 9))
def test_zb_v_passes_and_holds_as_much_as_the_first_rank_of_1f1b(stages: int) -> None:
    for micro_batches in [1, 2, 3, stages, 2 * stages - 1, 2 * stages, 3 * stages + 1]:
        report = check(schedule("zb-v", stages, 2, micro_batches), outstanding=1)
        halves = 2 * min(stages, micro_batches)
        assert max(report.peak_held) == halves
        if micro_batches >= 2 * stages - 1:
            assert report.peak_held == [halves] * stages


def test_one_send_of_zb_v_is_buffered() -> None:
    """Both halves of a V send to each other, so that with rendezvous neighbours wait for each other."""
    with pytest.raises(ScheduleError, match="deadlock with at most 0 incomplete sends"):
        check(schedule("zb-v", 4, 2, 8), outstanding=0)


def test_a_large_schedule_is_checked_in_seconds() -> None:
    made = schedule("interleaved", 32, 4, 256)
    start = time.process_time()
    assert check(made, outstanding=0).peak_live[0] == 2 * 31 + 3 * 32 + 1
    assert time.process_time() - start < 15  # 2 s on a quiet machine


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    stages=st.integers(1, 10),
    chunks=st.integers(1, 5),
    groups=st.integers(1, 4),
    outstanding=st.sampled_from([0, 1, 3]),
)
def test_any_size_passes_under_any_bound(stages: int, chunks: int, groups: int, outstanding: int) -> None:
    check(schedule("interleaved", stages, chunks, stages * groups), outstanding)
    check(schedule("1f1b", stages, 1, chunks * groups), outstanding)
    check(schedule("forward", stages, chunks, chunks + groups), outstanding)
    check(schedule("gpipe", stages, 1, chunks * groups), outstanding)
    check(schedule("zb-h1", stages, 1, chunks * groups), outstanding)
    check(schedule("zb-v", stages, 2, chunks * groups), max(outstanding, 1))
    check(forward_schedule(placement("zb-v", stages, 2), chunks * groups), outstanding)


def with_list(base: Schedule, rank: int, actions: list[Action]) -> Schedule:
    return replace(base, actions=[*base.actions[:rank], actions, *base.actions[rank + 1 :]])


def edited(base: Schedule, rank: int, edit: Callable[[list[Action]], None]) -> Schedule:
    actions = list(base.actions[rank])
    edit(actions)
    return with_list(base, rank, actions)


@pytest.mark.parametrize(
    "name, chunks", [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zb-h1", 1), ("zb-v", 2), ("forward", 2)]
)
def test_dropping_or_repeating_any_single_action_is_caught(name: str, chunks: int) -> None:
    base = schedule(name, 3, chunks, 3)
    for rank, order in enumerate(base.actions):
        for position, action in enumerate(order):
            with pytest.raises(ScheduleError):
                check(with_list(base, rank, order[:position] + order[position + 1 :]))
            with pytest.raises(ScheduleError, match=f"{action}.*occurs twice"):
                check(with_list(base, rank, [*order, action]))


def test_dropped_computes_and_sends_are_named() -> None:
    base = schedule("1f1b", 3, 1, 4)
    assert text(base.actions[2][-2:]) == "B3.0 sB3.0"
    with pytest.raises(ScheduleError, match=r"rank 2: B3\.0 is missing"):
        check(with_list(base, 2, base.actions[2][:-2]))
    with pytest.raises(ScheduleError, match="message 3: rank 0 sends nothing, rank 1 receives micro-batch 3"):
        check(edited(base, 0, lambda actions: actions.remove(Action(Kind.SEND_FORWARD, 3, 0))))


def swap(actions: list[Action], one: Action, other: Action) -> None:
    i, j = actions.index(one), actions.index(other)
    actions[i], actions[j] = other, one


def test_swapped_receives_are_caught() -> None:
    base = schedule("1f1b", 3, 1, 4)
    one, other = Action(Kind.RECV_FORWARD, 0, 0), Action(Kind.RECV_FORWARD, 1, 0)
    assert text(base.actions[1][:2]) == "rF0.0 rF1.0"
    with pytest.raises(
        ScheduleError, match="forward 0->1, message 0: rank 0 sends micro-batch 0 .* receives micro-batch 1"
    ):
        check(edited(base, 1, lambda actions: swap(actions, one, other)))


def test_backward_before_its_forward_is_caught() -> None:
    base = schedule("1f1b", 3, 1, 4)
    with pytest.raises(ScheduleError, match=r"rank 2, action 1 \(B0\.0\): runs before its forward F0\.0"):
        check(edited(base, 2, lambda actions: swap(actions, Action(F, 0, 0), Action(B, 0, 0))))


def test_weight_gradient_before_its_input_gradient_is_caught() -> None:
    base = schedule("zb-h1", 3, 1, 4)
    cut, weight = Action(Kind.BACKWARD_INPUT, 2, 0), Action(Kind.BACKWARD_WEIGHT, 2, 0)
    with pytest.raises(ScheduleError, match=r"\(W2\.0\): runs before its I2\.0"):
        check(edited(base, 1, lambda actions: swap(actions, cut, weight)))


def test_a_backward_both_whole_and_cut_is_caught() -> None:
    base = schedule("zb-h1", 3, 1, 4)
    with pytest.raises(ScheduleError, match=r"\(B2\.0\): repeats I2\.0"):
        check(edited(base, 1, lambda actions: actions.append(Action(B, 2, 0))))
    with pytest.raises(ScheduleError, match=r"\(I2\.0\): repeats B2\.0"):
        check(edited(base, 0, lambda actions: actions.append(Action(Kind.BACKWARD_INPUT, 2, 0))))
    with pytest.raises(ScheduleError, match=r"\(W2\.0\): runs before its I2\.0"):
        check(edited(base, 0, lambda actions: actions.append(Action(Kind.BACKWARD_WEIGHT, 2, 0))))


def test_an_input_gradient_without_its_weight_gradient_is_caught() -> None:
    base = schedule("zb-v", 3, 2, 6)
    with pytest.raises(ScheduleError, match=r"rank 1: W3\.1 is missing"):
        check(edited(base, 1, lambda actions: actions.remove(Action(Kind.BACKWARD_WEIGHT, 3, 1))))


def test_whole_and_cut_backwards_may_stand_side_by_side() -> None:
    """A whole backward may feed a cut one, and the other way round."""
    base = schedule("zb-h1", 3, 1, 4)

    def whole(actions: list[Action]) -> None:
        actions[actions.index(Action(Kind.BACKWARD_INPUT, 2, 0))] = Action(B, 2, 0)
        actions.remove(Action(Kind.BACKWARD_WEIGHT, 2, 0))

    report = check(edited(base, 1, whole), outstanding=0)
    assert report.peak_held == [3, 3, 3]


def test_swapped_sends_are_caught() -> None:
    base = schedule("zb-v", 3, 2, 6)
    one, other = Action(Kind.BACKWARD_INPUT, 4, 0).send(), Action(Kind.BACKWARD_INPUT, 5, 0).send()
    late = [action for action in base.actions[2] if action != one]
    late.insert(late.index(other) + 1, one)
    with pytest.raises(
        ScheduleError, match="backward 2->1, message 4: rank 2 sends micro-batch 5 .* receives micro-batch 4"
    ):
        check(with_list(base, 2, late))


def test_the_turn_of_a_v_out_of_order_is_caught() -> None:
    base = schedule("zb-v", 2, 2, 4)
    with pytest.raises(ScheduleError, match=r"\(F1\.1\): runs before its input F1\.0 on the same rank"):
        check(edited(base, 1, lambda actions: swap(actions, Action(F, 1, 0), Action(F, 1, 1))))
    one, other = Action(Kind.BACKWARD_INPUT, 2, 1), Action(Kind.BACKWARD_INPUT, 2, 0)
    with pytest.raises(ScheduleError, match=r"\(I2\.0\): runs before its input B2\.1 or I2\.1 on the same rank"):
        check(edited(base, 1, lambda actions: swap(actions, one, other)))


def test_receive_after_its_compute_is_caught() -> None:
    def late(actions: list[Action]) -> None:
        recv = Action(Kind.RECV_FORWARD, 2, 0)
        actions.remove(recv)
        actions.insert(actions.index(Action(F, 2, 0)) + 1, recv)

    with pytest.raises(ScheduleError, match=r"\(F2\.0\): runs before its receive rF2\.0 was posted"):
        check(edited(schedule("1f1b", 3, 1, 4), 1, late))


def test_send_before_its_compute_is_caught() -> None:
    base = schedule("1f1b", 3, 1, 4)
    with pytest.raises(ScheduleError, match=r"rank 0, action 0 \(sF0\.0\): sends what was not computed yet"):
        check(edited(base, 0, lambda actions: swap(actions, Action(F, 0, 0), Action(F, 0, 0).send())))


def test_chunks_of_one_rank_out_of_order_are_caught() -> None:
    base = schedule("interleaved", 1, 2, 2)
    with pytest.raises(ScheduleError, match=r"\(F0\.1\): runs before its input F0\.0 on the same rank"):
        check(edited(base, 0, lambda actions: swap(actions, Action(F, 0, 0), Action(F, 0, 1))))


@pytest.mark.parametrize(
    "action, rule",
    [
        (Action(F, 4, 0), r"micro-batch outside 0\.\.3"),
        (Action(F, 0, 1), r"chunk outside 0\.\.0"),
        (Action(Kind.RECV_FORWARD, 0, 0), "no other rank is at the other end"),
    ],
)
def test_actions_that_do_not_exist_are_caught(action: Action, rule: str) -> None:
    with pytest.raises(ScheduleError, match=rule):
        check(edited(schedule("1f1b", 2, 1, 4), 0, lambda actions: actions.insert(0, action)))


def test_a_backward_in_a_forward_schedule_is_caught() -> None:
    with pytest.raises(ScheduleError, match="a schedule without backward holds BACKWARD"):
        check(edited(schedule("forward", 1, 1, 2), 0, lambda actions: actions.append(Action(B, 0, 0))))


def test_a_missing_rank_is_caught() -> None:
    base = schedule("1f1b", 3, 1, 4)
    with pytest.raises(ScheduleError, match="3 ranks need one list each, got 2 lists"):
        check(replace(base, actions=base.actions[:2]))


def test_a_circular_wait_is_a_deadlock() -> None:
    """Rank 0 runs backward 0 before forward 1, rank 1 forward 1 before backward 0."""
    two = Placement(2, 1)
    compute = [
        [Action(F, 0, 0), Action(B, 0, 0), Action(F, 1, 0), Action(B, 1, 0)],
        [Action(F, 0, 0), Action(F, 1, 0), Action(B, 0, 0), Action(B, 1, 0)],
    ]
    with pytest.raises(ScheduleError, match="deadlock") as caught:
        check(Schedule("circular", two, 2, with_communication(compute, two)))
    assert "rank 0, action 3 (B0.0) waits for micro-batch 0 for virtual stage 0" in str(caught.value)
    assert "rank 1" in str(caught.value)


def test_late_receives_deadlock_only_where_a_send_is_a_rendezvous() -> None:
    """Each rank posts its receives only after it has sent, so both wait for the other to post."""
    base = schedule("1f1b", 2, 1, 4)

    def post_late(actions: list[Action]) -> None:
        for action in [a for a in actions if a.kind.passes_on and a.recv() in actions]:
            actions.remove(action.recv())
            actions.insert(actions.index(action), action.recv())

    late = edited(edited(base, 0, post_late), 1, post_late)
    check(late)
    check(late, outstanding=1)
    with pytest.raises(ScheduleError, match="at most 0 incomplete sends .* waits for rank 1 to post"):
        check(late, outstanding=0)
