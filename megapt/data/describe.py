"""What a `.bin/.idx` pair holds, in figures, whatever its size."""

from __future__ import annotations

from typing import Any

import numpy as np

from megapt.data.indexed import IndexedReader

READ_ALL = 10_000_000  # lengths up to which all are read
_RANGES = 64  # of neighbouring sequences in a sample
_RANGE = 4096  # sequences
_QUANTILES = {"5%": 0.05, "25%": 0.25, "50%": 0.5, "75%": 0.75, "95%": 0.95}
_FIRST = 16  # tokens shown


def describe(reader: IndexedReader) -> dict[str, Any]:
    """Counts, dtype, bytes, fingerprint, first tokens and the distribution of sequence lengths in tokens.

    `lengths` has min, quantiles, max and mean, of all sequences up to READ_ALL of them; beyond, of `sampled`
    sequences in 64 evenly spread ranges of 4096. The mean is always that of all.
    """
    count = min(_FIRST, reader.num_tokens)
    return {
        "prefix": reader.prefix,
        "documents": reader.num_documents,
        "sequences": reader.num_sequences,
        "tokens": reader.num_tokens,
        "dtype": reader.dtype.name,
        "bytes": {"bin": reader.bin.size, "idx": reader.idx.size},
        "packed": reader.packed,
        "multimodal": reader.multimodal,
        "fingerprint": reader.fingerprint(),
        "first_tokens": reader.tokens(0, count).tolist(),
        "lengths": _lengths(reader),
    }


def document_tokens(reader: IndexedReader, document: int, limit: int) -> tuple[list[int], int]:
    """The first `limit` tokens of a document, and how many it has. IndexError if there is no such document."""
    start, stop = reader.token_range(*reader.document(document))
    return reader.tokens(start, min(limit, stop - start)).tolist(), stop - start


def _lengths(reader: IndexedReader) -> dict[str, Any] | None:
    total = reader.num_sequences
    if not total:
        return None
    at, count = reader.header.lengths_at, min(_RANGE, total)
    if total <= READ_ALL:
        pieces = [piece.view("<i4").copy() for piece in reader.idx.stream(at, at + 4 * total)]
    else:
        starts = [(total - count) * k // (_RANGES - 1) for k in range(_RANGES)]
        pieces = [piece.view("<i4") for piece in reader.idx.sample([(at + 4 * start, 4 * count) for start in starts])]
    lengths = np.concatenate(pieces)
    quantiles = np.quantile(lengths, list(_QUANTILES.values()), method="nearest").tolist()
    return {
        "sampled": None if total <= READ_ALL else len(lengths),
        "mean": reader.num_tokens / total,
        "min": int(lengths.min()),
        **{name: int(value) for name, value in zip(_QUANTILES, quantiles, strict=True)},
        "max": int(lengths.max()),
    }
