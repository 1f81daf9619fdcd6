"""Where documents lie among the B x S tokens of a call, in the forms that kernels want."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

_P = ParamSpec("_P")
_R = TypeVar("_R")


def remembered(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Keeps results for the layers of a model and the micro-batches of a pipeline that are under way together."""
    cached: Callable[..., _R] = lru_cache(maxsize=64)(function)

    def call(*arguments: _P.args, **keywords: _P.kwargs) -> _R:
        # torch.compile would warn of the cache, and has no need of it.
        return (function if torch.compiler.is_compiling() else cached)(*arguments, **keywords)

    return call


@remembered
def documents_of(lengths: tuple[int, ...] | None, rows: int, length: int) -> tuple[int, ...]:
    """The lengths of the documents that hold tokens; without documents, each row is one."""
    if lengths is None:
        return (length,) * rows if length else ()
    return tuple(n for n in lengths if n)


@remembered
def longest_of(lengths: tuple[int, ...]) -> tuple[int, bool]:
    """The longest document's tokens, 0 without any, and whether another is shorter."""
    longest = max(lengths) if lengths else 0
    return longest, any(length != longest for length in lengths)


@dataclass(frozen=True)
class Run:
    """Neighbouring documents of equal length: `count` x `length` tokens from number `start` on."""

    start: int
    count: int
    length: int

    def of(self, t: Tensor) -> Tensor:
        """Its tokens of t [T, heads, width] as a view [count, heads, length, width]."""
        tokens = t[self.start : self.start + self.count * self.length]
        return tokens.unflatten(0, (self.count, self.length)).transpose(1, 2)


def runs(lengths: tuple[int, ...]) -> Iterator[Run]:
    """Documents as few batches."""
    start = 0
    for length, same in groupby(lengths):
        count = len(list(same))
        yield Run(start, count, length)
        start += count * length


@remembered
@torch.inference_mode(False)  # what an evaluation made first must serve a backward pass as well
def cu_seqlens(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 [documents + 1]: where documents begin, and the end of the last one."""
    return torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device, non_blocking=True)


@remembered
@torch.inference_mode(False)  # what an evaluation made first must serve a backward pass as well
def starts_and_ends(lengths: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """int32 [T] each: for every token, the first token of its document, and the one after its last."""
    sizes = torch.tensor(lengths, dtype=torch.int64)
    ends = sizes.cumsum(0)
    pair = torch.stack([ends - sizes, ends]).to(torch.int32).repeat_interleave(sizes, dim=1)
    starts, ends = pair.to(device, non_blocking=True).unbind(0)
    return starts, ends
