"""Tensors whose memory ends, or begins, at a page that may not be touched: an access one element beyond it faults.

Under the emulator a kernel's fault is the launch's error, with block and thread. Anywhere else it ends the process.
"""

from __future__ import annotations

import ctypes
import mmap
import weakref

import torch

_PAGE = mmap.PAGESIZE
_NONE, _READ_WRITE, _NO_RESERVE = 0, mmap.PROT_READ | mmap.PROT_WRITE, 0x4000

_c = ctypes.CDLL(None, use_errno=True)
_c.mmap.restype = ctypes.c_void_p
_c.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_c.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_c.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def guarded(tensor: torch.Tensor, *, before: bool = False, align: int = 1) -> torch.Tensor:
    """A contiguous copy of a tensor on the CPU, its last byte (or with `before` its first) next to a forbidden page.

    align: bytes of which its address shall be a multiple, as kernels that move 16 at once want it. Where its size is
    no multiple of that, up to align - 1 bytes lie between its end and the page.
    """
    bytes_ = tensor.numel() * tensor.element_size()
    inside = -(-bytes_ // _PAGE) * _PAGE
    offset = 0 if before else (inside - bytes_) // align * align
    copy = _tensor(inside, _PAGE, offset, tensor.numel(), tensor.dtype).view(tensor.shape)
    copy.copy_(tensor)
    return copy


def sparse(count: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor [count] of zeros that takes memory only where it is written: for more than 2^31 elements.

    As many forbidden bytes lie before it, where an index would go that overflows 32 bits and becomes negative.
    """
    bytes_ = -(-count * dtype.itemsize // _PAGE) * _PAGE
    return _tensor(bytes_, bytes_, 0, count, dtype)


def _tensor(inside: int, forbidden: int, offset: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """[count] of `dtype`, `offset` bytes into `inside` bytes of memory between forbidden ones (a page after it)."""
    if count == 0:
        return torch.empty(0, dtype=dtype)
    total = forbidden + inside + _PAGE
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
    start = _c.mmap(None, total, _NONE, flags, -1, 0)
    if start in (None, ctypes.c_void_p(-1).value) or _c.mprotect(start + forbidden, inside, _READ_WRITE):
        raise MemoryError(f"{total} bytes of address space")
    memory = (ctypes.c_char * inside).from_address(start + forbidden)
    weakref.finalize(memory, _c.munmap, start, total)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=offset)
