"""Outputs that appear under their final name only when whole."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

StrPath = str | os.PathLike[str]


def temporary_name(path: StrPath) -> Path:
    """A name in the same folder as `path` (so that a rename is atomic) which no other writer picks."""
    path = Path(path)
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")


def sync_folder(path: StrPath) -> None:
    """Make the renames done inside this folder survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: StrPath, data: bytes) -> None:
    """Write `data` to `path` so that a reader sees the old file or the new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)
