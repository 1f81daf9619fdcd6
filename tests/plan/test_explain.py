"""Why a layout loses: its rule, its memory, its seconds."""

from __future__ import annotations

import pytest

from megapt.plan.candidates import Wanted
from megapt.plan.explain import difference, explain
from megapt.plan.search import Plan, search
from megapt.plan.table import memory_items
from tests.plan.planning import config, gpu


@pytest.fixture(scope="module")
def plan() -> Plan:
    return search(config(), 8, gpu())


def test_seconds_add_up_and_name_the_largest(plan: Plan) -> None:
    found = explain(plan, Wanted.parse("tp=2,pp=4"))
    assert found.option is not None and found.option.layout.cell == (2, 4)
    *items, (last, here, best) = found.seconds
    assert last == "step" and (here, best) == (found.option.seconds, plan.best.seconds)
    assert sum(row[1] for row in items) == pytest.approx(here, rel=0.01)
    assert sum(row[2] for row in items) == pytest.approx(best, rel=0.01)
    worst = max(items, key=lambda row: row[1] - row[2])
    assert f": {worst[0]} +" in found.verdict and "It loses" in found.verdict
    assert found.bytes[-1] == ("all", float(found.option.bytes), float(plan.best.bytes))
    assert any(line.strip().startswith("tensor collectives") for line in found.lines())


def test_the_best_is_said_to_be_it(plan: Plan) -> None:
    layout = plan.best.layout
    found = explain(plan, Wanted.parse(f"tp={layout.tp},pp={layout.pp}"))
    assert "is the best layout" in found.verdict


@pytest.mark.parametrize(
    "text, message",
    [
        ("tp=3", "3 must divide model.heads = 16 and model.ffn = 4096"),
        ("pp=16", "8 layers cannot fill 16 stages; at most 8"),
        ("tp=4,pp=4", "the world of 8 ranks is not divisible by tensor x pipeline = 4 x 4 = 16"),
        ("micro=3,tp=1,pp=1", "64 samples is not divisible by micro-batch x data = 3 x 8 = 24"),
        ("pp=2,zero=native-2", "with a pipeline use stage 0 or 1"),
        ("zero=native-3,pp=1", "use zero.backend = deepspeed"),
        ("pp=2,schedule=zb-v,chunks=3", "3 chunks per rank; the zb-v schedule has 2"),
        ("pp=8,schedule=interleaved", "8 layers cannot fill 16 stages"),
        ("dp=3,pp=1,tp=1", "no legal layout of 8 ranks has dp=3"),
        ("recompute=selective:6,pp=4", "6 are more than one of 4 virtual stages of 8 layers can have; at most 5"),
    ],
)
def test_the_rule_that_is_broken(plan: Plan, text: str, message: str) -> None:
    found = explain(plan, Wanted.parse(text))
    assert "is not legal" in found.verdict and message in found.verdict and found.option is None


@pytest.mark.parametrize("text", ["chunks=2", "schedule=zb-v", "zero=deepspeed-2-offload", "recompute=selective:6"])
def test_values_that_the_best_layout_does_not_go_with_are_legal(plan: Plan, text: str) -> None:
    assert plan.best.layout.pp == 1  # which has neither chunks nor a schedule
    wanted = Wanted.parse(text)
    found = explain(plan, wanted)
    assert found.option is not None and wanted.allows(found.option.layout), found.verdict
    found.option.layout.checked(plan.config)


def test_the_fault_is_looked_for_in_what_was_given() -> None:
    plan = search(config({"layers": 7}), 7, gpu())  # no batch of 64 samples has 7 data-parallel ranks
    assert plan.best.layout.pp == 7
    assert "tensor x pipeline = 8 x 1 = 8" in explain(plan, Wanted.parse("tp=8")).verdict


def test_memory_that_lacks() -> None:
    plan = search(config(), 8, gpu(2.5))
    assert "not possible" in explain(plan, Wanted.parse("recompute=budget:0.0001")).verdict
    found = explain(plan, Wanted.parse("tp=1,pp=1,zero=native-0"))
    assert "does not fit" in found.verdict and found.option is not None
    assert found.option.layout.recompute == "full" and found.option.layout.micro == 1
    assert f"needs {found.option.bytes / 2**30:,.1f} GiB" in found.verdict
    first = found.verdict.rpartition(": ")[2].partition(" ")[0]
    items = memory_items(found.option.worst)
    assert items[first] == max(items.values())


def test_other_hardware(plan: Plan) -> None:
    changes = ["network=25Gb", "node.devices=2"]
    after = search(config(), 8, plan.hardware.what_if(changes))
    small = search(config(), 8, gpu(plan.best.bytes / 2**30))  # of which a margin stays free
    assert "the old layout does not fit there" in difference(plan, small, ["memory"])[1]
    lines = difference(plan, after, changes)
    change = after.best.time.tokens_per_second / plan.best.time.tokens_per_second - 1
    assert change < 0 and f"{change:+.1%} tokens/s" in lines[0]
