"""Where the bytes of a token file lie: a memory map of a local file here, ranges of a remote one in `remote`."""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import stat
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any, Protocol

import numpy as np
import numpy.typing as npt

from megapt.errors import UserError
from megapt.files import StrPath

Bytes = npt.NDArray[np.uint8]
Progress = Callable[[int], None]  # told how many more bytes are done

STREAM = 8 << 20  # bytes per piece of a pass over a file; a multiple of every dtype's size

_NO_COPY = {errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM, errno.EBADF}


class Storage(Protocol):
    """The bytes of one file that does not change. `name` is for messages, `size` in bytes.

    Every method raises UserError if the file turns out to have changed, or cannot be read any more.
    """

    name: str
    size: int

    def read(self, offset: int, count: int) -> Bytes:
        """Bytes [offset, offset + count), read-only; they must lie inside the file."""

    def sample(self, ranges: Sequence[tuple[int, int]]) -> list[Bytes]:
        """Small ranges (offset, count) far apart, none of them worth keeping at hand afterwards."""

    def stream(self, start: int, stop: int, piece: int = STREAM) -> Iterator[Bytes]:
        """Bytes [start, stop) in pieces of `piece`, in bounded memory; each piece holds until the next is taken."""

    def column(self, dtype: npt.DTypeLike, count: int, offset: int) -> npt.NDArray[Any]:
        """`count` numbers from byte `offset` on, as an array or what is indexed like one."""

    def check(self) -> None:
        """See that the file is still the one that was opened, as far as this is cheap to know."""


class LocalFile:
    """A memory map of a local file, read-only.

    A page of a map whose file was cut short is answered with SIGBUS, which kills the process without a word. So
    `read` asks the system first (one fstat) whether the file still has the size and the time of change it was
    opened with; a file that another one was renamed over is unharmed. What stays open is the moment between that
    question and the use of the bytes.
    """

    def __init__(self, path: StrPath, hint: str = "") -> None:
        self.name = os.fspath(path)
        try:
            self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise UserError(f"{self.name} does not exist{hint}") from error
        except OSError as error:
            raise UserError(f"{self.name} cannot be read: {error.strerror}") from error
        weakref.finalize(self, os.close, self.descriptor)
        status = os.fstat(self.descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{self.name} is not a file{hint}")
        self.size, self._changed = status.st_size, status.st_mtime_ns
        self._map = np.empty(0, np.uint8)  # an empty file cannot be mapped
        self._mapping: mmap.mmap | None = None
        if self.size:
            try:
                self._mapping = mmap.mmap(self.descriptor, self.size, prot=mmap.PROT_READ)
                self._map = np.frombuffer(self._mapping, np.uint8)
            except (OSError, ValueError) as error:
                raise UserError(f"{self.name} of {self.size} bytes cannot be mapped into memory: {error}") from error
        self._map.flags.writeable = False

    def read(self, offset: int, count: int) -> Bytes:
        """As Storage.read, without a copy."""
        self.check()
        return self._map[offset:offset + count]

    def sample(self, ranges: Sequence[tuple[int, int]]) -> list[Bytes]:
        """As Storage.sample, by reads: a page touched in a map brings its neighbours into memory."""
        self.check()
        found = []
        for offset, count in ranges:
            data = os.pread(self.descriptor, count, offset)
            if len(data) != count:
                raise self._error(f"ends before byte {offset + count}")
            found.append(np.frombuffer(data, np.uint8))
        return found

    def stream(self, start: int, stop: int, piece: int = STREAM) -> Iterator[Bytes]:
        """As Storage.stream, by reads into one buffer: no mapped page is touched."""
        buffer = np.empty(min(piece, max(stop - start, 0)), np.uint8)
        while start < stop:
            count = min(piece, stop - start)
            filled = 0
            while filled < count:
                got = os.preadv(self.descriptor, [buffer.data[filled:count]], start + filled)
                if not got:
                    raise self._error(f"ends at byte {start + filled}")
                filled += got
            yield buffer[:count]
            start += count
        self.check()

    def column(self, dtype: npt.DTypeLike, count: int, offset: int) -> npt.NDArray[Any]:
        """As Storage.column: a view of the map, which is then read page by page, nothing ahead."""
        if self._mapping is not None and hasattr(mmap, "MADV_RANDOM"):
            self._mapping.madvise(mmap.MADV_RANDOM)
        return np.frombuffer(self._map, dtype, count, offset) if count else np.empty(0, dtype)

    def check(self) -> None:
        """As Storage.check."""
        try:
            status = os.fstat(self.descriptor)
        except OSError as error:  # a network file system that lost the file
            raise self._error(f"is gone ({error.strerror})") from error
        if status.st_size != self.size:
            raise self._error(f"has {status.st_size} bytes")
        if status.st_mtime_ns != self._changed:
            raise self._error("was written to")

    def copy_to(self, target: IO[bytes], start: int, stop: int, progress: Progress) -> None:
        """Append bytes [start, stop) to `target` inside the system where it can (without a copy on some file
        systems); holes are left out, so that sparse files stay sparse."""
        target.flush()
        end = target.tell() + stop - start
        while start < stop:
            data = self._next_data(start, stop)
            target.seek(data - start, os.SEEK_CUR)
            progress(data - start)
            hole = self._next_hole(data, stop)
            for at in range(data, hole, 8 * STREAM):
                self._copy_data(target, at, min(hole, at + 8 * STREAM))
                progress(min(hole, at + 8 * STREAM) - at)
            start = hole
        target.truncate(end)
        target.seek(end)
        self.check()

    def _copy_data(self, target: IO[bytes], start: int, stop: int) -> None:
        at = target.tell()
        if hasattr(os, "copy_file_range"):
            try:
                while start < stop:
                    done = os.copy_file_range(self.descriptor, target.fileno(), stop - start, start, at)
                    if not done:
                        raise self._error(f"ends at byte {start}")
                    start, at = start + done, at + done
            except OSError as error:
                if error.errno not in _NO_COPY:
                    raise
        target.seek(at)
        for piece in self.stream(start, stop):
            target.write(piece.data)
        target.flush()

    def _next_data(self, start: int, stop: int) -> int:
        try:
            return min(os.lseek(self.descriptor, start, os.SEEK_DATA), stop)
        except OSError as error:
            return stop if error.errno == errno.ENXIO else start  # no data from here on; or it cannot tell

    def _next_hole(self, start: int, stop: int) -> int:
        try:
            return min(os.lseek(self.descriptor, start, os.SEEK_HOLE), stop)
        except OSError:
            return stop

    def _error(self, what: str) -> UserError:
        return UserError(f"{self.name} changed while it was in use: it {what}, but had {self.size} bytes and another "
                         "time of change when it was opened. Put new data under another name, or rename it over "
                         "the old file; then start again")


def sha256(storage: Storage, progress: Progress = lambda count: None) -> str:
    """The SHA-256 of the whole file in hexadecimal digits."""
    digest = hashlib.sha256()
    for piece in storage.stream(0, storage.size):
        digest.update(piece.data)
        progress(len(piece))
    return digest.hexdigest()
