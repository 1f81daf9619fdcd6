"""The clock against closed formulas, against a recursion without lists, and against each rule of the model."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megapt.parallel.pipeline.actions import Action, Kind
from megapt.parallel.pipeline.check import check
from megapt.parallel.pipeline.schedules import Schedule, schedule
from megapt.parallel.pipeline.simulate import Costs, Simulation, simulate

TIMES = [(1, 1, 1), (1, 1.25, 0.75), (2, 3, 1)]  # F, I, W
SIZES = [(p, m) for p in (1, 2, 3, 4, 7) for m in (p, p + 1, 2 * p - 1, 2 * p, 3 * p)]


def run(name: str, stages: int, chunks: int, micro_batches: int, *times: float, **more: Any) -> Simulation:
    return simulate(schedule(name, stages, chunks, micro_batches), Costs.even(stages, chunks, *times, **more))


@pytest.mark.parametrize("f, i, w", TIMES)
@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_bubble_of_gpipe_and_1f1b_is_p_minus_1_over_m(name: str, f: float, i: float, w: float) -> None:
    for p, m in [*SIZES, (4, 1), (4, 2), (8, 3)]:
        found = run(name, p, 1, m, f, i, w).timeline
        assert found.bubble == pytest.approx((p - 1) / m)
        assert found.step == pytest.approx((m + p - 1) * (f + i + w))
        assert found.span_bubble == pytest.approx(found.bubble)
        assert found.rank_bubbles == pytest.approx([(p - 1) / m] * p)


@pytest.mark.parametrize("f, i, w", TIMES)
@pytest.mark.parametrize("v", [1, 2, 3, 4])
def test_bubble_of_interleaved_is_p_minus_1_over_v_m(v: int, f: float, i: float, w: float) -> None:
    for p in (1, 2, 3, 4, 8):
        for m in (p, 2 * p, 4 * p):
            assert run("interleaved", p, v, m, f, i, w).timeline.bubble == pytest.approx((p - 1) / (v * m))


@pytest.mark.parametrize("f, i, w", TIMES)
def test_bubble_of_zb_h1_is_that_of_the_paper_where_w_is_the_shortest(f: float, i: float, w: float) -> None:
    for p, m in SIZES:
        found = run("zb-h1", p, 1, m, f, i, w).timeline
        assert found.step - m * (f + i + w) == pytest.approx((p - 1) * (f + i - w), abs=1e-9)
        assert found.span_bubble == pytest.approx(found.bubble)


def test_zb_v_has_no_bubble_where_all_kinds_take_equal_time() -> None:
    for p, m in SIZES:
        found = run("zb-v", p, 2, m).timeline
        if m >= 2 * p - 1:
            assert found.span_bubble == pytest.approx(0, abs=1e-9)
            # The ranks begin one forward of a chunk apart.
            assert found.step == pytest.approx(3 * m + (p - 1) / 2)
        assert found.step <= run("zb-h1", p, 1, m).timeline.step + 1e-9


@pytest.mark.parametrize("f, i, w", [(1, 1.25, 0.75), (1, 0.9, 1.1), (1, 1, 2), (3, 1, 1)])
def test_no_zero_bubble_schedule_is_slower_than_1f1b(f: float, i: float, w: float) -> None:
    for p, m in [*SIZES, (4, 1), (4, 2), (8, 3)]:
        plain = run("1f1b", p, 1, m, f, i, w).timeline.step
        assert run("zb-h1", p, 1, m, f, i, w).timeline.step <= plain + 1e-9
        assert run("zb-v", p, 2, m, f, i, w).timeline.step <= plain + 1e-9


def test_peak_bytes() -> None:
    held = {"activation_bytes": 8.0, "weight_share": 0.75}
    assert run("gpipe", 4, 1, 8, **held).peak_bytes == [64.0] * 4
    assert run("1f1b", 4, 1, 8, **held).peak_bytes == [32.0, 24.0, 16.0, 8.0]
    assert run("interleaved", 4, 2, 8, **held).peak_bytes == [44.0, 36.0, 28.0, 20.0]
    # arXiv 2401.10241: (p - r) whole ones and r that wait for W.
    assert run("zb-h1", 4, 1, 8, **held).peak_bytes == [32.0, 30.0, 28.0, 26.0]
    assert run("zb-v", 4, 2, 8, **held).peak_bytes == [32.0] * 4
    assert run("forward", 4, 1, 8, **held).peak_bytes == [0.0] * 4


def test_a_hop_takes_its_time_once_each_way_where_it_hides_behind_compute() -> None:
    for p in (2, 4):
        found = run("gpipe", p, 1, 8, 1, 1, 1, transfer=0.5).timeline
        assert found.step == pytest.approx((8 + p - 1) * 3 + 2 * (p - 1) * 0.5)


def test_a_channel_carries_one_tensor_at_a_time() -> None:
    found = run("forward", 2, 1, 5, 1, transfer=3).timeline
    assert [span.start for span in found.ranks[1]] == [4, 7, 10, 13, 16]
    assert [span.start for span in found.ranks[0]] == [0, 1, 2, 3, 4]


def test_a_transfer_begins_when_its_receive_is_posted() -> None:
    """Rank 1 posts the receive of micro-batch 1 as it begins forward 0, which is long."""
    made = schedule("forward", 2, 1, 3)
    costs = Costs([1, 10], [0, 0], [0, 0], transfer=2)
    late = simulate(made, costs).timeline
    assert [span.start for span in late.ranks[1]] == [3, 13, 23]
    early = [action for action in made.actions[1] if action.kind.is_recv]
    posted = [made.actions[0], [*early, *(a for a in made.actions[1] if not a.kind.is_recv)]]
    assert simulate(Schedule("early", made.placement, 3, posted, False), costs).timeline == late
    # One whose receive is posted only when it is needed waits for the whole transfer.
    needed = [
        action for compute in (a for a in made.actions[1] if a.kind.is_compute) for action in (compute.recv(), compute)
    ]
    slow = simulate(Schedule("late", made.placement, 3, [made.actions[0], needed], False), costs).timeline
    assert [span.start for span in slow.ranks[1]] == [3, 15, 27]


def starts_and_ends(made: Schedule, costs: Costs) -> dict[tuple[int, Action], tuple[float, float]]:
    """The earliest times by recursion over dependencies; transfers take no time."""
    placement = made.placement
    compute = [[a for a in actions if a.kind.is_compute] for actions in made.actions]
    index = {(rank, action): n for rank, order in enumerate(compute) for n, action in enumerate(order)}

    def needs(rank: int, action: Action) -> Iterator[tuple[int, Action]]:
        place = index[rank, action]
        if place:
            yield rank, compute[rank][place - 1]
        source = placement.source(rank, action)
        if source is not None:
            kinds = [Kind.FORWARD] if action.kind is Kind.FORWARD else [Kind.BACKWARD, Kind.BACKWARD_INPUT]
            made_by = [(source[0], Action(kind, action.micro_batch, source[1])) for kind in kinds]
            yield from (producer for producer in made_by if producer in index)

    @cache
    def end(rank: int, action: Action) -> float:
        return start(rank, action) + costs.seconds(action.kind, placement.virtual(rank, action.chunk))

    @cache
    def start(rank: int, action: Action) -> float:
        return max((end(*needed) for needed in needs(rank, action)), default=0.0)

    return {key: (start(*key), end(*key)) for key in index}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_schedule_runs_as_early_as_its_order_allows(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["gpipe", "1f1b", "interleaved", "zb-h1", "zb-v", "forward"]))
    p = data.draw(st.integers(1, 5))
    v = {"interleaved": data.draw(st.integers(1, 3)), "zb-v": 2}.get(name, 1)
    m = p * data.draw(st.integers(1, 3)) if name == "interleaved" else data.draw(st.integers(1, 12))
    per_stage = st.lists(st.integers(1, 9), min_size=p * v, max_size=p * v)
    costs = Costs(data.draw(per_stage), data.draw(per_stage), data.draw(per_stage))
    made = schedule(name, p, v, m)
    check(made, outstanding=1)
    found = simulate(made, costs).timeline
    spans = {(rank, s.action): (s.start, s.end) for rank, row in enumerate(found.ranks) for s in row}
    assert spans == starts_and_ends(made, costs)
    whole = [f + i + w for f, i, w in zip(costs.forward, costs.backward_input, costs.backward_weight, strict=True)]
    if made.has_backward:
        assert sum(found.busy) == m * sum(whole)
        assert found.step >= max(found.busy) and found.bubble >= found.span_bubble
    slower = Costs(costs.forward, costs.backward_input, costs.backward_weight, transfer=2.0)
    assert simulate(made, slower).timeline.step >= found.step


def test_measured_costs_reproduce_the_timeline_they_come_from() -> None:
    costs = Costs([1, 2, 3, 4], [2, 2, 1, 5], [1, 1, 2, 2])
    for name in ("zb-v", "interleaved"):
        made = schedule(name, 2, 2, 6)
        first = simulate(made, costs).timeline
        assert simulate(made, Costs.measured(first, made.placement)).timeline == first


def test_costs_must_fit_the_schedule() -> None:
    with pytest.raises(AssertionError, match="4 virtual stages need a cost each, got 2"):
        simulate(schedule("interleaved", 2, 2, 4), Costs.even(2, 1))
