"""Step times: published laws, what more of something may never do, and the clock against the simulator."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megapt.config import Config, from_tree
from megapt.errors import UserError
from megapt.parallel.pipeline.schedules import schedule
from megapt.parallel.pipeline.simulate import Costs, simulate
from megapt.plan import cost, hardware
from megapt.plan.clock import pipeline_pass
from megapt.plan.cost import Software
from megapt.plan.flops import flops
from megapt.plan.time import StepTime, step_time

H100 = hardware.load("h100")
MODEL: dict[str, Any] = {
    "layers": 16, "hidden": 4096, "heads": 32, "kv_heads": 8, "ffn": 14336, "vocabulary": 128256, "max_sequence": 65536
}  # fmt: skip


def _config(tensor: int = 1, pipeline: int = 1, **more: Any) -> Config:
    """A Llama of 16 layers; `more` holds sections, whose values go over the defaults here."""
    tree: dict[str, Any] = {
        "model": MODEL,
        "parallel": {"tensor": tensor, "pipeline": pipeline},
        "batch": {"sequence": 4096, "samples": 64},
        "data": {"train": "corpus"},
        "train": {"steps": 1},
        "compile": True,
    }
    for section, values in more.items():
        tree[section] = {**tree.get(section, {}), **values} if isinstance(values, dict) else values
    return from_tree(tree).config


def _seconds(config: Config, data: int = 1, changes: tuple[str, ...] = (), software: Software = cost.MEGAPT) -> float:
    return step_time(config, data, H100.what_if(changes) if changes else H100, software).seconds


_SCHEDULES = st.sampled_from(
    [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("interleaved", 3), ("zb-h1", 1), ("zb-v", 2)]
)


@st.composite
def _pipelines(draw: st.DrawFn) -> tuple[str, int, int, int, Costs]:
    name, chunks = draw(_SCHEDULES)
    stages = draw(st.integers(1 if chunks == 1 else 2, 5))
    micro_batches = draw(st.integers(1, 30))
    if name == "interleaved":
        micro_batches *= stages
    virtual = stages * chunks
    if draw(st.booleans()):
        parts = [[draw(st.sampled_from([0.5, 1.0, 2.0]))] * virtual for _ in range(3)]
    else:
        parts = [draw(st.lists(st.floats(0.5, 2), min_size=virtual, max_size=virtual)) for _ in range(3)]
    return name, stages, chunks, micro_batches, Costs(*parts, transfer=draw(st.sampled_from([0.0, 0.07, 0.6, 1.7])))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(_pipelines())
def test_the_clock_is_the_simulator(case: tuple[str, int, int, int, Costs]) -> None:
    name, stages, chunks, micro_batches, costs = case
    timeline = simulate(schedule(name, stages, chunks, micro_batches), costs).timeline
    found = pipeline_pass(name, stages, chunks, micro_batches, costs)
    assert found.seconds == pytest.approx(max(spans[-1].end for spans in timeline.ranks), rel=1e-9)
    assert found.first == pytest.approx([spans[0].start for spans in timeline.ranks], abs=1e-9)
    assert found.last == pytest.approx([spans[-1].end for spans in timeline.ranks], rel=1e-9)
    for spans, finals in zip(timeline.ranks, found.final, strict=True):
        for chunk, (start, end) in enumerate(finals):
            final = [span for span in spans if span.action.chunk == chunk and str(span.action)[0] in "BW"][-1]
            assert (start, end) == pytest.approx((final.start, final.end), rel=1e-9)


@pytest.mark.parametrize("name, chunks", [("1f1b", 1), ("interleaved", 2), ("zb-h1", 1), ("zb-v", 2)])
def test_many_micro_batches_are_exact(name: str, chunks: int) -> None:
    stages, micro_batches = 4, 256
    virtual = stages * chunks
    costs = Costs(
        [1 + 0.03 * v for v in range(virtual)], [1.1] * virtual, [0.9 + 0.01 * v for v in range(virtual)], 0.35
    )
    timeline = simulate(schedule(name, stages, chunks, micro_batches), costs).timeline
    seconds = pipeline_pass(name, stages, chunks, micro_batches, costs).seconds
    assert seconds == pytest.approx(max(spans[-1].end for spans in timeline.ranks), rel=1e-9)


@pytest.mark.parametrize("stages, chunks, micro_batches", [(4, 1, 8), (8, 1, 640), (4, 2, 8), (4, 4, 4000), (8, 3, 16)])
def test_the_bubble_is_the_published_one(stages: int, chunks: int, micro_batches: int) -> None:
    """(p - 1) / (v m) of the ideal time (arXiv 2104.04473, section 2.2)."""
    name = "1f1b" if chunks == 1 else "interleaved"
    costs = Costs.even(stages, chunks, 1.0, 1.5, 0.5)
    ideal = micro_batches * 3.0
    found = pipeline_pass(name, stages, chunks, micro_batches, costs).seconds
    assert found / ideal - 1 == pytest.approx((stages - 1) / (chunks * micro_batches))


def test_items_add_up_and_know_the_layout() -> None:
    config = _config(8, 4, checkpoint={"every": 100}, optimizer={"kind": "adamw"}, model={"tied_embeddings": True})
    step = step_time(config, 8, H100)
    assert sum(step.items.values()) == pytest.approx(step.seconds)
    assert min(step.items.values()) >= 0
    assert (step.world, step.tokens, len(step.chunks), len(step.busy)) == (256, 64 * 4096, 4, 4)
    assert [chunk.rank for chunk in step.chunks] == [0, 1, 2, 3]
    assert sum(chunk.layers for chunk in step.chunks) == 16
    for name in ("bubble", "tensor collectives", "tied embedding", "checkpoint", "optimizer", "gradient norm"):
        assert step.items[name] > 0, name
    assert step.hidden["gradient reduction"] > 0 and step.transfer > 0
    assert step.tokens_per_second == pytest.approx(step.tokens / step.seconds)
    assert step.mfu == pytest.approx(step.tflops * 1e12 / H100.peak_flops("bf16"))
    assert 0 < step.communication_share < 1 and 0 < step.bubble_share < 1
    alone = step_time(_config(), 1, H100)
    for name in ("bubble", "tensor collectives", "tied embedding", "gradient reduction", "weight gather"):
        assert alone.items[name] == 0, name


@st.composite
def _layouts(draw: st.DrawFn) -> tuple[Config, int]:
    tensor, pipeline = draw(st.sampled_from([1, 2, 4, 8])), draw(st.sampled_from([1, 2, 4]))
    data = draw(st.sampled_from([1, 2, 4, 8]))
    kinds = [("1f1b", 1), ("zb-h1", 1), ("gpipe", 1)] + ([("interleaved", 2), ("zb-v", 2)] if pipeline > 1 else [])
    name, chunks = draw(st.sampled_from(kinds))
    stage = draw(st.sampled_from([0, 1] if pipeline > 1 else [0, 1, 2]))
    parallel = {"schedule": name, "chunks": chunks, "sequence": draw(st.booleans())}
    policy = draw(st.sampled_from(["none", "selective", "full"]))
    return _config(tensor, pipeline, parallel=parallel, zero={"stage": stage}, recompute={"policy": policy}), data


_BETTER = {
    "network=150": "more network", "network.latency=1us": "less latency", "node.bandwidth=900": "more NVLink",
    "peak.bf16=1500": "more FLOP/s", "memory.bandwidth=6000": "faster memory", "launch=1us": "faster launches",
    "gemm.depth=0": "deeper tiles", "in_step=0.9": "steps as fast as benchmarks", "attention.half_at=10": "attention",
}  # fmt: skip


@settings(max_examples=50, deadline=None, derandomize=True)
@given(_layouts(), st.sampled_from(sorted(_BETTER)))
def test_better_hardware_is_never_slower(layout: tuple[Config, int], change: str) -> None:
    config, data = layout
    assert _seconds(config, data, (change,)) <= _seconds(config, data) * (1 + 1e-12), _BETTER[change]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(_layouts())
def test_no_step_beats_its_products(layout: tuple[Config, int]) -> None:
    """FLOPs as they are done never pass the rate of the best product, nor with recomputation counted."""
    config, data = layout
    step = step_time(config, data, H100)
    ceiling = H100.gemm.share * H100.gemm.sustained * H100.in_step
    done = flops(config).hardware_done.total * step.tokens / step.seconds / (step.peak * step.world)
    assert 0 < done <= ceiling
    assert sum(step.items.values()) == pytest.approx(step.seconds)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(_layouts(), st.integers(0, 2))
def test_more_work_takes_longer(layout: tuple[Config, int], which: int) -> None:
    config, data = layout
    tree = config.model_dump()
    section, key = [("batch", "samples"), ("model", "ffn"), ("model", "vocabulary")][which]
    tree[section][key] *= 2
    assert _seconds(from_tree(tree).config, data) > _seconds(config, data)


def test_tensor_parallelism_belongs_inside_a_node() -> None:
    config = _config(8)
    steps = [step_time(config, 2, H100.what_if([f"node.devices={devices}"])) for devices in (8, 4, 1)]
    inside, across, apart = (step.items["tensor collectives"] for step in steps)
    assert across > 1.9 * inside and apart > 3.5 * across  # four adapters of 42.5 GB/s, or one, for 360 GB/s of NVLink
    assert steps[0].seconds < steps[1].seconds < steps[2].seconds


def test_sequence_parallelism_moves_as_much_and_spares_elementwise_work() -> None:
    plain, cut = (step_time(_config(8, parallel={"sequence": on}), 1, H100) for on in (False, True))
    assert cut.items["elementwise"] < plain.items["elementwise"]
    assert cut.chunks[0].forward < plain.chunks[0].forward
    ratio = cut.items["tensor collectives"] / plain.items["tensor collectives"]
    assert 0.5 < ratio < 1.5


def test_recomputation_costs_what_it_computes() -> None:
    times = {p: step_time(_config(recompute={"policy": p}), 1, H100) for p in ("none", "selective", "full")}
    assert times["none"].items["recompute"] == 0
    assert times["none"].seconds < times["selective"].seconds < times["full"].seconds
    added = times["full"].items["recompute"] / (times["none"].seconds - times["none"].items["optimizer"])
    assert 0.15 < added < 1 / 3  # a forward without head and last product, of a forward and a backward
    half = step_time(_config(recompute={"policy": "full", "layers": 8}), 1, H100)
    assert half.items["recompute"] == pytest.approx(times["full"].items["recompute"] / 2)
    stated = [[["full"] * 8 + ["none"] * 8]]
    assert step_time(_config(), 1, H100, policies=stated).seconds == pytest.approx(half.seconds)


def test_windows_shorten_attention() -> None:
    batch = {"sequence": 65536, "samples": 1}
    full = step_time(_config(batch=batch), 1, H100)
    some = step_time(_config(batch=batch, model={"window": 4096, "window_pattern": 2}), 1, H100)
    every = step_time(_config(batch=batch, model={"window": 4096}), 1, H100)
    attention = [step.items["attention"] for step in (full, some, every)]
    # Half of the layers have it: 32768.5 pairs per token, or about 3968.
    assert attention[1] == pytest.approx((attention[0] + attention[2]) / 2)
    assert 7 < attention[0] / attention[2] < 9


def test_what_runs_beside_computing_is_not_waited_for() -> None:
    def step(stage: int, software: Software = cost.MEGAPT, backend: str = "native") -> StepTime:
        return step_time(_config(zero={"stage": stage, "backend": backend}), 16, H100, software)

    overlapped, waiting = step(1), step(1, Software(overlaps_gradients=False))
    exposed = overlapped.items["gradient reduction"]
    assert exposed < 0.2 * waiting.items["gradient reduction"]
    total = exposed + overlapped.hidden["gradient reduction"]
    assert total == pytest.approx(waiting.items["gradient reduction"], rel=1e-6)
    assert overlapped.items["weight gather"] < waiting.items["weight gather"]
    # An all-reduce moves twice what a reduce-scatter does, and stage 0 updates everything everywhere.
    assert step(0).items["optimizer"] > 10 * step(1).items["optimizer"]
    assert step(2).items["gradient reduction"] > exposed
    # DeepSpeed's stage 1 reduces whole gradients behind the backward.
    assert step(1, backend="deepspeed").items["gradient reduction"] > 1.5 * waiting.items["gradient reduction"]
    third = step(3, backend="deepspeed")
    gathered = [found.items["weight gather"] + found.hidden["weight gather"] for found in (third, overlapped)]
    assert gathered[0] == pytest.approx(4 * gathered[1], rel=0.2)  # with each of four micro-batches


def test_zero_bubble_schedules_have_less_bubble() -> None:
    def step(name: str, chunks: int = 1) -> StepTime:
        parallel, even = {"schedule": name, "chunks": chunks}, {"vocabulary": 1024}
        return step_time(_config(1, 4, parallel=parallel, model=even, batch={"samples": 16}), 1, H100)

    plain = step("1f1b").items["bubble"]
    for name, chunks in (("zb-h1", 1), ("zb-v", 2), ("interleaved", 2)):
        assert step(name, chunks).items["bubble"] < 0.8 * plain, name


def test_optimizers_and_offload() -> None:
    kinds = ("adamw", "muon")
    adamw, muon = (step_time(_config(optimizer={"kind": kind}), 8, H100).items["optimizer"] for kind in kinds)
    assert muon > adamw
    offloaded = _config(zero={"stage": 1, "backend": "deepspeed", "offload": True})
    assert step_time(offloaded, 8, H100).items["optimizer"] > 5 * adamw


def test_a_product_by_hand() -> None:
    """[4096, 4096] x [4096, 4096] on an H100: 512 tiles in four waves of 132, each a little longer for its ends."""
    device = cost.rates(H100, "bf16")
    tile = 2 * 256 * 128 * (4096 + H100.gemm.depth)
    assert cost.product(device, 4096, 4096, 4096) == pytest.approx(4 * tile * 132 / device.flops)
    # One row is bound by reading the matrix.
    assert cost.product(device, 1, 4096, 4096) == pytest.approx((4096**2 + 2 * 4096) * 2 / device.bytes, rel=0.2)
    assert cost.product(device, 4096, 4096, 4096, batch=2) > cost.product(device, 4096, 4096, 4096)


def test_refusals() -> None:
    with pytest.raises(UserError, match="divisible by micro-batch x data"):
        step_time(_config(), 3, H100)
    with pytest.raises(UserError, match="has no peak for fp64"):
        step_time(_config(precision="fp64"), 1, H100.model_copy(update={"peak": {"bf16": 1.0}}))
    with pytest.raises(UserError, match="recompute.budget = 1e-06 GiB is too small"):
        step_time(_config(recompute={"policy": "budget", "budget": 1e-6}), 1, H100)
