"""What a comparison must notice, on tables made by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from megapt.parameters import Shard
from megapt.prove.compare import SPREAD, UNIT, Family, assemble, measure, precisions_of
from megapt.prove.trainer import Piece, Report

SHAPE = (4, 3)
WHOLE = torch.arange(12, dtype=torch.float64).view(SHAPE) + 1
HALVES = [Shard((2, 3), 0, 0, 2), Shard((2, 3), 0, 2, 2)]
FP64 = precisions_of("fp64", "native", None)


def report(*shards: Shard, values: torch.Tensor = WHOLE) -> Report:
    pieces = []
    for shard in shards:
        local = torch.zeros(shard.shape, dtype=torch.float64)
        shard.valid(local).copy_(values[shard.slices()])
        pieces.append(Piece("weight", "w", SHAPE, shard, 0, local.flatten()))
    return Report(pieces)


def family() -> Family:
    exact = assemble([report(*HALVES)])
    return Family.of(exact, [{key: value.float().double() * (1 + 3e-7) for key, value in exact.items()}])


def test_pieces_make_the_whole_whatever_their_shards() -> None:
    padded = Shard((3, 3), 0, 3, 1)
    assert torch.equal(assemble([report(Shard((3, 3), 0, 0, 3), padded)])["weight", "w"], WHOLE)
    columns = [Shard((4, 2), 1, 0, 2), Shard((4, 2), 1, 2, 1)]
    assert torch.equal(assemble([report(c) for c in columns])["weight", "w"], WHOLE)


def test_fragments_are_placed_by_their_start() -> None:
    whole = report(*HALVES)
    first = whole.pieces[0]
    cut = [replace(first, values=first.values[:4]), replace(first, start=4, values=first.values[4:]), whole.pieces[1]]
    assert torch.equal(assemble([Report(cut)])["weight", "w"], WHOLE)


def test_a_bound_is_the_measured_rounding_in_units_of_the_precision() -> None:
    known = family()
    measured = 12 * 3e-7
    assert known.bound(("weight", "w"), "fp32") == pytest.approx(SPREAD * measured, rel=1e-2)
    ratio = known.bound(("weight", "w"), "fp64") / known.bound(("weight", "w"), "fp32")
    assert ratio == pytest.approx(math.sqrt(2) * UNIT["fp64"] / UNIT["fp32"])


def test_no_bound_is_below_one_rounding_of_the_result() -> None:
    exact = assemble([report(*HALVES)])
    assert Family.of(exact, [exact]).bound(("weight", "w"), "fp32") == SPREAD * UNIT["fp32"] * 12


def test_what_is_right_is_inside() -> None:
    found = measure([report(HALVES[0]), report(HALVES[1])], family(), FP64)
    assert found["weight"].error == 0 and found["weight"].inside


def test_a_wrong_copy_on_one_rank_shows() -> None:
    wrong = WHOLE.clone()
    wrong[1, 1] *= 1 + 1e-9
    found = measure([report(*HALVES), report(HALVES[0], values=wrong)], family(), FP64)
    assert not found["weight"].inside and found["weight"].ratio > 100


def test_a_missing_element_and_a_nan_are_infinitely_wrong() -> None:
    assert measure([report(HALVES[0])], family(), FP64)["weight"].error == math.inf
    bad = WHOLE.clone()
    bad[0, 0] = math.nan
    found = measure([report(*HALVES, values=bad)], family(), FP64)["weight"]
    assert found.error == math.inf and not found.inside


def test_a_value_that_no_rank_reports_is_wrong() -> None:
    known = family()
    known.table["loss", "step 0"] = torch.tensor(1.0, dtype=torch.float64)
    known.rounding["loss", "step 0"] = 1.0
    assert measure([report(*HALVES)], known, FP64)["loss"].error == math.inf


def test_deepspeed_is_exact_until_its_first_update() -> None:
    found = precisions_of("fp64", "deepspeed", None)
    assert found == {"first": "fp64", "norm": "fp32", "updated": "fp32", "resumed": "fp32"}
    assert precisions_of("fp64", "native", "deepspeed")["resumed"] == "fp32"
    assert set(precisions_of("fp64", "native", "native").values()) == {"fp64"}
