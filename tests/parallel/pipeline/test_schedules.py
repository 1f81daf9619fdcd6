"""Orders of the schedules, where communication stands in them, and refusals."""

from __future__ import annotations

import pytest

from megapt.errors import UserError
from megapt.parallel.pipeline.actions import Action, Kind, Placement, PlacementKind
from megapt.parallel.pipeline.check import check
from megapt.parallel.pipeline.schedules import (
    NAMES,
    TRAINING_NAMES,
    Schedule,
    forward_only,
    forward_schedule,
    gpipe,
    interleaved,
    one_f_one_b,
    placement,
    schedule,
    with_communication,
    zb_h1,
    zb_v,
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
    assert text(order[0]) == ("F0.0 F1.0 F0.1 F1.1 F2.0 B0.1 F3.0 B1.1 F2.1 B0.0 F3.1 B1.0 B2.1 B3.1 B2.0 B3.0")
    assert text(order[1]) == ("F0.0 F1.0 F0.1 B0.1 F1.1 B1.1 F2.0 B0.0 F3.0 B1.0 F2.1 B2.1 F3.1 B3.1 B2.0 B3.0")


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


def test_gpipe_runs_all_forwards_first() -> None:
    assert [short(order) for order in gpipe(2, 3)] == ["F0 F1 F2 B0 B1 B2"] * 2


def test_interleaved_with_one_chunk_is_1f1b() -> None:
    assert interleaved(4, 1, 8) == one_f_one_b(4, 8)


def test_forward_only_takes_an_incomplete_last_group() -> None:
    assert text(forward_only(Placement(2, 2), 3)[0]) == "F0.0 F1.0 F0.1 F1.1 F2.0 F2.1"


def test_forward_only_on_a_v_takes_what_comes_back_as_it_arrives() -> None:
    placement = Placement(2, 2, PlacementKind.V)
    assert text(forward_only(placement, 5)[0]) == "F0.0 F1.0 F2.0 F0.1 F3.0 F1.1 F4.0 F2.1 F3.1 F4.1"
    assert text(forward_only(placement, 2)[1]) == "F0.0 F0.1 F1.0 F1.1"


def test_known_zb_h1_order_of_three_stages_and_four_micro_batches() -> None:
    order = zb_h1(3, 4)
    assert short(order[0]) == "F0 F1 F2 B0 F3 B1 B2 B3"
    assert short(order[1]) == "F0 F1 I0 F2 I1 W0 F3 I2 W1 I3 W2 W3"
    assert short(order[2]) == "F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3"


def test_known_zb_v_order_of_two_stages_and_four_micro_batches() -> None:
    order = zb_v(2, 4)
    assert text(order[0]) == (
        "F0.0 F1.0 F2.0 F0.1 I0.1 W0.1 F1.1 I1.1 W1.1 F3.0 B0.0 F2.1 I2.1 W2.1 B1.0 F3.1 I3.1 W3.1 B2.0 B3.0"
    )
    assert text(order[1]) == (
        "F0.0 F0.1 F1.0 F1.1 I0.1 W0.1 F2.0 I0.0 W0.0 F2.1 I1.1 W1.1 F3.0 I1.0 W1.0 F3.1 I2.1 W2.1 "
        "I2.0 I3.1 I3.0 W2.0 W3.1 W3.0"
    )


@pytest.mark.parametrize("stages", range(1, 7))
def test_backwards_are_cut_except_where_nobody_waits_for_the_input_gradient(stages: int) -> None:
    for name in ("zb-h1", "zb-v"):
        made = schedule(name, stages, 1 if name == "zb-h1" else 2, 2 * stages)
        for rank, actions in enumerate(made.actions):
            for action in actions:
                if action.kind is Kind.BACKWARD:
                    assert made.placement.virtual(rank, action.chunk) == 0, f"{name}: {action} on rank {rank}"


def test_communication_of_1f1b_on_the_first_middle_and_last_rank() -> None:
    actions = schedule("1f1b", 3, 1, 3).actions
    assert short(actions[0]) == "F0 sF0 F1 rB0 sF1 F2 rB1 sF2 B0 rB2 B1 B2"
    assert short(actions[1]) == "rF0 rF1 F0 rB0 sF0 F1 rF2 sF1 B0 rB1 sB0 F2 rB2 sF2 B1 sB1 B2 sB2"
    assert short(actions[2]) == "rF0 F0 rF1 B0 sB0 F1 rF2 B1 sB1 F2 B2 sB2"


ALL = [("gpipe", 1), ("1f1b", 1), ("interleaved", 3), ("zb-h1", 1), ("zb-v", 2), ("forward", 3)]


@pytest.mark.parametrize("name, chunks", ALL)
def test_sends_follow_their_compute_and_receives_come_one_compute_ahead(name: str, chunks: int) -> None:
    made = schedule(name, 4, chunks, 8)
    for rank, actions in enumerate(made.actions):
        compute = [action for action in actions if action.kind.is_compute]
        for position, action in enumerate(actions):
            if action.kind.is_send:
                before = next(a for a in reversed(actions[:position]) if not a.kind.is_recv)
                assert before.send() == action
            if action.kind.is_recv:
                consumer = next(i for i, c in enumerate(compute) if c.kind.passes_on and c.recv() == action)
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
    for name, chunks in ALL:
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


@pytest.mark.parametrize(
    "name, chunks, message",
    [
        ("gpipe", 2, "got 2; set chunks to 1, or use the interleaved"),
        ("1f1b", 2, "got 2; set chunks to 1, or use the interleaved"),
        ("zb-h1", 3, "got 3; set chunks to 1, or use the interleaved"),
        ("zb-v", 1, "two model chunks per rank, got 1; set chunks to 2"),
        ("zb-v", 3, "two model chunks per rank, got 3; set chunks to 2"),
    ],
)
def test_wrong_chunks_are_refused(name: str, chunks: int, message: str) -> None:
    for make in (lambda: schedule(name, 2, chunks, 4), lambda: placement(name, 2, chunks)):
        with pytest.raises(UserError, match=message) as caught:
            make()
        assert name in str(caught.value)


@pytest.mark.parametrize("name, chunks", ALL)
@pytest.mark.parametrize("stages, micro_batches, word", [(0, 4, "stages"), (2, 0, "micro_batches")])
def test_sizes_below_one_are_refused(name: str, chunks: int, stages: int, micro_batches: int, word: str) -> None:
    with pytest.raises(UserError, match=f"{word} of at least 1, got 0"):
        schedule(name, stages, chunks, micro_batches)


def test_placement_is_that_of_the_schedule() -> None:
    assert (*TRAINING_NAMES, "forward") == NAMES == tuple(name for name, _ in ALL)
    for name, chunks in ALL:
        assert schedule(name, 4, chunks, 8).placement == placement(name, 4, chunks)
    assert placement("zb-v", 4, 2).kind is PlacementKind.V
    assert forward_schedule(placement("zb-v", 4, 2), 3).placement == placement("zb-v", 4, 2)
