"""The rows of a run: their columns, the file they are appended to, and one run beside an older one."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]

# What a row is of: rows of two runs with the same of these are about the same thing.
KEY = ("record", "op", "case", "impl", "pass", "mode", "dtype")

COLUMNS = (
    "record", "status", "reason", "op", "case", "impl", "kind", "pass", "mode", "dtype", "shape", "preset",
    "p20_us", "p50_us", "p80_us", "repeats", "timing", "bytes", "flops", "gb_per_s", "tflops", "percent_of_copy",
    "percent_of_copy_of_size", "percent_of_gemm", "percent_of_limit", "peak_bytes", "error", "torch_error",
    "error_allowed", "error_against", "registers", "spills", "emulated", "device", "name", "torch", "triton", "cuda",
    "python", "threads", "commit",
)  # fmt: skip


class Refused(ValueError):
    """The benchmark cannot do what was asked for; the message says why."""


def environment(device: torch.device) -> Row:
    """The columns that say where a row was measured. name: of the GPU or the processor."""
    import importlib.metadata

    try:
        triton: str | None = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    return {
        "device": device.type,
        "name": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "torch": torch.__version__,
        "triton": triton,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "commit": _commit(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        ran = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return ran.stdout.strip() or None


class Writer:
    """Appends rows to a file, each one whole and on the disk before the next is measured."""

    def __init__(self, path: Path | None, append: bool) -> None:
        self._file = None
        self.rows: list[Row] = []
        if path is None:
            return
        if path.exists() and not append:
            raise Refused(f"{path} exists: name another file, or give --append to add rows to it")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and (text := path.read_bytes()) and not text.endswith(b"\n"):
            raise Refused(f"{path} ends in the middle of a row; remove what follows its last line end")
        self._file = open(path, "a", encoding="utf-8")

    def write(self, row: Row) -> None:
        ordered = {column: row.get(column) for column in COLUMNS}
        self.rows.append(ordered)
        if self._file is not None:
            self._file.write(json.dumps(ordered) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())


def read(path: Path) -> list[Row]:
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or no JSON
        raise Refused(f"{path} holds no rows of this benchmark: {error}") from None
    if not rows:
        raise Refused(f"{path} holds no rows of this benchmark: it is empty")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or (absent := [c for c in COLUMNS if c not in row]):
            lack = f"lacks {', '.join(absent[:3])}" if isinstance(row, dict) else f"is a {type(row).__name__}"
            raise Refused(f"{path} holds no rows of this benchmark: line {number} {lack}")
    return rows


def check_comparable(old: Iterable[Row], device: Row) -> None:
    """Refused unless the rows were measured on such a device."""
    for row in old:
        for column in ("device", "name"):
            if row[column] != device[column]:
                raise Refused(
                    f"the rows to compare with are of {row['name']} ({row['device']}), and this is {device['name']} "
                    f"({device['device']}): times of two devices say nothing about the code"
                )


def compare(old: Iterable[Row], new: Iterable[Row], tolerance: float) -> tuple[list[str], bool]:
    """Lines about every row that was timed in both, and whether some time grew by more than `tolerance` (0.05: 5 %).

    A row that was timed in `old` and failed or was skipped in `new` counts as grown. Refused where both have rows of
    an operation whose shapes differ.
    """
    before = {tuple(row[c] for c in KEY): row for row in old}  # of several runs in one file, the last
    lines, worse = [], False
    for row in new:
        known = before.get(tuple(row[c] for c in KEY))
        if known is None or known["status"] != "ok":
            continue
        what = " ".join(str(row[c]) for c in KEY[1:] if row[c])
        if known["shape"] != row["shape"]:
            raise Refused(f"{what}: measured with {known['shape']} before and with {row['shape']} now")
        if row["status"] != "ok":
            lines.append(f"LOST    {what}: {row['reason']}")
            worse = True
            continue
        ratio = row["p50_us"] / known["p50_us"]
        if row["record"] == "ceiling":
            lines.append(f"ceiling {ratio:6.3f} x  {what}: {known['p50_us']:.1f} -> {row['p50_us']:.1f} us")
            continue
        slower = ratio > 1 + tolerance
        worse |= slower
        word = "SLOWER " if slower else "faster " if ratio < 1 - tolerance else "same   "
        lines.append(f"{word} {ratio:6.3f} x  {what}: {known['p50_us']:.1f} -> {row['p50_us']:.1f} us")
    return lines, worse
