"""The header and the columns of Megatron's `.idx` files.

An `.idx` is a header of 34 bytes (magic, version, dtype code, number of sequences Ns, number of document boundaries
Nd), then i32[Ns] lengths in tokens, i64[Ns] offsets into the `.bin` in bytes, i64[Nd] document boundaries in sequence
numbers, the first of them 0, and for multimodal corpora i8[Ns] modes. All numbers are little-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from megapt.data.storage import Storage
from megapt.errors import UserError
from megapt.files import StrPath

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {code: np.dtype(name) for code, name in
          {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}.items()}
CODES = {dtype: code for code, dtype in DTYPES.items()}
FLOAT_CODES = {6: "float64", 7: "float32"}
MAX_LENGTH = 2**31 - 1  # tokens of one sequence


@dataclass(frozen=True)
class Header:
    """What an `.idx` says of itself: the tokens' dtype, the numbers of sequences and of document boundaries."""

    dtype: np.dtype[Any]
    sequences: int
    boundaries: int

    @property
    def lengths_at(self) -> int:
        """Byte at which the lengths begin."""
        return HEADER.size

    @property
    def offsets_at(self) -> int:
        """Byte at which the offsets begin."""
        return HEADER.size + 4 * self.sequences

    @property
    def boundaries_at(self) -> int:
        """Byte at which the document boundaries begin."""
        return HEADER.size + 12 * self.sequences

    @property
    def end(self) -> int:
        """Bytes of the whole `.idx`, modes left out."""
        return self.boundaries_at + 8 * self.boundaries

    def pack(self) -> bytes:
        """The header as it stands in the file."""
        return HEADER.pack(MAGIC, VERSION, CODES[self.dtype], self.sequences, self.boundaries)


def read_header(idx: Storage) -> Header:
    """The header of an `.idx`. UserError names the field that is wrong; the file's size is not looked at."""
    if idx.size < HEADER.size:
        raise UserError(f"{idx.name} is cut short: {idx.size} bytes, but its header alone takes {HEADER.size}")
    magic, version, code, sequences, boundaries = HEADER.unpack(idx.sample([(0, HEADER.size)])[0].tobytes())
    if magic != MAGIC:
        raise UserError(f"{idx.name} is not a Megatron index: it starts with {magic!r} instead of {MAGIC!r}")
    if version != VERSION:
        raise UserError(f"{idx.name} has version {version}; this reader knows version {VERSION}")
    if code not in DTYPES:
        found = FLOAT_CODES.get(code, "unknown")
        known = ", ".join(f"{c} {d.name}" for c, d in DTYPES.items())
        raise UserError(f"{idx.name} has dtype code {code} ({found}); tokens are integers: {known}")
    if boundaries < 1:
        raise UserError(f"{idx.name} is damaged: no document boundaries, but there is at least the first, 0")
    return Header(DTYPES[code], int(sequences), int(boundaries))


def write_index(file: IO[bytes], header: Header, lengths: Callable[[], Iterable[npt.NDArray[np.int32]]],
                boundaries: Iterable[npt.NDArray[np.int64]]) -> int:
    """Write an `.idx` of sequences that lie back to back, and return the bytes of tokens that they make.

    `lengths()` gives all lengths, a part at a time and the same twice; `boundaries` all document boundaries.
    """
    file.write(header.pack())
    for part in lengths():
        file.write(part.astype("<i4").data)
    at = 0
    for part in lengths():
        ends = at + np.cumsum(part.astype(np.int64) * header.dtype.itemsize)
        file.write(np.concatenate([[at], ends[:-1]]).astype("<i8").data)
        at = int(ends[-1])
    for bounds in boundaries:
        file.write(bounds.astype("<i8").data)
    return at


def cast_tokens(tokens: npt.NDArray[np.integer[Any]], dtype: np.dtype[Any], first: int, target: StrPath
                ) -> npt.NDArray[np.integer[Any]]:
    """Tokens [n] in another integer type. UserError if one does not fit; `first` is the number of the first of them."""
    if len(tokens) and not np.can_cast(tokens.dtype, dtype, "safe"):
        limits, low, high = np.iinfo(dtype), int(tokens.min()), int(tokens.max())
        if low < limits.min or high > limits.max:
            worst = low if low < limits.min else high
            raise UserError(f"token {first + int(np.argmax(tokens == worst))}: id {worst} does not fit {dtype.name} of "
                            f"{target} ({limits.min} to {limits.max})")
    return np.ascontiguousarray(tokens, dtype)
