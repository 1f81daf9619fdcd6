"""Megatron's `.bin/.idx` token files, byte for byte: a memory-mapped reader and an all-or-nothing writer.

`.bin` is raw little-endian tokens and nothing else. `.idx` is a header of 34 bytes (magic, version, dtype
code, number of sequences Ns, number of document boundaries Nd), then i32[Ns] lengths in tokens, i64[Ns]
offsets in bytes, i64[Nd] document boundaries in sequence numbers, the first of them 0.
"""

from __future__ import annotations

import hashlib
import os
import struct
from array import array
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from megapt.errors import UserError
from megapt.files import StrPath, sync_folder, temporary_name

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {code: np.dtype(name) for code, name in
          {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}.items()}
CODES = {dtype: code for code, dtype in DTYPES.items()}
FLOAT_CODES = {6: "float64", 7: "float32"}

_PROBES = 32  # neighbouring sequences looked at on opening
_BLOCK = 4096  # bytes per block of the fingerprint
_BLOCKS = 64  # blocks per file of the fingerprint
_CHUNK = 1 << 20  # index entries handled at a time by full passes

Tokens = npt.NDArray[np.integer[Any]]


def best_dtype(vocabulary: int) -> np.dtype[Any]:
    """The dtype that holds ids below `vocabulary`: u16 below 65500 (Megatron's bound), else i32."""
    return DTYPES[8] if vocabulary < 65500 else DTYPES[4]


class IndexedReader:
    """Memory-mapped tokens of `{prefix}.bin` described by `{prefix}.idx`.

    Opening reads the header and a few dozen index entries, whatever the size of the corpus; `verify` checks
    all.

    Attributes: `dtype` of the tokens; `num_sequences`, `num_documents`, `num_tokens`; the memory-mapped
    read-only arrays `lengths` (i32 [num_sequences], tokens), `offsets` (i64 [num_sequences], bytes) and
    `document_boundaries` (i64 [num_documents + 1], sequence numbers).

    The packed stream is all sequences in index order, end to end. Writers lay sequences back to back, and
    then the stream is the `.bin` itself. Where the index says otherwise (subsets, reordered indices), the
    stream's positions are computed once from the lengths: O(num_sequences) time and 8 bytes per sequence.

    Raises UserError if a file is missing, damaged, or does not belong to the other.
    """

    def __init__(self, prefix: StrPath) -> None:
        self.prefix = os.fspath(prefix)
        self.idx_path, self.bin_path = Path(self.prefix + ".idx"), Path(self.prefix + ".bin")
        self._idx, self._bin = _map_file(self.idx_path), _map_file(self.bin_path)
        self._read_header()
        self._check_ends()
        self.packed = self._looks_packed()
        if self.packed:
            self._check_size()
            self._stream: Tokens = self._bin.view(self.dtype)
            self.num_tokens = len(self._stream)
        else:
            self._check_entries()
            self._ends = np.cumsum(self.lengths, dtype=np.int64)
            self.num_tokens = int(self._ends[-1])

    def __len__(self) -> int:
        return self.num_sequences

    def sequence(self, i: int) -> Tokens:
        """Sequence `i` as a read-only view [lengths[i]] of the file. IndexError outside [0,
        num_sequences)."""
        if not 0 <= i < self.num_sequences:
            raise IndexError(f"sequence {i} of {self.num_sequences} in {self.bin_path}")
        offset, size = int(self.offsets[i]), int(self.lengths[i]) * self.dtype.itemsize
        if size < 0 or offset < 0 or offset + size > len(self._bin):
            raise self._bad_entry(i)
        return self._bin[offset:offset + size].view(self.dtype)

    def tokens(self, start: int, count: int) -> Tokens:
        """Tokens [start, start + count) of the packed stream, as a view where the files allow one.

        IndexError unless they lie inside [0, num_tokens).
        """
        if start < 0 or count < 0 or start + count > self.num_tokens:
            raise IndexError(f"tokens [{start}, {start + count}) of {self.num_tokens} in {self.bin_path}")
        if self.packed:
            return self._stream[start:start + count]
        parts: list[Tokens] = []
        i = int(np.searchsorted(self._ends, start, side="right"))
        skip = start - (int(self._ends[i - 1]) if i else 0)
        while count > 0:
            part = self.sequence(i)[skip:skip + count]
            parts.append(part)
            count, skip, i = count - len(part), 0, i + 1
        return np.concatenate(parts) if parts else np.empty(0, self.dtype)

    def token_range(self, first: int, last: int) -> tuple[int, int]:
        """The range [start, stop) of the packed stream that sequences [first, last) fill."""
        if not 0 <= first <= last <= self.num_sequences:
            raise IndexError(f"sequences [{first}, {last}) of {self.num_sequences} in {self.idx_path}")
        start, stop = self._position(first), self._position(last)
        if not 0 <= start <= stop <= self.num_tokens:
            raise UserError(f"{self.idx_path} is damaged: sequences [{first}, {last}) would span tokens "
                            f"[{start}, {stop}) of {self.num_tokens}; rebuild the data")
        return start, stop

    def fingerprint(self) -> str:
        """A hash of both files' sizes and of up to 64 blocks of 4 KiB of each, evenly spread, ends included.

        It tells apart corpora that were rebuilt, cut or mixed up, at the cost of 128 small reads; an edit of
        a few bytes between the blocks of a large file goes unseen. The path and the time of change do not
        count.
        """
        digest = hashlib.blake2b(digest_size=16)
        for data in (self._idx, self._bin):
            digest.update(struct.pack("<Q", len(data)))
            if len(data) <= _BLOCK * _BLOCKS:
                digest.update(data.tobytes())
                continue
            for k in range(_BLOCKS):
                start = (len(data) - _BLOCK) * k // (_BLOCKS - 1)
                digest.update(data[start:start + _BLOCK].tobytes())
        return digest.hexdigest()

    def verify(self) -> None:
        """Check every index entry against the files: O(num_sequences). UserError names the first bad one."""
        self._check_entries()
        boundaries = self.document_boundaries
        for start in range(0, len(boundaries), _CHUNK):
            block = boundaries[start:start + _CHUNK + 1]  # one entry shared with the next block
            falls = np.flatnonzero(block[1:] < block[:-1])
            if len(falls):
                at = start + int(falls[0])
                raise UserError(f"{self.idx_path} is damaged: document {at} would end at sequence "
                                f"{int(boundaries[at + 1])}, before its start {int(boundaries[at])}")
        if int(boundaries[-1]) != self.num_sequences:
            raise UserError(f"{self.idx_path} is incomplete: its documents end at sequence "
                            f"{int(boundaries[-1])} of {self.num_sequences}; its writer did not close "
                            "the last document")

    def _read_header(self) -> None:
        path, size = self.idx_path, len(self._idx)
        if size < HEADER.size:
            raise UserError(f"{path} is cut short: {size} bytes, but its header alone takes {HEADER.size}")
        magic, version, code, sequences, boundaries = HEADER.unpack(self._idx[:HEADER.size].tobytes())
        if magic != MAGIC:
            raise UserError(f"{path} is not a Megatron index: it starts with {magic!r} instead of {MAGIC!r}")
        if version != VERSION:
            raise UserError(f"{path} has version {version}; this reader knows version {VERSION}")
        if code not in DTYPES:
            found = FLOAT_CODES.get(code, "unknown")
            known = ", ".join(f"{c} {d.name}" for c, d in DTYPES.items())
            raise UserError(f"{path} has dtype code {code} ({found}); tokens are integers: {known}")
        if boundaries < 1:
            raise UserError(f"{path} is damaged: no document boundaries, but there is at least the first, 0")
        expected = HEADER.size + 12 * sequences + 8 * boundaries
        if size == expected + sequences and sequences:
            raise UserError(f"{path} is {sequences} bytes longer than a text index: it carries modes of a "
                            "multimodal corpus, which are not supported")
        if size != expected:
            raise UserError(f"{path} has {size} bytes, but its header ({sequences} sequences, {boundaries} "
                            f"document boundaries) declares {expected}; it is cut short or "
                            "damaged: rebuild or copy it again")
        self.dtype = DTYPES[code]
        self.num_sequences, self.num_documents = int(sequences), int(boundaries) - 1
        at = HEADER.size
        self.lengths = np.frombuffer(self._idx, "<i4", sequences, at)
        self.offsets = np.frombuffer(self._idx, "<i8", sequences, at + 4 * sequences)
        self.document_boundaries = np.frombuffer(self._idx, "<i8", boundaries, at + 12 * sequences)

    def _check_ends(self) -> None:
        """What can be known of both files without reading all entries."""
        if len(self._bin) % self.dtype.itemsize:
            raise UserError(f"{self.bin_path} has {len(self._bin)} bytes, not a multiple of "
                            f"{self.dtype.itemsize} ({self.dtype.name}, as {self.idx_path} says); it is cut "
                            "short or damaged")
        first, last = int(self.document_boundaries[0]), int(self.document_boundaries[-1])
        if first != 0 or not 0 <= last <= self.num_sequences:
            raise UserError(f"{self.idx_path} is damaged: document boundaries run from {first} to {last}, "
                            f"but must run from 0 to at most {self.num_sequences}")
        if self.num_sequences:
            size = self.dtype.itemsize
            end = int(self.offsets[-1]) + int(self.lengths[-1]) * size
            if int(self.lengths[-1]) < 0 or int(self.offsets[-1]) < 0 or end > len(self._bin):
                raise self._bad_entry(self.num_sequences - 1)

    def _looks_packed(self) -> bool:
        """Whether the first and a sample of all sequences lie back to back from the start of the `.bin`."""
        if not self.num_sequences:
            return True
        probes = min(_PROBES, self.num_sequences - 1)
        at = np.array([(self.num_sequences - 2) * k // max(probes - 1, 1) for k in range(probes)], np.int64)
        ends = self.offsets[at] + self.lengths[at].astype(np.int64) * self.dtype.itemsize
        return int(self.offsets[0]) == 0 and bool((ends == self.offsets[at + 1]).all())

    def _check_size(self) -> None:
        declared = 0
        if self.num_sequences:
            declared = int(self.offsets[-1]) + int(self.lengths[-1]) * self.dtype.itemsize
        if declared != len(self._bin):
            raise UserError(f"{self.bin_path} has {len(self._bin)} bytes, but {self.idx_path} declares "
                            f"{declared}; the two do not belong together: rebuild or copy them again")

    def _check_entries(self) -> None:
        item, expected = self.dtype.itemsize, 0
        for start in range(0, self.num_sequences, _CHUNK):
            offsets = self.offsets[start:start + _CHUNK]
            lengths = self.lengths[start:start + _CHUNK].astype(np.int64)
            # Compared by subtraction, since a damaged offset near 2^63 would make a sum wrap around.
            bad = (lengths < 0) | (offsets < 0) | (offsets > len(self._bin) - lengths * item)
            if self.packed:
                bad |= offsets != expected + np.cumsum(lengths * item) - lengths * item
            if bad.any():
                raise self._bad_entry(start + int(np.argmax(bad)))
            expected += int(lengths.sum()) * item

    def _position(self, i: int) -> int:
        if i == self.num_sequences:
            return self.num_tokens
        if self.packed:
            return int(self.offsets[i]) // self.dtype.itemsize
        return int(self._ends[i - 1]) if i else 0

    def _bad_entry(self, i: int) -> UserError:
        offset, length = int(self.offsets[i]), int(self.lengths[i])
        return UserError(f"{self.idx_path} places sequence {i} of {self.num_sequences} ({length} tokens of "
                         f"{self.dtype.itemsize} bytes) at byte {offset}, which does not fit {self.bin_path} "
                         f"of {len(self._bin)} bytes; one of the two is cut short or damaged: rebuild "
                         "or copy it again")


class IndexedWriter:
    """Writes `{prefix}.bin` and `{prefix}.idx`; both appear only when the `with` block ends without an
    exception.

    One document is one sequence, as Megatron's preprocessing lays it without sentence splitting; an empty
    document adds a boundary but no sequence. Memory: 12 bytes per document. The `.idx` comes last, so a pair
    with an `.idx` is a whole pair; an earlier pair of that name stays until the new one is complete.
    """

    def __init__(self, prefix: StrPath, dtype: npt.DTypeLike) -> None:
        self.dtype = np.dtype(dtype).newbyteorder("<")
        if self.dtype not in CODES:
            raise UserError(f"token files cannot hold {self.dtype.name}; one of "
                            f"{', '.join(d.name for d in CODES)} is needed")
        self.prefix = os.fspath(prefix)
        self.idx_path, self.bin_path = Path(self.prefix + ".idx"), Path(self.prefix + ".bin")
        self.num_tokens = 0
        self._limits = np.iinfo(self.dtype)
        self._lengths, self._boundaries = array("i"), array("q", [0])
        self._open_length = 0
        self._idx_temporary = temporary_name(self.idx_path)
        self._bin_temporary = temporary_name(self.bin_path)

    @property
    def num_documents(self) -> int:
        """Documents closed so far."""
        return len(self._boundaries) - 1

    def __enter__(self) -> Self:
        self.bin_path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self._bin_temporary, "xb", buffering=1 << 20)  # noqa: SIM115
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self._commit()
        finally:
            self._file.close()
            self._bin_temporary.unlink(missing_ok=True)
            self._idx_temporary.unlink(missing_ok=True)

    def add_document(self, tokens: Sequence[int] | Tokens) -> None:
        """Add one document, possibly empty. UserError if an id does not fit the dtype."""
        self.extend(tokens)
        self.end_document()

    def extend(self, tokens: Sequence[int] | Tokens) -> None:
        """Add tokens to the document that is open; a document too long for memory comes in pieces."""
        if len(tokens) == 0:
            return
        values = np.asarray(tokens)
        if values.ndim != 1 or not np.issubdtype(values.dtype, np.integer):
            raise UserError(f"a document must be a flat list of integers, "
                            f"not {values.dtype} {list(values.shape)}")
        low, high = int(values.min()), int(values.max())
        if low < self._limits.min or high > self._limits.max:
            worst = low if low < self._limits.min else high
            raise UserError(f"token id {worst} does not fit {self.dtype.name} of {self.bin_path} "
                            f" ({self._limits.min} to {self._limits.max})")
        length = self._open_length + len(values)
        if length > 2**31 - 1:
            raise UserError(f"document {self.num_documents} has {length} tokens or more; the format holds at "
                            f"most {2**31 - 1} in one document: split it")
        self._file.write(values.astype(self.dtype).tobytes())
        self._open_length = length
        self.num_tokens += len(values)

    def end_document(self) -> None:
        """Close the open document: a sequence if it has tokens, and a boundary in any case."""
        if self._open_length:
            self._lengths.append(self._open_length)
            self._open_length = 0
        self._boundaries.append(len(self._lengths))

    def _commit(self) -> None:
        if self._open_length:
            raise RuntimeError(f"{self.bin_path}: the last document was not closed with end_document()")
        _flush_to_disk(self._file)
        with open(self._idx_temporary, "xb", buffering=1 << 20) as file:
            sequences, boundaries = len(self._lengths), len(self._boundaries)
            file.write(HEADER.pack(MAGIC, VERSION, CODES[self.dtype], sequences, boundaries))
            lengths = np.frombuffer(self._lengths, np.int32)
            file.write(lengths.astype("<i4", copy=False).data)
            at = 0
            for start in range(0, len(lengths), _CHUNK):
                sizes = lengths[start:start + _CHUNK].astype(np.int64) * self.dtype.itemsize
                ends = at + np.cumsum(sizes)
                file.write((ends - sizes).astype("<i8").tobytes())
                at = int(ends[-1])
            file.write(np.frombuffer(self._boundaries, np.int64).astype("<i8", copy=False).data)
            _flush_to_disk(file)
        # An old index must never describe the new tokens, not even between the two renames.
        self.idx_path.unlink(missing_ok=True)
        os.replace(self._bin_temporary, self.bin_path)
        os.replace(self._idx_temporary, self.idx_path)
        sync_folder(self.idx_path.parent)


def _flush_to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _map_file(path: Path) -> npt.NDArray[np.uint8]:
    if not path.is_file():
        raise UserError(f"{path} does not exist; give the common path of the .bin and .idx files, "
                        "without the ending")
    if path.stat().st_size == 0:
        return np.empty(0, np.uint8)  # an empty file cannot be mapped
    return np.asarray(np.memmap(path, np.uint8, mode="r"))
