"""The dry run: its peaks against real steps, its collectives against the record of real engines, and any world."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megapt.config import from_tree, load
from megapt.errors import UserError
from megapt.model.positions import rotary_table
from megapt.plan.dry_run import Collective, DryRank, dry_run, moved, stage_ranks
from megapt.plan.live import LiveBytes
from megapt.plan.measure import LAYOUTS, Measured, layout, measure
from megapt.plan.memory import stage_memory
from megapt.prove.ranks import run_ranks

CONFIGS = Path(__file__).parents[2] / "configs"
MEASURED = ("dp 2, native ZeRO 1", "pp 2, zb-h1")


def _measure_all(rank: int, world: int, trees: list[dict[str, Any]]) -> list[tuple[Measured, list[Collective]]]:
    return [(measure(rank, world, tree), _collectives(world, tree)) for tree in trees]


def _collectives(world: int, tree: dict[str, Any]) -> list[Collective]:
    """Of a real step, as a dry run lists them."""
    from megapt.engine import Engine
    from megapt.plan.dry_run import _collectives as listed
    from megapt.plan.dry_run import step_batch

    config = from_tree(tree).config
    live = LiveBytes()
    with live:
        engine = Engine(config, world, torch.device("cpu"))
        count = config.batch.global_samples // (config.batch.micro * engine.mesh.dp.size)
        batch = step_batch(config, count, torch.device("cpu"))
        live.operations.clear()
        engine.train_step(batch, 1e-3)
    return listed(live.operations, engine.mesh, 1.0, ())


@pytest.fixture(scope="module")
def measured() -> list[list[tuple[Measured, list[Collective]]]]:
    return run_ranks(2, _measure_all, [_small(name) for name in MEASURED], timeout=300.0)


def _small(name: str) -> dict[str, Any]:
    return LAYOUTS[name][1] | {"batch": {"sequence": 64, "samples": 4, "micro": 1}}


@pytest.mark.parametrize("index", range(len(MEASURED)), ids=MEASURED)
def test_peaks_and_collectives_are_those_of_a_real_step(index: int, measured: Any) -> None:
    config = from_tree(_small(MEASURED[index])).config
    for rank, dry in enumerate(dry_run(config, 2, [0, 1])):
        real, collectives = measured[rank][index]
        assert dry.peak == pytest.approx(real.allocated, rel=0.1)
        # A transfer that ends late holds its tensors longer than the dry run's, which end at once.
        assert dry.peak == pytest.approx(real.tensors, rel=0.04)
        assert Counter(dry.collectives) == Counter(collectives)


@pytest.fixture(scope="module")
def large() -> list[DryRank]:
    """Two stages of a model of 405 billion parameters on 4,096 GPUs."""
    config = load(CONFIGS / "llama-405b.yaml", _LARGE).config
    return dry_run(config, 4096, [0, 3840], "cuda")


_LARGE = [
    "parallel.tensor=8", "parallel.pipeline=16", "parallel.schedule=1f1b", "parallel.chunks=1", "batch.micro=1",
    "batch.tokens=524288", "zero.backend=native", "zero.stage=1", "recompute.policy=selective",
]  # fmt: skip


def test_the_estimate_holds_for_a_world_that_no_test_can_start(large: list[DryRank]) -> None:
    estimates = stage_memory(load(CONFIGS / "llama-405b.yaml", _LARGE).config, 32)
    for dry in large:
        assert dry.peak > 20 * 2**30
        assert estimates[dry.coordinates[0]].allocated == pytest.approx(dry.peak, rel=0.05)
    assert [dry.coordinates for dry in large] == [(0, 0, 0), (15, 0, 0)]


def test_collectives_of_a_large_world_are_counted_for_the_whole_step(large: list[DryRank]) -> None:
    first = large[0]
    assert first.micro_batches == (4, 4)
    (send,) = [one for one in first.collectives if one.kind == "send"]
    # One micro-batch's stream in bf16, cut over eight tensor ranks.
    assert (send.axis, send.bytes, send.count) == ("pp", 4096 * 16384 * 2 // 8, 4)
    gathered = sum(one.bytes * one.count for one in first.collectives if one.kind == "all-gather" and one.axis == "dp")
    estimate = stage_memory(load(CONFIGS / "llama-405b.yaml", _LARGE).config, 32)[0]
    assert gathered == pytest.approx(estimate.weights, rel=0.001), "every weight is gathered once"
    reduced = sum(o.bytes * o.count for o in first.collectives if o.kind == "reduce-scatter" and o.axis == "dp")
    assert reduced == 2 * gathered, "and its gradient reduced in fp32"


def test_more_micro_batches_than_fill_the_pipeline_are_not_run_but_counted() -> None:
    few, many = (
        dry_run(from_tree(layout(pipeline=2) | {"batch": {"sequence": 32, "samples": n, "micro": 1}}).config, 2, [1])
        for n in (4, 12)
    )
    assert (few[0].micro_batches, many[0].micro_batches) == ((4, 4), (4, 12))
    assert many[0].peak - few[0].peak == 0
    transfers = [
        [one.count for one in ranks[0].collectives if one.kind in ("send", "receive")] for ranks in (few, many)
    ]
    assert transfers[1] == [3 * count for count in transfers[0]]


def test_what_is_held_has_its_name() -> None:
    (dry,) = dry_run(from_tree(layout(precision="bf16")).config, 1)
    (estimate,) = stage_memory(from_tree(layout(precision="bf16")).config, 1, cpu=True)
    for item in ("weights", "main_grad", "masters", "moments"):
        assert dry.items[item] == pytest.approx(estimate.items[item], rel=0.01)
    assert sum(dry.items.values()) == dry.peak == max(dry.phases.values())
    assert dry.phases.keys() >= {"forward", "backward"}


def test_a_dry_run_leaves_nothing_behind() -> None:
    config = from_tree(layout()).config
    dry_run(config, 1)
    assert not dist.is_initialized()
    assert rotary_table.cache_info().currsize == 0
    x = torch.ones(2, device="cpu")
    assert x.device.type == "cpu" and float(x.sum()) == 2.0
    with pytest.raises(UserError, match="rank 5 is not in a world of 4"):
        dry_run(config, 4, [5])
    assert not dist.is_initialized()


def test_what_cannot_be_run_dry_is_refused() -> None:
    config = from_tree(layout(zero="deepspeed 1")).config
    with pytest.raises(UserError, match="native"):
        dry_run(config, 2, device="cuda")
    with pytest.raises(UserError, match="cpu or cuda"):
        dry_run(config, 2, device="tpu")
    with pytest.raises(UserError, match="not divisible"):
        stage_ranks(from_tree(layout(pipeline=2)).config, 3)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(UserError, match="no process group"):
            dry_run(config, 2)
    finally:
        dist.destroy_process_group()


def test_live_bytes_follow_storages_not_views() -> None:
    with LiveBytes() as live:
        x = torch.zeros(1000)
        view, other = x[10:20], torch.zeros(10)
        assert live.now == 4040
        del x
        assert live.now == 4040, "the view holds it"
        live.name([view], "kept")
        del view
        assert live.now == 40 and live.items["kept"] == 0
        live.restart()
        other = other + torch.ones(20)[:10]
        assert (live.peak, live.now) == (40 + 80 + 40, 40)


def test_moved_is_the_whole_tensor() -> None:
    from megapt.prove.collectives import Group, Operation

    group = Group("g", (0, 1, 2, 3))
    assert moved(Operation("all-gather", group, ((8, 2), (2, 2)), "bfloat16")) == 32
    assert moved(Operation("reduce-scatter", group, ((2, 2), (8, 2)), "float32")) == 64
    assert moved(Operation("all-to-all", group, ((8,), (8,)), "float32")) == 32
    assert moved(Operation("all-reduce", group, ((8,),), "float64")) == 64
    assert moved(Operation("barrier", group, (), "")) == 0
    assert Collective("all-reduce", "dp", 4, 64, 2).sent == 2 * 0.75 * 64 * 2
