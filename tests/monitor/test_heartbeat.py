from __future__ import annotations

from dataclasses import replace

import pytest

from megapt.monitor.heartbeat import Heartbeat, Kind, Roster, State, Verdict
from megapt.operations import Blocked, Place


def describe(rank: int) -> str:
    return f"rank {rank}"


class Ranks:
    """Ranks whose heartbeats a test writes by hand, under a clock a test moves by hand."""

    def __init__(self, world: int, **times: float | None) -> None:
        limits: dict = {
            "interval": 5.0,
            "timeout": 30.0,
            "start_timeout": 300.0,
            "stall_timeout": None,
        } | times
        self.roster = Roster(range(world), describe, **limits)
        self.now = 1000.0
        self.counts = [0] * world
        self.positions = [(0, 0, "start")] * world
        self.states = [State.RUNNING] * world
        self.raw = [b""] * world
        self.places = [Place("")] * world

    def live(self, *ranks: int) -> None:
        for rank in ranks:
            self.counts[rank] += 1
            beats, step, phase = self.positions[rank]
            heartbeat = Heartbeat(
                self.counts[rank], beats, self.states[rank], step, phase, "node3", 40 + rank, self.places[rank]
            )
            self.raw[rank] = heartbeat.encode().encode()

    def beat(self, rank: int, step: int, phase: str) -> None:
        self.positions[rank] = (self.positions[rank][0] + 1, step, phase)

    def pass_time(self, seconds: float, *living: int, look: float = 5.0) -> Verdict | None:
        """Let ``living`` send and the observer look every ``look`` seconds; the first verdict ends it."""
        end = self.now + seconds
        while self.now < end:
            self.now += look
            self.live(*living)
            verdict = self.roster.observe(self.now, self.raw)
            if verdict is not None:
                return verdict
        return None


def test_living_ranks_are_left_alone_for_ever() -> None:
    ranks = Ranks(3)
    assert ranks.pass_time(10_000, 0, 1, 2) is None


def test_a_silent_rank_is_named_after_the_timeout_and_within_a_minute() -> None:
    ranks = Ranks(3)
    ranks.beat(1, 12, "backward")
    ranks.pass_time(20, 0, 1, 2)
    start = ranks.now
    verdict = ranks.pass_time(100, 0, 2)
    assert verdict is not None and verdict.kind is Kind.MISSING and verdict.ranks == (1,)
    assert 30 < ranks.now - start <= 40
    assert verdict.text.startswith(
        "rank 1 [process 41 on node3, last at step 12, phase 'backward'] has sent no"
    )


def test_ranks_of_one_host_that_die_together_are_named_together() -> None:
    ranks = Ranks(4)
    ranks.pass_time(20, 0, 1, 2, 3)
    ranks.pass_time(5, 0, 1, 2)  # rank 3 just missed this one, rank 2 just made it
    verdict = ranks.pass_time(100, 0, 1)
    assert verdict is not None and verdict.ranks == (2, 3)
    assert "have sent no heartbeat" in verdict.text


def test_many_missing_ranks_still_make_one_line() -> None:
    ranks = Ranks(100)
    ranks.pass_time(20, *range(100))
    verdict = ranks.pass_time(100, 0)
    assert verdict is not None and len(verdict.ranks) == 99
    assert "and 91 more have sent" in verdict.text and "\n" not in verdict.text


def test_a_rank_never_heard_of_gets_the_start_timeout() -> None:
    ranks = Ranks(2, start_timeout=100.0)
    assert ranks.pass_time(95, 0) is None
    verdict = ranks.pass_time(20, 0)
    assert verdict is not None and verdict.ranks == (1,)
    assert "rank 1 [never heard of]" in verdict.text


@pytest.mark.parametrize("state", [State.FINISHED, State.LEFT])
def test_a_rank_that_ended_may_be_silent(state: State) -> None:
    ranks = Ranks(2)
    ranks.states[1] = state
    ranks.live(1)
    assert ranks.pass_time(1000, 0) is None
    assert not ranks.roster.all_done()
    assert ranks.roster.all_done(besides=(0,))


def test_an_observer_that_slept_accuses_nobody_when_it_wakes() -> None:
    ranks = Ranks(2)
    ranks.pass_time(20, 0, 1)
    ranks.now += 3600
    # The first looks after an hour of sleep still see what stood there before.
    assert ranks.roster.observe(ranks.now, ranks.raw) is None
    assert ranks.pass_time(100, 0, 1) is None


def test_a_stall_names_the_lowest_step_rarest_phase_first() -> None:
    ranks = Ranks(4, stall_timeout=60.0)
    for rank, (step, phase) in enumerate([(8, "backward"), (7, "forward"), (7, "data"), (7, "forward")]):
        ranks.beat(rank, step, phase)
    ranks.pass_time(5, 0, 1, 2, 3)
    start = ranks.now
    verdict = ranks.pass_time(1000, 0, 1, 2, 3)
    assert verdict is not None and verdict.kind is Kind.STALLED and verdict.ranks == (1, 2, 3)
    assert 60 < ranks.now - start <= 70
    assert "lowest step is 7, in phase 'data': rank 2; in phase 'forward': rank 1, rank 3." in verdict.text


def test_a_stall_names_the_rank_that_the_others_wait_for_and_its_process() -> None:
    ranks = Ranks(3, stall_timeout=60.0)
    waiting = Blocked("tp ranks 0, 1, 2", 4, "all-reduce", "[8] float32")
    ranks.places = [Place("forward of micro-batch 2", issued={"tp ranks 0, 1, 2": 4}, blocked=waiting)] * 3
    ranks.places[1] = Place("forward of micro-batch 1", issued={"tp ranks 0, 1, 2": 3})
    for rank in range(3):
        ranks.beat(rank, 7, "training")
    verdict = ranks.pass_time(1000, 0, 1, 2)
    assert verdict is not None and verdict.ranks == (1,) and "\n" not in verdict.text
    assert "the lowest step is 7. MISSING: rank 1, in forward of micro-batch 1." in verdict.text
    assert "Look first at the log of rank 1 [process 41 on node3, last at step 7, phase 'training']" in verdict.text


def test_ranks_that_wait_for_nobody_are_told_apart_by_what_they_do() -> None:
    ranks = Ranks(3, stall_timeout=60.0)
    ranks.places = [Place("optimizer step"), Place("forward of micro-batch 1"), Place("optimizer step")]
    for rank in range(3):
        ranks.beat(rank, 7, "training")
    verdict = ranks.pass_time(1000, 0, 1, 2)
    assert verdict is not None
    assert "in phase 'training' (forward of micro-batch 1): rank 1; in phase 'training' (opt" in verdict.text
    assert "(optimizer step): rank 0, rank 2. Every rank's log" in verdict.text


def test_any_rank_that_gets_on_puts_a_stall_off() -> None:
    ranks = Ranks(2, stall_timeout=60.0)
    for step in range(20):
        ranks.beat(1, step, "forward")
        assert ranks.pass_time(40, 0, 1) is None


def test_a_stall_needs_everybody_to_have_started_and_somebody_to_run() -> None:
    ranks = Ranks(2, stall_timeout=60.0)
    assert ranks.pass_time(200, 0) is None
    ranks.states = [State.CLOSING, State.FINISHED]
    assert ranks.pass_time(500, 0, 1) is None


def test_heartbeats_and_verdicts_come_back_as_they_went() -> None:
    heartbeat = Heartbeat(3, 2, State.CLOSING, 10**7, 'a "phase", | odd', "nöde", 77)
    blocked = Blocked("tp ranks 0, 1", 7, "all-gather", "[2] float32")
    stuck = replace(heartbeat, place=Place("backward", "send", 5, 9, "receive", {"tp ranks 0, 1": 7}, blocked))
    assert Heartbeat.decode(stuck.encode().encode()) == stuck
    assert Heartbeat.decode(heartbeat.encode().encode()) == heartbeat
    verdict = Verdict(Kind.FAILED, (3, 5), "two\nlines")
    assert Verdict.decode(verdict.encode().encode()) == verdict
