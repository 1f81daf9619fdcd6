"""Splits against all splits there are, and the layout string."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megapt.errors import UserError
from megapt.parallel.pipeline.actions import Placement, PlacementKind
from megapt.parallel.pipeline.split import balance
from megapt.rules import parse_layout


def every_split(layers: int, stages: int) -> Iterator[list[int]]:
    for cuts in combinations(range(1, layers), stages - 1):
        places = [0, *cuts, layers]
        yield [end - start for start, end in zip(places, places[1:], strict=False)]


def stage_costs(counts: list[int], costs: list[int], first: int, last: int) -> list[int]:
    found, start = [], 0
    for count in counts:
        found.append(sum(costs[start : start + count]))
        start += count
    found[0] += first
    found[-1] += last
    return found


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_no_other_split_is_better(data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, 4))
    chunks = data.draw(st.integers(1, 2))
    kind = data.draw(st.sampled_from(PlacementKind)) if chunks == 2 else PlacementKind.LOOPING
    where = Placement(stages, chunks, kind)
    layers = data.draw(st.integers(stages * chunks, 10))
    equal = data.draw(st.booleans())
    costs = [3] * layers if equal else data.draw(st.lists(st.integers(0, 6), min_size=layers, max_size=layers))
    first, last = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 9))

    def figures(counts: list[int]) -> tuple[int, int]:
        """The most expensive virtual stage and the most expensive rank."""
        of_stage = stage_costs(counts, costs, first, last)
        of_rank = [sum(of_stage[where.virtual(rank, chunk)] for chunk in range(chunks)) for rank in range(stages)]
        return max(of_stage), max(of_rank)

    found = balance(costs, stages * chunks, first, last, where)
    assert sum(found) == layers and len(found) == stages * chunks and min(found) >= 1
    best = min(map(figures, every_split(layers, stages * chunks)))
    assert figures(found)[0] == best[0]
    if equal or chunks == 1:
        assert figures(found) == best
    assert figures(found)[1] <= figures(balance(costs, stages * chunks, first, last))[1]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(stages=st.integers(1, 4), layers=st.integers(4, 10), last=st.integers(0, 7), data=st.data())
def test_ties_go_to_the_even_then_to_the_later(stages: int, layers: int, last: int, data: st.DataObject) -> None:
    costs = data.draw(st.lists(st.integers(1, 4), min_size=layers, max_size=layers))

    def rank(counts: list[int]) -> tuple[int, int, list[int]]:
        of_stage = stage_costs(counts, costs, 0, last)
        return max(of_stage), sum(cost * cost for cost in of_stage), counts

    assert balance(costs, stages, 0, last) == min(every_split(layers, stages), key=rank)


def test_known_splits() -> None:
    assert balance([1.0] * 10, 4) == [2, 2, 3, 3]
    assert balance([1.0] * 32, 8, 0.0, 2.1) == [4, 4, 4, 4, 4, 5, 5, 2]


def test_a_rank_counts_all_its_virtual_stages() -> None:
    """Head and loss make stage 3 dear; its rank gets fewer layers in its other chunk too."""
    loop, v = Placement(2, 2), Placement(2, 2, PlacementKind.V)
    assert balance([1.0] * 13, 4, 0.0, 5.0) == [4, 4, 4, 1]
    assert balance([1.0] * 13, 4, 0.0, 5.0, loop) == [5, 3, 4, 1]
    assert balance([1.0] * 13, 4, 0.0, 5.0, v) == [3, 5, 4, 1]


def test_fractions_do_not_break_ties_by_rounding() -> None:
    assert balance([0.1] * 9, 3, 0.1, 0.1) == balance([1] * 9, 3, 1, 1) == [2, 4, 3]
    assert balance([1e-30] * 8, 4) == [2, 2, 2, 2]


@pytest.mark.parametrize("layers, stages", [(3, 4), (0, 1), (4, 0)])
def test_too_few_layers_are_refused(layers: int, stages: int) -> None:
    with pytest.raises(UserError, match=f"at least one layer, got {layers} layers for {stages} virtual stages"):
        balance([1.0] * layers, stages)


def test_layout_string() -> None:
    assert parse_layout("3,4*6,3", 30, 8) == [3, 4, 4, 4, 4, 4, 4, 3]
    assert parse_layout(" 2 , 1*2", 4, 3) == [2, 1, 1]
    assert parse_layout("7", 7, 1) == [7]


@pytest.mark.parametrize(
    "layout, message",
    [
        ("3,4*6,2", "has 8 stages with 29 layers"),
        ("3,4*7,3", "has more than 8 stages with"),
        ("15*2", "has 2 stages with 30 layers, the fewest 15; an even one: 3,3,4,4,4,4,4,4"),
        ("0,5*6,0", "the fewest 0"),
        ("4*0", "has 0 stages"),
        ("4*999999999999", "has more than 8 stages"),
        ("3,x", "got 'x' in '3,x'"),
        ("", "got '' in ''"),
        ("3,-4", "got '-4'"),
        ("3*", "got '3*'"),
    ],
)
def test_wrong_layouts_are_refused(layout: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_layout(layout, 30, 8)
    assert message in str(caught.value)
