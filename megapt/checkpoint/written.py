"""What one rank writes: rectangles of global tensors into files of its own, and a note of them for the commit."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from megapt.checkpoint.rawfile import RawFile, Slot
from megapt.files import sync_file

FILE_BYTES = 2 << 30  # a rank's tensors are spread over files of about this size


class Rectangle(NamedTuple):
    """A part of a global tensor of one kind. shape: the global one; offset and extent: per dimension; key: its name in
    the file, which no other rectangle of the rank has."""

    name: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    extent: tuple[int, ...]
    key: str

    @property
    def slot(self) -> Slot:
        return Slot(self.key, self.dtype, self.extent)

    @classmethod
    def of(cls, row: Sequence[Any]) -> Rectangle:
        """Back from JSON, which has no tuples."""
        name, kind, dtype, shape, offset, extent, key = row
        return cls(name, kind, dtype, tuple(shape), tuple(offset), tuple(extent), key)


@dataclass
class Written:
    """rows: each rectangle with the file that holds it and its checksum; files: the bytes of each."""

    rows: list[tuple[Rectangle, str, str]] = field(default_factory=list)
    files: dict[str, int] = field(default_factory=dict)

    def note(self, rank: int, folder: int) -> None:
        """Leave this in an open folder as the rank's note, whole or not at all."""
        name = note_name(rank)
        descriptor = os.open(f".{name}", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666, dir_fd=folder)
        with open(descriptor, "wb") as file:
            file.write(json.dumps({"rows": self.rows, "files": self.files}, separators=(",", ":")).encode())
            sync_file(file)
        os.rename(f".{name}", name, src_dir_fd=folder, dst_dir_fd=folder)
        os.fsync(folder)

    @classmethod
    def read(cls, path: Path) -> Written:
        tree = json.loads(path.read_bytes())
        return cls([(Rectangle.of(row), file, crc) for row, file, crc in tree["rows"]], tree["files"])


def note_name(rank: int) -> str:
    return f"rank-{rank:05d}.json"


class RankFiles:
    """The files of one rank in a folder, one open at a time; `rectangles` must come in their order.

    The folder is opened once: should another one stand in its place later, nothing is written there.
    """

    def __init__(self, folder: Path, rank: int, rectangles: Sequence[Rectangle]) -> None:
        self.written = Written()
        self._folder, self._rank = folder, rank
        self._groups = self._split(rectangles)
        self._names = (f"rank-{rank:05d}-{number:03d}.safetensors" for number in range(len(rectangles)))
        self._file: RawFile | None = None
        self._left = 0
        self._open = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    @staticmethod
    def _split(rectangles: Sequence[Rectangle]) -> Iterator[list[Rectangle]]:
        group: list[Rectangle] = []
        size = 0
        for rectangle in rectangles:
            size += rectangle.slot.nbytes
            if group and size > FILE_BYTES:
                yield group
                group, size = [], rectangle.slot.nbytes
            group.append(rectangle)
        if group:
            yield group

    def add(self, rectangle: Rectangle, data: memoryview) -> None:
        """Write the next rectangle, row by row."""
        if self._left == 0:
            self._close_file()
            group = next(self._groups)
            self._file = RawFile(self._folder / next(self._names), [r.slot for r in group], self._open)
            self._left = len(group)
        assert self._file is not None
        crc = self._file.append(data)
        self._left -= 1
        self.written.rows.append((rectangle, self._file.path.name, crc))

    def close(self) -> None:
        """Everything is on disk, and the rank's note beside it says so."""
        assert self._left == 0 and next(self._groups, None) is None, "rectangles were announced and not written"
        self._close_file()
        self.written.note(self._rank, self._open)

    def abandon(self) -> None:
        """Let go of everything, after `close` or an error."""
        if self._file is not None:
            self._file.abandon()
            self._file = None
        os.close(self._open)

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self.written.files[self._file.path.name] = self._file.size
            self._file = None
