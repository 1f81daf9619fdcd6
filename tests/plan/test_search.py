"""The search against working everything out, and every layout that it gives against the configuration's own rules."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from megapt.config import from_tree
from megapt.errors import UserError
from megapt.plan.bounds import Bounds
from megapt.plan.candidates import (
    POLICIES,
    Layout,
    Wanted,
    cells,
    divisors,
    sample_unit,
    schedules,
    sequence_choices,
    zero_stages,
)
from megapt.plan.hardware import load
from megapt.plan.search import Option, evaluate, room, search
from megapt.rules import check_world
from tests.plan.planning import config, gpu, loaded


def everything(made: Any, world: int, hardware: Any, limit: int) -> list[Option]:
    """Every legal layout with whole policies and native ZeRO that fits, worked out."""
    found = []
    for tp, pp, dp in cells(made, world):
        for micro in divisors(sample_unit(made) // dp):
            ways = schedules(made, pp, made.batch.global_samples // (dp * micro))
            zeros = [name for name in zero_stages(made, pp, None) if name.startswith("native")]
            for (name, chunks), zero, sequence, policy in product(
                list(ways), zeros, sequence_choices(made, tp, micro), POLICIES
            ):
                option = evaluate(made, Layout(tp, pp, dp, name, chunks, micro, zero, policy, sequence), hardware)
                if option.bytes <= limit:
                    found.append(option)
    return sorted(found, key=lambda option: option.seconds)


@pytest.mark.parametrize("gib", [80.0, 6.0])
def test_the_search_finds_what_working_everything_out_finds(gib: float) -> None:
    made = config({"layers": 4}, batch={"sequence": 2048, "samples": 8})
    hardware = gpu(gib)
    limit = room(hardware)
    all_of_them = everything(made, 4, hardware, limit)
    plan = search(made, 4, hardware, backend="native", top=5)
    # Mixes of policies, which the list of everything leaves out, can only be faster.
    assert plan.best.seconds <= all_of_them[0].seconds * (1 + 1e-12)
    whole = [option for option in plan.ranked if ":" not in option.layout.recompute]
    if gib == 80.0:
        assert [o.seconds for o in whole[:5]] == pytest.approx([o.seconds for o in all_of_them[:5]])
    for cell in {option.layout.cell for option in all_of_them}:
        best = min(option.seconds for option in all_of_them if option.layout.cell == cell)
        found = [option.seconds for option in plan.ranked if option.layout.cell == cell]
        assert best > 2 * plan.best.seconds or min(found) <= best * (1 + 1e-12)
    # Nothing beats the front in both, but for what saves less than a hundredth.
    for option in all_of_them:
        if option.seconds < 2 * plan.best.seconds:
            assert any(f.seconds <= option.seconds * (1 + 1e-12) and f.bytes <= 1.01 * option.bytes for f in plan.front)
    assert plan.timed < len(all_of_them)


def test_the_front_rises_in_neither() -> None:
    plan = search(config(), 8, gpu())
    assert plan.front[0] is plan.best and len(plan.front) > 3
    for before, after in zip(plan.front, plan.front[1:], strict=False):
        assert after.seconds > before.seconds and after.bytes < before.bytes


def test_memory_decides_what_is_recomputed() -> None:
    made = config(batch={"sequence": 2048, "samples": 64, "micro": 8})
    wide = search(made, 8, gpu(80), only=Wanted.parse("tp=1,pp=1,micro=8,zero=native-1"))
    assert wide.best.layout.recompute == "none"
    need = wide.best.bytes / 2**30
    tight = search(made, 8, gpu(need * 0.9), only=Wanted.parse("tp=1,pp=1,micro=8,zero=native-1"))
    policy, _, layers = tight.best.layout.recompute.partition(":")
    assert policy in ("selective", "full") and 1 <= int(layers) < 8
    assert tight.best.bytes <= room(tight.hardware) < wide.best.bytes
    # One layer less would not fit.
    if int(layers) > 1:
        fewer = Layout(**{**vars(tight.best.layout), "recompute": f"{policy}:{int(layers) - 1}"})
        assert evaluate(made, fewer, tight.hardware).bytes > room(tight.hardware)
    margin = search(made, 8, gpu(need * 1.02), margin=0.5)
    assert all(option.bytes <= need * 1.02 * 2**30 / 2 for option in margin.ranked)


def test_deepspeed_only_where_it_alone_can() -> None:
    made = config(batch={"sequence": 2048, "samples": 64})
    zeros = {option.layout.zero for option in search(made, 8, gpu()).ranked}
    assert zeros <= {"native-0", "native-1", "native-2", "deepspeed-3"}
    asked = {option.layout.zero for option in search(made, 8, gpu(), backend="deepspeed").ranked}
    assert asked and all(zero.startswith("deepspeed") for zero in asked)
    fp16 = config(precision="fp16")
    assert not any("deepspeed" in option.layout.zero for option in search(fp16, 8, gpu()).ranked)
    with pytest.raises(UserError, match="no legal layout of 8 ranks has zero.backend = deepspeed"):
        search(fp16, 8, gpu(), backend="deepspeed")


@st.composite
def problems(draw: st.DrawFn) -> tuple[Any, int, Any]:
    """A model that makes sense, a batch, a number of ranks and a cluster."""
    head = draw(st.sampled_from([32, 64, 128]))
    heads = draw(st.sampled_from([2, 6, 8, 12, 16]))
    kv = draw(st.sampled_from([k for k in (1, 2, 3, 4, 6, 8, heads) if heads % k == 0]))
    norm = draw(st.sampled_from(["rms_norm", "layer_norm"]))
    model = {
        "layers": draw(st.integers(1, 14)),
        "hidden": head * heads,
        "heads": heads,
        "kv_heads": kv,
        "ffn": draw(st.sampled_from([96, 512, 1024, 2816])),
        "vocabulary": draw(st.integers(100, 70000)),
        "max_sequence": 4096,
        "norm": norm,
        "gated": draw(st.booleans()),
        "tied_embeddings": draw(st.booleans()),
    }
    batch: dict[str, Any] = {"sequence": draw(st.sampled_from([128, 250, 1024]))}
    batch["samples"] = draw(st.integers(1, 96))
    if draw(st.booleans()):
        step = draw(st.sampled_from([1, 2, 4, 8]))
        batch["samples"] = step * draw(st.integers(2, 12))
        batch["ramp"] = {"start": step, "increment": step, "samples": 1000}
    sections: dict[str, Any] = {"precision": draw(st.sampled_from(["bf16", "fp32", "fp16"])), "batch": batch}
    sections["optimizer"] = {"kind": draw(st.sampled_from(["adamw", "muon"]))}
    if draw(st.booleans()):
        sections["recompute"] = {"policy": "full", "layers": 1}
    world = draw(st.integers(1, 48))
    name = draw(st.sampled_from(["h100", "a100-40", "mi300x", "cpu"]))
    hardware = load(name).what_if([f"memory={draw(st.sampled_from([0.05, 0.5, 4, 80]))}GiB"])
    return loaded(model, **sections).config, world, hardware


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(problems())
def test_every_layout_is_one_that_the_runtime_takes(problem: tuple[Any, int, Any]) -> None:
    made, world, hardware = problem
    try:
        plan = search(made, world, hardware, top=3)
    except UserError as error:
        assert "no layout of" in str(error) and not list(cells(made, world))
        return
    bounds = Bounds(made, hardware, cpu=hardware.gemm.units == 1)
    for option in plan.ranked:
        checked = from_tree(option.config.model_dump()).config
        assert check_world(checked, world) == option.layout.dp
        assert checked == option.config and Layout.of(checked, option.layout.dp) == option.layout
        assert option.bytes <= room(hardware)
        # What the search leaves out by.
        policy, _, most = option.layout.recompute.partition(":")
        least = bounds.seconds(option.layout, policy, int(most) if most else None)  # type: ignore[arg-type]
        assert least <= option.seconds * (1 + 1e-9)
        assert bounds.bytes(option.layout, policy, int(most) if most else None) <= option.bytes  # type: ignore[arg-type]
        assert bounds.least(option.layout) <= option.bytes
    for layout, size in plan.tight.values():
        assume(":" not in layout.recompute)
        layout.checked(made)
        assert evaluate(made, layout, hardware).bytes >= size
    for tp, pp in list(plan.tight)[:3]:  # what is said to fit nowhere fits nowhere
        assert not search(made, world, hardware, only=Wanted({"tp": tp, "pp": pp}), best_alone=True).ranked


def test_what_is_only_slow_is_not_said_not_to_fit() -> None:
    made = config({"kv_heads": 16, "layers": 4}, batch={"sequence": 2048, "samples": 512})
    slow = Wanted({"tp": 16, "pp": 1})
    hardware = gpu(4.0)
    plan = search(made, 16, hardware)
    assert search(made, 16, hardware, only=slow).ranked
    assert (16, 1) not in plan.tight and (16, 1) not in {option.layout.cell for option in plan.ranked}


@pytest.mark.parametrize(
    "text, message",
    [
        ("tp=0", "tp is a whole number from 1 on, not '0'"),
        ("tpp=4", "did you mean `tp`"),
        ("tp=4,tp=2", "`tp` is given twice"),
        ("schedule=fast", "legal: gpipe, 1f1b, interleaved, zb-h1, zb-v"),
        ("recompute=some", "none, selective, full, full:3 or budget:12.5"),
        ("zero=9", "a backend and a stage"),
        ("sequence=maybe", "sequence is on or off"),
        ("pp=", "needs a value"),
        ("", "no layout was given"),
    ],
)
def test_what_is_no_layout(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Wanted.parse(text)


def test_no_legal_layout_names_the_nearest() -> None:
    made = config(batch={"sequence": 2048, "samples": 6})
    with pytest.raises(UserError) as caught:
        search(made, 35, gpu())
    text = str(caught.value)
    assert "no layout of 35 ranks is legal" in text and "numbers of ranks that work: 32 or 36" in text
    assert "or a batch that more ranks divide: " in text
    with pytest.raises(UserError, match="the most that any layout of this batch takes: 768"):
        search(made, 100_000, gpu())
    assert list(cells(made, 16 * 8 * 6))
    with pytest.raises(UserError, match="no legal layout of 8 ranks has tp=3"):
        search(made, 8, gpu(), only=Wanted.parse("tp=3"))
    with pytest.raises(UserError, match="share of the memory"):
        search(made, 8, gpu(), margin=1.0)
