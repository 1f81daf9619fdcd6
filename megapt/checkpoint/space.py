"""Room on the disk, asked for before anything is written."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from megapt.checkpoint.written import Rectangle
from megapt.errors import UserError

_DESCRIPTION = 1024  # bytes that files, notes and index spend on saying what one rectangle is, at most


def bytes_needed(rectangles: Iterable[Rectangle]) -> int:
    """That writing these takes on the disk."""
    return sum(rectangle.slot.nbytes + _DESCRIPTION for rectangle in rectangles)


def check_space(folder: Path, needed: int) -> None:
    """UserError unless the file system of `folder` has `needed` bytes left. One that tells no size is believed."""
    found = os.statvfs(folder)
    free = found.f_bavail * found.f_frsize
    if found.f_blocks and needed > free:
        raise UserError(
            f"it needs {readable(needed)}, but the file system of {folder} has {readable(free)} left; make room there, "
            "keep fewer checkpoints (checkpoint.keep), or use another disk"
        )


def readable(count: int) -> str:
    """Bytes in words: 1.5 GB."""
    value, unit = float(count), "bytes"
    for larger in ("KB", "MB", "GB", "TB", "PB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
