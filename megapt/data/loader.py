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
from torch import Tensor

from megapt.batch import Documents, MicroBatch, StepBatch
from megapt.data.batches import BatchSchedule
from megapt.data.composite import DocumentRows
from megapt.errors import UserError

Int64 = npt.NDArray[np.int64]


class SampleSource(Protocol):
    """What a loader needs of a data set; CompositeDataset is one."""

    @property
    def name(self) -> str: ...

    @property
    def sequence(self) -> int: ...

    @property
    def num_samples_per_epoch(self) -> int: ...

    def fill(self, ids: npt.NDArray[np.integer[Any]], tokens: Int64, labels: Int64) -> DocumentRows | None: ...

    def loss_tokens(self, ids: npt.NDArray[np.integer[Any]]) -> int: ...


@dataclass(frozen=True)
class _Cut:
    """How a global batch becomes one rank's micro-batches: rank r of dp takes samples [r * b / dp, (r + 1) * b / dp) of
    the b samples, `micro_batch` at a time."""

    dataset: SampleSource
    micro_batch: int
    dp_rank: int
    dp_size: int

    def __post_init__(self) -> None:
        if self.micro_batch < 1:
            raise UserError(f"a micro-batch of {self.micro_batch} samples is not possible; it must be 1 or more")
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
        raise UserError(
            f"a global batch of {batch} samples is not a positive multiple of micro-batch {self.micro_batch} x "
            f"data-parallel size {self.dp_size} = {unit}; {advice}"
        )

    def load(self, ids: Int64) -> StepBatch:
        """This rank's part of samples [n].

        Tokens and labels have a buffer each: as views of one of [n, sequence + 1] they would not be contiguous, and
        then a copy to the device would first be gathered on the host, unpinned.
        """
        share, size, data = len(ids) // self.dp_size, self.micro_batch, self.dataset
        tokens, labels = (_empty((share, data.sequence), torch.int64) for _ in range(2))
        rows = data.fill(ids[self.dp_rank * share:(self.dp_rank + 1) * share], tokens.numpy(), labels.numpy())
        micro_batches = [
            MicroBatch(
                tokens[k:k + size],
                labels[k:k + size],
                None if rows is None else _documents(rows, k, k + size, data.sequence),
            )
            for k in range(0, share, size)
        ]
        return StepBatch(micro_batches, ids, data.loss_tokens(ids))


def _documents(rows: DocumentRows, first: int, last: int, sequence: int) -> Documents:
    """Of rows [first, last)."""
    lengths = rows.length[slice(*np.searchsorted(rows.row, [first, last]).tolist())]
    ends = np.cumsum(lengths)
    cu_seqlens = _empty((len(lengths) + 1,), torch.int32)
    cu_seqlens.numpy()[0], cu_seqlens.numpy()[1:] = 0, ends
    positions = _empty(((last - first) * sequence,), torch.int64)
    positions.numpy()[:] = np.arange(len(positions)) - np.repeat(ends - lengths, lengths)
    return Documents(tuple(lengths.tolist()), cu_seqlens, positions)


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory that a GPU can fetch by itself, where there is one. torch keeps such memory until its copies are done."""
    return torch.empty(shape, dtype=dtype, pin_memory=torch.cuda.is_available())


class StepLoader:
    """Random access to the steps of a run: `step(s)` is the same whatever was asked before.

    The global batch of step s is samples [schedule.first_sample(s), + schedule.size(s)) of the data set,
    whatever the data-parallel size and micro-batch. The `prefetch` steps after the one asked for are read by
    `workers` background threads; what goes wrong there is raised by the `step` call that asks for the step concerned.

    UserError, at construction, if a batch size of the schedule cannot be cut evenly; from `step`, what the data set
    raises.
    """

    def __init__(
        self,
        dataset: SampleSource,
        schedule: BatchSchedule,
        micro_batch: int,
        dp_rank: int,
        dp_size: int,
        prefetch: int = 2,
        workers: int = 1,
    ) -> None:
        self._cut = _Cut(dataset, micro_batch, dp_rank, dp_size)
        for size in schedule.sizes:
            self._cut.check(size)
        self._schedule, self._prefetch = schedule, prefetch
        self._pending: dict[int, Future[StepBatch]] = {}
        self._threads = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="data") if prefetch else None
        self._closed = False

    def step(self, s: int) -> StepBatch:
        """This rank's part of step `s` (from 0)."""
        if self._closed:
            raise RuntimeError("the loader is closed")
        ready = self._pending.pop(s, None)
        wanted = range(s + 1, s + 1 + self._prefetch)
        for other in [other for other in self._pending if other not in wanted]:
            self._pending.pop(other).cancel()
        if self._threads:
            for ahead in wanted:
                if ahead not in self._pending:
                    self._pending[ahead] = self._threads.submit(self._load, ahead)
        return ready.result() if ready else self._load(s)

    def close(self) -> None:
        """Stop reading ahead. No step can be had afterwards."""
        self._closed = True
        self._pending.clear()
        if self._threads:
            self._threads.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _load(self, s: int) -> StepBatch:
        first = self._schedule.first_sample(s)
        return self._cut.load(np.arange(first, first + self._schedule.size(s), dtype=np.int64))


def eval_batches(
    dataset: SampleSource, batches: int, batch: int, micro_batch: int, dp_rank: int, dp_size: int
) -> Iterator[StepBatch]:
    """This rank's part of the first `batches` global batches of `batch` samples each: always the same samples.

    UserError if the data set has fewer than batches * batch samples, or a batch cannot be cut evenly.
    """
    cut = _Cut(dataset, micro_batch, dp_rank, dp_size)
    cut.check(batch)
    available = dataset.num_samples_per_epoch
    if batches * batch > available:
        raise UserError(
            f"evaluation over {batches} batches of {batch} samples needs {batches * batch} samples, but {dataset.name} "
            f"has {available}; it is enough for {available // batch} such batches"
        )
    return (cut.load(np.arange(k * batch, (k + 1) * batch, dtype=np.int64)) for k in range(batches))
