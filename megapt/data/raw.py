"""Token streams without an index (`.bin` files of bare integers, `.npy` arrays) from pairs and to pairs."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy_format

from megapt.data.index_format import MAX_LENGTH, cast_tokens
from megapt.data.indexed import IndexedReader
from megapt.data.pair_writer import PairWriter, cut_lengths
from megapt.data.storage import LocalFile, Progress
from megapt.data.transfer import check_outputs, nothing_done, runs_of
from megapt.errors import UserError
from megapt.files import StrPath, open_whole

_DTYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")
_WIDER = {"uint32": "int32", "uint64": "int64"}  # pairs have no such types; ids fit the signed ones


def from_raw(path: StrPath, output: StrPath, dtype: str | None, output_dtype: str | None = None,
             eod: int | None = None, npy: bool = False, overwrite: bool = False,
             progress: Progress = nothing_done) -> IndexedReader:
    """Make a pair of a stream of tokens, and return it opened.

    Args:
        path: a local file of bare little-endian integers, or, if `npy`, a `.npy` with an array [n] of integers.
        dtype: their type; a `.npy` knows its own.
        output_dtype: type of the pair's tokens; default: `dtype`, or the signed type for uint32 and uint64.
        eod: id of the token that ends a document; it stays the last token of its document. Without it all is one
            document, in as many sequences as the format needs.
        progress: told bytes of the input.

    UserError if the file is not of that kind, a token does not fit, or the output exists and is not to be replaced.
    """
    check_outputs([f"{output}.bin", f"{output}.idx"], [path], overwrite)
    file = LocalFile(path)
    start, source = (0, token_dtype(dtype)) if not npy else _npy_header(file, dtype)
    if (file.size - start) % source.itemsize:
        raise UserError(f"{file.name} has {file.size - start} bytes of tokens, not a multiple of {source.itemsize} "
                        f"({source.name}); it is cut short, or of another type")
    with PairWriter(output, token_dtype(output_dtype or _WIDER.get(source.name, source.name))) as writer:
        cutter = _Cutter(writer, eod)
        for piece in file.stream(start, file.size):
            tokens = piece.view(source)
            writer.write(tokens)
            cutter.add(tokens)
            progress(len(piece))
        cutter.close()
        writer.finish()
        writer.commit()
    return IndexedReader(output)


def to_raw(prefix: StrPath, output: StrPath, output_dtype: str | None = None, npy: bool = False,
           overwrite: bool = False, progress: Progress = nothing_done) -> int:
    """Write a pair's packed stream as bare little-endian integers, or, if `npy`, as a `.npy` array [n]; returns n.

    Where documents end is lost, unless their last token says so. UserError as for `from_raw`.
    """
    check_outputs([output], [f"{prefix}.bin", f"{prefix}.idx"], overwrite)
    reader = IndexedReader(prefix)
    target = reader.dtype if output_dtype is None else token_dtype(output_dtype)
    count = 0
    with open_whole(output) as file:
        if npy:
            header = {"descr": npy_format.dtype_to_descr(target), "fortran_order": False, "shape": (reader.num_tokens,)}
            npy_format.write_array_header_1_0(file, header)
        for _, runs in runs_of(reader, 0, reader.num_sequences):
            for start, stop in runs:
                for piece in reader.bin.stream(start, stop):
                    tokens = cast_tokens(piece.view(reader.dtype), target, count, output)
                    file.write(tokens.data)
                    count += len(tokens)
                    progress(len(piece))
        assert count == reader.num_tokens, (count, reader.num_tokens)
    return count


class _Cutter:
    """Cuts a stream that comes in pieces into documents, each ending with `eod`."""

    def __init__(self, writer: PairWriter, eod: int | None) -> None:
        self._writer, self._eod, self._open = writer, eod, 0
        self._ends = 0

    def add(self, tokens: npt.NDArray[np.integer[Any]]) -> None:
        """Look at the next tokens [n]."""
        stops = np.flatnonzero(tokens == self._eod) + 1 if self._eod is not None else np.empty(0, np.int64)
        if not len(stops):
            self._open += len(tokens)
            return
        self._ends += len(stops)
        lengths = np.diff(stops, prepend=0)
        lengths[0] += self._open
        self._open = len(tokens) - int(stops[-1])
        if int(lengths[0]) > MAX_LENGTH:
            self._document(int(lengths[0]))
            lengths = lengths[1:]
        first = self._writer.num_sequences + 1
        self._writer.add_sequences(lengths)
        self._writer.add_boundaries(np.arange(first, first + len(lengths)))

    def close(self) -> None:
        """What comes after the last end is a document too. UserError if there was no end at all."""
        if self._eod is not None and not self._ends:
            raise UserError(f"token {self._eod}, which shall end documents, does not occur in the input; look at its "
                            "tokenizer, or leave it out to have one document")
        if self._open:
            self._document(self._open)

    def _document(self, length: int) -> None:
        self._writer.add_sequences(np.array(cut_lengths(length)))
        self._writer.add_boundaries(np.array([self._writer.num_sequences]))


def token_dtype(dtype: str | None) -> np.dtype[Any]:
    """The little-endian integer type of this name. UserError if there is none, or no name."""
    if dtype not in _DTYPES:
        problem = "a raw stream does not say its type" if dtype is None else f"tokens are never of type {dtype}"
        raise UserError(f"{problem}; name one of {', '.join(_DTYPES)}")
    return np.dtype(dtype).newbyteorder("<")


def _npy_header(file: LocalFile, dtype: str | None) -> tuple[int, np.dtype[Any]]:
    """Where the numbers of a `.npy` begin, and their type."""
    try:
        with open(file.name, "rb") as stream:
            version = npy_format.read_magic(stream)
            read = npy_format.read_array_header_1_0 if version == (1, 0) else npy_format.read_array_header_2_0
            shape, _, found = read(stream)
            start = stream.tell()
    except ValueError as error:
        raise UserError(f"{file.name} is not a .npy file: {error}") from error
    if len(shape) != 1 or found.kind not in "iu":
        raise UserError(f"{file.name} holds {found} {list(shape)}; an array [n] of integers is needed")
    if dtype is not None and np.dtype(dtype) != found.newbyteorder("="):
        raise UserError(f"{file.name} holds {found.name}, not {dtype}; a .npy says its own type")
    if file.size - start != shape[0] * found.itemsize:
        raise UserError(f"{file.name} has {file.size - start} bytes of numbers, but declares {shape[0]} of "
                        f"{found.itemsize} bytes; it is cut short or damaged")
    return start, found
