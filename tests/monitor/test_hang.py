"""Who keeps a stuck world waiting, told from where its ranks are, and how it is said."""

from __future__ import annotations

from typing import Any

from megapt.monitor.hang import diagnose, explain
from megapt.operations import Blocked, Place

PAIR, CHANNEL = "tp ranks 0, 1", "channel backward 1->0, ranks 1, 2, 2 to 1"


def describe(rank: int) -> str:
    return f"rank {rank} (pp {rank // 2}, dp 0, tp {rank % 2})"


def place(
    issued: dict[str, int], blocked: Blocked | None = None, action: str = "backward of micro-batch 1", **more: Any
) -> Place:
    return Place(action, issued=issued, blocked=blocked, **more)


def collective(queue: str, number: int) -> Blocked:
    return Blocked(queue, number, "all-reduce", "[8] float32")


def test_the_rank_that_did_not_join_a_collective_is_missing() -> None:
    places = {0: place({PAIR: 7}, collective(PAIR, 7)), 1: place({PAIR: 6}, action="forward of micro-batch 2")}
    assert diagnose(places).missing == [1]
    ranks, text = explain(places, describe)
    assert ranks == [1]
    assert text == (
        "MISSING: rank 1 (pp 0, dp 0, tp 1), in forward of micro-batch 2. It has not issued all-reduce of [8] float32 "
        "over tp ranks 0, 1, for which rank 0 (pp 0, dp 0, tp 0) waits in backward of micro-batch 1."
    )


def test_waiting_is_followed_to_its_root() -> None:
    """Rank 0 waits for 1 in a collective, 1 for a message of 2, 2 for 3 in a collective; 3 waits for nobody."""
    receive = Blocked(CHANNEL, 3, "receive", "gradient of micro-batch 1 for stage 0 ([8] float32)", 2)
    places = {
        0: place({PAIR: 4}, collective(PAIR, 4)),
        1: place({PAIR: 3, CHANNEL: 4}, receive),
        2: place({"tp ranks 2, 3": 9, CHANNEL: 2}, collective("tp ranks 2, 3", 9)),
        3: place({"tp ranks 2, 3": 8}, operation="send of [8] to rank 2", index=5, of=9, next="all-reduce of that"),
    }
    assert diagnose(places).waits == {0: {1}, 1: {2}, 2: {3}}
    ranks, text = explain(places, describe)
    assert ranks == [3]
    assert (
        "Its last operation, 5 of 9 in this step, was send of [8] to rank 2. Next it would issue all-reduce of " in text
    )
    assert "Held up by these in turn: rank 0 (pp 0, dp 0, tp 0) in backward of micro-batch 1, waiting in all-" in text
    assert "waiting in receive of gradient of micro-batch 1 for stage 0 ([8] float32) from rank 2." in text
    del places[3]  # and rank 2 sleeps
    places[2] = place({CHANNEL: 2}, action="backward of micro-batch 0")
    assert (
        "It has not issued send of gradient of micro-batch 1 for stage 0 ([8] float32) to rank 1, for which rank 1"
        in (explain(places, describe)[1])
    )


def test_operations_issued_early_accuse_nobody() -> None:
    """The sleeper has a reduction under way that another has not come to: it does not wait there."""
    sleeper = place({PAIR: 3, "dp ranks 1, 3": 5})
    places = {0: place({PAIR: 4}, collective(PAIR, 4)), 1: sleeper, 3: place({"dp ranks 1, 3": 4, CHANNEL: 9})}
    assert diagnose(places).missing == [1]
    # Nor does one who waits for what others have issued since.
    places[3] = place({"dp ranks 1, 3": 5}, collective("dp ranks 1, 3", 5))
    assert diagnose(places).missing == [1]


def test_a_send_that_is_not_taken_accuses_its_receiver() -> None:
    waiting = Blocked(CHANNEL, 4, "send", "[8] float32", 1)
    places = {1: place({CHANNEL: 3}), 2: place({CHANNEL: 4}, waiting)}
    ranks, text = explain(places, describe)
    assert ranks == [1] and "It has not issued receive of [8] float32 from rank 2, for which rank 2" in text


def test_where_no_host_waits_the_one_that_is_behind_is_missing() -> None:
    """On a GPU the host runs ahead of the device."""
    places = {0: place({PAIR: 9, "the world": 2}), 1: place({PAIR: 6, "the world": 1}), 2: place({"the world": 2})}
    ranks, text = explain(places, describe)
    assert ranks == [1]
    assert "It has not issued operation 7 over tp ranks 0, 1, for which rank 0 (pp 0, dp 0, tp 0) waits" in text
    assert "It has not issued operation 2 over the world, for which rank 2 (pp 1, dp 0, tp 0) waits" in text


def test_a_circle_is_followed_round() -> None:
    places = {
        0: place({"a": 1, "b": 0}, collective("a", 1)),
        1: place({"a": 0, "b": 1}, collective("b", 1)),
        2: place({"a": 1, "b": 1}, collective("a", 1)),
    }
    assert diagnose(places).circle == [0, 1]
    ranks, text = explain(places, describe)
    assert ranks == [0, 1]
    assert text.startswith("Ranks wait for each other in a circle: rank 0 (pp 0, dp 0, tp 0) in backward of micro-")


def test_all_have_come_and_the_network_has_not_carried_it_out() -> None:
    ranks, text = explain({rank: place({PAIR: 4}, collective(PAIR, 4)) for rank in (0, 1)}, describe)
    assert ranks == [0, 1] and "look at the network and the devices" in text


def test_where_nothing_is_on_record_nothing_is_said() -> None:
    assert explain({0: place({PAIR: 4}), 1: place({PAIR: 4})}, describe) == ([], "")
    assert explain({}, describe) == ([], "")


def test_a_thousand_ranks_are_a_few_sentences() -> None:
    world = "the world"
    for sleepers in (1, 500):
        places = {rank: place({world: 5}, collective(world, 5)) for rank in range(1024)}
        places |= {rank: place({world: 4}, action="between steps") for rank in range(sleepers)}
        ranks, text = explain(places, describe)
        assert ranks == list(range(sleepers)) and len(text) < 1500
        assert f"for which ranks {sleepers}, {sleepers + 1}, " in text
        assert f"and {1024 - sleepers - 8} more wait" in text
        assert ("Missing as well: ranks 3, 4, 5, 6, 7, 8, 9, 10 and 489 more." in text) == (sleepers == 500)
    circle = {r: place({str(r): 1, str((r + 1) % 1024): 0}, collective(str(r), 1)) for r in range(1024)}
    ranks, text = explain(circle, describe)
    assert len(ranks) == 1024 and len(text) < 1500 and text.endswith("and 1016 more.")
