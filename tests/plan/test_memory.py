"""The memory estimate, by item, against the dry run of the real program, and what must hold of it for any layout."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from megapt.config import Config, from_tree
from megapt.errors import UserError
from megapt.plan.dry_run import dry_run
from megapt.plan.levels import levels
from megapt.plan.measure import layout
from megapt.plan.memory import (
    CONTEXT_BYTES,
    FRAGMENTATION,
    ITEMS,
    layer_activations,
    stage_memory,
)
from megapt.plan.passes import chunk_pass
from megapt.plan.working import ITEMS as HELD
from megapt.plan.working import Place
from megapt.rules import check_world

LLAMA: dict[str, Any] = layout()["model"]
GEMMA = {"norm_placement": "both", "norm_offset": True, "attention_softcap": 30.0, "window": 48, "window_pattern": 2}
OLMO = {"norm_placement": "after", "qk_norm": "whole"}


def config(tree: dict[str, Any], **sections: Any) -> Config:
    for name, values in sections.items():
        tree = {**tree, name: tree.get(name, {}) | values if isinstance(values, dict) else values}
    return from_tree(tree).config


BATCH = {"sequence": 32, "samples": 4, "micro": 1}

# World, device and config: every ZeRO stage and backend, policy, schedule and precision, and the models' features.
CASES: dict[str, tuple[int, str, Config]] = {
    "fp64": (1, "cpu", config(layout(precision="fp64"))),
    "fp16, ZeRO 1": (2, "cpu", config(layout(precision="fp16"))),
    "bf16, ZeRO 2 on a GPU": (4, "cuda", config(layout(precision="bf16", zero="native 2"))),
    "many small ZeRO 2 buckets": (2, "cpu", config(layout(zero="native 2"), zero={"bucket": 100_000})),
    "the optimizer step of DeepSpeed 0": (2, "cpu", config(layout(zero="deepspeed 0"), batch=BATCH)),
    "the optimizer step of DeepSpeed 1": (2, "cpu", config(layout(zero="deepspeed 1"), batch=BATCH)),
    "DeepSpeed 2 in fp32": (2, "cpu", config(layout(zero="deepspeed 2"), batch=BATCH)),
    "DeepSpeed 3 over four ranks": (4, "cpu", config(layout(precision="bf16", zero="deepspeed 3"))),
    "Muon": (1, "cpu", config(layout(), optimizer={"kind": "muon"}, batch=BATCH)),
    "Muon, sharded, tp 2": (4, "cpu", config(layout(tensor=2), optimizer={"kind": "muon"}, batch=BATCH)),
    "tp 2 on a GPU": (2, "cuda", config(layout(precision="bf16", tensor=2))),
    "full recompute, zb-h1": (2, "cpu", config(layout(pipeline=2, schedule="zb-h1", policy="full"))),
    "selective recompute, zb-v": (
        2, "cuda", config(layout(precision="bf16", pipeline=2, schedule="zb-v", chunks=2, policy="selective")),
    ),
    "some layers recomputed": (2, "cpu", config(layout(pipeline=2, policy="full"), recompute={"layers": 1})),
    "gpipe": (2, "cpu", config(layout(pipeline=2, schedule="gpipe"))),
    "capped scores": (2, "cuda", config(layout(LLAMA | GEMMA, "bf16", pipeline=2))),
    "norms after": (2, "cpu", config(layout(LLAMA | OLMO, "bf16", pipeline=2, policy="selective"))),
    "parallel residual": (2, "cpu", config(layout(LLAMA | {"parallel_residual": True}, pipeline=2, policy="full"))),
    "capped logits": (1, "cpu", config(layout(LLAMA | {"logit_softcap": 30.0}))),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_estimate_is_what_a_step_of_the_program_takes(name: str) -> None:
    world, device, chosen = CASES[name]
    estimates = stage_memory(chosen, check_world(chosen, world), cpu=device == "cpu")
    for estimate, dry in zip(estimates, dry_run(chosen, world, device=device), strict=True):
        assert estimate.allocated == pytest.approx(dry.peak, rel=0.05)
        # States too, one by one; a bucket's padding is all that is left out.
        for item in ("masters", "moments"):
            if chosen.zero.backend == "native":
                assert estimate.items.get(item, 0) == pytest.approx(dry.items.get(item, 0), rel=0.05)


@pytest.mark.parametrize("policy", ["none", "selective", "full"])
@pytest.mark.parametrize("cpu", [True, False])
@pytest.mark.parametrize("features", [{}, GEMMA, OLMO, {"qk_norm": "head", "parallel_residual": True}])
def test_what_a_pass_leaves_is_what_a_layer_keeps(policy: Any, cpu: bool, features: dict[str, Any]) -> None:
    chosen = config(layout(LLAMA | features, "bf16", tensor=2))
    place = Place.of(chosen, cpu)
    forward = chunk_pass(place, (policy, policy), False, False, "forward")
    kept = dict(zip(HELD, forward.end, strict=True))
    assert kept["activations"] - place.stream == 2 * layer_activations(chosen, cpu, policy)
    assert not any(size for item, size in kept.items() if item != "activations")
    # A backward gives all of it back, and the gradient of the stream besides.
    backward = chunk_pass(place, (policy, policy), False, False, "backward").end
    left = dict(zip(HELD, forward.end + backward, strict=True))
    assert left == dict.fromkeys(HELD, 0) | {"activations": place.stream, "working": place.stream}


@pytest.mark.parametrize("policy", ["none", "selective", "full"])
def test_halves_of_a_backward_give_back_what_the_whole_does(policy: Any) -> None:
    place = Place.of(config(layout(tensor=2)), cpu=True)
    input_half = chunk_pass(place, (policy,) * 3, True, True, "backward_input").end
    weight_half = chunk_pass(place, (policy,) * 3, True, True, "backward_weight").end
    assert (input_half + weight_half == chunk_pass(place, (policy,) * 3, True, True, "backward").end).all()


@pytest.mark.parametrize(
    "name,chunks", [("1f1b", 1), ("interleaved", 2), ("interleaved", 3), ("zb-h1", 1), ("zb-v", 2)]
)
def test_a_pipeline_is_full_after_two_micro_batches_for_each_rank(name: str, chunks: int) -> None:
    """As many a dry run takes of it."""
    for stages in (2, 3, 8):
        for rank in range(stages):
            few, many = (levels(name, stages, chunks, times * stages, rank).held.sum(1).max() for times in (2, 9))
            assert few == many


def test_gpipe_keeps_every_micro_batch() -> None:
    def activations(samples: int) -> int:
        chosen = config(layout(pipeline=2, schedule="gpipe"), batch={"samples": samples})
        return stage_memory(chosen, 1)[0].activations

    assert activations(80) == 5 * activations(16)


def test_a_gpu_has_a_context_and_loses_to_fragments_a_share_of_what_comes_and_goes() -> None:
    (stage,) = stage_memory(config(layout(precision="bf16")), 1)
    assert stage.items["context"] == CONTEXT_BYTES
    states = sum(stage.items[item] for item in ("weights", "main_grad", "masters", "moments", "batch"))
    assert stage.items["fragmentation"] == int(FRAGMENTATION * (stage.allocated - states))
    assert stage.total == stage.allocated + stage.items["context"] + stage.items["fragmentation"]


def test_offloaded_state_is_not_in_a_gpus_memory() -> None:
    chosen = config(layout(precision="bf16", zero="deepspeed 2"), zero={"offload": True})
    (gpu,), (cpu,) = (stage_memory(chosen, 2, cpu=cpu) for cpu in (False, True))
    assert not {"masters", "moments"} & gpu.items.keys()
    assert cpu.items["moments"] == 2 * cpu.parameters // 2 * 4


SCHEDULES = [("1f1b", 1), ("gpipe", 1), ("interleaved", 2), ("zb-h1", 1), ("zb-v", 2)]


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Config, int]:
    """A config and its number of data-parallel ranks."""
    pipeline = draw(st.sampled_from([1, 2, 4]))
    schedule, chunks = draw(st.sampled_from(SCHEDULES if pipeline > 1 else SCHEDULES[:2]))
    data, micro = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2]))
    zero = draw(st.sampled_from(["native 0", "native 1", "deepspeed 0", "deepspeed 1"]))
    if pipeline == 1:
        zero = draw(st.sampled_from([zero, "native 2", "deepspeed 2", "deepspeed 3"]))
    precision = draw(st.sampled_from(["bf16", "fp32"]))
    some: list[dict[str, Any]] = [{}, {"tied_embeddings": True}, {"vocabulary": 512}, OLMO, GEMMA]
    features = draw(st.sampled_from(some))
    made = layout(
        LLAMA | {"layers": draw(st.integers(8, 11))} | features, precision, zero,
        tensor=draw(st.sampled_from([1, 2, 4])), pipeline=pipeline, schedule=schedule, chunks=chunks,
    )  # fmt: skip
    samples = micro * data * pipeline * draw(st.integers(1, 4))
    try:
        return config(made, batch={"micro": micro, "samples": samples}), data
    except UserError:
        assume(False)
        raise


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.filter_too_much], derandomize=True)
@given(layouts(), st.booleans())
def test_items_add_up_and_recomputing_or_sharding_more_never_needs_more(made: tuple[Config, int], cpu: bool) -> None:
    chosen, data = made
    for stage in stage_memory(chosen, data, cpu):
        assert stage.total == sum(stage.items.values()) > 0
        assert stage.items.keys() <= ITEMS.keys() and min(stage.items.values()) > 0
        assert stage.weights == stage.items["weights"]
        # Held activations are a part of the most, unless the optimizer step is.
        assert stage.when == "optimizer step" or stage.allocated >= stage.activations

    def totals(**sections: Any) -> list[int]:
        tree = chosen.model_dump()
        changed = from_tree({**tree, **{k: tree[k] | v for k, v in sections.items()}}).config
        return [stage.allocated for stage in stage_memory(changed, data, cpu)]

    none, full = totals(recompute={"policy": "none"}), totals(recompute={"policy": "full"})
    some = totals(recompute={"policy": "full", "layers": 1})
    assert all(a <= b <= c for a, b, c in zip(full, some, none, strict=True))
    assert all(a <= b for a, b in zip(totals(recompute={"policy": "selective"}), none, strict=True))
    if chosen.zero.backend == "native" and not cpu:
        # On a CPU gloo's exchanges may take more than sharding gives; so may stage 2's buckets, where they are few.
        unsharded, sharded = (totals(zero={"stage": stage}) for stage in (0, 1))
        assert all(b <= a for a, b in zip(unsharded, sharded, strict=True))
        twice = config(chosen.model_dump(), zero={"stage": 1}, batch={"samples": 2 * chosen.batch.global_samples})
        more = [stage.allocated for stage in stage_memory(twice, 2 * data, cpu)]
        assert all(b <= a for a, b in zip(sharded, more, strict=True))
