"""What arguments must be before anything is read of them that only the right type has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megapt_kernels.registry import Unsupported

_INFINITY = float("inf")


def check_tensors(op: str, **arguments: Any) -> None:
    """Unsupported unless all are tensors with strides: not sparse, nested or packed for a library."""
    for name, t in arguments.items():
        if not isinstance(t, Tensor):
            raise Unsupported(f"{op}: {name} is a tensor, not {type(t).__name__}")
        if t.is_nested or t.layout != torch.strided:
            kind = "nested" if t.is_nested else str(t.layout)
            raise Unsupported(f"{op}: {name} is a dense tensor (torch.strided), not {kind}")


def check_numbers(op: str, **arguments: Any) -> None:
    """Unsupported unless all are finite numbers of Python's."""
    for name, value in arguments.items():
        if not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
            raise Unsupported(f"{op}: {name} is a number, not {type(value).__name__}")
        whole = isinstance(value, (int, torch.SymInt))
        if not (-(1 << 63) <= value < 1 << 63 if whole else -_INFINITY < value < _INFINITY):
            raise Unsupported(f"{op}: {name} is a finite number, not {value}")


def check_whole(op: str, **arguments: Any) -> None:
    """Unsupported unless all are whole numbers of Python's that fit 64 bits."""
    for name, value in arguments.items():
        if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
            raise Unsupported(f"{op}: {name} is a whole number, not {type(value).__name__}")
        if not -(1 << 63) <= value < 1 << 63:
            raise Unsupported(f"{op}: {name} is a whole number of 64 bits, not {value}")


def check_flags(op: str, **arguments: Any) -> None:
    """Unsupported unless all are True or False."""
    for name, value in arguments.items():
        if not isinstance(value, bool):
            raise Unsupported(f"{op}: {name} is True or False, not {type(value).__name__}")


def check_written(op: str, **arguments: Tensor) -> None:
    """Unsupported where elements of a tensor that is written to share memory, as those of an expanded one do."""
    for name, t in arguments.items():
        # A compiler is not asked to compare strides that it does not know.
        shared = expanded(t) if torch.compiler.is_compiling() else overlaps_itself(t)
        if shared:
            raise Unsupported(
                f"{op}: {name} is written to, and elements of it share memory (shape {list(t.shape)}, strides "
                f"{list(t.stride())}): give it memory of its own, such as a clone"
            )


def expanded(t: Tensor) -> bool:
    return any(size > 1 and stride == 0 for size, stride in zip(t.shape, t.stride(), strict=True))


def overlaps_itself(t: Tensor) -> bool:
    """Whether elements may share memory: True as well for layouts that interleave, which only as_strided makes."""
    if t.numel() == 0:
        return False
    reach = 0
    for stride, size in sorted((stride, size) for size, stride in zip(t.shape, t.stride(), strict=True) if size != 1):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False
