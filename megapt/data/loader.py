"""From a step number to this rank's micro-batches, read ahead in the background."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt
import torch

from megapt.batch import MicroBatch, StepBatch
from megapt.data.batches import BatchSchedule
from megapt.errors import UserError


class SampleSource(Protocol):
    """What a loader needs of a data set; TokenDataset is one."""

    name: str

    @property
    def num_samples_per_epoch(self) -> int: ...

    def sample(self, ids: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int64]: ...

    def loss_tokens(self, ids: npt.NDArray[np.integer[Any]]) -> int: ...


@dataclass(frozen=True)
class _Cut:
    """How a global batch becomes one rank's micro-batches: rank r of dp takes samples [r * b / dp, (r + 1) *
    b / dp) of the b samples, `micro_batch` at a time."""

    dataset: SampleSource
    micro_batch: int
    dp_rank: int
    dp_size: int
    vocabulary: int

    def __post_init__(self) -> None:
        if self.micro_batch < 1:
            raise UserError(f"a micro-batch of {self.micro_batch} samples is not possible; it must be "
                            "1 or more")
        if not 0 <= self.dp_rank < self.dp_size:
            raise ValueError(f"data-parallel rank {self.dp_rank} is outside [0, {self.dp_size})")

    def check(self, batch: int) -> None:
        """UserError unless a global batch of this size can be cut evenly."""
        unit = self.micro_batch * self.dp_size
        if batch % unit == 0 and batch > 0:
            return
        lower, upper = batch // unit * unit, (batch // unit + 1) * unit
        legal = f"{lower} or {upper}" if lower else f"{upper}"
        advice = f"the nearest global batches that fit are {legal}"
        if batch > 0 and batch % self.dp_size == 0:
            share = batch // self.dp_size
            divisors = [d for d in range(1, share + 1) if share % d == 0]
            nearest = sorted(sorted(divisors, key=lambda d: abs(d - self.micro_batch))[:2])
            advice += f"; with {batch}, a micro-batch of {' or '.join(map(str, nearest))} does"
        raise UserError(f"a global batch of {batch} samples is not a positive multiple of micro-batch "
                        f"{self.micro_batch} x data-parallel size {self.dp_size} = {unit}; {advice}")

    def load(self, ids: npt.NDArray[np.int64]) -> StepBatch:
        share = len(ids) // self.dp_size
        rows = self.dataset.sample(ids[self.dp_rank * share:(self.dp_rank + 1) * share])
        low, high = int(rows.min()), int(rows.max())
        if low < 0 or high >= self.vocabulary:
            raise UserError(f"{self.dataset.name} holds token id {low if low < 0 else high}, but the "
                            f"vocabulary has {self.vocabulary} ids (0 to {self.vocabulary - 1}); it was "
                            "built with another tokenizer, or the model's vocabulary is set too small")
        tokens = torch.from_numpy(np.ascontiguousarray(rows[:, :-1]))
        labels = torch.from_numpy(np.ascontiguousarray(rows[:, 1:]))
        micro_batches = [MicroBatch(tokens[k:k + self.micro_batch], labels[k:k + self.micro_batch])
                         for k in range(0, len(rows), self.micro_batch)]
        return StepBatch(micro_batches, ids, self.dataset.loss_tokens(ids))


class StepLoader:
    """Random access to the steps of a run: `step(s)` is the same whatever was asked before.

    The global batch of step s is samples [schedule.first_sample(s), + schedule.size(s)) of the data set,
    whatever the data-parallel size and micro-batch. `prefetch` steps after the one asked for are read by a
    background thread; what goes wrong there is raised by the `step` call that asks for the step concerned.

    UserError, at construction, if a batch size of the schedule cannot be cut evenly; from `step`, if a token
    id lies outside [0, vocabulary).
    """

    def __init__(self, dataset: SampleSource, schedule: BatchSchedule, micro_batch: int, dp_rank: int,
                 dp_size: int, vocabulary: int, prefetch: int = 1) -> None:
        self._cut = _Cut(dataset, micro_batch, dp_rank, dp_size, vocabulary)
        for size in schedule.sizes:
            self._cut.check(size)
        self._schedule, self._prefetch = schedule, prefetch
        self._pending: dict[int, Future[StepBatch]] = {}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="data") if prefetch else None
        self._closed = False

    def step(self, s: int) -> StepBatch:
        """This rank's part of step `s` (from 0)."""
        if self._closed:
            raise RuntimeError("the loader is closed")
        ready = self._pending.pop(s, None)
        wanted = range(s + 1, s + 1 + self._prefetch)
        for other in [other for other in self._pending if other not in wanted]:
            self._pending.pop(other).cancel()
        if self._thread:
            for ahead in wanted:
                if ahead not in self._pending:
                    self._pending[ahead] = self._thread.submit(self._load, ahead)
        return ready.result() if ready else self._load(s)

    def close(self) -> None:
        """Stop reading ahead. No step can be had afterwards."""
        self._closed = True
        self._pending.clear()
        if self._thread:
            self._thread.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def _load(self, s: int) -> StepBatch:
        first = self._schedule.first_sample(s)
        return self._cut.load(np.arange(first, first + self._schedule.size(s), dtype=np.int64))


def eval_batches(dataset: SampleSource, batches: int, batch: int, micro_batch: int, dp_rank: int,
                 dp_size: int, vocabulary: int) -> Iterator[StepBatch]:
    """This rank's part of the first `batches` global batches of `batch` samples each: always the same
    samples.

    UserError if the data set has fewer than batches * batch samples, or a batch cannot be cut evenly.
    """
    cut = _Cut(dataset, micro_batch, dp_rank, dp_size, vocabulary)
    cut.check(batch)
    available = dataset.num_samples_per_epoch
    if batches * batch > available:
        raise UserError(f"evaluation over {batches} batches of {batch} samples needs {batches * batch} "
                        f"samples, but {dataset.name} has {available}; it is enough for "
                        f"{available // batch} such batches")
    return (cut.load(np.arange(k * batch, (k + 1) * batch, dtype=np.int64)) for k in range(batches))
