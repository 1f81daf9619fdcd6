"""Who keeps a stuck world waiting, told from where its ranks are."""

from __future__ import annotations

import torch

from megapt.operations import Operations, Place, diagnose


def place(**values: object) -> Place:
    return Place(action="B1.0", **values)  # type: ignore[arg-type]


def test_the_rank_that_did_not_join_a_collective_is_missing() -> None:
    places = {
        0: place(operation="all-reduce over tp 0, 1", issued={"tp 0, 1": 7}),
        1: place(operation="all-gather over tp 0, 1", issued={"tp 0, 1": 6}),
    }
    missing, lines = diagnose(places)
    assert missing == [1]
    assert lines == ["rank 1 is not in all-reduce over tp 0, 1, where rank 0 is waiting"]


def test_waiting_is_followed_to_its_root() -> None:
    """Rank 0 waits for 1 in a collective, 1 for a message of 2, 2 for 3 in a collective; 3 waits for nobody."""
    places = {
        0: place(operation="all-reduce", issued={"tp 0, 1": 4}),
        1: place(operation="waiting for B1.0 from rank 2", issued={"tp 0, 1": 3, "channel 2-1": 2}, waits_for=2),
        2: place(operation="reduce-scatter", issued={"tp 2, 3": 9, "channel 2-1": 1}),
        3: place(operation="send", issued={"tp 2, 3": 8}),
    }
    missing, lines = diagnose(places)
    assert missing == [3]
    assert len(lines) == 3 and "rank 1 waiting for B1.0 from rank 2 in B1.0" in lines


def test_a_receive_posted_early_accuses_nobody() -> None:
    places = {0: place(issued={"channel 0-1": 1}), 1: place(issued={"channel 0-1": 3})}
    assert diagnose(places) == ([0, 1], [])


def test_a_circle_has_no_root_and_names_all() -> None:
    places = {0: place(waits_for=1), 1: place(waits_for=0)}
    missing, lines = diagnose(places)
    assert missing == [0, 1] and len(lines) == 2


def test_a_step_is_the_script_of_the_next() -> None:
    record, tensor = Operations(), torch.zeros(2, 3)
    record.begin_step()
    record.action = "F0.0"
    record.note("all-reduce", None, tensor)
    record.note("send", None, tensor, peer=4)
    record.begin_step()
    record.note("all-reduce", None, tensor)
    here = record.place()
    assert (here.index, here.of, here.issued) == (1, 2, {"world": 3})
    assert here.operation == "all-reduce over world of [2, 3] in F0.0"
    assert here.next == "send rank 4 of [2, 3] in F0.0"
    seen = []
    record.wait(lambda: seen.append(record.place()), 2, "F1.0")
    assert seen[0].waits_for == 2 and seen[0].operation == "waiting for F1.0 from rank 2"
    assert record.place().waits_for is None
