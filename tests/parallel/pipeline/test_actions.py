"""Placement, channels and the printed form of actions."""

from __future__ import annotations

import pytest

from megapt.errors import UserError
from megapt.parallel.pipeline.actions import Action, Channel, Direction, Kind, Message, Placement, PlacementKind
from megapt.parallel.pipeline.schedules import schedule


def test_actions_print_short() -> None:
    assert str(Action(Kind.FORWARD, 3, 0)) == "F3.0"
    assert str(Action(Kind.BACKWARD, 12, 1)) == "B12.1"
    assert str(Action(Kind.FORWARD, 3, 0).send()) == "sF3.0"
    assert str(Action(Kind.FORWARD, 3, 0).recv()) == "rF3.0"
    assert str(Action(Kind.BACKWARD, 3, 2).send()) == "sB3.2"
    assert str(Action(Kind.BACKWARD, 3, 2).recv()) == "rB3.2"
    assert str(Action(Kind.BACKWARD_INPUT, 4, 0)) == "I4.0"
    assert str(Action(Kind.BACKWARD_WEIGHT, 4, 0)) == "W4.0"


def test_a_cut_backward_sends_and_receives_as_a_whole_one() -> None:
    whole, cut = Action(Kind.BACKWARD, 3, 1), Action(Kind.BACKWARD_INPUT, 3, 1)
    assert cut.send() == whole.send() and cut.recv() == whole.recv()
    weight = Action(Kind.BACKWARD_WEIGHT, 3, 1)
    assert not weight.kind.passes_on and Placement(2, 2).source(0, weight) is None
    for move in (weight.send, weight.recv):
        with pytest.raises(AssertionError, match=r"W3\.1"):
            move()


def test_printed_actions_are_read_back() -> None:
    for kind in Kind:
        action = Action(kind, 12, 3)
        assert Action.parse(str(action)) == action
    for wrong in ("", "F3", "F3.", "X3.0", "F-1.0", "F3.0 ", "f3.0", "rI3.0"):
        with pytest.raises(UserError, match="as in F3.0; got"):
            Action.parse(wrong)


def test_every_kind_is_compute_send_or_recv() -> None:
    for kind in Kind:
        assert kind.is_compute + kind.is_send + kind.is_recv == 1
        assert kind.direction is (Direction.FORWARD if "F" in kind.value else Direction.BACKWARD)


@pytest.mark.parametrize("stages", range(1, 9))
@pytest.mark.parametrize(
    "chunks, kind", [*((chunks, PlacementKind.LOOPING) for chunks in range(1, 5)), (2, PlacementKind.V)]
)
def test_placement_walks_the_model_in_order(stages: int, chunks: int, kind: PlacementKind) -> None:
    placement = Placement(stages, chunks, kind)
    here: tuple[int, int] | None = (0, 0)
    walked = []
    while here is not None:
        walked.append(placement.virtual(*here))
        assert (placement.rank(walked[-1]), placement.chunk(walked[-1])) == here
        following = placement.next(*here)
        if following is not None:
            assert placement.previous(*following) == here
        here = following
    assert walked == list(range(stages * chunks)) == list(range(placement.virtual_stages))
    assert placement.previous(0, 0) is None


def test_looping_placement() -> None:
    placement = Placement(4, 2)
    assert [placement.rank(k) for k in range(8)] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert [placement.chunk(k) for k in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert placement.next(3, 0) == (0, 1)
    assert placement.next(3, 1) is None


def test_v_placement() -> None:
    placement = Placement(4, 2, PlacementKind.V)
    assert [placement.rank(k) for k in range(8)] == [0, 1, 2, 3, 3, 2, 1, 0]
    assert [placement.chunk(k) for k in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert placement.next(3, 0) == (3, 1)
    assert placement.next(0, 1) is None
    with pytest.raises(UserError, match="two model chunks per rank, got 3; set chunks to 2"):
        Placement(4, 3, PlacementKind.V)


def test_messages_of_a_v_run_both_ways_and_turn_in_memory() -> None:
    placement = Placement(2, 2, PlacementKind.V)
    down = Message(Channel(0, 1, Direction.FORWARD, wraps=False), 5, 1)
    assert placement.message(0, Action(Kind.SEND_FORWARD, 5, 0)) == down
    assert placement.message(1, Action(Kind.RECV_FORWARD, 5, 0)) == down
    up = Message(Channel(1, 0, Direction.FORWARD, wraps=False), 5, 3)
    assert placement.message(1, Action(Kind.SEND_FORWARD, 5, 1)) == up
    assert placement.message(0, Action(Kind.RECV_FORWARD, 5, 1)) == up
    gradient = Message(Channel(0, 1, Direction.BACKWARD, wraps=False), 5, 2)
    assert placement.message(0, Action(Kind.SEND_BACKWARD, 5, 1)) == gradient
    assert placement.message(1, Action(Kind.RECV_BACKWARD, 5, 1)) == gradient
    assert placement.message(1, Action(Kind.SEND_FORWARD, 5, 0)) is None
    assert placement.message(1, Action(Kind.RECV_FORWARD, 5, 1)) is None
    assert placement.message(1, Action(Kind.SEND_BACKWARD, 5, 1)) is None
    assert placement.message(1, Action(Kind.RECV_BACKWARD, 5, 0)) is None
    assert placement.source(1, Action(Kind.FORWARD, 5, 1)) == (1, 0)
    assert len(placement.channels()) == 4


def test_message_of_an_ordinary_and_of_a_wrapping_step() -> None:
    placement = Placement(2, 2)
    ordinary = Message(Channel(0, 1, Direction.FORWARD, wraps=False), 5, 1)
    assert placement.message(0, Action(Kind.SEND_FORWARD, 5, 0)) == ordinary
    assert placement.message(1, Action(Kind.RECV_FORWARD, 5, 0)) == ordinary
    wrapping = Message(Channel(1, 0, Direction.FORWARD, wraps=True), 5, 2)
    assert placement.message(1, Action(Kind.SEND_FORWARD, 5, 0)) == wrapping
    assert placement.message(0, Action(Kind.RECV_FORWARD, 5, 1)) == wrapping
    backward = Message(Channel(0, 1, Direction.BACKWARD, wraps=True), 5, 1)
    assert placement.message(0, Action(Kind.SEND_BACKWARD, 5, 1)) == backward
    assert placement.message(1, Action(Kind.RECV_BACKWARD, 5, 0)) == backward


def test_no_message_at_the_ends_of_the_model_or_within_a_rank() -> None:
    placement = Placement(2, 2)
    assert placement.message(0, Action(Kind.RECV_FORWARD, 0, 0)) is None
    assert placement.message(1, Action(Kind.SEND_FORWARD, 0, 1)) is None
    assert placement.message(0, Action(Kind.SEND_BACKWARD, 0, 0)) is None
    assert placement.message(1, Action(Kind.RECV_BACKWARD, 0, 1)) is None
    assert Placement(1, 2).message(0, Action(Kind.SEND_FORWARD, 0, 0)) is None


def test_source_is_upstream_of_the_data() -> None:
    placement = Placement(2, 2)
    assert placement.source(0, Action(Kind.FORWARD, 0, 1)) == (1, 0)
    assert placement.source(1, Action(Kind.BACKWARD, 0, 0)) == (0, 1)
    assert placement.source(0, Action(Kind.FORWARD, 0, 0)) is None
    assert placement.source(1, Action(Kind.BACKWARD, 0, 1)) is None


def test_channels_are_those_that_schedules_use() -> None:
    cases = [
        (1, 1, "1f1b"),
        (2, 1, "1f1b"),
        (5, 1, "1f1b"),
        (2, 3, "interleaved"),
        (4, 2, "interleaved"),
        (4, 2, "zb-v"),
    ]
    for stages, chunks, name in cases:
        made = schedule(name, stages, chunks, 2 * stages)
        used = {
            message.channel
            for rank, actions in enumerate(made.actions)
            for action in actions
            if not action.kind.is_compute and (message := made.placement.message(rank, action)) is not None
        }
        listed = made.placement.channels()
        assert len(listed) == len(set(listed)) and set(listed) == used
