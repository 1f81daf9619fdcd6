"""Silent bugs are caught by the proof, by a wide margin, and named by `--why`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from megapt.prove.cases import Case
from megapt.prove.compare import measure, precisions_of
from megapt.prove.job import Prover, family_of
from megapt.prove.layout import Layout
from megapt.prove.ranks import Ranks
from megapt.prove.small import built_in
from megapt.prove.trainer import Job, run
from megapt.prove.why import explain
from tests.prove import bugs

LLAMA, GPT2 = built_in()[:2]

# bug, model, layout in which it shows, the first operation that differs, its cause
BUGS = [
    ("dropped_all_reduce", LLAMA, "tp=2,sequence=off", "layers.1.attention.out", "missing reduction over tp"),
    ("dropped_all_reduce", GPT2, "tp=2", "layers.1.attention.out", "missing reduction over tp"),
    ("dropped_backward_reduce", LLAMA, "tp=2", "gradient of layers.3.mlp_norm", "missing reduction over tp"),
    ("averaged_over_dp", LLAMA, "dp=2", "reduction over dp: gradient of", "averaged over dp"),
    ("tied_gradient_not_summed", GPT2, "pp=2", "finalize: gradient of embedding.weight", "tied copy head.weight"),
    ("tied_weight_not_shared", GPT2, "pp=2", "weights in use: embedding.weight", "copies differ"),
    ("local_loss_scale", LLAMA, "dp=2", "gradient of loss", "divided by each rank's own tokens"),
    ("unmasked_padding", GPT2, "tp=2", "loss", "padded vocabulary takes part"),
    ("sequence_parts_not_summed", LLAMA, "tp=2", "finalize: gradient of norm.weight", "missing sum over tp"),
    ("norm_counts_twice", LLAMA, "tp=2", "norm", "norm.weight is counted twice"),
    ("weight_part_twice", LLAMA, "pp=2,schedule=zb-h1,zero=deepspeed-1", "gradient of layers.", "ran 5 times for 4"),
    ("weight_part_left_out", LLAMA, "pp=2,schedule=zb-h1", "gradient of layers.", "ran 3 times for 4"),
]


@pytest.fixture(scope="module")
def ranks() -> Iterator[dict[int, Ranks]]:
    with Ranks(1) as one, Ranks(2) as two:
        yield {1: one, 2: two}


@pytest.fixture(scope="module")
def prover(ranks: dict[int, Ranks]) -> Iterator[Prover]:
    with Prover("fp64", print) as prover:
        for shape in (LLAMA, GPT2):
            prover.prepare(ranks[1], Case(shape, Layout()))
        yield prover


@pytest.mark.parametrize(("bug", "shape", "layout", "operation", "cause"), BUGS)
def test_a_bug_is_caught_and_named(
    bug: str, shape: Any, layout: str, operation: str, cause: str, ranks: dict[int, Ranks], prover: Prover
) -> None:
    case = Case(shape, Layout.parse(layout))
    reports = ranks[2].run(bugs.plant, bug, run, Job(case.config("fp64"), 2))
    found = measure(reports, prover.families[family_of(case)], precisions_of("fp64", "native", None))
    assert max(worst.ratio for worst in found.values()) > 1e6

    def start(world: int, function: Any, *args: Any) -> list[Any]:
        if world == 1:
            return ranks[1].run(function, *args)
        return ranks[world].run(bugs.plant, bug, function, *args)

    explanation = explain(Case(shape, Layout()), case, "fp64", print, start)
    lines = list(explanation.lines())
    print("\n".join(lines))
    assert explanation.first is not None
    assert explanation.first.title.startswith(operation), lines
    assert any(cause in line for line in lines if line.strip().startswith("cause")), lines
