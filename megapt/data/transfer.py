"""Pairs from pairs: merged, split at document boundaries, in another dtype. Memory does not grow with the corpus."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megapt.data.indexed import IndexedReader
from megapt.data.pair_writer import PairWriter
from megapt.data.storage import Progress
from megapt.errors import UserError
from megapt.files import StrPath

_CHUNK = 1 << 18  # index entries handled at a time


def nothing_done(count: int) -> None:
    """The progress of a caller who does not look."""


def merge(inputs: Sequence[StrPath], output: StrPath, overwrite: bool = False,
          progress: Progress = nothing_done) -> IndexedReader:
    """Write the documents of all inputs, in their order, into one pair, and return it opened.

    `progress` is told bytes of `.bin`. UserError if the output exists and `overwrite` is not set, if an input is the
    output, if the inputs' dtypes differ, or if one of them is damaged.
    """
    check_outputs([f"{output}.bin", f"{output}.idx"], _files(inputs), overwrite)
    readers = [IndexedReader(path) for path in inputs]
    if len({reader.dtype for reader in readers}) != 1:
        listed = ", ".join(f"{reader.prefix} {reader.dtype.name}" for reader in readers[:8])
        raise UserError(f"only pairs of one dtype can be merged, not {listed or 'none'}; bring them to one with megapt "
                        "data convert")
    with PairWriter(output, readers[0].dtype) as writer:
        for reader in readers:
            copy_documents(reader, 0, reader.num_documents, writer, progress)
        writer.finish()
        writer.commit()
    return IndexedReader(output)


def split(prefix: StrPath, outputs: Sequence[StrPath], shares: Sequence[float], overwrite: bool = False,
          progress: Progress = nothing_done) -> list[IndexedReader]:
    """Cut a pair into consecutive ranges of documents, one per output, and return them opened.

    The shares are normalised by their sum, and bounds rounded to the nearest document. All outputs appear together.
    UserError as for `merge`, and if a part would hold no document.
    """
    if len(shares) != len(outputs) or len({os.fspath(path) for path in outputs}) != len(outputs):
        raise UserError(f"each of {len(shares)} parts needs a name of its own, not {', '.join(map(str, outputs))}")
    if any(not share > 0 or share == float("inf") for share in shares):
        raise UserError(f"shares must be numbers above 0, not {', '.join(map(str, shares))}")
    check_outputs([f"{path}{end}" for path in outputs for end in (".bin", ".idx")], _files([prefix]), overwrite)
    reader = IndexedReader(prefix)
    cumulated = np.concatenate([[0.0], np.cumsum(np.array(shares, np.float64) / float(sum(shares)))])
    bounds = [int(round(share * reader.num_documents)) for share in cumulated[:-1].tolist()] + [reader.num_documents]
    for path, first, last in zip(outputs, bounds[:-1], bounds[1:], strict=True):
        if first >= last:
            raise UserError(f"{path} would hold none of the {reader.num_documents} documents of {reader.prefix}; make "
                            "fewer parts, or give it a larger share")
    with ExitStack() as stack:
        writers = [stack.enter_context(PairWriter(path, reader.dtype)) for path in outputs]
        for writer, first, last in zip(writers, bounds[:-1], bounds[1:], strict=True):
            copy_documents(reader, first, last, writer, progress)
            writer.finish()
        for writer in writers:
            writer.commit()
    return [IndexedReader(path) for path in outputs]


def convert(prefix: StrPath, output: StrPath, dtype: npt.DTypeLike, overwrite: bool = False,
            progress: Progress = nothing_done) -> IndexedReader:
    """Write a pair's sequences and documents with tokens of another dtype; UserError if one does not fit."""
    check_outputs([f"{output}.bin", f"{output}.idx"], _files([prefix]), overwrite)
    reader = IndexedReader(prefix)
    with PairWriter(output, dtype) as writer:
        copy_documents(reader, 0, reader.num_documents, writer, progress)
        writer.finish()
        writer.commit()
    return IndexedReader(output)


def copy_documents(reader: IndexedReader, first: int, last: int, writer: PairWriter, progress: Progress) -> None:
    """Append documents [first, last) with their sequences. UserError if the index is damaged there."""
    base = writer.num_sequences
    low = high = int(reader.document_boundaries[first:first + 1][0])
    for start in range(first + 1, last + 1, _CHUNK):
        bounds = reader.document_boundaries[start:min(start + _CHUNK, last + 1)]
        if (np.diff(bounds, prepend=high) < 0).any() or int(bounds[-1]) > reader.num_sequences:
            raise UserError(f"{reader.idx.name} is damaged among documents {start - 1} to {start - 1 + len(bounds)}; "
                            "see megapt data verify")
        writer.add_boundaries(bounds + (base - low))
        high = int(bounds[-1])
    if last == reader.num_documents and high != reader.num_sequences:
        raise UserError(f"{reader.idx.name} is incomplete: its documents end at sequence {high} of "
                        f"{reader.num_sequences}; see megapt data verify")
    for lengths, runs in runs_of(reader, low, high):
        for start, stop in runs:
            writer.copy(reader.bin, start, stop, reader.dtype, progress)
        writer.add_sequences(lengths)


def runs_of(reader: IndexedReader, first: int, last: int
            ) -> Iterator[tuple[npt.NDArray[np.int64], list[tuple[int, int]]]]:
    """Sequences [first, last) in blocks: their lengths, and the byte ranges of the `.bin` that they fill in order."""
    for _, lengths, offsets in reader.entries(first, last):
        ends = offsets + lengths * reader.dtype.itemsize
        cuts = np.flatnonzero(offsets[1:] != ends[:-1]) + 1
        starts = offsets[np.concatenate([[0], cuts])]
        stops = ends[np.concatenate([cuts - 1, [len(ends) - 1]])]
        yield lengths, list(zip(starts.tolist(), stops.tolist(), strict=True))


def check_outputs(outputs: Sequence[StrPath], inputs: Sequence[StrPath], overwrite: bool) -> None:
    """UserError if an output is an input, under whatever name, or exists and shall not be replaced."""
    sources = {os.path.realpath(path) for path in inputs}
    for path in outputs:
        if "://" in os.fspath(path):
            raise UserError(f"{path} cannot be written: outputs are local files; write one and copy it there")
        same = [source for source in inputs if os.path.exists(path) and os.path.exists(source)
                and os.path.samefile(path, source)]
        if os.path.realpath(path) in sources or same:
            raise UserError(f"{path} is an input and would be overwritten while it is read; choose another output")
    existing = [str(path) for path in outputs if Path(path).exists()]
    if existing and not overwrite:
        raise UserError(f"{', '.join(existing[:4])} {'exists' if len(existing) == 1 else 'exist'} already; choose "
                        "another output, or set overwrite")


def _files(prefixes: Sequence[StrPath]) -> list[str]:
    return [os.fspath(prefix).removeprefix("file://") + ending for prefix in prefixes for ending in (".bin", ".idx")]
