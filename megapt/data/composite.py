"""What a run reads: samples of one or several sources in their blend, with what is to be predicted of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megapt.batch import IGNORE
from megapt.data.blend import BlendLike
from megapt.data.dataset import Ids, Int64, TokenDataset
from megapt.data.objectives import FillInTheMiddle, MaskedLm
from megapt.data.packing import Pieces
from megapt.errors import UserError


class DocumentRows(NamedTuple):
    """Where documents lie in rows of tokens, in order: the row of each [m], and its tokens [m], which fill every row.

    What is padding counts as a document of its own."""

    row: Int64
    length: Int64

    @classmethod
    def of(cls, pieces: Pieces, rows: int, columns: int) -> DocumentRows:
        """Of the first `columns` columns of `rows` rows."""
        inside = pieces.within(columns)
        free = columns - np.bincount(inside.row, inside.length, rows).astype(np.int64)
        padded = np.flatnonzero(free)
        row = np.concatenate([inside.row, padded])
        order = np.argsort(row, kind="stable")
        return cls(row[order], np.concatenate([inside.length, free[padded]])[order])


@dataclass(frozen=True)
class Objective:
    """What is done with the tokens of a sample. Without any of these, each token predicts the next one.

    documents: whether attention and positions are to end with a document.
    """

    documents: bool = False
    fim: FillInTheMiddle | None = None
    masked: MaskedLm | None = None

    @property
    def fact(self) -> str:
        """What of it decides which tokens are read and predicted."""
        if self.masked is not None:
            return self.masked.fact
        return "next_token" if self.fim is None else f"next_token:{self.fim.fact}"


class SourceUse(NamedTuple):
    """What a run takes of a source: samples, tokens without padding (of packed documents: at most), and epochs."""

    name: str
    share: float
    samples: int
    tokens: int
    available: int
    epochs: float


@dataclass
class CompositeDataset:
    """Samples of one or several sources, numbered as the blend mixes them; a function of the sample's number alone.

    sources: by name, all of one sequence length and packing; blend: None for a single source; vocabulary: token ids
    lie below it, or `fill` raises UserError.
    """

    sources: Mapping[str, TokenDataset]
    vocabulary: int
    blend: BlendLike | None = None
    objective: Objective = field(default_factory=Objective)

    def __post_init__(self) -> None:
        self._data = list(self.sources.values())
        assert self.blend is not None or len(self._data) == 1, "several sources need a blend"
        self.sequence, self.packing = self._data[0].sequence, self._data[0].packing
        self.name = self._data[0].name if len(self._data) == 1 else f"blend of {', '.join(self.sources)}"
        wide = max(data.reader.dtype.itemsize for data in self._data) > 4
        self._dtype = np.dtype(np.int64 if wide else np.int32)  # narrow: it is written and read once more

    @property
    def num_samples_per_epoch(self) -> int:
        """Samples in one pass over all sources."""
        return sum(data.num_samples_per_epoch for data in self._data)

    def facts(self) -> dict[str, str]:
        """All that decides what a sample id stands for; see Receipt.check."""
        found = {} if self.blend is None else {"blend": self.blend.fingerprint}
        for name, data in self.sources.items():
            prefix = "" if self.blend is None else f"{name} "
            found |= {prefix + key: value for key, value in data.facts.items()}
        return found | {"objective": self.objective.fact}

    def locate(self, ids: Ids) -> tuple[Int64, Int64]:
        """(source, ordinal) [n] of samples [n]: each is the ordinal-th sample of a source."""
        if self.blend is not None:
            return self.blend.locate(ids)
        ordinals = np.asarray(ids, np.int64)
        return np.zeros_like(ordinals), ordinals

    def source_samples(self, samples: int) -> dict[str, int]:
        """How many of the first `samples` samples each source gives."""
        if self.blend is None:
            return dict.fromkeys(self.sources, samples)
        return dict(zip(self.sources, self.blend.counts(samples).tolist(), strict=True))

    def records(self, ids: Ids) -> Int64:
        """What samples [n] stand for: int64 [n, 4], source, ordinal, epoch of the source, and place within it."""
        source, ordinal = self.locate(ids)
        found = np.empty((len(source), 4), np.int64)
        found[:, 0], found[:, 1] = source, ordinal
        for k, at in _by_source(source):
            found[at, 2], found[at, 3] = self._data[k].places(ordinal[at])
        return found

    def token_counts(self, ids: Ids) -> dict[str, int]:
        """Tokens without padding that samples [n] hold, by source; nothing is read."""
        source, ordinal = self.locate(ids)
        found = dict.fromkeys(self.sources, 0)
        for k, at in _by_source(source):
            found[list(self.sources)[k]] = int(self._data[k].counts(ordinal[at])[0].sum())
        return found

    def loss_tokens(self, ids: Ids) -> int:
        """How many labels of samples [n] take part in the loss; nothing is read."""
        source, ordinal = self.locate(ids)
        total = 0
        for k, at in _by_source(source):
            tokens, labels = self._data[k].counts(ordinal[at])
            total += int((labels if self.objective.masked is None else self.objective.masked.labels(tokens)).sum())
        return total

    def gather(self, ids: Ids) -> tuple[npt.NDArray[Any], Pieces]:
        """Rows [n, sequence + 1] of samples [n] as they lie in the corpus, and what they are made of.

        Pieces end with documents where the packing or the objective needs it.
        """
        source, ordinal = self.locate(ids)
        cut = self.objective.documents or self.objective.fim is not None
        rows = np.zeros((len(source), self.sequence + 1), self._dtype)
        parts = []
        for k, at in _by_source(source):
            data = self._data[k]
            part = data.pieces(ordinal[at], at, cut)
            data.read(part, rows)
            parts.append(part)
        self._check_vocabulary(rows, source)
        return rows, parts[0] if len(parts) == 1 else Pieces.join(parts)

    def fill(self, ids: Ids, tokens: Int64, labels: Int64) -> DocumentRows | None:
        """Put samples [n] into tokens and labels, both int64 [n, sequence]; labels are IGNORE where there is no loss.

        Returns where documents lie, where attention is to know.
        """
        rows, pieces = self.gather(ids)
        sequence, given = self.sequence, np.asarray(ids, np.int64)
        filled = np.bincount(pieces.row, pieces.length, len(rows)).astype(np.int64)
        if self.objective.fim is not None:
            rows = self.objective.fim(given, rows, pieces)
        if self.objective.masked is not None:
            length = np.minimum(filled, sequence)
            tokens[...], labels[...] = self.objective.masked(given, rows[:, :sequence], length)
        else:
            tokens[...], labels[...] = rows[:, :-1], rows[:, 1:]
            for row in np.flatnonzero(filled <= sequence).tolist():
                labels[row, filled[row] - 1:] = IGNORE
            if self.packing != "concatenate":  # what follows a document here does not follow from it
                last = pieces.column + pieces.length - 1
                inside = last < sequence
                labels[pieces.row[inside], last[inside]] = IGNORE
        return DocumentRows.of(pieces, len(rows), sequence) if self.objective.documents else None

    def describe(self, total_samples: int) -> list[SourceUse]:
        """What a run of so many samples takes of each source."""
        counts = self.source_samples(total_samples)
        return [
            SourceUse(
                name,
                counts[name] / max(total_samples, 1),
                counts[name],
                int(min(counts[name] * self.sequence, data.epochs(counts[name]) * data.num_tokens)),
                data.num_tokens,
                data.epochs(counts[name]),
            )
            for name, data in self.sources.items()
        ]

    def _check_vocabulary(self, rows: npt.NDArray[Any], source: Int64) -> None:
        # Negative numbers are the largest of all when read without a sign: one pass finds both.
        if not rows.size or int(rows.view(f"u{rows.itemsize}").max()) < self.vocabulary:
            return
        row, column = np.argwhere((rows < 0) | (rows >= self.vocabulary))[0].tolist()
        raise UserError(
            f"{self._data[int(source[row])].name} holds token id {rows[row, column]}, but the vocabulary has "
            f"{self.vocabulary} ids (0 to {self.vocabulary - 1}); it was built with another tokenizer, or the model's "
            "vocabulary is set too small"
        )


def _by_source(source: Int64) -> list[tuple[int, Int64]]:
    """(source, where it occurs) for each source that does."""
    return [(k, np.flatnonzero(source == k)) for k in np.unique(source).tolist()]
