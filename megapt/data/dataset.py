"""One split of an indexed token file, cut into samples in a given order."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from megapt.data.indexed import IndexedReader
from megapt.data.order import SPLITS, SampleOrder, SequentialOrder, split_ranges
from megapt.errors import UserError
from megapt.files import StrPath


class TokenDataset:
    """Samples of sequence + 1 tokens from one split of `{prefix}.bin/.idx`.

    A split is a contiguous range of sequences, hence of the packed stream. "train" is read in SampleOrder,
    shuffled anew in every epoch without end; "valid" and "test" in SequentialOrder, once.

    `split` is Megatron's "969,30,1". Opening reads a few pages of the files, whatever their size. UserError
    if the split has no share or no sequences, or holds fewer than sequence + 1 tokens.
    """

    def __init__(self, prefix: StrPath, split_name: str, split: str, sequence: int, seed: int) -> None:
        if split_name not in SPLITS:
            raise UserError(f'there is no split "{split_name}"; one of {", ".join(SPLITS)} is needed')
        self.reader = IndexedReader(prefix)
        self.split_name, self.sequence, self.seed = split_name, sequence, seed
        self.name = f"{self.reader.prefix} ({split_name})"
        if not self.reader.num_sequences:
            raise UserError(f"{self.reader.prefix} holds no tokens; build it from text that has some")
        ranges = split_ranges(split, self.reader.num_sequences, requested=(split_name,))
        first, last = ranges[SPLITS.index(split_name)]
        if first == last:
            raise UserError(f'split "{split}" gives {split_name} no share of {self.reader.prefix}; give it '
                            'one, as in "969,30,1"')
        self._start, stop = self.reader.token_range(first, last)
        self.num_tokens = stop - self._start
        self._files = self.reader.fingerprint()
        self.order: SampleOrder | SequentialOrder
        if split_name == "train":
            # Keyed by content, so that corpora of equal length in one blend are not shuffled alike.
            identity = f"{self._files}:{self._start}:{stop}"
            self.order = SampleOrder(self.num_tokens, sequence, seed, identity, self.name)
        else:
            self.order = SequentialOrder(self.num_tokens, sequence, self.name)

    @property
    def num_samples_per_epoch(self) -> int:
        """Samples in one pass over the split."""
        return self.order.samples_per_epoch

    @cached_property
    def fingerprint(self) -> str:
        """All that decides which tokens a sample id stands for, as `key=value` words; see Receipt.check."""
        stop = self._start + self.num_tokens
        return (f"files={self._files} split={self.split_name} tokens={self._start}:{stop} "
                f"sequence={self.sequence} seed={self.seed} order={self.order.kind}")

    def sample(self, ids: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int64]:
        """The tokens of samples [n]: int64 [n, sequence + 1]. IndexError for an id that the order does not
        have."""
        _, starts = self.order.starts(ids)
        rows = np.empty((len(starts), self.sequence + 1), np.int64)
        for row, start in zip(rows, starts.tolist(), strict=True):
            before = min(self.sequence + 1, self.num_tokens - start)
            row[:before] = self.reader.tokens(self._start + start, before)
            if before <= self.sequence:  # over the end of the ring
                row[before:] = self.reader.tokens(self._start, self.sequence + 1 - before)
        return rows

    def loss_tokens(self, ids: npt.NDArray[np.integer[Any]]) -> int:
        """How many labels of these samples take part in the loss: all of them in a packed stream."""
        return len(ids) * self.sequence
