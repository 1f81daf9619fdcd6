"""Hardware files: what they hold, how they are changed, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megapt.errors import UserError
from megapt.monitor.progress import peak_flops_of
from megapt.plan import hardware
from megapt.plan.hardware import Hardware

NAMES = ["a100-40", "a100-80", "b200", "cpu", "gb200", "h100", "h100-pcie", "h200", "mi300x"]


def test_the_package_brings_its_hardware() -> None:
    assert hardware.names() == NAMES
    setup = (Path(__file__).parents[2] / "setup.py").read_text(encoding="utf-8")
    assert "hardware/*.yaml" in setup  # or an installed package has none


@pytest.mark.parametrize("name", NAMES)
def test_figures_are_sensible(name: str) -> None:
    found = hardware.load(name)
    assert found is hardware.load(name.upper())  # read once
    assert found.node.bandwidth > found.network.bandwidth
    assert found.node.latency <= found.network.latency
    assert found.peak_flops("bf16") >= found.peak_flops("fp32")
    assert found.copy_rate < found.memory.bandwidth * 1e9
    assert {hash(found)} == {hash(found.model_copy())}


def test_peaks_are_those_that_training_reports() -> None:
    devices = {
        "a100-40": "NVIDIA A100-SXM4-40GB",
        "a100-80": "NVIDIA A100-SXM4-80GB",
        "h100": "NVIDIA H100 80GB HBM3",
        "h100-pcie": "NVIDIA H100 PCIe",
        "h200": "NVIDIA H200",
        "b200": "NVIDIA B200",
        "gb200": "NVIDIA GB200",
    }
    for name, device in devices.items():
        assert hardware.load(name).peak_flops("bf16") == pytest.approx(peak_flops_of(device), rel=1e-3)


def test_unknown_hardware_lists_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'h110' is not known; did you mean h100\? Known: a100-40.*mi300x"):
        hardware.load("h110")
    with pytest.raises(UserError, match="does not exist; without a file, name one of a100-40"):
        hardware.load(tmp_path / "mine.yaml")
    (tmp_path / "list.yaml").write_text("[1, 2]")
    with pytest.raises(UserError, match="must hold the figures"):
        hardware.load(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("name: [")
    with pytest.raises(UserError, match="not valid YAML"):
        hardware.load(tmp_path / "broken.yaml")
    text = (hardware.FOLDER / "h100.yaml").read_text().replace("share: 0.80", "share: 1.8").replace("host:", "hots:")
    (tmp_path / "wrong.yaml").write_text(text)
    with pytest.raises(UserError, match=r"wrong.yaml: `gemm.share`.*less than or equal to 1.*`hots`"):
        hardware.load(tmp_path / "wrong.yaml")


def test_what_if() -> None:
    h100 = hardware.load("h100")
    changed = h100.what_if(["network=200Gb", "memory=141GiB", "memory=4.8TB/s", "node.devices=4", "launch=7us"])
    assert changed.network.bandwidth == 25 and changed.network.latency == h100.network.latency
    assert (changed.memory.gib, changed.memory.bandwidth) == (141, pytest.approx(4800))
    assert changed.node.devices == 4 and changed.launch == pytest.approx(7e-6)
    assert h100.what_if(["network.topology=tree", "network.oversubscription=2"]).nodes_per_leaf == 4
    assert h100.what_if(["peak.bf16=500", "in_step=1"]).peak_flops("bf16") == 500e12
    with pytest.raises(UserError, match="form name=value, with a name out of .*network.bandwidth"):
        h100.what_if(["netwrok=200Gb"])
    with pytest.raises(UserError, match="gemm has several figures: name one of gemm.share"):
        h100.what_if(["gemm=0.7"])
    with pytest.raises(UserError, match=r"did you mean network\?"):
        h100.what_if(["netwrok=200Gb"])
    for change in ("network=200 furlongs", "network=25GiB", "node=25GiB", "network=200us", "host=5TFLOP/s"):
        with pytest.raises(UserError, match="is not a number with a unit out of GB, GB/s"):
            h100.what_if([change])
    with pytest.raises(UserError, match="'5GB' is not a number with a unit out of s, ms, us or none"):
        h100.what_if(["launch=5GB"])
    with pytest.raises(UserError, match="'4GiB' is not a number without a unit"):
        h100.what_if(["node.devices=4GiB"])
    with pytest.raises(UserError, match="changed by network=-1: `network.bandwidth`: Input should be greater than 0"):
        h100.what_if(["network=-1"])
    with pytest.raises(UserError, match="has no peak for fp64; its file states bf16"):
        Hardware.model_validate(h100.model_dump() | {"peak": {"bf16": 1.0}}).peak_flops("fp64")


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.sampled_from(["network", "memory.gib", "node", "node.devices", "peak.bf16", "name", "gemm", "x", "", "a.b"]),
    st.text("0123456789.eE+-Gb/s iTB=nanu", max_size=8) | st.sampled_from(["9GiB", "9us", "9TiB", "9GB"]),
)
def test_nonsense_is_refused_in_words(key: str, value: str) -> None:
    try:
        changed = hardware.load("a100-80").what_if([f"{key}={value}"])
    except UserError:
        return
    assert changed.network.bandwidth > 0 and changed.memory.gib > 0 and changed.node.devices >= 1
