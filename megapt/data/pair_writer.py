"""Writing a `.bin/.idx` pair in bounded memory: tokens, sequence lengths and document boundaries as they come."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
import numpy.typing as npt

from megapt.data.index_format import CODES, MAX_LENGTH, Header, cast_tokens, write_index
from megapt.data.storage import LocalFile, Progress, Storage
from megapt.errors import UserError
from megapt.files import DISK_FULL, StrPath, sync_file, sync_folder, temporary_name

_CHUNK = 1 << 18  # index entries handled at a time

Integers = npt.NDArray[np.integer[Any]]


class PairWriter:
    """`{prefix}.bin` and `{prefix}.idx` under construction; they appear on `commit`, and not at all without it.

    Tokens are appended with `write` or `copy`, and are cut into sequences by `add_sequences` and those into documents
    by `add_boundaries`, in any interleaving. The index waits in unnamed files in the output's folder, so memory does
    not grow with the corpus. An earlier pair of that name stays until `commit`. All counts are 64 bits wide.
    """

    def __init__(self, prefix: StrPath, dtype: npt.DTypeLike) -> None:
        self.dtype = np.dtype(dtype).newbyteorder("<")
        if self.dtype not in CODES:
            raise UserError(f"token files cannot hold {self.dtype.name}; one of "
                            f"{', '.join(d.name for d in CODES)} is needed")
        self.prefix = os.fspath(prefix)
        if "://" in self.prefix:
            raise UserError(f"{self.prefix} cannot be written: outputs are local files; write one and copy it there")
        self.idx_path, self.bin_path = Path(self.prefix + ".idx"), Path(self.prefix + ".bin")
        self.num_tokens = self.num_sequences = self.num_boundaries = 0
        self._idx_temporary, self._bin_temporary = temporary_name(self.idx_path), temporary_name(self.bin_path)

    def __enter__(self) -> Self:
        folder = self.bin_path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lengths: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
            self._boundaries: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
            self._file: IO[bytes] = open(self._bin_temporary, "xb", buffering=1 << 20)  # noqa: SIM115
        except OSError as error:
            raise UserError(f"{self.bin_path} cannot be written: {error.strerror}; choose another output") from error
        self.add_boundaries(np.zeros(1, np.int64))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        for file in (self._file, self._lengths, self._boundaries):
            with suppress(OSError):  # what a full disk did not take at first, it does not take now
                file.close()
        self._bin_temporary.unlink(missing_ok=True)
        self._idx_temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise UserError(f"{self.bin_path} cannot be written: {error.strerror}, after {self.num_tokens:,} tokens; "
                            "make room, or choose another output. What was there before is unharmed") from error

    def write(self, tokens: Integers) -> None:
        """Append tokens [n] of any integer type. UserError if one does not fit the dtype."""
        self._file.write(cast_tokens(tokens, self.dtype, self.num_tokens, self.bin_path).data)
        self.num_tokens += len(tokens)

    def copy(self, source: Storage, start: int, stop: int, dtype: np.dtype[Any], progress: Progress) -> None:
        """Append the tokens of type `dtype` in bytes [start, stop) of a file."""
        if dtype == self.dtype and isinstance(source, LocalFile):
            source.copy_to(self._file, start, stop, progress)
            self.num_tokens += (stop - start) // dtype.itemsize
            return
        for piece in source.stream(start, stop):
            self.write(piece.view(dtype))
            progress(len(piece))

    def add_sequences(self, lengths: Integers) -> None:
        """Append sequences of these lengths in tokens, [n]."""
        self._lengths.write(lengths.astype("<i4").data)
        self.num_sequences += len(lengths)

    def add_boundaries(self, boundaries: Integers) -> None:
        """Append ends of documents, in sequence numbers counted from the beginning of the output, [n]."""
        self._boundaries.write(boundaries.astype("<i8").data)
        self.num_boundaries += len(boundaries)

    def finish(self) -> None:
        """Write the index and bring both files to the disk, still under their temporary names."""
        sync_file(self._file)
        with open(self._idx_temporary, "xb", buffering=1 << 20) as file:
            header = Header(self.dtype, self.num_sequences, self.num_boundaries)
            size = write_index(file, header, lambda: _entries(self._lengths, "<i4"), _entries(self._boundaries, "<i8"))
            sync_file(file)
        assert size == self.num_tokens * self.dtype.itemsize == os.path.getsize(self._bin_temporary), self.prefix

    def commit(self) -> None:
        """Give both files their names; `finish` comes before."""
        # An old index must never describe the new tokens, not even between the two renames.
        self.idx_path.unlink(missing_ok=True)
        os.replace(self._bin_temporary, self.bin_path)
        os.replace(self._idx_temporary, self.idx_path)
        sync_folder(self.idx_path.parent)


def cut_lengths(length: int) -> list[int]:
    """The sequences that hold one run of tokens: the format holds at most 2^31 - 1 tokens in one."""
    whole, rest = divmod(length, MAX_LENGTH)
    return [MAX_LENGTH] * whole + [rest] * (rest > 0)


def _entries(file: IO[bytes], dtype: str) -> Iterator[npt.NDArray[Any]]:
    file.seek(0)
    while data := file.read(_CHUNK * np.dtype(dtype).itemsize):
        yield np.frombuffer(data, dtype)
