"""How well counting alone predicts a text: the losses that a trained model has to beat."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megapt.errors import UserError

_CHUNK = 1 << 22  # tokens counted at a time

Int64 = npt.NDArray[np.int64]


class Entropies(NamedTuple):
    """Nats per token: `unigram` H(x_t), and `bigram` H(x_t | x_{t-1})."""

    unigram: float
    bigram: float


def token_entropies(tokens: npt.NDArray[np.integer[Any]], vocabulary: int) -> Entropies:
    """Entropies of the empirical distributions of exactly these tokens [T], in nats.

    They are the lowest cross-entropies that a table of token frequencies, and one of frequencies after each
    token, can reach on this text. Memory: O(vocabulary + distinct pairs), whatever T. UserError for fewer
    than two tokens or an id outside [0, vocabulary).
    """
    if len(tokens) < 2:
        raise UserError(f"entropies need at least 2 tokens, not {len(tokens)}")
    counts = np.zeros(vocabulary, np.int64)
    pairs, pair_counts = np.empty(0, np.int64), np.empty(0, np.int64)
    for start in range(0, len(tokens), _CHUNK):
        block = np.asarray(tokens[start:start + _CHUNK + 1], np.int64)  # one token shared with the next block
        if int(block.min()) < 0 or int(block.max()) >= vocabulary:
            worst = int(block.min()) if int(block.min()) < 0 else int(block.max())
            raise UserError(f"token id {worst} is outside the vocabulary of {vocabulary}")
        counts += np.bincount(block[:_CHUNK], minlength=vocabulary)
        found, found_counts = np.unique(block[:-1] * vocabulary + block[1:], return_counts=True)
        pairs, pair_counts = _merge(pairs, pair_counts, found, found_counts)
    contexts = counts.copy()
    contexts[int(tokens[-1])] -= 1  # the last token is nobody's context
    bigram = _entropy(pair_counts) - _entropy(contexts)
    return Entropies(_entropy(counts), max(bigram, 0.0))


def _merge(keys: Int64, counts: Int64, more_keys: Int64, more_counts: Int64) -> tuple[Int64, Int64]:
    merged, place = np.unique(np.concatenate([keys, more_keys]), return_inverse=True)
    totals = np.zeros(len(merged), np.int64)
    np.add.at(totals, place, np.concatenate([counts, more_counts]))
    return merged, totals


def _entropy(counts: Int64) -> float:
    seen = counts[counts > 0].astype(np.float64)
    total = seen.sum()
    return float(np.log(total) - (seen * np.log(seen)).sum() / total)
