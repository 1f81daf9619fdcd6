"""Tensors and the bytes that stand for them in safetensors files."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from megapt.checkpoint.rawfile import RawFile, Slot

__all__ = ["DTYPES", "NAMES", "Slot", "TensorFile", "checksum", "raw_bytes"]

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor, without a copy where it is contiguous."""
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data


def checksum(tensor: Tensor) -> str:
    return f"crc32:{zlib.crc32(raw_bytes(tensor)):08x}"


class TensorFile(RawFile):
    """A safetensors file written tensor by tensor: at no time is more than one in memory. The library's `save_file`
    wants all at once."""

    def write(self, tensor: Tensor) -> str:
        """Append the next tensor, from any device; returns its checksum."""
        slot = self.next_slot()
        assert tuple(tensor.shape) == slot.shape and NAMES[tensor.dtype] == slot.dtype, (slot, tensor.shape)
        return self.append(raw_bytes(tensor.cpu()))
