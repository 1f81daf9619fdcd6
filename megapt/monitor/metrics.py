"""The curve of a run: one JSON line per logged step, TensorBoard beside it, and a picture of both."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megapt.errors import UserError
from megapt.files import sync_folder, write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FILE_NAME = "metrics.jsonl"
DISCARDED_NAME = "metrics.discarded.jsonl"
TENSORBOARD_NAME = "tensorboard"

# JSON has no such numbers; as strings they stay readable for every parser and still say what happened.
_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class Metrics:
    """Writer of ``metrics.jsonl`` (and of TensorBoard events in ``tensorboard/``); rank 0 alone makes one.

    A resumed run repeats the steps after its checkpoint, so the lines with ``step >= resume_step`` are taken
    out first: the file is the curve of the run as it counts, each step once. What is taken out is appended to
    ``metrics.discarded.jsonl``. A last line torn by a kill is dropped; damage elsewhere is refused.

    Args:
        folder: folder of the run; must exist.
        tensorboard: whether to write TensorBoard events too.
        resume_step: first step this process will log; 0 for a fresh run.

    Raises:
        UserError: an existing ``metrics.jsonl`` is damaged before its last line.
    """

    def __init__(self, folder: str | os.PathLike[str], tensorboard: bool, resume_step: int) -> None:
        self.path = Path(folder) / FILE_NAME
        _rewind(self.path, resume_step)
        self._file = open(self.path, "ab", buffering=0)
        sync_folder(self.path.parent)
        self._writer: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(Path(folder) / TENSORBOARD_NAME), purge_step=resume_step)

    def log(self, step: int, **scalars: Any) -> None:
        """Append one line ``{"step": step, ...}``; it is with the operating system when this returns.

        Scalars are Python numbers, or NumPy or torch values of one element (a tensor on a device is waited
        for). ``plot_loss`` knows the names ``loss``, ``valid_loss``, ``lr`` and ``tokens``.
        """
        numbers = {name: _number(value) for name, value in scalars.items()}
        # One unbuffered write per line: a killed process leaves at most the last line torn.
        self._file.write((json.dumps({"step": step, **_to_json(numbers)}) + "\n").encode())
        if self._writer is not None:
            for name, value in numbers.items():
                self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        """Force everything logged so far to the disk; worth a call before a checkpoint is committed."""
        os.fsync(self._file.fileno())
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Flush and close both files."""
        if not self._file.closed:
            self.flush()
            self._file.close()
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All lines of a ``metrics.jsonl``, in the order they were written; a torn last line is left out.

    Raises:
        UserError: the file does not exist, or a line other than the last is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"metrics: there is no file {path}; give the {FILE_NAME} in the folder of a run.")
    return _parse(path)


def plot_loss(
    metrics_path: str | os.PathLike[str], png_path: str | os.PathLike[str], baselines: Mapping[str, float]
) -> None:
    """Draw the training and validation loss, with the learning rate on a small panel below, as a PNG file.

    Args:
        metrics_path: a ``metrics.jsonl``.
        png_path: the picture; replaced whole if it exists.
        baselines: losses, in nats per token, to draw as labelled dashed lines, such as ``{"unigram": 7.1}``.

    The horizontal axis is tokens where every line has ``tokens``, else the step.

    Raises:
        UserError: as ``read_metrics``, or no line holds a ``loss``.
    """
    from io import BytesIO

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    lines = read_metrics(metrics_path)
    if not any("loss" in line for line in lines):
        raise UserError(f"metrics: {metrics_path} holds no line with a loss yet; there is nothing to draw.")
    axis = "tokens" if all("tokens" in line for line in lines) else "step"
    # A figure of its own canvas needs no global backend, so a caller's pyplot state is left alone.
    figure = Figure(figsize=(8.0, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    _draw_losses(top, lines, axis, baselines)
    _draw_series(bottom, lines, axis, "lr", color="tab:gray", linewidth=1.2)
    bottom.set_ylabel("learning rate")
    bottom.set_ylim(bottom=0)
    bottom.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    bottom.set_xlabel(axis)
    bottom.xaxis.set_major_formatter(EngFormatter(sep=""))
    for panel in (top, bottom):
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    picture = BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    write_whole(Path(png_path), picture.getvalue())


def _draw_losses(panel: Axes, lines: list[dict[str, Any]], axis: str, baselines: Mapping[str, float]) -> None:
    _draw_series(panel, lines, axis, "loss", label="train", color="tab:blue", linewidth=1.0)
    if any("valid_loss" in line for line in lines):
        _draw_series(
            panel, lines, axis, "valid_loss", label="valid", color="tab:orange", marker="o", markersize=3.5
        )
    for name, value in baselines.items():
        panel.axhline(value, color="black", linestyle="--", linewidth=0.8, alpha=0.6)
        panel.annotate(
            f"{name} {value:.3f}",
            xy=(1.0, value),
            xycoords=("axes fraction", "data"),
            xytext=(-2, 2),
            textcoords="offset points",
            ha="right",
            va="bottom",
            fontsize=8,
        )
    panel.set_ylabel("loss (nats per token)")
    panel.legend(frameon=False, loc="upper right")


def _draw_series(panel: Axes, lines: list[dict[str, Any]], axis: str, name: str, **style: Any) -> None:
    points = [(line[axis], line[name]) for line in lines if name in line]
    panel.plot([x for x, _ in points], [y for _, y in points], **style)


def _rewind(path: Path, resume_step: int) -> None:
    if not path.exists():
        return
    lines = _parse(path)
    kept = [line for line in lines if line["step"] < resume_step]
    discarded = [line for line in lines if line["step"] >= resume_step]
    if discarded:
        with open(path.with_name(DISCARDED_NAME), "ab") as file:
            file.write(_encode(discarded))
            file.flush()
            os.fsync(file.fileno())
    data = _encode(kept)
    # Rewriting also takes away a torn last line, onto which the next one would otherwise be glued.
    if data != path.read_bytes():
        write_whole(path, data)


def _parse(path: Path) -> list[dict[str, Any]]:
    # A kill between two bytes leaves a piece without a newline at the end; a whole line always has one.
    whole, _, _torn = path.read_bytes().rpartition(b"\n")
    lines = []
    for number, text in enumerate(whole.split(b"\n") if whole else (), start=1):
        try:
            values = json.loads(text)
            lines.append({"step": int(values["step"]), **_from_json(values)})
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"metrics: line {number} of {path} is not a JSON object with a step ({error!r}); only a torn "
                f"last line is expected. Repair that line, or move the file away to go on with a new one."
            ) from error
    return lines


def _encode(lines: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(_to_json(line)) + "\n" for line in lines).encode()


def _number(value: Any) -> int | float:
    number = value.item() if hasattr(value, "item") else value
    if not isinstance(number, int | float):
        raise TypeError(f"a metric is a number, not {type(value).__name__}")
    return number


def _to_json(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }


def _from_json(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _NOT_FINITE.get(value, value) if isinstance(value, str) else value
        for name, value in values.items()
    }
