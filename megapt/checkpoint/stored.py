"""Reading safetensors files: any bytes of any tensor, checksummed while they are in the processor's cache.

The library gives whole tensors as mapped memory, whose pages come one fault at a time; reading large pieces straight
to where they belong keeps up with a fast disk.
"""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import dataclass
from math import prod
from pathlib import Path

from megapt.checkpoint.index import file_problem
from megapt.checkpoint.rawfile import WIDTHS
from megapt.checkpoint.strict import Malformed, dimensions, member, parse, typed

CHUNK = 1 << 20
_MOST_HEADER = 100_000_000  # as the format has it


class Damaged(Exception):
    """What is wrong with a file, in words that go on after its name."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: dtype as safetensors names it, and where its bytes lie, counted from the file's begin."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class StoredFile:
    """An open safetensors file of `size` bytes and its checked header; Damaged says what is wrong with it.

    The header must be as `RawFile` writes it, so that a flipped byte shows even where no tensor depends on it. Threads
    may share it.
    """

    def __init__(self, folder: Path, name: str, size: int) -> None:
        if problem := file_problem(folder, name, size):
            raise Damaged(problem)
        try:
            self._file = open(folder / name, "rb", buffering=0)  # noqa: SIM115 (open as long as this lives)
        except OSError as error:
            raise Damaged(str(error.strerror)) from None
        try:
            self.tensors = self._header(size)
        except Malformed as error:
            raise Damaged(f"its header is damaged: {error}") from None

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()

    def read(self, out: memoryview, begin: int, crc: int = 0) -> int:
        """Fill `out` from position `begin` on; returns the CRC-32 of its bytes, going on from `crc`."""
        for at in range(0, len(out), CHUNK):
            piece = out[at : at + CHUNK]
            self._read(piece, begin + at)
            crc = zlib.crc32(piece, crc)
        return crc

    def _read(self, out: memoryview, begin: int) -> None:
        done = 0
        while done < len(out):
            try:
                got = os.preadv(self._file.fileno(), [out[done:]], begin + done)
            except OSError as error:
                raise Damaged(f"it cannot be read: {error.strerror}") from None
            if got == 0:
                raise Damaged("it ends too early")
            done += got

    def _header(self, size: int) -> dict[str, Stored]:
        length = bytearray(8)
        if size < 8:
            raise Malformed(f"a file of {size} bytes has none")
        self._read(memoryview(length), 0)
        count = int.from_bytes(length, "little")
        if not 0 < count <= min(size - 8, _MOST_HEADER):
            raise Malformed(f"its length is given as {count}, in a file of {size} bytes")
        text = bytearray(count)
        self._read(memoryview(text), 8)
        tree = typed(parse(bytes(text)), dict, "it")
        if json.dumps(tree, separators=(",", ":")).encode() != text.rstrip(b" "):
            raise Malformed("it is not the shortest form of its JSON")
        if tree.pop("__metadata__", None) != {"format": "pt"}:
            raise Malformed('its metadata is not {"format":"pt"}')
        tensors = {}
        at = 0
        for key, value in tree.items():
            stored = _stored(key, value, 8 + count)
            if stored.begin != 8 + count + at:
                raise Malformed(f"{ascii(key)} does not begin where the tensor before it ends")
            tensors[key], at = stored, stored.end - 8 - count
        if 8 + count + at != size:
            raise Malformed(f"the tensors end at {8 + count + at} of {size} bytes")
        return tensors


def _stored(key: str, value: object, base: int) -> Stored:
    try:
        tree = typed(value, dict, "the entry")
        dtype, shape, offsets = member(tree, "dtype", str), dimensions(tree, "shape"), dimensions(tree, "data_offsets")
        if dtype not in WIDTHS:
            raise Malformed(f"the dtype {ascii(dtype)} is unknown")
        if len(tree) != 3 or len(offsets) != 2 or offsets[1] - offsets[0] != prod(shape) * WIDTHS[dtype]:
            raise Malformed(f"{list(offsets)} are not the offsets of {dtype} {list(shape)}")
    except Malformed as error:
        raise Malformed(f"{ascii(key)}: {error}") from None
    return Stored(dtype, shape, base + offsets[0], base + offsets[1])
