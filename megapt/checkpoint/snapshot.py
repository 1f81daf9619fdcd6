"""Host memory in which a rank's part of a checkpoint waits for its writer, while training changes the live tensors."""

from __future__ import annotations

import mmap
import os

import numpy as np
import torch
from torch import Tensor

from megapt.checkpoint.rawfile import Slot
from megapt.checkpoint.tensorfile import raw_bytes

_ALIGNED = 64


class Snapshot:
    """Memory shared with the background writer by its descriptor; kept from save to save, so that only the first one
    pays for pages. With CUDA it is pinned: the device copies into it by itself.

    It is anonymous (memfd), which no size of /dev/shm limits and no crash leaves behind.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.descriptor = os.memfd_create("checkpoint", os.MFD_CLOEXEC)
        self.nbytes = 0
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def reserve(self, nbytes: int) -> None:
        """Have room for `nbytes`. Raises OSError where the memory is not there."""
        if nbytes <= self.nbytes:
            return
        self._unpin()
        os.posix_fallocate(self.descriptor, 0, nbytes)
        flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
        self._bytes = torch.frombuffer(mmap.mmap(self.descriptor, nbytes, flags=flags), dtype=torch.uint8)
        self.nbytes = nbytes
        if self.device.type == "cuda":
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(self._bytes.data_ptr(), nbytes, 0))

    def put(self, at: int, tensor: Tensor) -> None:
        """Copy a tensor to the place `at`; from a device, the copy has ended only after `settle`."""
        nbytes = tensor.numel() * tensor.element_size()
        room = self._bytes[at : at + nbytes]
        if tensor.device.type == "cpu" and tensor.is_contiguous():
            np.copyto(np.asarray(room), np.frombuffer(raw_bytes(tensor), np.uint8))  # twice as fast as torch's
        else:
            room.view(tensor.dtype).view(tensor.shape).copy_(tensor, non_blocking=True)

    def settle(self) -> None:
        """Wait for the copies."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def close(self) -> None:
        self._unpin()
        self._bytes = torch.empty(0, dtype=torch.uint8)
        os.close(self.descriptor)

    def _unpin(self) -> None:
        if self.device.type == "cuda" and self.nbytes:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(self._bytes.data_ptr()))
        self.nbytes = 0


def places(slots: list[Slot]) -> tuple[list[int], int]:
    """Where each tensor stands in a snapshot, and the bytes of the whole."""
    found, at = [], 0
    for slot in slots:
        found.append(at)
        at += -(-slot.nbytes // _ALIGNED) * _ALIGNED
    return found, at
