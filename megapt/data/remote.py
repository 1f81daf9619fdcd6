"""Token files in object stores and on web servers, read in ranges through a bounded cache of blocks on local disk.

A URL is any that fsspec knows: "s3://bucket/corpus", "gs://...", "http://...". A file is cut into blocks; a block is
fetched when a byte of it is asked for, kept as a file in the cache folder, and removed when the folder is full and no
other block was left alone for longer. The processes of a machine share the folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import numpy.typing as npt

from megapt.data.storage import STREAM, Bytes
from megapt.errors import UserError
from megapt.files import StrPath, open_whole

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

BLOCK_BYTES = 4 << 20
CACHE_BYTES = 64 * BLOCK_BYTES

_LOCKS = 64  # lock files of a cache folder
_ATTEMPTS = 4  # of one request
_FIRST_PAUSE = 0.5  # seconds after the first failure; four times as long after each further one
_RECHECK = 10.0  # seconds between two looks at whether the remote file changed
_ABANDONED = 3600.0  # seconds after which a partial file is nobody's any more
_IDENTITY = ("ETag", "etag", "md5Hash", "Content-MD5", "generation", "VersionId", "Last-Modified", "LastModified",
             "last_modified", "mtime", "created")
_NAME = re.compile(r"[0-9a-f]{24}\.\d+\.block(\.[0-9a-f]{8}\.partial)?")

_T = TypeVar("_T")


def is_remote(prefix: str) -> bool:
    """Whether this is a URL of something else than a local file."""
    return "://" in prefix and not prefix.startswith("file://")


def default_folder() -> Path:
    """Where blocks are kept if no folder is named: megapt/blocks in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megapt" / "blocks"


class BlockCache:
    """Blocks of remote files in a folder, least recently used out first, shared by processes and runs.

    A block appears under its name only when whole, and readers hold it open while they read, so that one process may
    remove what another one reads. Where several processes miss the same block at once, one fetches it and the others
    wait. The folder holds at most `capacity` bytes of blocks, plus capacity / 64 or one block per process (what each
    may add between two counts). UserError if the folder cannot be made or is smaller than two blocks.
    """

    def __init__(self, folder: StrPath | None = None, capacity: int = CACHE_BYTES,
                 block_bytes: int = BLOCK_BYTES) -> None:
        self.folder, self.capacity, self.block_bytes = Path(folder or default_folder()), capacity, block_bytes
        if block_bytes < 1 or capacity < 2 * block_bytes:
            raise UserError(f"a cache of {capacity} bytes is too small for blocks of {block_bytes}; it must hold two, "
                            f"{2 * max(block_bytes, 1)} bytes")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cache folder {self.folder} cannot be made: {error.strerror}; name another one") from error
        self._added = capacity  # bytes added since the folder was counted; at first nothing is known of it

    def read(self, key: str, block: int, size: int, start: int, stop: int, fetch: Callable[[], bytes]) -> Bytes:
        """Bytes [start, stop) of a block of `size` bytes, which `fetch` gets if it is not here."""
        path = self.folder / f"{key}.{block}.block"
        found = _read_block(path, size, start, stop)
        if found is not None:
            return found
        with self._lock(path.name):
            found = _read_block(path, size, start, stop)  # another process may have been first
            if found is not None:
                return found
            data = fetch()
            try:
                with open_whole(path) as file:
                    file.write(data)
                self._added += size
                if self._added >= min(self.capacity // 64, self.capacity - self.block_bytes):
                    self._evict(path)
            except OSError as error:
                raise UserError(f"cache folder {self.folder} cannot hold a block of {size} bytes ({error.strerror}); "
                                f"free some room, or name another folder or a smaller cache than {self.capacity} bytes"
                                ) from error
        return np.frombuffer(data, np.uint8)[start:stop]

    def _evict(self, newest: Path) -> None:
        blocks: list[tuple[int, int, str]] = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                match = _NAME.fullmatch(entry.name)
                with contextlib.suppress(FileNotFoundError):  # removed by another process meanwhile
                    if match and (not match[1] or entry.stat().st_mtime < time.time() - _ABANDONED):
                        blocks.append((entry.stat().st_mtime_ns, entry.stat().st_size, entry.path))
        total = sum(size for _, size, _ in blocks)
        for _, size, path in sorted(blocks):
            if total <= self.capacity:
                break
            if path != str(newest):
                Path(path).unlink(missing_ok=True)
                total -= size
        self._added = 0

    @contextlib.contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        number = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little") % _LOCKS
        with open(self.folder / f"{number}.lock", "ab") as file:
            # Without locks (some shared file systems) a block may be fetched twice, no more.
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            yield


class RemoteFile:
    """A file behind a URL as a Storage. UserError if it is missing, unreachable, or not served in ranges."""

    def __init__(self, url: str, cache: BlockCache) -> None:
        self.name, self._cache, self.block_bytes = url, cache, cache.block_bytes
        info = self._ask(lambda system, path: system.info(path), attempts=1)
        if info.get("type") == "directory" or info.get("size") is None:
            raise UserError(f"{url} is not a file of known size; give the common URL of the .bin and .idx files, "
                            "without the ending")
        self.size = int(info["size"])
        self._identity, self._checked = _identity(info), time.monotonic()
        words = f"{url} {self._identity} {cache.block_bytes}"
        self._key = hashlib.blake2b(words.encode(), digest_size=12).hexdigest()
        if self.size > 1 and self._ask(_second_byte, attempts=1) is None:
            raise UserError(f"{url} is on a server that does not serve ranges of bytes (no Range support), so all "
                            "of it would be fetched for every read; copy the files here, or use a server that does")

    def read(self, offset: int, count: int) -> Bytes:
        """As Storage.read, through the cache."""
        size, stop = self.block_bytes, offset + count
        parts = []
        for block in range(offset // size, -(-stop // size) if count else 0):
            low, high = block * size, min((block + 1) * size, self.size)
            fetch = functools.partial(self._fetch_one, low, high - low)
            parts.append(self._cache.read(self._key, block, high - low, max(offset - low, 0), min(stop, high) - low,
                                          fetch))
        joined = parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.uint8), *parts])
        joined.flags.writeable = False
        return joined

    def sample(self, ranges: Sequence[tuple[int, int]]) -> list[Bytes]:
        """As Storage.sample: the ranges alone are fetched, at the same time where the protocol can, and not kept."""
        return [np.frombuffer(data, np.uint8) for data in self._fetch(ranges)]

    def stream(self, start: int, stop: int, piece: int = STREAM) -> Iterator[Bytes]:
        """As Storage.stream: a pass over everything would only flush the cache, and goes past it."""
        for at in range(start, stop, piece):
            yield np.frombuffer(self._fetch_one(at, min(piece, stop - at)), np.uint8)

    def column(self, dtype: npt.DTypeLike, count: int, offset: int) -> npt.NDArray[Any]:
        """As Storage.column."""
        return cast("npt.NDArray[Any]", RemoteColumn(self, np.dtype(dtype), count, offset))

    def check(self) -> None:
        """As Storage.check. Blocks at hand stay what they were; `_fetch` looks at the remote file now and then."""

    def _fetch_one(self, offset: int, count: int) -> bytes:
        return self._fetch([(offset, count)])[0]

    def _fetch(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        if not ranges:
            return []
        starts, stops = [start for start, _ in ranges], [start + count for start, count in ranges]

        def get(system: AbstractFileSystem, path: str) -> list[bytes]:
            found = system.cat_ranges([path] * len(ranges), starts, stops, on_error="return")
            for (start, count), data in zip(ranges, found, strict=True):
                if isinstance(data, Exception):
                    raise data
                if len(data) != count:
                    raise OSError(f"{len(data)} bytes came for bytes [{start}, {start + count})")
            return [bytes(data) for data in found]

        data = self._ask(get)
        if time.monotonic() - self._checked >= _RECHECK:
            self._check_identity()
        return data

    def _check_identity(self) -> None:
        def fresh(system: AbstractFileSystem, path: str) -> dict[str, Any]:
            system.invalidate_cache(system._parent(path))
            return cast("dict[str, Any]", system.info(path))

        if _identity(self._ask(fresh)) != self._identity:
            raise UserError(f"{self.name} changed while it was in use; put new data under another name and start again")
        self._checked = time.monotonic()

    def _ask(self, question: Callable[[AbstractFileSystem, str], _T], attempts: int = _ATTEMPTS) -> _T:
        """What a file system answers; asked again after failures that may pass."""
        from fsspec.core import url_to_fs

        for attempt in range(attempts):
            try:
                # Looked up each time (a dictionary of fsspec's): a file system does not survive a fork.
                return question(*url_to_fs(self.name))
            except FileNotFoundError as error:
                reason = f" ({error.__cause__})" if error.__cause__ else ""
                raise UserError(f"{self.name} does not exist or cannot be reached{reason}; give the common URL of the "
                                ".bin and .idx files, without the ending") from error
            except (ImportError, PermissionError) as error:
                raise UserError(f"{self.name} cannot be read: {error}") from error
            except Exception as error:  # each protocol's library has exceptions of its own
                if attempt + 1 == attempts:
                    tried = f" ({attempts} attempts)" if attempts > 1 else ""
                    raise UserError(f"{self.name} cannot be read{tried}: {type(error).__name__}: {error}") from error
                time.sleep(_FIRST_PAUSE * 4**attempt)
        raise AssertionError(attempts)


class RemoteColumn:
    """One column of a remote index, indexed like an array: single numbers and slices through the block cache, arrays
    of numbers as small ranges of their own."""

    def __init__(self, file: RemoteFile, dtype: np.dtype[Any], count: int, offset: int) -> None:
        self._file, self.dtype, self._count, self._offset = file, dtype, count, offset
        self._seen: dict[int, int] = {}  # the numbers that searches came by, few as they begin alike

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, at: int | slice | npt.NDArray[np.integer[Any]]) -> Any:
        size = self.dtype.itemsize
        if isinstance(at, slice):
            start, stop, step = at.indices(self._count)
            if step != 1:
                raise IndexError(f"a column of {self._file.name} is read in steps of 1, not {step}")
            return self._file.read(self._offset + start * size, max(stop - start, 0) * size).view(self.dtype)
        if isinstance(at, np.ndarray):
            places = [(self._offset + self._inside(i) * size, size) for i in at.tolist()]
            data = b"".join(part.tobytes() for part in self._file.sample(places))
            return np.frombuffer(data, self.dtype)
        return self._file.read(self._offset + self._inside(at) * size, size).view(self.dtype)[0]

    def __array__(self, *_: Any, **__: Any) -> npt.NDArray[Any]:
        raise TypeError(f"a column of {self._file.name} is not fetched whole; take a slice")

    def searchsorted(self, value: int, side: str = "left") -> int:
        """As of an ascending array, for one value: a few numbers are fetched, each once, and one block."""
        last = value if side == "right" else value - 1
        low, high = 0, self._count
        while high - low > self._file.block_bytes // self.dtype.itemsize:
            middle = (low + high) // 2
            if middle not in self._seen:
                self._seen[middle] = int(self[np.array([middle])][0])
            low, high = (middle + 1, high) if self._seen[middle] <= last else (low, middle)
        return low + int(np.count_nonzero(self[low:high] <= last))

    def _inside(self, i: int) -> int:
        if not -self._count <= i < self._count:
            raise IndexError(f"entry {i} of {self._count} in {self._file.name}")
        return i % self._count


def _second_byte(system: AbstractFileSystem, path: str) -> bytes | None:
    """None if the server sends everything instead: fsspec sees that from the answer's headers, before the body."""
    with system.open(path, "rb", cache_type="none") as file:
        if not file.seekable():
            return None
        try:
            file.seek(1)
            return cast("bytes", file.read(1))
        except ValueError:
            return None


def _identity(info: dict[str, Any]) -> str:
    return " ".join([str(info["size"]), *(f"{key}={info[key]}" for key in _IDENTITY if info.get(key) is not None)])


def _read_block(path: Path, size: int, start: int, stop: int) -> Bytes | None:
    """Bytes [start, stop) of a cached block, marked as used; None if it is not there."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        if os.fstat(descriptor).st_size != size:
            return None
        data = os.pread(descriptor, stop - start, start)
        with contextlib.suppress(OSError):  # a folder that is only read from, or a block just removed
            os.utime(path)
    finally:
        os.close(descriptor)
    return np.frombuffer(data, np.uint8) if len(data) == stop - start else None
