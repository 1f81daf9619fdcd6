from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megapt.data.batches import BatchSchedule
from megapt.errors import UserError


def test_constant() -> None:
    schedule = BatchSchedule(12)
    assert [schedule.size(s) for s in (0, 1, 10**15)] == [12, 12, 12]
    assert schedule.first_sample(10**15) == 12 * 10**15
    assert schedule.sizes == (12,)


@settings(deadline=None, derandomize=True)
@given(start=st.integers(1, 20), increment=st.integers(1, 12), count=st.integers(1, 12),
       samples=st.integers(1, 800))
def test_ramp_equals_a_simulation(start: int, increment: int, count: int, samples: int) -> None:
    goal = start + increment * count
    schedule = BatchSchedule(goal, (start, increment, samples))
    consumed = 0
    seen = []
    for step in range(400):
        size = goal if consumed >= samples else start + increment * (consumed * count // samples)
        assert (schedule.size(step), schedule.first_sample(step)) == (size, consumed)
        seen.append(size)
        consumed += size
    assert set(seen) <= set(schedule.sizes)
    if goal in seen:
        assert tuple(dict.fromkeys(seen)) == schedule.sizes


def test_ramp_of_a_real_size() -> None:
    schedule = BatchSchedule(1536, (32, 32, 5_859_375))  # GPT-3 as Megatron ramps it
    assert schedule.sizes == tuple(range(32, 1537, 32))
    last = next(step for step in range(10**6) if schedule.size(step) == 1536)
    assert schedule.first_sample(last - 1) < 5_859_375 <= schedule.first_sample(last)
    assert schedule.first_sample(last + 10**12) == schedule.first_sample(last) + 1536 * 10**12


def test_increment_that_misses_names_the_nearest_that_do_not() -> None:
    with pytest.raises(UserError, match=r"4 by 6 .* 32 exactly \(28, then 34\); .* increment of 4 or 7 does"):
        BatchSchedule(32, (4, 6, 100))
    BatchSchedule(32, (4, 7, 100))


@pytest.mark.parametrize(("ramp", "message"), [
    ((32, 4, 100), "must start below"), ((4, 0, 100), "1 or more"), ((0, 4, 100), "1 or more"),
    ((4, 4, 0), "1 or more"),
])
def test_ramps_that_cannot_be(ramp: tuple[int, int, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        BatchSchedule(32, ramp)


def test_negative_questions() -> None:
    with pytest.raises(UserError, match="must be 1 or more"):
        BatchSchedule(0)
    for question in (BatchSchedule(4).size, BatchSchedule(4).first_sample):
        with pytest.raises(ValueError, match="counted from 0"):
            question(-1)
