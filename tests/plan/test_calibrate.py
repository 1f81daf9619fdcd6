"""Calibration of the CPU at hand: the file holds what was measured, and predicts what it was made from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megapt.errors import UserError
from megapt.plan import calibrate as module
from megapt.plan import hardware
from megapt.plan.calibrate import Bench, calibrate
from megapt.plan.cost import product, rates
from megapt.prove.ranks import run_ranks


def test_a_calibrated_file_is_hardware(tmp_path: Path) -> None:
    path = tmp_path / "new" / "mine.yaml"
    made = calibrate(path, torch.device("cpu"), seconds=0.6)
    read = hardware.load(path)
    assert read.name == made.name and read.name.startswith("CPU")
    assert path.read_text().startswith("# Measured by `megapt plan calibrate` on CPU")
    assert list(path.parent.iterdir()) == [path]
    for name in ("fp32", "bf16", "fp64"):
        assert read.peak_flops(name) == pytest.approx(made.peak_flops(name), rel=1e-3)
    # Sane for any machine that runs tests, however busy: more than a microcontroller, less than a GPU.
    assert 1e8 < read.peak_flops("fp32") < 1e13
    assert 1e8 < read.copy_rate < 1e12
    assert 1e-8 < read.launch < 1e-2
    assert 0 < read.in_step <= 1 and read.memory.gib > 0.5
    # What was not measured is a CPU core's.
    assert read.network == hardware.load("cpu").network


def test_products_are_fitted() -> None:
    """Times that follow the model give its constants back, on a device of tiles and on one without."""
    shapes = [(1024, 1024, 1024), (4096, 4096, 4096), (8192, 8192, 8192), (4096, 4096, 128), (128, 4096, 4096)]
    for name in ("h100", "cpu"):
        base = hardware.load(name)
        true = module._changed(rates(base, "bf16"), 3e11 if name == "cpu" else 5.5e14, 64.0)
        seconds = [product(true, *shape) for shape in shapes]
        speed, depth = module._fit_products(base, "bf16", shapes, seconds)
        assert speed == pytest.approx(true.flops, rel=0.02) and depth == 64.0


def test_saturation_is_fitted() -> None:
    lengths = [128, 256, 1024]
    most, half = module._saturation(lengths, [0.5 * n / (n + 300) for n in lengths])
    assert (most, half) == pytest.approx((0.5, 300))
    assert module._saturation(lengths, [0.5, 0.4, 0.3]) == (0.5, 0.0)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"ends in .yaml, not 'mine.txt'; try mine.yaml"):
        calibrate(tmp_path / "mine.txt")
    with pytest.raises(UserError, match="positive number of seconds, not -1"):
        calibrate(tmp_path / "mine.yaml", seconds=-1)
    with pytest.raises(UserError, match="device meta cannot be measured here; there is cpu"):
        calibrate(tmp_path / "mine.yaml", torch.device("meta"))
    assert not list(tmp_path.iterdir())


def _measure_link(rank: int, world: int) -> None:
    found = Bench(torch.device("cpu"), 0.01).link()
    assert 1e-3 < found["bandwidth"] < 1e3
    assert 0 < found["latency"] < 1


def test_the_link_between_ranks_is_measured() -> None:
    run_ranks(2, _measure_link)
