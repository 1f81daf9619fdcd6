from __future__ import annotations

import pytest
import torch

from megapt.monitor.progress import (
    Progress,
    emit,
    format_count,
    format_duration,
    format_memory,
    memory_bytes,
    peak_flops,
    peak_flops_of,
)

LEARNING = {"loss": 4.2131, "lr": 3e-4, "grad_norm": 0.8123}


def test_the_line_in_full() -> None:
    progress = Progress(500, 100, 1_000_000, 6e9, 989e12, 8)
    line = progress.line(120, **LEARNING, step_seconds=40.0, skipped=3, memory=312 * 2**20)
    # 500k tok/s x 6 GFLOP = 3.0 PFLOP/s of 7.912; 380 steps at 2 s are left.
    assert line == (
        "step 120/500 | loss 4.213 | lr 3.0e-04 | norm 0.81 | 500k tok/s | MFU 37.9 % of 8 x 989 TFLOP/s | "
        "mem 312 MiB | skipped 3 | ETA 12m40s"
    )
    assert progress.throughput is not None
    assert progress.throughput.tokens_per_second == pytest.approx(5e5)
    assert progress.throughput.mfu == pytest.approx(3e15 / (8 * 989e12))
    assert progress.throughput.eta_seconds == pytest.approx(760)


@pytest.mark.parametrize(("flops", "peak"), [(None, 1e12), (6e9, None)])
def test_what_is_not_known_is_said_or_left_out(flops: float | None, peak: float | None) -> None:
    progress = Progress(10, 0, 100, flops, peak, 1)
    line = progress.line(1, loss=float("nan"), lr=0.0, grad_norm=None, step_seconds=1.0)
    assert line == "step 1/10 | loss nan | lr 0.0e+00 | norm n/a | 100 tok/s | MFU n/a | ETA 9s"


def test_throughput_is_of_the_last_interval_and_eta_of_a_smoothed_rate() -> None:
    progress = Progress(100, 0, 1000, None, None, 1)
    progress.line(10, **LEARNING, step_seconds=10.0)
    progress.line(20, **LEARNING, step_seconds=40.0)
    assert progress.throughput is not None
    assert progress.throughput.tokens_per_second == pytest.approx(250)
    # 1 s per step, then 4 s: 0.7 * 1 + 0.3 * 4 for each of the 80 steps left.
    assert progress.throughput.eta_seconds == pytest.approx(80 * 1.9)


def test_a_growing_batch_counts_its_own_tokens() -> None:
    progress = Progress(4, 1, lambda step: 100 * (step + 1), None, None, 1)
    progress.line(3, **LEARNING, step_seconds=10.0)
    assert progress.throughput is not None
    assert progress.throughput.tokens_per_second == pytest.approx((200 + 300) / 10)
    assert progress.throughput.eta_seconds == pytest.approx(400 / 50)


def test_the_last_line_has_nothing_left() -> None:
    progress = Progress(4, 0, 100, None, None, 1)
    assert progress.line(4, **LEARNING, step_seconds=1.0).endswith("ETA 0s")


def test_a_line_is_flushed(capsys: pytest.CaptureFixture[str]) -> None:
    emit("step 1/2")
    assert capsys.readouterr().out == "step 1/2\n"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.5, "0.5"), (42, "42"), (950, "950"), (999.4, "999"), (999.6, "1.00k"), (1234, "1.23k"),
        (12345, "12.3k"), (99_960, "100k"), (123_456, "123k"), (999_600, "1.00M"), (2.5e9, "2.50G"),
    ],
)  # fmt: skip
def test_counts(value: float, text: str) -> None:
    assert format_count(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0s"),
        (59.6, "1m00s"),
        (133, "2m13s"),
        (3 * 3600 + 5 * 60 + 59, "3h05m"),
        (2 * 86400 + 4 * 3600, "2d04h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_memory_units() -> None:
    assert format_memory(312 * 2**20) == "312 MiB"
    assert format_memory(41 * 2**30 + 2**29) == "41.5 GiB"


def test_memory_of_the_cpu_grows_with_what_is_held() -> None:
    before = memory_bytes("cpu")
    held = torch.ones(64 * 2**20, dtype=torch.uint8)
    after = memory_bytes("cpu")
    assert after.current - before.current > 48 * 2**20
    assert before.current <= before.peak <= after.peak
    assert after.current <= after.peak
    del held


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce GT 710", None),
    ],
)
def test_peaks_by_name(name: str, peak: float | None) -> None:
    assert peak_flops_of(name) == peak


def test_the_peak_of_a_cpu_is_unknown_unless_given(monkeypatch: pytest.MonkeyPatch) -> None:
    peak, text = peak_flops("cpu")
    assert peak is None and "MFU is not shown" in text
    assert peak_flops("cpu", given=2e12) == (2e12, "2 TFLOP/s, as given")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert peak_flops("cuda:0") == (989e12, "989 TFLOP/s, dense bf16 of NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Unheard Of")
    assert peak_flops("cuda:0")[0] is None
