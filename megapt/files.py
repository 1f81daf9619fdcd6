"""Outputs that appear under their final name only when whole."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

StrPath = str | os.PathLike[str]

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def temporary_name(path: StrPath) -> Path:
    """A name in the same folder as `path` (so that a rename is atomic) which no other writer picks."""
    path = Path(path)
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")


def sync_folder(path: StrPath) -> None:
    """Make the names made or renamed in this folder survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(file: IO[bytes]) -> None:
    """Make what was written to an open file survive a power cut."""
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def open_whole(path: StrPath, make_folder: bool = True) -> Iterator[IO[bytes]]:
    """A file to write that appears as `path` when the `with` block ends, and never if it raises.

    A reader at any moment, and after any crash, sees the old file or the new one. `make_folder`: make the folder
    too where it is missing. An OSError for want of room, or about the temporary name, comes out with `path` as its
    file name, which those of an open file lack.
    """
    path = Path(path)
    if make_folder:
        path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        with open(temporary, "xb", buffering=1 << 20) as file:
            yield file
            sync_file(file)
        os.replace(temporary, path)
    except OSError as error:
        full = error.filename is None and error.errno in DISK_FULL
        if full or error.filename == str(temporary):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_whole(path: StrPath, data: bytes, make_folder: bool = True) -> None:
    """Put `data` at `path` as `open_whole` does."""
    with open_whole(path, make_folder) as file:
        file.write(data)
