"""`megapt bench train` and the comparison script, on a model of a few thousand parameters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megapt import bench
from megapt.config import from_tree, load
from megapt.engine import Engine
from megapt.plan.flops import model_flops_per_token
from tests.distributed.layouts import LLAMA

ROOT = Path(__file__).resolve().parents[1]
COMPARISON = ROOT / "docs" / "results" / "cpu-training"
SMALL = [
    "model.layers=1", "model.hidden=32", "model.heads=2", "model.kv_heads=1", "model.ffn=48", "model.vocabulary=61",
    "batch.sequence=16", "batch.samples=4", "batch.micro=2",
]  # fmt: skip


def test_train_reports_what_its_steps_took(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "time_steps", lambda engine, steps, warmup: [0.5, 0.1, 0.3][:steps])
    monkeypatch.setattr(bench, "gemm_flops", lambda dtype, device: 1e9)
    output = tmp_path / "result.json"
    result = bench.train(COMPARISON / "llama-16m.yaml", [*SMALL, "precision=fp32"], 3, 0, output)
    assert json.loads(output.read_text()) == result
    config = load(COMPARISON / "llama-16m.yaml", SMALL).config
    assert result["tokens_per_step"] == 64 and result["tokens_per_second"] == pytest.approx(64 / 0.3)
    flops = model_flops_per_token(config.model, 16) * 64 / 0.3
    assert result["model_flops_per_second_per_rank"] == pytest.approx(flops)
    assert result["gemm_share"] == pytest.approx(flops / 1e9)
    assert result["mfu"] is None and result["zero"].startswith("native ZeRO 1")
    assert result["layout"] == {"pipeline": 1, "data": 1, "tensor": 1}
    assert result["peak_memory_bytes"] > 2**20 and result["environment"]["torch"] == torch.__version__


def test_mfu_is_against_the_stated_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "time_steps", lambda engine, steps, warmup: [0.25])
    monkeypatch.setattr(bench, "gemm_flops", lambda dtype, device: 1e9)
    result = bench.train(COMPARISON / "llama-16m.yaml", [*SMALL, "run.peak_tflops=0.5"], 1, 0)
    assert result["mfu"] == pytest.approx(result["model_flops_per_second_per_rank"] / 0.5e12)


def test_steps_train_and_every_one_is_timed() -> None:
    tree: dict[str, Any] = {
        "precision": "fp32", "model": LLAMA, "data": {"train": "x"}, "train": {"steps": 1},
        "batch": {"sequence": 16, "samples": 4, "micro": 2}, "zero": {"backend": "native"},
    }  # fmt: skip
    engine = Engine(from_tree(tree).config, 1, torch.device("cpu"))
    before = engine.parameters[0].detach().clone()
    seconds = bench.time_steps(engine, steps=3, warmup=2)
    assert len(seconds) == 3 and all(s > 0 for s in seconds)
    assert engine.backend.updates == 5
    assert not torch.equal(engine.parameters[0], before)


def test_random_tokens_depend_on_the_sample_alone() -> None:
    tokens = bench.RandomTokens(vocabulary=50, sequence=9)
    batch = tokens.sample(np.array([3, 5]))
    assert batch.shape == (2, 10) and batch.dtype == np.int64 and 0 <= batch.min() and batch.max() < 50
    assert np.array_equal(batch[1], tokens.sample(np.array([5]))[0]) and not np.array_equal(batch[0], batch[1])
    assert tokens.loss_tokens(np.array([3, 5])) == 18


def test_gemm_speed_counts_two_operations_per_product(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([float(n) for n in range(100)])
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
    assert bench.gemm_flops(torch.float32, torch.device("cpu"), size=8) == 2 * 8**3


def test_comparison_alternates_both_sides(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    output = tmp_path / "result.json"
    command = [
        sys.executable, str(COMPARISON / "compare.py"), "--rounds", "2", "--steps", "1", "--threads", "1",
        "--precision", "bf16", "--output", str(output), "--override", *SMALL, "batch.samples=2",
    ]  # fmt: skip
    # Tests in this process may have left a rank's variables behind, which the other side would take for a launcher's.
    rank = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    environment = {name: value for name, value in os.environ.items() if name not in rank}
    environment |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(output.read_text())
    sides = result["precisions"]["bf16"]["sides"]
    assert list(sides) == ["megapt-native", "trainer", "trainer-bf16-weights"]
    assert "bf16 autocast" in sides["trainer"]["what"] and "bfloat16 weights" in sides["trainer-bf16-weights"]["what"]
    for side in sides.values():
        assert len(side["step_seconds"]["rounds"]) == 2
        assert side["tokens_per_second"] == pytest.approx(32 / side["step_seconds"]["median"])
    assert sides["megapt-native"]["time_over_megapt"] == {"median": 1.0, "min": 1.0, "max": 1.0}
    assert result["config"]["model"]["hidden"] == 32 and result["environment"]["threads"] == 1
    assert "trainer" in done.stdout
