"""safetensors files written tensor by tensor: at no time is more than one tensor in memory.

The library's `save_file` wants all tensors at once. The format is a length, a JSON header and the bytes, so
the header is written first from shapes that are known, and the tensors follow in order.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Slot(NamedTuple):
    """A tensor that will be written: its key, its dtype as safetensors names it, its shape."""

    key: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor, without a copy where it is contiguous."""
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data


def checksum(tensor: Tensor) -> str:
    return f"crc32:{zlib.crc32(raw_bytes(tensor)):08x}"


class TensorFile:
    """A safetensors file being written. The tensors must come in the order of `slots`.

    Errors are OSErrors that carry the path. The file is whole and on disk once `close` has returned.
    """

    def __init__(self, path: Path, slots: Sequence[Slot]) -> None:
        self.path = path
        self._left = list(reversed(slots))
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        at = 0
        for slot in slots:
            offsets = [at, at := at + slot.nbytes]
            header[slot.key] = {"dtype": slot.dtype, "shape": slot.shape, "data_offsets": offsets}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the tensors begin aligned
        self.size = 8 + len(text) + at
        self._file = open(path, "wb")  # noqa: SIM115 (open until close)
        self._write(len(text).to_bytes(8, "little") + text)

    def write(self, tensor: Tensor) -> None:
        """Append the next tensor, from any device."""
        slot = self._left.pop()
        assert tuple(tensor.shape) == slot.shape and NAMES[tensor.dtype] == slot.dtype, (slot, tensor.shape)
        self._write(raw_bytes(tensor.cpu()))

    def close(self) -> None:
        assert not self._left, f"{self.path}: {len(self._left)} tensors were announced and not written"
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        except OSError as error:
            raise self._located(error) from None

    def abandon(self) -> None:
        """Give up on a file after an error; what it holds does not matter any more."""
        try:
            self._file.close()
        except OSError:
            pass  # the buffer could not be flushed, which is the error already known

    def _write(self, data: bytes | memoryview) -> None:
        try:
            self._file.write(data)
        except OSError as error:
            raise self._located(error) from None

    def _located(self, error: OSError) -> OSError:
        return OSError(error.errno, error.strerror, str(self.path))
