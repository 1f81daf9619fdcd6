"""Megatron's `.bin/.idx` token files, byte for byte: a reader that loads nothing and an all-or-nothing writer.

`.bin` is raw little-endian tokens and nothing else; `index_format` describes the `.idx`.
"""

from __future__ import annotations

import hashlib
import os
import struct
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from megapt.data.index_format import CODES, DTYPES, MAX_LENGTH, read_header
from megapt.data.pair_writer import PairWriter
from megapt.data.remote import CACHE_BYTES, BlockCache, RemoteColumn, RemoteFile, is_remote
from megapt.data.storage import LocalFile, Progress, Storage, sha256
from megapt.errors import UserError
from megapt.files import StrPath

_PROBES = 32  # neighbouring sequences looked at on opening
_BLOCK = 4096  # bytes per block of the fingerprint
_BLOCKS = 64  # blocks per file of the fingerprint
_CHUNK = 1 << 18  # index entries handled at a time by full passes
_PENDING = 1 << 16  # index entries that the writer holds in memory

Tokens = npt.NDArray[np.integer[Any]]
Int64 = npt.NDArray[np.int64]


def best_dtype(vocabulary: int) -> np.dtype[Any]:
    """The dtype that holds ids below `vocabulary`: u16 below 65500 (Megatron's bound), else i32."""
    return DTYPES[8] if vocabulary < 65500 else DTYPES[4]


class IndexedReader:
    """Tokens of `{prefix}.bin` described by `{prefix}.idx`: local files, or remote ones ("s3://bucket/corpus").

    Opening reads the header and a few dozen index entries, whatever the size of the corpus; `megapt data verify`
    checks all.

    Attributes: `dtype` of the tokens; `num_sequences`, `num_documents`, `num_tokens`; the read-only columns `lengths`
    (i32 [num_sequences], tokens), `offsets` (i64 [num_sequences], bytes), `document_boundaries` (i64 [num_documents
    + 1], sequence numbers) and, if `multimodal`, `modes` (i8 [num_sequences], else None). Local columns are
    memory-mapped arrays, which are not aligned: numpy copies them whole in some operations, `searchsorted` among them
    (`sequence_at` and `document_at` search without). Remote ones take an int, a slice of step 1, an array of numbers
    and `len`, and fetch what they are asked for.

    The packed stream is all sequences in index order, end to end. Writers lay sequences back to back, and
    then the stream is the `.bin` itself. Where the index says otherwise (subsets, reordered indices), the
    stream's positions are computed once from the lengths: O(num_sequences) time and 8 bytes per sequence, and
    for local files only.

    Args:
        prefix: common path or URL of the two files, without the ending.
        multimodal: whether the index ends with modes; the file does not say so itself.
        cache: folder for blocks of remote files, shared by the processes of a machine; default:
            `remote.default_folder()`.
        cache_bytes: most bytes of blocks kept in that folder.

    Raises UserError if a file is missing, damaged, does not belong to the other, or, in later calls, changed.
    """

    def __init__(self, prefix: StrPath, multimodal: bool = False, cache: StrPath | None = None,
                 cache_bytes: int = CACHE_BYTES) -> None:
        self.prefix, self.multimodal = os.fspath(prefix), multimodal
        self.idx, self.bin = open_pair(self.prefix, cache, cache_bytes)
        self._read_index()
        self._check_ends()
        self.packed = self._looks_packed()
        if self.packed:
            self._check_size()
            self.num_tokens = self.bin.size // self.dtype.itemsize
        else:
            self._ends = self._stream_ends()
            self.num_tokens = int(self._ends[-1])

    def __len__(self) -> int:
        return self.num_sequences

    def sequence(self, i: int) -> Tokens:
        """Sequence `i` [lengths[i]], read-only; a view of a local file. IndexError outside [0, num_sequences)."""
        if not 0 <= i < self.num_sequences:
            raise IndexError(f"sequence {i} of {self.num_sequences} in {self.bin.name}")
        self.idx.check()
        offset, length = int(self.offsets[i]), int(self.lengths[i])
        if not self._fits(offset, length):
            raise self._bad_entry(i, offset, length)
        return self.bin.read(offset, length * self.dtype.itemsize).view(self.dtype)

    def tokens(self, start: int, count: int) -> Tokens:
        """Tokens [start, start + count) of the packed stream, as a view where the files allow one.

        IndexError unless they lie inside [0, num_tokens).
        """
        if start < 0 or count < 0 or start + count > self.num_tokens:
            raise IndexError(f"tokens [{start}, {start + count}) of {self.num_tokens} in {self.bin.name}")
        if self.packed:
            size = self.dtype.itemsize
            return self.bin.read(start * size, count * size).view(self.dtype)
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
            raise IndexError(f"sequences [{first}, {last}) of {self.num_sequences} in {self.idx.name}")
        self.idx.check()
        start, stop = self._position(first), self._position(last)
        if not 0 <= start <= stop <= self.num_tokens:
            raise UserError(f"{self.idx.name} is damaged: sequences [{first}, {last}) would span tokens "
                            f"[{start}, {stop}) of {self.num_tokens}; rebuild the data")
        return start, stop

    def document(self, d: int) -> tuple[int, int]:
        """The sequences [first, last) of document `d`. IndexError outside [0, num_documents)."""
        if not 0 <= d < self.num_documents:
            raise IndexError(f"document {d} of {self.num_documents} in {self.idx.name}")
        self.idx.check()
        first, last = self.document_boundaries[d:d + 2].tolist()
        if not 0 <= first <= last <= self.num_sequences:
            raise UserError(f"{self.idx.name} is damaged: document {d} would hold sequences [{first}, {last}) of "
                            f"{self.num_sequences}; see megapt data verify")
        return first, last

    def sequence_at(self, token: int) -> int:
        """The sequence that holds token `token` of the packed stream. IndexError outside [0, num_tokens)."""
        if not 0 <= token < self.num_tokens:
            raise IndexError(f"token {token} of {self.num_tokens} in {self.bin.name}")
        if not self.packed:
            return int(np.searchsorted(self._ends, token, side="right"))
        self.idx.check()
        return _last_at_most(self.offsets, token * self.dtype.itemsize)

    def document_at(self, sequence: int) -> int:
        """The document that holds sequence `sequence`. IndexError outside [0, num_sequences)."""
        if not 0 <= sequence < self.num_sequences:
            raise IndexError(f"sequence {sequence} of {self.num_sequences} in {self.idx.name}")
        self.idx.check()
        return _last_at_most(self.document_boundaries, sequence)

    def entries(self, first: int, last: int) -> Iterator[tuple[int, Int64, Int64]]:
        """(number, lengths, offsets) of sequences [first, last), in blocks of bounded size that start at `number`.

        UserError at the first that does not lie inside the `.bin`.
        """
        lengths_at, offsets_at = self.header.lengths_at, self.header.offsets_at
        lengths = self.idx.stream(lengths_at + 4 * first, lengths_at + 4 * last, 4 * _CHUNK)
        offsets = self.idx.stream(offsets_at + 8 * first, offsets_at + 8 * last, 8 * _CHUNK)
        for number, length, offset in zip(range(first, last, _CHUNK), lengths, offsets, strict=True):
            length_n, offset_n = length.view("<i4").astype(np.int64), offset.view("<i8").astype(np.int64)
            # Compared by subtraction, since a damaged offset near 2^63 would make a sum wrap around.
            bad = (length_n < 0) | (offset_n < 0) | (offset_n > self.bin.size - length_n * self.dtype.itemsize)
            if bad.any():
                at = int(np.argmax(bad))
                raise self._bad_entry(number + at, int(offset_n[at]), int(length_n[at]))
            yield number, length_n, offset_n

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for file in (self.idx, self.bin):
            digest.update(struct.pack("<Q", file.size))
            if file.size <= _BLOCK * _BLOCKS:
                ranges = [(0, file.size)]
            else:
                ranges = [((file.size - _BLOCK) * k // (_BLOCKS - 1), _BLOCK) for k in range(_BLOCKS)]
            for block in file.sample(ranges):
                digest.update(block.tobytes())
        return digest.hexdigest()

    def fingerprint(self) -> str:
        """A hash of both files' sizes and of up to 64 blocks of 4 KiB of each, evenly spread, ends included.

        It tells apart corpora that were rebuilt, cut or mixed up, at the cost of 128 small reads; an edit of
        a few bytes between the blocks of a large file goes unseen (`full_hash` sees it). The path and the time
        of change do not count.
        """
        return self._fingerprint

    def full_hash(self, progress: Progress = lambda count: None) -> dict[str, str]:
        """The SHA-256 of each file, {"bin": ..., "idx": ...}; reads all of both."""
        return {"bin": sha256(self.bin, progress), "idx": sha256(self.idx, progress)}

    def check_unchanged(self) -> None:
        """UserError if one of the local files is no longer what was opened: two fstat calls.

        Every method asks this by itself; whoever reads the columns directly calls it before.
        """
        self.idx.check()
        self.bin.check()

    def verify(self) -> None:
        """Check every index entry against the files: O(num_sequences). UserError names the first kind of defect."""
        from megapt.data.verify import ORDER, check_pair

        for finding in check_pair(self.idx, self.bin, multimodal=self.multimodal).findings:
            if self.packed or finding.kind not in ORDER:
                raise UserError(f"{self.idx.name} and {self.bin.name} are damaged: {finding}")

    def _read_index(self) -> None:
        self.header = header = read_header(self.idx)
        size, expected = self.idx.size, header.end + header.sequences * self.multimodal
        if size == header.end + header.sequences and header.sequences and not self.multimodal:
            raise UserError(f"{self.idx.name} is {header.sequences} bytes longer than a text index: it carries modes "
                            "of a multimodal corpus; pass multimodal to read it with them")
        if size != expected:
            raise UserError(f"{self.idx.name} has {size} bytes, but its header ({header.sequences} sequences, "
                            f"{header.boundaries} document boundaries{', modes' * self.multimodal}) declares "
                            f"{expected}; it is cut short or damaged: rebuild or copy it again")
        self.dtype = header.dtype
        self.num_sequences, self.num_documents = header.sequences, header.boundaries - 1
        self.lengths: npt.NDArray[np.int32] = self.idx.column("<i4", header.sequences, header.lengths_at)
        self.offsets: Int64 = self.idx.column("<i8", header.sequences, header.offsets_at)
        self.document_boundaries: Int64 = self.idx.column("<i8", header.boundaries, header.boundaries_at)
        self.modes: npt.NDArray[np.int8] | None = (
            self.idx.column("i1", header.sequences, header.end) if self.multimodal else None)

    def _check_ends(self) -> None:
        """What can be known of both files without reading all entries."""
        if self.bin.size % self.dtype.itemsize:
            raise UserError(f"{self.bin.name} has {self.bin.size} bytes, not a multiple of "
                            f"{self.dtype.itemsize} ({self.dtype.name}, as {self.idx.name} says); it is cut "
                            "short or damaged")
        first, last = self._numbers(self.header.boundaries_at, "<i8", [0, self.num_documents])
        if first != 0 or not 0 <= last <= self.num_sequences:
            raise UserError(f"{self.idx.name} is damaged: document boundaries run from {first} to {last}, "
                            f"but must run from 0 to at most {self.num_sequences}")
        self._last_end = 0
        if self.num_sequences:
            offset, = self._numbers(self.header.offsets_at, "<i8", [self.num_sequences - 1])
            length, = self._numbers(self.header.lengths_at, "<i4", [self.num_sequences - 1])
            if not self._fits(offset, length):
                raise self._bad_entry(self.num_sequences - 1, offset, length)
            self._last_end = offset + length * self.dtype.itemsize

    def _looks_packed(self) -> bool:
        """Whether the first and a sample of all sequences lie back to back from the start of the `.bin`."""
        if not self.num_sequences:
            return True
        probes = min(_PROBES, self.num_sequences - 1)
        at = [(self.num_sequences - 2) * k // max(probes - 1, 1) for k in range(probes)]
        lengths = self._numbers(self.header.lengths_at, "<i4", at)
        offsets = self._numbers(self.header.offsets_at, "<i8", [0, *at, *(i + 1 for i in at)])
        ends = [offset + length * self.dtype.itemsize for offset, length in zip(offsets[1:], lengths, strict=False)]
        return offsets[0] == 0 and ends == offsets[probes + 1:]

    def _check_size(self) -> None:
        if self._last_end != self.bin.size:
            raise UserError(f"{self.bin.name} has {self.bin.size} bytes, but {self.idx.name} declares "
                            f"{self._last_end}; the two do not belong together: rebuild or copy them again")

    def _stream_ends(self) -> Int64:
        """Where each sequence ends in the stream of an index that is not packed, in tokens [num_sequences]."""
        if isinstance(self.idx, RemoteFile):
            raise UserError(f"{self.idx.name} does not list its sequences in the order of the .bin, so that all of it "
                            "would be fetched; rewrite it with megapt data merge, or copy both files here")
        ends = np.empty(self.num_sequences, np.int64)
        at = 0
        for number, lengths, _ in self.entries(0, self.num_sequences):
            block = ends[number:number + len(lengths)]
            np.cumsum(lengths, out=block)
            block += at
            at = int(block[-1])
        return ends

    def _position(self, i: int) -> int:
        if i == self.num_sequences:
            return self.num_tokens
        if self.packed:
            return self._numbers(self.header.offsets_at, "<i8", [i])[0] // self.dtype.itemsize
        return int(self._ends[i - 1]) if i else 0

    def _numbers(self, column: int, dtype: str, at: list[int]) -> list[int]:
        """Single numbers of the column that begins at this byte of the index."""
        size = np.dtype(dtype).itemsize
        found = self.idx.sample([(column + i * size, size) for i in at])
        return [int(number.view(dtype)[0]) for number in found]

    def _fits(self, offset: int, length: int) -> bool:
        return 0 <= offset and 0 <= length and offset + length * self.dtype.itemsize <= self.bin.size

    def _bad_entry(self, i: int, offset: int, length: int) -> UserError:
        return UserError(f"{self.idx.name} places sequence {i} of {self.num_sequences} ({length} tokens of "
                         f"{self.dtype.itemsize} bytes) at byte {offset}, which does not fit {self.bin.name} "
                         f"of {self.bin.size} bytes; one of the two is cut short or damaged: rebuild "
                         "or copy it again")


def open_pair(prefix: str, cache: StrPath | None = None, cache_bytes: int = CACHE_BYTES) -> tuple[Storage, Storage]:
    """The `.idx` and the `.bin` of a prefix, opened and not looked into."""
    if is_remote(prefix):
        blocks = BlockCache(cache, cache_bytes)
        return RemoteFile(prefix + ".idx", blocks), RemoteFile(prefix + ".bin", blocks)
    prefix = prefix.removeprefix("file://")
    hint = "; give the common path of the .bin and .idx files, without the ending"
    return LocalFile(prefix + ".idx", hint), LocalFile(prefix + ".bin", hint)


def _last_at_most(column: Any, value: int) -> int:
    """The last entry of an ascending column that is not above `value`."""
    if isinstance(column, RemoteColumn):
        return column.searchsorted(value, "right") - 1
    return bisect_right(column, value) - 1


class IndexedWriter:
    """Writes `{prefix}.bin` and `{prefix}.idx`; both appear only when the `with` block ends without an
    exception.

    One document is one sequence, as Megatron's preprocessing lays it without sentence splitting; an empty
    document adds a boundary but no sequence. Memory does not grow with the corpus. The `.idx` comes last, so a pair
    with an `.idx` is a whole pair; an earlier pair of that name stays until the new one is complete.
    """

    def __init__(self, prefix: StrPath, dtype: npt.DTypeLike) -> None:
        self._pair = PairWriter(prefix, dtype)
        self.dtype, self.prefix = self._pair.dtype, self._pair.prefix
        self.idx_path: Path = self._pair.idx_path
        self.bin_path: Path = self._pair.bin_path
        self._lengths, self._boundaries = array("i"), array("q")
        self._num_sequences = self._open_length = 0
        self.num_documents = 0

    @property
    def num_tokens(self) -> int:
        """Tokens written so far."""
        return self._pair.num_tokens

    def __enter__(self) -> Self:
        self._pair.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        try:
            if kind is None:
                if self._open_length:
                    raise RuntimeError(f"{self.bin_path}: the last document was not closed with end_document()")
                self._spool()
                self._pair.finish()
                self._pair.commit()
        except BaseException as failure:
            self._pair.__exit__(type(failure), failure, failure.__traceback__)
            raise
        self._pair.__exit__(kind, error, trace)

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
        length = self._open_length + len(values)
        if length > MAX_LENGTH:
            raise UserError(f"document {self.num_documents} has {length} tokens or more; the format holds at "
                            f"most {MAX_LENGTH} in one sequence: split it")
        self._pair.write(values)
        self._open_length = length

    def end_document(self) -> None:
        """Close the open document: a sequence if it has tokens, and a boundary in any case."""
        if self._open_length:
            self._lengths.append(self._open_length)
            self._num_sequences += 1
            self._open_length = 0
        self._boundaries.append(self._num_sequences)
        self.num_documents += 1
        if len(self._boundaries) >= _PENDING:
            self._spool()

    def _spool(self) -> None:
        self._pair.add_sequences(np.array(self._lengths, np.int32))
        self._pair.add_boundaries(np.array(self._boundaries, np.int64))
        del self._lengths[:], self._boundaries[:]


__all__ = ["CODES", "IndexedReader", "IndexedWriter", "Tokens", "best_dtype", "open_pair"]
