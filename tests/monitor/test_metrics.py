from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from megapt.errors import UserError
from megapt.monitor.metrics import Metrics, plot_loss, read_metrics


def write(folder: Path, steps: range, resume_step: int, loss: float = 1.0) -> Path:
    with Metrics(folder, tensorboard=False, resume_step=resume_step) as metrics:
        for step in steps:
            metrics.log(step, loss=loss)
    return folder / "metrics.jsonl"


def test_one_json_line_per_step_readable_at_once(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, tensorboard=False, resume_step=0)
    metrics.log(0, loss=torch.tensor(2.5), lr=np.float32(0.5), skipped=np.int64(1))
    metrics.log(1, loss=2.25, valid_loss=2.4)
    # Nothing was flushed or closed: this is what a kill would leave.
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [
        {"step": 0, "loss": 2.5, "lr": 0.5, "skipped": 1},
        {"step": 1, "loss": 2.25, "valid_loss": 2.4},
    ]
    metrics.close()
    metrics.close()


def test_numbers_that_are_not_finite_stay_json_and_come_back(tmp_path: Path) -> None:
    with Metrics(tmp_path, tensorboard=False, resume_step=0) as metrics:
        metrics.log(0, loss=math.nan, norm=math.inf, other=-math.inf)
    text = (tmp_path / "metrics.jsonl").read_text()

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    json.loads(text, parse_constant=refuse)
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(line["loss"]) and line["norm"] == math.inf and line["other"] == -math.inf


def test_resuming_drops_the_steps_that_are_repeated_and_keeps_them_aside(tmp_path: Path) -> None:
    write(tmp_path, range(10), 0, loss=1.0)
    path = write(tmp_path, range(6, 8), 6, loss=2.0)
    assert [(line["step"], line["loss"]) for line in read_metrics(path)] == [
        *((step, 1.0) for step in range(6)), (6, 2.0), (7, 2.0),
    ]  # fmt: skip
    aside = [json.loads(line) for line in (tmp_path / "metrics.discarded.jsonl").read_text().splitlines()]
    assert [line["step"] for line in aside] == [6, 7, 8, 9]


@pytest.mark.parametrize("cut", range(1, 20))
def test_a_line_torn_at_any_byte_is_dropped(tmp_path: Path, cut: int) -> None:
    path = write(tmp_path, range(3), 0)
    path.write_bytes(path.read_bytes()[:-cut])
    assert [line["step"] for line in read_metrics(path)] == [0, 1]
    write(tmp_path, range(2, 4), 2)
    assert [line["step"] for line in read_metrics(path)] == [0, 1, 2, 3]
    assert not (tmp_path / "metrics.discarded.jsonl").exists()


@pytest.mark.parametrize("damage", [b'{"step": 1, "lo\n', b"[]\n", b'{"loss": 1.0}\n', b"\0\0\0\n", b"\n"])
def test_damage_before_the_last_line_is_refused_and_nothing_changes(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    data = b'{"step": 0, "loss": 1.0}\n' + damage + b'{"step": 2, "loss": 1.0}\n'
    path.write_bytes(data)
    with pytest.raises(UserError, match="line 2"):
        Metrics(tmp_path, tensorboard=False, resume_step=1)
    assert path.read_bytes() == data


def test_reading_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_a_text_is_not_a_metric(tmp_path: Path) -> None:
    with Metrics(tmp_path, tensorboard=False, resume_step=0) as metrics, pytest.raises(TypeError):
        metrics.log(0, loss="low")
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_tensorboard_shows_each_step_once_after_resuming(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps, resume_step, loss in ((range(8), 0, 1.0), (range(5, 7), 5, 2.0)):
        with Metrics(tmp_path, tensorboard=True, resume_step=resume_step) as metrics:
            for step in steps:
                metrics.log(step, loss=loss)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    points = [(point.step, point.value) for point in events.Scalars("loss")]
    assert points == [*((step, 1.0) for step in range(5)), (5, 2.0), (6, 2.0)]


def test_picture_shows_losses_rate_and_baselines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    with Metrics(tmp_path, tensorboard=False, resume_step=0) as metrics:
        for step in range(20):
            valid = {"valid_loss": 5.1 - 0.1 * step} if step % 5 == 0 else {}
            metrics.log(step, loss=5 - 0.1 * step, lr=1e-3, tokens=(step + 1) * 1000, **valid)
    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))[1]
    )
    plot_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png", {"unigram": 4.2})
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    top, bottom = figures[0].axes
    assert [list(line.get_xdata())[:2] for line in top.lines[:2]] == [[1000, 2000], [1000, 6000]]
    assert list(top.lines[2].get_ydata()) == [4.2, 4.2] and top.lines[2].get_linestyle() == "--"
    assert [text.get_text() for text in top.texts] == ["unigram 4.200"]
    assert top.get_ylabel() == "loss (nats per token)"
    assert (bottom.get_xlabel(), bottom.get_ylabel()) == ("tokens", "learning rate")


def test_picture_counts_steps_where_a_line_has_no_tokens(tmp_path: Path) -> None:
    path = write(tmp_path, range(3), 0, loss=math.nan)
    plot_loss(path, tmp_path / "loss.png", {})
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_to_draw_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, range(0), 0)
    with pytest.raises(UserError, match="nothing to draw"):
        plot_loss(path, tmp_path / "loss.png", {})
    assert not (tmp_path / "loss.png").exists()
