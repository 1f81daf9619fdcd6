"""Compressed files and standard input as blocks of one size; Parquet files opened. Both libraries are optional."""

from __future__ import annotations

import gzip
import sys
import zlib
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, Any

from megapt.errors import UserError

if TYPE_CHECKING:
    import pyarrow.parquet

BLOCK = 1 << 18  # bytes
_COMPRESSED = 1 << 14  # bytes given to zstandard at once: a block of theirs may grow a thousandfold


class Blocks:
    """The decompressed content of a file (or of "-", standard input) in blocks of BLOCK bytes, the last one shorter.

    `used`: bytes of the file read so far. UserError, while iterating, if the file is damaged or cut short.
    """

    def __init__(self, path: str, compression: str) -> None:
        self.path, self.compression, self.used = path, compression, 0

    def __iter__(self) -> Iterator[bytes]:
        if self.path == "-":
            yield from self._regular(iter(lambda: sys.stdin.buffer.read(BLOCK), b""))
            return
        with open(self.path, "rb") as file:
            try:
                yield from self._regular(self._gzip(file) if self.compression == "gz" else self._zstandard(file))
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise UserError(f"{self.path} is not a whole gzip file: {error}") from error

    def _regular(self, parts: Iterator[bytes]) -> Iterator[bytes]:
        """Parts of any size as blocks of one size, so that cuts do not depend on a library's buffers."""
        buffer = bytearray()
        for part in parts:
            buffer += part
            while len(buffer) >= BLOCK:
                yield bytes(buffer[:BLOCK])
                del buffer[:BLOCK]
        if buffer:
            yield bytes(buffer)

    def _gzip(self, file: IO[bytes]) -> Iterator[bytes]:
        with gzip.GzipFile(fileobj=file) as content:
            while part := content.read(BLOCK):
                self.used = file.tell()
                yield part

    def _zstandard(self, file: IO[bytes]) -> Iterator[bytes]:
        library = zstandard(self.path)
        context = library.ZstdDecompressor(max_window_size=2**31)
        frame: Any = None
        try:
            while part := file.read(_COMPRESSED):
                self.used += len(part)
                while part:  # a file may hold several frames
                    frame = frame or context.decompressobj()
                    if content := frame.decompress(part):
                        yield content
                    part = b""
                    if frame.eof:
                        part, frame = frame.unused_data, None
        except library.ZstdError as error:
            raise UserError(f"{self.path} is not a zstandard file: {error}") from error
        if frame is not None:
            raise UserError(f"{self.path} is not a whole zstandard file: its last frame is cut short")


def zstandard(path: str) -> Any:
    """The zstandard library. UserError if it is not installed."""
    try:
        import zstandard as library
    except ImportError as error:
        raise UserError(f"{path} needs the zstandard library: pip install megapt[data]") from error
    return library


def parquet(path: str) -> pyarrow.parquet.ParquetFile:
    """A Parquet file, opened. UserError if it is damaged, or if pyarrow is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet as library
    except ImportError as error:
        raise UserError(f"{path} needs the pyarrow library: pip install megapt[data]") from error
    try:
        return library.ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is not a Parquet file: {error}") from error
