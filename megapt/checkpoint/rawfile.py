"""safetensors files written piece by piece, with the standard library alone: the background writer imports no torch.

The format is a length, a JSON header and the bytes, so the header is written first from shapes that are known, and the
tensors follow in order. Checksums are taken on the way, and what was written is sent to the disk while more comes.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

WIDTHS = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
_CHUNK = 4 << 20  # checksummed and written while it is still in the processor's cache
_SYNC = 64 << 20  # the disk works beside the processor instead of after it


class Slot(NamedTuple):
    """A tensor that will be written: its key, its dtype as safetensors names it, its shape."""

    key: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * WIDTHS[self.dtype]


class RawFile:
    """A new safetensors file. The tensors' bytes must come in the order of `slots`.

    dir_fd: an open folder in which the file is made, whatever its path means by now. Errors are OSErrors that carry
    the path; a file that exists is one. The file is whole and on disk once `close` has returned.
    """

    def __init__(self, path: Path, slots: Sequence[Slot], dir_fd: int | None = None) -> None:
        self.path = path
        self._slots = list(slots)
        self._next = 0
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        at = 0
        for slot in slots:
            offsets = [at, at := at + slot.nbytes]
            header[slot.key] = {"dtype": slot.dtype, "shape": slot.shape, "data_offsets": offsets}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the tensors begin aligned
        self.size = 8 + len(text) + at
        name = str(path) if dir_fd is None else path.name
        try:
            descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666, dir_fd=dir_fd)
        except OSError as error:
            raise self._located(error) from None
        self._file = open(descriptor, "wb", buffering=1 << 20)  # noqa: SIM115 (open until close)
        self._flusher = ThreadPoolExecutor(1, "checkpoint-flush")
        self._flushed: Future[None] | None = None
        self._unsynced = 0
        self._write(len(text).to_bytes(8, "little") + text)

    def next_slot(self) -> Slot:
        """What the next `append` must bring."""
        return self._slots[self._next]

    def append(self, data: memoryview) -> str:
        """Write the next tensor's bytes; returns their checksum as the index has it."""
        slot = self.next_slot()
        assert data.nbytes == slot.nbytes, f"{self.path}: {slot} came with {data.nbytes} bytes"
        self._next += 1
        crc = 0
        for at in range(0, data.nbytes, _CHUNK):
            chunk = data[at : at + _CHUNK]
            crc = zlib.crc32(chunk, crc)
            self._write(chunk)
        return f"crc32:{crc:08x}"

    def close(self) -> None:
        left = len(self._slots) - self._next
        assert not left, f"{self.path}: {left} tensors were announced and not written"
        try:
            self._flush()
            self._flusher.shutdown()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        except OSError as error:
            raise self._located(error) from None

    def abandon(self) -> None:
        """Give up on a file after an error; what it holds does not matter any more."""
        self._flusher.shutdown()
        try:
            self._file.close()
        except OSError:
            pass  # the buffer could not be flushed, which is the error already known

    def _write(self, data: bytes | memoryview) -> None:
        try:
            self._file.write(data)
            self._unsynced += len(data)
            if self._unsynced >= _SYNC:
                self._unsynced = 0
                self._flush()
                self._flushed = self._flusher.submit(os.fdatasync, self._file.fileno())
        except OSError as error:
            raise self._located(error) from None

    def _flush(self) -> None:
        """Wait until the disk has what it was given before; an error there counts here."""
        if self._flushed is not None:
            self._flushed.result()
            self._flushed = None

    def _located(self, error: OSError) -> OSError:
        return OSError(error.errno, error.strerror, str(self.path))
