"""Flat buckets of gradients and weights, in the order in which the backward pass completes them.

A bucket is what one collective moves: its gradients are reduced as soon as the last of them is final, its weights are
gathered once they are updated, and each data-parallel rank keeps the optimizer state of an equal part (its shard).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megapt.mesh import Axis, all_gather, all_reduce, all_to_all, reduce_scatter
from megapt.operations import Issued
from megapt.parameters import Parameter
from megapt.zero.base import accumulation_dtype

ALIGN = 64  # elements: shards and blocks begin on a cache line


@dataclass(frozen=True)
class Piece:
    """A parameter's part of a shard: elements [start, start + end - begin) of its flattened local shard lie in
    [begin, end) of the bucket's."""

    parameter: Parameter
    start: int
    begin: int
    end: int


def start_reduce_scatter(out: Tensor, whole: Tensor, axis: Axis) -> Issued | Exchange:
    """Sum `whole` [axis.size x n] over ranks; this one gets its part `out` [n], which may be that part of `whole`
    itself, once the result was waited for. Collective over the axis.

    Gloo has no reduce-scatter but an all-reduce of a copy. Exchanging parts and adding them up takes half the time,
    and half the bytes.
    """
    if whole.device.type == "cpu":
        return Exchange(out, whole, axis)
    return reduce_scatter(out, whole, group=axis.group, async_op=True)


class Exchange:
    """A reduce-scatter under way as an all-to-all. It holds memory of the size of `whole`."""

    def __init__(self, out: Tensor, whole: Tensor, axis: Axis) -> None:
        self.out = out
        self.parts = torch.empty(axis.size, out.numel(), dtype=whole.dtype)
        self.issued = all_to_all(self.parts.view(-1), whole, None, None, axis.group, async_op=True)

    def wait(self) -> None:
        self.issued.wait()
        torch.sum(self.parts, dim=0, out=self.out)


class Bucket:
    """Parameters that are reduced and gathered together.

    weights: flat, in the parameters' dtype, of which they become views. grads: flat fp32 (or fp64), of which
    `main_grad` are views; None where gradients are sharded (stage 2) and no backward is filling them. grad: this rank's
    reduced shard [width], a part of `grads` where these are kept. master: its weights [width] in full precision, a view
    of `weights` where these are.

    blocks: parameters that multiply as one stay neighbours. late: gradients are complete only after the last backward.
    shards: 1 where every rank keeps all (stage 0).
    """

    def __init__(
        self, blocks: Sequence[Sequence[Parameter]], dp: Axis, shards: int, late: bool, keep_grads: bool
    ) -> None:
        self.dp, self.shards, self.late = dp, shards, late
        self.parameters = [p for block in blocks for p in block]
        self.offsets: dict[Parameter, int] = {}
        self.gaps: list[slice] = []
        at = 0
        for block in blocks:
            aligned = -(-at // ALIGN) * ALIGN
            self.gaps.append(slice(at, aligned))
            at = aligned
            for p in block:
                self.offsets[p] = at
                at += p.numel()
        self.width = -(-at // (shards * ALIGN)) * ALIGN
        self.gaps.append(slice(at, self.width * shards))
        self.lo = self.width * dp.rank if shards > 1 else 0
        first = self.parameters[0]
        self.dtype = accumulation_dtype(first.dtype)
        self.device = first.device
        self.weights = torch.zeros(self.width * shards, dtype=first.dtype, device=first.device)
        for p, view in zip(self.parameters, self._views(self.weights), strict=True):
            view.copy_(p.data)
            p.data = view
        shard = self.weights[self.lo : self.lo + self.width]
        self.master = shard if first.dtype == self.dtype else shard.to(self.dtype)
        self.grads: Tensor | None = None
        if keep_grads:
            self.hold(torch.zeros(self.width * shards, dtype=self.dtype, device=self.device))
        kept: Tensor | None = self.grads
        self.grad: Tensor = torch.zeros_like(self.master) if kept is None else kept[self.lo : self.lo + self.width]
        self._reducing: Issued | Exchange | None = None
        self._gathering: Issued | None = None

    def _views(self, flat: Tensor) -> Iterator[Tensor]:
        return (flat[at : at + p.numel()].view(p.shape) for p, at in self.offsets.items())

    def hold(self, grads: Tensor) -> None:
        """Let gradients accumulate in this memory [at least shards x width]; its gaps become zero."""
        self.grads = grads[: self.width * self.shards]
        for gap in self.gaps:
            self.grads[gap].zero_()
        for p, view in zip(self.parameters, self._views(self.grads), strict=True):
            p.main_grad = view

    def release(self) -> None:
        """No gradients are held any more."""
        self.grads = None
        for p in self.parameters:
            del p.main_grad

    def interval(self, parameter: Parameter, rank: int) -> tuple[int, int]:
        """[start, stop) of the parameter's flattened local shard that data-parallel rank `rank` keeps; may be empty."""
        at, numel = self.offsets[parameter], parameter.numel()
        if self.shards == 1:
            return 0, numel
        start = min(max(rank * self.width - at, 0), numel)
        return start, max(start, min((rank + 1) * self.width - at, numel))

    def pieces(self) -> Iterator[Piece]:
        """What this rank's shard holds, in order."""
        for p, at in self.offsets.items():
            start, stop = self.interval(p, self.dp.rank)
            if start < stop:
                yield Piece(p, start, at + start - self.lo, at + stop - self.lo)

    def counted(self) -> list[tuple[int, int]]:
        """Ranges of the shard that this tensor rank counts in the norm; neighbours are joined, over gaps too."""
        ranges: list[tuple[int, int]] = []
        joined = False
        for piece in self.pieces():
            primary = piece.parameter.shard.primary
            if primary and joined:
                ranges[-1] = (ranges[-1][0], piece.end)
            elif primary:
                ranges.append((piece.begin, piece.end))
            joined = primary
        return ranges

    def reduce(self) -> None:
        """Start summing gradients over data-parallel ranks, into `grad`. Collective over dp."""
        assert self.grads is not None and self._reducing is None
        if self.shards > 1:
            self._reducing = start_reduce_scatter(self.grad, self.grads, self.dp)
        elif self.dp.size > 1:
            self._reducing = all_reduce(self.grads, group=self.dp.group, async_op=True)

    def reduced(self) -> None:
        """Wait for `reduce`: on a GPU the stream waits, not the host."""
        if self._reducing is not None:
            self._reducing.wait()
            self._reducing = None

    def gather(self) -> None:
        """Start bringing every rank's weights here. Collective over dp."""
        if self.shards > 1:
            shard = self.weights[self.lo : self.lo + self.width]  # where the result has it: nothing is copied
            self._gathering = all_gather(self.weights, shard, group=self.dp.group, async_op=True)

    def gathered(self) -> None:
        """Wait for `gather`, before the weights are read."""
        if self._gathering is not None:
            self._gathering.wait()
            self._gathering = None


def make_buckets(
    parameters: Sequence[Parameter], late: set[Parameter], size: int, dp: Axis, shards: int, keep_grads: bool
) -> list[Bucket]:
    """Buckets of up to `size` elements (or one block, if that is larger): in backward order, then those of `late`
    parameters.

    parameters: in the order of the forward pass. keep_grads: whether gradients of all micro-batches accumulate in full
    buckets; late ones do in any case.
    """
    blocks: dict[int, list[Parameter]] = {}
    for p in parameters:
        blocks.setdefault(p.untyped_storage().data_ptr(), []).append(p)
    backward = [sorted(block, key=lambda p: p.storage_offset()) for block in reversed(blocks.values())]
    # A block is late as a whole, or its parameters would part.
    waiting = [any(p in late for p in block) for block in backward]
    buckets = []
    for is_late in (False, True):
        chosen = [block for block, waits in zip(backward, waiting, strict=True) if waits is is_late]
        keep = keep_grads or is_late
        buckets += [Bucket(part, dp, shards, is_late, keep) for part in _filled(chosen, size)]
    return buckets


def _filled(blocks: Sequence[list[Parameter]], size: int) -> Iterator[list[list[Parameter]]]:
    part: list[list[Parameter]] = []
    held = 0
    for block in blocks:
        numel = sum(p.numel() for p in block)
        if part and held + numel > size:
            yield part
            part, held = [], 0
        part.append(block)
        held += numel
    if part:
        yield part
