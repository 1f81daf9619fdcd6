"""Which stretches of the packed stream fill a sample: documents found in the index, and documents packed into samples.

Packing whole documents needs an index of its own, which is built once per corpus, split and sequence length and kept
in the cache folder under a key of contents.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megapt.data.indexed import IndexedReader
from megapt.data.order import KeyedPermutation, derive_key
from megapt.errors import UserError
from megapt.files import StrPath, sync_file, sync_folder

Int64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

WINDOW = 1 << 18  # documents packed with one another
_PIECE = np.dtype([("start", "<i8"), ("length", "<i4")])
_KINDS = {"best_fit": "best_fit-1", "document": "document-1"}


@dataclass(frozen=True)
class Pieces:
    """Stretches of a packed stream that fill rows of tokens, in order of row and column.

    row, column: int64 [m], where a piece begins; start: int64 [m], its first token's place in the stream; length:
    int64 [m], in tokens; ends: bool [m], whether it reaches the end of its document.
    """

    row: Int64
    column: Int64
    start: Int64
    length: Int64
    ends: Bools

    @classmethod
    def of(cls, row: Int64, start: Int64, length: Int64, ends: Bools) -> Pieces:
        """Each row's pieces, in order, one after the other from column 0."""
        return cls(row, _places(row, length), start, length, ends)

    def runs(self) -> Iterator[tuple[int, int, int, int]]:
        """(row, column, start, length) of what can be read at once: pieces that are neighbours in both."""
        if not len(self.row):
            return
        joined = np.zeros(len(self.row), bool)
        joined[1:] = (self.row[1:] == self.row[:-1]) & (self.start[1:] == self.start[:-1] + self.length[:-1])
        first = np.flatnonzero(~joined)
        total = np.add.reduceat(self.length, first)
        yield from zip(
            self.row[first].tolist(), self.column[first].tolist(), self.start[first].tolist(), total.tolist(),
            strict=True,
        )  # fmt: skip

    def within(self, columns: int) -> Pieces:
        """What lies in the first `columns` columns."""
        length = np.minimum(self.length, columns - self.column)
        inside = length > 0
        whole = self.ends & (length == self.length)
        return Pieces(self.row[inside], self.column[inside], self.start[inside], length[inside], whole[inside])

    @staticmethod
    def join(parts: list[Pieces]) -> Pieces:
        """The pieces of several sets of rows, no row being in two of them."""
        row = np.concatenate([p.row for p in parts])
        order = np.argsort(row, kind="stable")
        columns = ([getattr(p, name) for p in parts] for name in ("column", "start", "length", "ends"))
        return Pieces(row[order], *(np.concatenate(c)[order] for c in columns))


def _places(row: Int64, length: Int64) -> Int64:
    """The running sum of lengths in front of each piece, begun anew with every row."""
    before = np.cumsum(length) - length
    fresh = np.ones(len(row), bool)
    fresh[1:] = row[1:] != row[:-1]
    first = np.flatnonzero(fresh)
    return before - np.repeat(before[first], np.diff(np.append(first, len(row))))


class Boundaries:
    """Where sequences, which are the documents here, lie in the packed stream of a reader.

    Nothing is built: the index's own offsets are searched where they lie. Only a stream that is not packed gets an
    array of 8 bytes per sequence.
    """

    def __init__(self, reader: IndexedReader) -> None:
        self._reader, self._count = reader, reader.num_sequences
        self._unit = reader.dtype.itemsize if reader.packed else 1
        self._column: Any = reader.offsets
        if not reader.packed:
            lengths = [block for _, block, _ in reader.entries(0, self._count)]
            ends = np.cumsum(np.concatenate(lengths))
            self._column = np.concatenate([np.zeros(1, np.int64), ends[:-1]])

    def starts(self, sequences: npt.NDArray[np.integer[Any]]) -> Int64:
        """The first token of sequences [n], which lie in [0, num_sequences)."""
        if not isinstance(self._column, np.ndarray):  # remote: one by one, through the cache of blocks
            found = [int(self._column[i]) for i in np.asarray(sequences).tolist()]
            return np.array(found, np.int64) // self._unit
        return np.asarray(self._column[sequences], np.int64) // self._unit

    def starts_among(self, low: int, high: int) -> Callable[[Int64], Int64]:
        """What gives the first token of the i-th [n] of sequences [low, high), for passes over all of them."""
        column = self._column[low:high]  # of a remote index: fetched whole
        return lambda i: np.asarray(column[i], np.int64) // self._unit

    def locate(self, positions: Int64) -> Int64:
        """The sequences that hold the tokens at positions [n] of the stream: the last that begin at or before them."""
        if not isinstance(self._column, np.ndarray):  # remote: a few small ranges each, remembered
            search = self._column.searchsorted
            return np.array([search(p * self._unit, "right") - 1 for p in positions.tolist()], np.int64)
        # numpy's searchsorted would copy the column, which is not aligned in the file.
        targets = positions * self._unit
        low, high = np.zeros_like(targets), np.full_like(targets, self._count)
        while (high - low > 1).any():
            middle = (low + high) >> 1
            right = self._column[middle] <= targets
            low, high = np.where(right, middle, low), np.where(right, high, middle)
        return low

    def cut(self, row: Int64, start: Int64, length: Int64) -> Pieces:
        """Stretches [start, start + length) of rows, cut where documents end. Stretches hold at least one token."""
        self._reader.check_unchanged()
        first, last = self.locate(start), self.locate(start + length - 1)
        # One more than the last: where it begins is where the last one ends.
        begins, stops = [], []
        for a, b in zip(first.tolist(), last.tolist(), strict=True):
            edges = np.asarray(self._column[a:b + 2], np.int64)
            if b + 1 == self._count:
                edges = np.append(edges, self._reader.num_tokens * self._unit)
            begins.append(edges[:-1])
            stops.append(edges[1:])
        counts = last - first + 1
        rows, low = np.repeat(row, counts), np.repeat(start, counts)
        high = low + np.repeat(length, counts)
        stop = np.concatenate(stops) // self._unit
        begin, end = np.maximum(np.concatenate(begins) // self._unit, low), np.minimum(stop, high)
        full = end > begin  # sequences without tokens are passed over
        begin, end, stop = begin[full], end[full], stop[full]
        return Pieces.of(rows[full], begin, end - begin, end == stop)


def best_fit(lengths: npt.NDArray[np.integer[Any]], room: int) -> tuple[Int64, int]:
    """The bin of each piece [n], and the number of bins of `room` tokens: best-fit decreasing.

    Pieces are taken from the longest to the shortest, and each goes where it leaves the least room (arXiv
    2404.10830); pieces of equal length are placed together, so that the work grows with the number of different
    lengths and rooms. Lengths lie in [1, room].
    """
    order = np.argsort(-np.asarray(lengths, np.int64), kind="stable")
    sizes = np.asarray(lengths, np.int64)[order]
    placed = np.empty(len(order), np.int64)
    open_bins: dict[int, list[Int64]] = {}  # by room left
    mask = bins = 0  # bit r: some bin has r tokens of room left
    edges = np.append(np.flatnonzero(np.diff(sizes, prepend=-1)), len(sizes)).tolist()
    for at, stop in zip(edges[:-1], edges[1:], strict=True):
        size = int(sizes[at])
        while at < stop:
            above = mask >> size
            left = size + (above & -above).bit_length() - 1 if above else room
            each = left // size
            wanted = -(-(stop - at) // each)
            if above:
                chosen = open_bins[left].pop()
                if len(chosen) > wanted:
                    open_bins[left].append(chosen[wanted:])
                    chosen = chosen[:wanted]
                if not open_bins[left]:
                    mask ^= 1 << left
            else:
                chosen = np.arange(bins, bins + wanted)
                bins += wanted
            taken = min(stop - at, each * len(chosen))
            placed[at:at + taken] = np.repeat(chosen, each)[:taken]
            at += taken
            last = taken - each * (len(chosen) - 1)  # pieces in the last of these bins
            for part, count in ((chosen[:-1], each), (chosen[-1:], last)):
                rest = left - count * size
                if len(part) and rest:
                    open_bins.setdefault(rest, []).append(part)
                    mask |= 1 << rest
    result = np.empty_like(placed)
    result[order] = placed
    return result, bins


class PackedIndex:
    """Samples of whole documents, `sequence` tokens at most: item i holds pieces[bins[i]:bins[i + 1]].

    A piece that is one token longer than `sequence` is the head of a longer document; its last token is a label only.
    Both arrays are memory-mapped.
    """

    def __init__(self, folder: Path, sequence: int) -> None:
        self.sequence = sequence
        try:
            self._pieces = np.memmap(folder / "pieces", _PIECE, "r")
            self._bins = np.memmap(folder / "bins", "<i8", "r")
        except (OSError, ValueError) as error:  # numpy's for what is empty, or no whole number of entries
            raise UserError(f"{folder} is damaged ({error}); remove it, it is built again") from error
        if self._bins[-1] != len(self._pieces) or self._bins[0] != 0:
            raise UserError(f"{folder} is damaged: it holds {len(self._pieces)} pieces, but its samples end at piece "
                            f"{self._bins[-1]}; remove it, it is built again")
        self.num_items = len(self._bins) - 1

    def pieces(self, row: Int64, items: Int64) -> Pieces:
        """The pieces of items [n], for rows [n]."""
        rows, at = self._expand(items)
        found = self._pieces[at]
        length = found["length"].astype(np.int64)
        return Pieces.of(row[rows], found["start"].astype(np.int64), length, length <= self.sequence)

    def counts(self, items: Int64) -> tuple[Int64, Int64]:
        """(tokens, labels) [n] of items [n]: all tokens but padding, and those followed by one of their document."""
        rows, at = self._expand(items)
        length = self._pieces["length"][at].astype(np.int64)
        labels = np.bincount(rows, length - 1, len(items)).astype(np.int64)
        tokens = np.bincount(rows, np.minimum(length, self.sequence), len(items)).astype(np.int64)
        return tokens, labels

    def _expand(self, items: Int64) -> tuple[Int64, Int64]:
        first = np.asarray(self._bins[items], np.int64)
        counts = np.asarray(self._bins[items + 1], np.int64) - first
        rows = np.repeat(np.arange(len(items)), counts)
        return rows, np.repeat(first, counts) + np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)


def packed_index(
    reader: IndexedReader,
    sequences: tuple[int, int],
    sequence: int,
    packing: str,
    seed: int | None,
    cache: StrPath,
    say: Callable[[str], None] | None = None,
) -> PackedIndex:
    """The index of sequences [lo, hi) of a corpus, packed as "best_fit" or "document"; built if the cache lacks it.

    seed: documents are shuffled by it before they are packed in windows of WINDOW; None leaves them in order. The
    processes of a machine take turns, so that one builds; on file systems without locks each builds its own, the
    same, and the first one stays. UserError if the split holds no token, or the cache cannot be written.
    """
    words = [_KINDS[packing], reader.fingerprint(), *sequences, sequence, -1 if seed is None else seed, WINDOW]
    key = hashlib.blake2b(" ".join(map(str, words)).encode(), digest_size=12).hexdigest()
    folder = Path(cache) / f"{packing}-{key}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _turn(folder.with_suffix(".lock")) as alone:
            if not folder.is_dir():
                for abandoned in folder.parent.glob(f"{folder.name}.*.partial") if alone else ():
                    shutil.rmtree(abandoned, ignore_errors=True)
                _build(folder, reader, sequences, sequence, packing, seed, say or _say)
    except OSError as error:
        raise UserError(f"the index of packed samples cannot be kept in {folder.parent} ({error.strerror}); name "
                        "another folder with data.cache") from error
    return PackedIndex(folder, sequence)


def _build(
    folder: Path,
    reader: IndexedReader,
    sequences: tuple[int, int],
    sequence: int,
    packing: str,
    seed: int | None,
    say: Callable[[str], None],
) -> None:
    total, started, next_word = sequences[1] - sequences[0], time.monotonic(), time.monotonic() + 10
    say(f"packing {total:,} documents of {reader.prefix} into samples of {sequence} ({packing}), once, in {folder}")
    part = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}.partial")
    part.mkdir()
    try:
        items = pieces = tokens = 0
        with open(part / "pieces", "wb") as piece_file, open(part / "bins", "wb") as bin_file:
            bin_file.write(np.zeros(1, "<i8").tobytes())
            for done, found, ends in _windows(reader, sequences, sequence, packing, seed):
                piece_file.write(found.tobytes())
                bin_file.write((ends + pieces).astype("<i8").tobytes())
                items, pieces = items + len(ends), pieces + len(found)
                tokens += int(np.minimum(found["length"], sequence).sum(dtype=np.int64))
                if time.monotonic() > next_word:
                    next_word = time.monotonic() + 10
                    say(f"packed {done:,} of {total:,} documents")
            for file in (piece_file, bin_file):
                sync_file(file)
        if not items:
            raise UserError(f"the {total} documents of {reader.prefix} that this split has hold no token")
        sync_folder(part)
        try:
            os.rename(part, folder)
        except OSError:
            if not folder.is_dir():  # else another process was first, with the same
                raise
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    share = 100 * (1 - tokens / (items * sequence))
    say(f"packed {pieces:,} pieces into {items:,} samples, {share:.2f} % padding, {time.monotonic() - started:.1f} s")


def _windows(
    reader: IndexedReader, sequences: tuple[int, int], sequence: int, packing: str, seed: int | None
) -> Iterator[tuple[int, npt.NDArray[Any], Int64]]:
    """(documents done, pieces, where each sample's pieces end) of one window of documents after the other."""
    low, high = sequences
    column, starts_of = reader.lengths[low:high], Boundaries(reader).starts_among(low, high)
    shuffle = None if seed is None else KeyedPermutation(max(high - low, 1), derive_key("packing", seed))
    for at in range(0, high - low, WINDOW):
        ids = np.arange(at, min(at + WINDOW, high - low))
        if shuffle is not None:
            ids = shuffle(ids)
        lengths = column[ids].astype(np.int64)
        if lengths.min() < 0:
            raise UserError(f"{reader.prefix}.idx is damaged: a sequence has {lengths.min()} tokens; see megapt data "
                            "verify")
        starts = starts_of(ids)
        heads = np.maximum(-(-lengths // sequence) - 1, 0)  # pieces that fill a sample and go on after it
        document = np.repeat(np.arange(len(ids)), heads + 1)
        number = np.arange(len(document)) - np.repeat(np.cumsum(heads + 1) - (heads + 1), heads + 1)
        length = np.minimum(lengths[document] - number * sequence, sequence + 1)
        found = np.empty(len(document), _PIECE)
        found["start"], found["length"] = starts[document] + number * sequence, length
        found = found[length > 0]
        if packing == "document":
            yield at + len(ids), found, np.arange(1, len(found) + 1)
            continue
        whole = np.flatnonzero(found["length"] <= sequence)
        bins, count = best_fit(found["length"][whole], sequence)
        item = np.empty(len(found), np.int64)
        item[whole] = bins
        item[found["length"] > sequence] = np.arange(count, count + len(found) - len(whole))
        order = np.argsort(item, kind="stable")
        ends = np.cumsum(np.bincount(item)) if len(found) else np.empty(0, np.int64)
        yield at + len(ids), found[order], ends


@contextlib.contextmanager
def _turn(path: Path) -> Iterator[bool]:
    """Wait until no other process is in here; False where the file system has no locks."""
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield False
        else:
            yield True


def _say(message: str) -> None:
    print(f"megapt: {message}", file=sys.stderr, flush=True)
