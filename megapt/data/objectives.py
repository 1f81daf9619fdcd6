"""What is predicted: transforms of samples that are pure functions of (seed, sample id), whoever reads them.

How many labels a sample has follows from its length alone, never from its tokens, so that every rank knows the loss
tokens of the whole global batch without reading other ranks' samples.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from megapt.batch import IGNORE
from megapt.config import FimConfig, MaskedLmConfig
from megapt.data.order import derive_key, mix
from megapt.data.packing import Pieces
from megapt.data.vocabulary import Vocabulary
from megapt.errors import UserError

Int64 = npt.NDArray[np.int64]
Tokens = npt.NDArray[np.integer[Any]]
UInt64 = npt.NDArray[np.uint64]
Bools = npt.NDArray[np.bool_]

_TOP = np.uint64(1 << 63)
_BLOCK = 1 << 14  # tokens masked at a time: they and their temporaries stay in a core's cache
_STEP = np.uint64(0x9E3779B97F4A7C15)  # splitmix64's increment: an odd constant, so that counters stay apart


def draw(key: int, ids: npt.NDArray[np.integer[Any]], counters: npt.NDArray[np.integer[Any]]) -> UInt64:
    """64 random bits for each (sample id, counter), broadcast against each other."""
    streams = mix(ids.astype(np.uint64) * _STEP + np.uint64(key))
    return mix(streams + counters.astype(np.uint64) * _STEP)


def share(bits: UInt64) -> npt.NDArray[np.float64]:
    """Uniform numbers in [0, 1) of 64 random bits each."""
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


class FillInTheMiddle:
    """Documents cut in prefix, middle and suffix, the middle moved to the end (arXiv 2207.14255), on tokens.

    Each document's part in a sample is rearranged with probability `rate`, cut at two places drawn uniformly: with
    probability 1 - spm_rate into <prefix> P <suffix> S <middle> M (PSM), else into <prefix> <suffix> S <middle> P M
    (SPM). To make room for the three special tokens the last three tokens of the suffix's end are left out, so the
    sample keeps its length and everything else its place. A document's last token (its end-of-document token) stays
    last. Parts of fewer than four tokens besides are left alone.
    """

    def __init__(self, config: FimConfig, vocabulary: Vocabulary, seed: int) -> None:
        self._rate, self._spm_rate, self._key = config.rate, config.spm_rate, derive_key("fim", seed)
        names = {"data.fim.prefix": config.prefix, "data.fim.middle": config.middle, "data.fim.suffix": config.suffix}
        self.tokens = tuple(vocabulary.id(token, key) for key, token in names.items())
        if len(set(self.tokens)) < 3:
            raise UserError(f"data.fim needs three different tokens, not {', '.join(names.values())}")
        self.fact = f"fim-1:{self._rate}:{self._spm_rate}:{','.join(map(str, self.tokens))}"

    def __call__(self, ids: Int64, rows: Tokens, pieces: Pieces) -> Tokens:
        """Rearranged rows [n, columns] of samples `ids` [n]; pieces lie within documents."""
        first = np.searchsorted(pieces.row, pieces.row)
        bits = [draw(self._key, ids[pieces.row], (np.arange(len(first)) - first) * 4 + k) for k in range(4)]
        content = pieces.length - pieces.ends - 3
        chosen = (share(bits[0]) < self._rate) & (content > 0)
        if not chosen.any():
            return rows
        spm = share(bits[1][chosen]) < self._spm_rate
        content = content[chosen]
        cuts = [(share(b[chosen]) * (content + 1)).astype(np.int64) for b in bits[2:]]
        low, high = np.minimum(*cuts), np.maximum(*cuts)
        begin = pieces.row[chosen] * rows.shape[1] + pieces.column[chosen]
        tail = begin + pieces.length[chosen] - pieces.ends[chosen]
        prefix, suffix, middle = (begin, low), (begin + high, content - high), (begin + low, high - low)
        sentinels = rows.size + np.arange(3)  # places of the three tokens, put behind all others
        pre, mid, suf = ((np.full_like(begin, s), np.ones_like(begin)) for s in sentinels)
        none = (begin, np.zeros_like(begin))
        end = (tail, pieces.ends[chosen].astype(np.int64))
        in_psm = (pre, prefix, suf, suffix, mid, none, middle, end)
        in_spm = (pre, none, suf, suffix, mid, prefix, middle, end)
        # [chosen pieces, parts]: where each part is taken from, and how long it is
        orders = list(zip(in_psm, in_spm, strict=True))
        place, length = (np.stack([np.where(spm, b[k], a[k]) for a, b in orders], axis=1).ravel() for k in range(2))
        source = _ranges(place, length)
        index = np.arange(rows.size)
        index[_ranges(begin, pieces.length[chosen])] = source
        return np.append(rows.ravel(), np.array(self.tokens, rows.dtype))[index].reshape(rows.shape)


def _ranges(start: Int64, length: Int64) -> Int64:
    """start[0], start[0] + 1, ... (length[0] of them), start[1], ..."""
    before = np.cumsum(length) - length
    return np.arange(int(length.sum())) + np.repeat(start - before, length)


class MaskedLm:
    """BERT's objective (arXiv 1810.04805): some tokens are hidden, and those alone are predicted.

    A sample of t tokens has exactly round(rate * t) labels, one at least. Of its chosen tokens a share `random`
    becomes a token drawn from the vocabulary's ordinary ones, a share `keep` stays, and the rest becomes the mask.
    Special tokens and padding are never masked: where a sample has too few others, special tokens fill up the
    number, predicted but left as they are. With `whole_word`, words are chosen instead of tokens; the last word taken
    gives only as many of its first tokens as the number leaves room for. A word begins at a token that begins with
    white space (or, in WordPiece, is not marked to continue one), and after a special token.
    """

    def __init__(self, config: MaskedLmConfig, vocabulary: Vocabulary, seed: int) -> None:
        self._rate, self._random, self._keep = config.rate, config.random, config.keep
        self._whole_word, self._key = config.whole_word, derive_key("masked_lm", seed)
        self.mask = vocabulary.id(config.mask, "data.masked_lm.mask")
        self._is_ordinary = np.zeros(vocabulary.size, bool)  # by token id: it may be masked
        self._is_ordinary[list(vocabulary.ids.values())] = True  # published vocabularies have holes
        self._is_ordinary[[*vocabulary.special, self.mask]] = False
        self._ordinary = np.flatnonzero(self._is_ordinary)
        if not len(self._ordinary):
            raise UserError(f"the tokenizer {vocabulary.name} has special tokens alone, so nothing can be masked")
        self.highest = max(self.mask, int(self._ordinary[-1]) if config.random else 0)  # of the ids it may put in
        self._starts = vocabulary.word_starts() if config.whole_word else self._is_ordinary
        self.fact = f"masked_lm-1:{config.rate}:{config.random}:{config.keep}:{int(config.whole_word)}:{self.mask}"

    def labels(self, tokens: Int64) -> Int64:
        """How many labels samples of so many tokens [n] have."""
        return np.minimum(np.maximum(np.floor(self._rate * tokens + 0.5).astype(np.int64), 1), tokens)

    def __call__(self, ids: Int64, rows: Tokens, length: Int64) -> tuple[Tokens, Int64]:
        """(inputs, labels) [n, S] of rows [n, S] of samples `ids` [n], the first `length` [n] columns of which hold
        tokens."""
        inputs, labels = rows.copy(), np.full(rows.shape, IGNORE, np.int64)
        step = max(1, _BLOCK // rows.shape[1])
        for at in range(0, len(rows), step):
            part = slice(at, at + step)
            self._mask(ids[part], rows[part], length[part], inputs[part], labels[part])
        return inputs, labels

    def _mask(self, ids: Int64, rows: Tokens, length: Int64, inputs: Tokens, labels: Int64) -> None:
        # A model's vocabulary may be larger than the tokenizer's; what that does not know is special.
        ordinary = self._is_ordinary[np.minimum(rows, len(self._is_ordinary) - 1)] & (rows < len(self._is_ordinary))
        row, column = self._choose(ids, rows, length, ordinary)
        truth = rows[row, column]
        labels[row, column] = truth
        bits = draw(self._key, ids[row], 2 * column + 1)
        kind = share(bits)
        shown = np.where(kind < self._random, self._ordinary[mix(bits) % np.uint64(len(self._ordinary))], self.mask)
        stays = (kind >= self._random) & (kind < self._random + self._keep) | ~ordinary[row, column]
        inputs[row, column] = np.where(stays, truth, shown)

    def _choose(self, ids: Int64, rows: Tokens, length: Int64, ordinary: Bools) -> tuple[Int64, Int64]:
        """(rows, columns) of the tokens to be predicted: those of the lowest rank. A token's rank is drawn, or that of
        its word; ordinary tokens come first, then special ones, then padding; among equals the first column."""
        columns = np.arange(rows.shape[1])
        group = columns[None]
        if self._whole_word:
            begins = self._starts[np.minimum(rows, len(self._starts) - 1)] | ~ordinary
            begins[:, 1:] |= ~ordinary[:, :-1]
            group = np.cumsum(begins, axis=1)
        low = np.uint64(rows.shape[1].bit_length())
        rank = draw(self._key, ids[:, None], 2 * group) >> (low + np.uint64(2)) << low
        rank |= columns.astype(np.uint64)
        rank[~ordinary] |= _TOP >> np.uint64(1)
        rank[columns >= length[:, None]] |= _TOP
        counts = self.labels(length)
        order = np.argpartition(rank, np.unique(np.maximum(counts - 1, 0)), axis=1)
        row = np.repeat(np.arange(len(rows)), counts)
        return row, order[row, np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)]
