"""Reducing gradients while the backward pass still runs.

Buckets are reduced in one fixed order on every data-parallel rank, whatever order autograd finishes them in: ranks that
queued their collectives differently would wait for each other for ever.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megapt.operations import Issued
from megapt.parameters import Parameter
from megapt.zero.accumulate import Accumulator
from megapt.zero.buckets import Bucket, Exchange, start_reduce_scatter

_IN_FLIGHT = 2  # reductions that may be under way, with their memory, when another one begins


class Overlap(Accumulator):
    """Stages 0 and 1: a bucket is reduced as soon as it has its gradients of all micro-batches.

    Every parameter outside late buckets gets one gradient per micro-batch, in whatever order a schedule computes them;
    where the number of micro-batches is not known, everything is reduced at the end.
    """

    def __init__(self, parameters: Sequence[Parameter], buckets: Sequence[Bucket]) -> None:
        super().__init__(parameters)
        self._buckets = list(buckets)
        self._bucket_of = {p: b for b in self._buckets if not b.late for p in b.parameters}
        self._missing: dict[Bucket, int] = {}
        self._next = 0

    def start(self, micro_batches: int | None) -> None:
        """Before the first backward of a step of so many micro-batches."""
        self.begin()
        for bucket in self._buckets:
            bucket.reduced()  # of a step that was given up
        self._next = 0
        self._missing = {b: micro_batches * len(b.parameters) for b in self._buckets if micro_batches and not b.late}

    def _arrived(self, parameter: Parameter) -> None:
        bucket = self._bucket_of.get(parameter)
        if bucket is None or not self._missing:
            return
        self._missing[bucket] -= 1
        assert self._missing[bucket] >= 0, f"{parameter.spec.name}: more gradients than micro-batches"
        while self._next < len(self._buckets) and self._missing.get(self._buckets[self._next]) == 0:
            self._launch()

    def finish(self) -> None:
        """After gradients were completed: reduce what has not been, and wait for all."""
        while self._next < len(self._buckets):
            self._launch()
        for bucket in self._buckets:
            bucket.reduced()

    def _launch(self) -> None:
        bucket, earlier = self._buckets[self._next], self._next - _IN_FLIGHT
        if bucket.device.type == "cpu" and earlier >= 0:
            self._buckets[earlier].reduced()  # there a reduction holds memory of the size of its bucket
        bucket.reduce()
        self._next += 1


@dataclass(frozen=True)
class _Flight:
    """A reduction under way: into `part`, out of `memory`, which is free again after it."""

    bucket: Bucket
    work: Issued | Exchange
    part: Tensor
    memory: Tensor


class Sharding(Accumulator):
    """Stage 2: full buckets exist while one micro-batch's backward fills them, and are reduced into shards at once.

    Sums are linear: it does not matter to the result which gradients travel together. Late buckets stay whole.
    """

    def __init__(self, parameters: Sequence[Parameter], buckets: Sequence[Bucket]) -> None:
        super().__init__(parameters)
        self._late = [b for b in buckets if b.late]
        self._buckets = [b for b in buckets if not b.late]
        self._bucket_of = {p: b for b in self._buckets for p in b.parameters}
        self._size = max((b.width * b.shards for b in self._buckets), default=0)
        self._free: list[Tensor] = []  # memory for the largest bucket each
        self._held: dict[Bucket, Tensor] = {}
        self._present: dict[Bucket, set[Parameter]] = {}
        self._started: set[Bucket] = set()
        self._flying: deque[_Flight] = deque()
        self._turn = 0

    def start(self, micro_batches: int | None) -> None:
        """Before the first backward of a step."""
        while self._flying:
            self._land()
        for bucket, memory in self._held.items():  # of a step that was given up
            bucket.release()
            self._free.append(memory)
        self._held.clear()
        self._present.clear()
        self._started.clear()
        self._turn = 0
        self.begin()

    def _opening(self, parameter: Parameter) -> None:
        bucket = self._bucket_of.get(parameter)
        if bucket is not None and bucket.grads is None:
            self._open(bucket)

    def _arrived(self, parameter: Parameter) -> None:
        bucket = self._bucket_of.get(parameter)
        if bucket is None:
            return
        self._present[bucket].add(parameter)
        while self._complete(self._buckets[self._turn]):
            self._flush(self._buckets[self._turn])
            self._turn = (self._turn + 1) % len(self._buckets)

    def end(self) -> None:
        """After the last backward: what is left on the way to the shards is sent, and awaited."""
        for bucket in self._buckets:
            if bucket in self._present:
                self._flush(bucket)
            self._fresh.difference_update(bucket.parameters)
        while self._flying:
            self._land()
        self._free.clear()  # until the next backward others may have the memory
        for bucket in self._buckets:
            if bucket not in self._started:
                bucket.grad.zero_()
        super().end()

    def finish(self) -> None:
        for bucket in self._late:
            bucket.reduce()
        for bucket in self._late:
            bucket.reduced()

    def _complete(self, bucket: Bucket) -> bool:
        return len(self._present.get(bucket, ())) == len(bucket.parameters)

    def _open(self, bucket: Bucket) -> None:
        while len(self._flying) >= _IN_FLIGHT:
            self._land()
        memory = self._free.pop() if self._free else torch.empty(self._size, dtype=bucket.dtype, device=bucket.device)
        bucket.hold(memory)
        self._held[bucket] = memory
        self._fresh.update(bucket.parameters)
        self._present[bucket] = set()

    def _flush(self, bucket: Bucket) -> None:
        """Start adding a full bucket to its shard."""
        for p in self._fresh.intersection(bucket.parameters):
            p.main_grad.zero_()
        assert bucket.grads is not None
        part = torch.empty_like(bucket.grad)
        work = start_reduce_scatter(part, bucket.grads, bucket.dp)
        self._flying.append(_Flight(bucket, work, part, self._held.pop(bucket)))
        bucket.release()
        del self._present[bucket]

    def _land(self) -> None:
        flight = self._flying.popleft()
        flight.work.wait()
        bucket = flight.bucket
        if bucket in self._started:
            bucket.grad.add_(flight.part)
        else:
            bucket.grad.copy_(flight.part)
            self._started.add(bucket)
        self._free.append(flight.memory)
