"""`parallel: auto` becomes a layout, the same on every rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megapt.config import Loaded, dump, from_tree
from megapt.errors import UserError
from megapt.plan.auto import ORIGIN, describe, named, resolve, stated
from megapt.plan.search import search
from megapt.rules import check_world
from tests.plan.planning import gpu, loaded

CPU = torch.device("cpu")
SMALL = {"layers": 4, "hidden": 256, "heads": 4, "ffn": 512, "vocabulary": 1000}


def auto(parallel: Any = "auto", **sections: Any) -> Loaded:
    return loaded(SMALL, parallel=parallel, **sections)


def test_the_planner_fills_in_the_layout() -> None:
    before = auto({"auto": "h100"})
    after = resolve(before, 8, CPU)
    config = after.config
    plain = loaded(SMALL).config
    assert config.parallel.auto is None and check_world(config, 8)
    best = search(plain, 8, gpu(79.1), backend="native").best
    assert best.layout.on(plain) == config
    changed = {key for key, origin in after.origins.items() if origin == ORIGIN}
    assert "parallel.auto" in changed and "batch.micro" in changed
    line = describe(before, after, 8)
    assert line is not None and str(best.layout) in line
    assert resolve(auto({"auto": "h100"}), 8, CPU) == after  # every rank alike
    assert from_tree({**config.model_dump()}).config == config
    assert "auto: null" in dump(config)


def test_nothing_happens_without_it() -> None:
    plain = loaded(SMALL)
    assert resolve(plain, 8, CPU) is plain and describe(plain, plain, 8) is None


def test_what_the_file_states_stays() -> None:
    given = auto(
        {"auto": "detect", "tensor": 2, "schedule": "1f1b"},
        batch={"sequence": 128, "samples": 16, "micro": 2},
        zero={"stage": 0},
        recompute={"policy": "full"},
    )
    assert stated(given.config) == {
        "tp": 2, "schedule": "1f1b", "micro": 2, "zero": "native-0", "recompute": "full",
    }  # fmt: skip
    made = resolve(given, 4, CPU).config
    assert (made.parallel.tensor, made.batch.micro, made.zero.stage, made.recompute.policy) == (2, 2, 0, "full")
    deepspeed = resolve(auto(zero={"backend": "deepspeed"}, batch={"sequence": 128, "samples": 16}), 2, CPU)
    assert deepspeed.config.zero.backend == "deepspeed"


def test_refusals() -> None:
    with pytest.raises(UserError, match="no layout of 7 ranks is legal"):
        resolve(auto(), 7, CPU)
    with pytest.raises(UserError, match="hardware 'h900' is not known"):
        resolve(auto({"auto": "h900"}), 8, CPU)
    with pytest.raises(UserError, match="layers_per_stage belongs to one layout"):
        resolve(auto({"auto": "cpu", "layers_per_stage": "4"}), 8, CPU)
    with pytest.raises(UserError, match=r"parallel: auto: the model fits in no layout of 1 ranks"):
        resolve(loaded({"hidden": 2048, "ffn": 8192}, parallel="auto"), 1, CPU)
    with pytest.raises(UserError, match="`parallel`"):
        auto("automatic")


@pytest.mark.parametrize(
    "device, name",
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100 80GB PCIe", "a100-80"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA GB200", "gb200"),
        ("AMD Instinct MI300X", "mi300x"),
        ("Tesla T4", None),
    ],
)
def test_devices_by_their_names(device: str, name: str | None) -> None:
    assert named(device) == name
