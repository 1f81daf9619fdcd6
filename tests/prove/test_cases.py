"""The matrix covers what it says, and every checkpoint is read in another layout."""

from __future__ import annotations

import random
from itertools import combinations

import pytest

from megapt.prove.cases import AXES, SLOW, Case, Matrix, coverage
from megapt.prove.job import family_of, one_process, plan
from megapt.prove.layout import Layout
from megapt.prove.small import built_in

SHAPES = built_in()


@pytest.fixture(scope="module")
def quick() -> list[Case]:
    return Matrix(SHAPES, 8, "fp64").quick()


@pytest.fixture(scope="module")
def full() -> list[Case]:
    return Matrix(SHAPES, 8, "fp64").full()


def test_quick_covers_every_pair_that_any_legal_layout_has(quick: list[Case]) -> None:
    matrix = Matrix(SHAPES, 8, "fp64")
    assert len(quick) < 60 and all(matrix.legal(case) for case in quick)
    covered = set().union(*(case.pairs() for case in quick))
    chooser = random.Random(7)
    legal = 0
    for _ in range(20_000):
        values = {axis: chooser.choice(choices) for axis, choices in (AXES | SLOW).items()}
        case = Case(chooser.choice(SHAPES), Layout(**values))
        if matrix.legal(case):
            legal += 1
            assert {pair for pair in case.pairs() if matrix.wants(pair)} <= covered, case
    assert legal > 500


def test_every_value_occurs(quick: list[Case], full: list[Case]) -> None:
    for cases, axes in ((quick, AXES | SLOW), (full, AXES)):
        values, pairs = coverage(cases, axes)
        assert values == {axis: sorted(choices, key=str) for axis, choices in axes.items()}
        assert pairs > 300


def test_brief_shapes_meet_what_a_layer_can_tell_apart(quick: list[Case]) -> None:
    for shape in SHAPES:
        cases = [case for case in quick if case.shape == shape]
        assert {case.layout.recompute for case in cases} == set(AXES["recompute"])
        assert {(case.layout.tp > 1, case.layout.sequence) for case in cases} >= {(True, True), (True, False)}
        assert any(case.layout.tp > 2 and case.layout.sequence for case in cases), "ranks share key/value heads"
        if shape.brief:
            assert len({family_of(case) for case in cases}) == 1, "one reference is enough"
    assert {shape.name for shape in SHAPES if not shape.brief} == {"llama", "gpt2"}


def test_full_holds_the_product_of_the_main_axes(full: list[Case]) -> None:
    have = {(c.shape.name, c.layout.tp, c.layout.pp, c.layout.dp, c.layout.schedule, c.layout.zero) for c in full}
    for shape, zero in (("llama", "native-1"), ("gpt2", "deepspeed-1")):
        for schedule in AXES["schedule"]:
            assert (shape, 2, 2, 1, schedule, zero) in have
    assert len(set(full)) == len(full)


def test_the_matrix_is_the_same_every_time(quick: list[Case]) -> None:
    assert list(map(str, quick)) == list(map(str, Matrix(SHAPES, 8, "fp64").quick()))


def test_fewer_ranks_and_no_compiler_leave_out_what_they_cannot_run() -> None:
    cases = Matrix(SHAPES, 2, "fp64", compiler=False).full()
    assert {c.layout.world for c in cases} == {1, 2} and not any(c.layout.compile for c in cases)


def test_every_checkpoint_is_read_by_another_layout(quick: list[Case]) -> None:
    planned = plan(quick)
    read = [one.resumes for one in planned if one.resumes is not None]
    assert sorted(map(str, read)) == sorted(map(str, quick))
    seen: set[Case] = set()
    for one in planned:
        assert one.resumes is None or (one.resumes in seen and one.resumes != one.case)
        if one.resumes is not None:
            assert one_process(one.resumes) == one_process(one.case)
        seen.add(one.case)
    worlds = [one.case.layout.world for one in planned[: len(quick)]]
    assert worlds == sorted(worlds)  # ranks are started once per world size


def test_pairs_are_of_different_axes() -> None:
    case = Case(SHAPES[0], Layout())
    assert len(case.pairs()) == len(list(combinations(["shape", *AXES], 2)))
