"""One split of one corpus as samples: an order says which, the packing says what they are made of."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from megapt.data.indexed import IndexedReader
from megapt.data.order import SPLITS, ItemOrder, SampleOrder, SequentialOrder, split_ranges
from megapt.data.packing import Boundaries, Pieces, packed_index
from megapt.data.remote import CACHE_BYTES
from megapt.errors import UserError
from megapt.files import StrPath

Int64 = npt.NDArray[np.int64]
Ids = npt.NDArray[np.integer[Any]]
Packing = Literal["concatenate", "best_fit", "document"]

PAD = 0  # token where a row holds none; never a label, and never attended to where attention knows documents


class _Samples(Protocol):
    """What the ids of one way to order and pack stand for."""

    kind: str
    per_epoch: float

    def pieces(self, ids: Ids, row: Int64, documents: bool) -> Pieces: ...

    def counts(self, ids: Ids) -> tuple[Int64, Int64]: ...

    def places(self, ids: Ids) -> tuple[Int64, Int64]: ...


class TokenDataset:
    """Samples from one split of `{prefix}.bin/.idx`, a local pair or a remote one.

    A split is a contiguous range of sequences, hence of the packed stream. "train" is shuffled anew in every epoch
    and has no end (with order "megatron": the `total_samples` that Megatron would have indexed); "valid" and "test"
    are read once, in order.

    packing: "concatenate" cuts the joined documents into samples of sequence + 1 tokens, neighbours sharing one;
    "best_fit" fills samples of `sequence` tokens with whole documents, longer ones cut first; "document" begins a new
    sample with each document. The last two keep an index in the folder `cache`, built when it is not there, and leave
    room at the end of samples, filled with PAD.

    `split` is Megatron's "969,30,1". With "concatenate" in order "arithmetic", opening reads a few pages of the
    files, whatever their size. UserError if the split has no share or no sequences, or holds too few tokens.
    """

    def __init__(
        self,
        prefix: StrPath,
        split_name: str,
        split: str,
        sequence: int,
        seed: int,
        *,
        packing: Packing = "concatenate",
        order: Literal["arithmetic", "megatron"] = "arithmetic",
        total_samples: int | None = None,
        cache: StrPath = "cache",
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        if split_name not in SPLITS:
            raise UserError(f'there is no split "{split_name}"; one of {", ".join(SPLITS)} is needed')
        self.reader = IndexedReader(prefix, cache=cache, cache_bytes=cache_bytes)
        self.split_name, self.sequence, self.seed, self.packing = split_name, sequence, seed, packing
        self.name = f"{self.reader.prefix} ({split_name})"
        if not self.reader.num_sequences:
            raise UserError(f"{self.reader.prefix} holds no tokens; build it from text that has some")
        try:
            ranges = split_ranges(split, self.reader.num_sequences, requested=(split_name,))
        except UserError as error:
            raise UserError(f"{self.reader.prefix}: {error}") from error
        self.sequences = ranges[SPLITS.index(split_name)]
        if self.sequences[0] == self.sequences[1]:
            raise UserError(
                f'split "{split}" gives {split_name} no share of {self.reader.prefix}; give it one, as in "969,30,1"'
            )
        self.first_token, stop = self.reader.token_range(*self.sequences)
        self.num_tokens = stop - self.first_token
        self._samples: _Samples
        if packing != "concatenate":
            self._samples = _Packed(self, packing, cache)
        elif order == "megatron" and split_name == "train":
            self._samples = _Megatron(self, total_samples, cache)
        else:
            self._samples = _Cut(self)

    @property
    def num_samples_per_epoch(self) -> int:
        """Samples in the first pass over the split: later ones may have one more or less."""
        return int(self._samples.per_epoch)

    def epochs(self, samples: int) -> float:
        """How many passes over the split so many samples are."""
        return samples / self._samples.per_epoch

    @cached_property
    def boundaries(self) -> Boundaries:
        """Where the documents of the corpus lie."""
        return Boundaries(self.reader)

    @cached_property
    def facts(self) -> dict[str, str]:
        """All that decides which tokens a sample id stands for; see Receipt.check."""
        stop = self.first_token + self.num_tokens
        return {
            "files": self.reader.fingerprint(),
            "split": self.split_name,
            "tokens": f"{self.first_token}:{stop}",
            "sequence": str(self.sequence),
            "seed": str(self.seed),
            "order": self._samples.kind,
        }

    @cached_property
    def identity(self) -> str:
        """Keys the shuffles by content, so that corpora of equal length in one blend are not shuffled alike."""
        return f"{self.reader.fingerprint()}:{self.first_token}:{self.first_token + self.num_tokens}"

    def pieces(self, ids: Ids, row: Int64 | None = None, documents: bool = False) -> Pieces:
        """What samples [n] are made of, for rows [n] (default 0, 1, ...): sequence + 1 tokens each or fewer.

        With `documents`, and always where whole documents are packed, a piece lies within one document.
        """
        return self._samples.pieces(ids, np.arange(len(ids)) if row is None else row, documents)

    def read(self, pieces: Pieces, rows: npt.NDArray[Any]) -> None:
        """Put the tokens of pieces into rows [n, sequence + 1]; what no piece fills is left as it is."""
        for row, column, start, length in pieces.runs():
            rows[row, column:column + length] = self.reader.tokens(start, length)

    def sample(self, ids: Ids) -> Int64:
        """The tokens of samples [n]: int64 [n, sequence + 1], PAD where a sample is shorter. IndexError for an id that
        the order does not have."""
        rows = np.full((len(ids), self.sequence + 1), PAD, np.int64)
        self.read(self.pieces(ids), rows)
        return rows

    def counts(self, ids: Ids) -> tuple[Int64, Int64]:
        """(tokens, labels) [n] of samples [n], nothing being read: inputs but for padding, and those of them that are
        followed by a token to predict (of their own document, where whole documents are packed)."""
        return self._samples.counts(ids)

    def places(self, ids: Ids) -> tuple[Int64, Int64]:
        """(epoch, place) [n] of samples [n]; a place is a token of the stream, or the number of a packed sample."""
        return self._samples.places(ids)


class _Cut:
    """The joined documents, cut every `sequence` tokens."""

    def __init__(self, data: TokenDataset) -> None:
        self._data = data
        self.order: SampleOrder | SequentialOrder
        if data.split_name == "train":
            self.order = SampleOrder(data.num_tokens, data.sequence, data.seed, data.identity, data.name)
            self.per_epoch = data.num_tokens / data.sequence
        else:
            self.order = SequentialOrder(data.num_tokens, data.sequence, data.name)
            self.per_epoch = float(self.order.num_samples)
        self.kind = self.order.kind

    def pieces(self, ids: Ids, row: Int64, documents: bool) -> Pieces:
        data = self._data
        _, starts = self.order.starts(ids)
        wanted = self.order.lengths(ids) + 1
        # A sample that runs over the end of the ring goes on at its beginning.
        first = np.minimum(wanted, data.num_tokens - starts)
        over = np.flatnonzero(first < wanted)
        rows = np.concatenate([row, row[over]])
        order = np.argsort(rows, kind="stable")
        start = np.concatenate([starts, np.zeros(len(over), np.int64)])[order] + data.first_token
        length = np.concatenate([first, (wanted - first)[over]])[order]
        if documents:
            return data.boundaries.cut(rows[order], start, length)
        return Pieces.of(rows[order], start, length, np.zeros(len(rows), bool))

    def counts(self, ids: Ids) -> tuple[Int64, Int64]:
        labels = self.order.lengths(ids)
        return np.minimum(labels + 1, self._data.sequence), labels

    def places(self, ids: Ids) -> tuple[Int64, Int64]:
        return self.order.starts(ids)


class _Packed:
    """Whole documents, by the packed index."""

    def __init__(self, data: TokenDataset, packing: str, cache: StrPath) -> None:
        shuffled = data.split_name == "train"
        seed = data.seed if shuffled else None
        self._index = packed_index(data.reader, data.sequences, data.sequence, packing, seed, cache)
        count = self._index.num_items
        self._order = ItemOrder(count, data.seed, data.identity, data.name) if shuffled else None
        self._name, self.per_epoch = data.name, float(count)
        self.kind = f"{packing}-1" + (f"-{self._order.kind}" if self._order else "")

    def places(self, ids: Ids) -> tuple[Int64, Int64]:
        if self._order:
            return self._order.items(ids)
        items = np.asarray(ids, np.int64)
        if len(items) and not 0 <= items.min() <= items.max() < self._index.num_items:
            raise IndexError(f"samples {items.min()} to {items.max()} of {self._index.num_items} in {self._name}")
        return np.zeros_like(items), items

    def pieces(self, ids: Ids, row: Int64, documents: bool) -> Pieces:
        return self._index.pieces(row, self.places(ids)[1])

    def counts(self, ids: Ids) -> tuple[Int64, Int64]:
        return self._index.counts(self.places(ids)[1])


class _Megatron:
    """Megatron's GPTDataset, index for index: shuffled documents, joined, cut, and shuffled again."""

    def __init__(self, data: TokenDataset, total: int | None, cache: StrPath) -> None:
        from megapt.data.megatron_order import MegatronOrder

        self._first, high = data.sequences
        self._data, self._lengths = data, data.reader.lengths[self._first:high]
        self._order = MegatronOrder(
            self._lengths,
            data.sequence,
            data.seed,
            total,
            data.split_name,
            first_sequence=self._first,
            cache=Path(cache),
            fingerprint=data.reader.fingerprint(),
        )
        self.kind = f"megatron-{total or 'epoch'}"
        self.per_epoch = data.num_tokens / data.sequence

    def pieces(self, ids: Ids, row: Int64, documents: bool) -> Pieces:
        found = self._order.pieces(ids)
        sequences, offsets, lengths = (np.concatenate([part[k] for part in found]) for k in range(3))
        rows = np.repeat(row, [len(part[0]) for part in found])
        start = self._data.boundaries.starts(sequences) + offsets
        ends = offsets + lengths == np.asarray(self._lengths[sequences - self._first])
        return Pieces.of(rows, start, lengths.astype(np.int64), ends)

    def counts(self, ids: Ids) -> tuple[Int64, Int64]:
        full = np.full(len(ids), self._data.sequence, np.int64)
        return full, full

    def places(self, ids: Ids) -> tuple[Int64, Int64]:
        places = np.asarray(self._order.shuffle_index[np.asarray(ids)], np.int64)
        return np.zeros_like(places), places
