"""What a build's report says of the lengths of documents, and the picture of them."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)

_COUNTED = 1 << 20  # lengths below are counted one by one; above there is one per million tokens at most
_BINS_PER_DECADE = 10


class LengthCounts:
    """How many documents have each length: exact, in memory that does not grow with the corpus (8 MiB, and 16 bytes for
    each document of a million tokens or more)."""

    def __init__(self, lengths: Iterable[npt.NDArray[np.int64]]) -> None:
        counts = np.zeros(_COUNTED, np.int64)
        long: list[npt.NDArray[np.int64]] = []
        for block in lengths:
            counts += np.bincount(block[block < _COUNTED], minlength=_COUNTED)
            long.append(block[block >= _COUNTED])
        values, extra = np.unique(np.concatenate([*long, np.empty(0, np.int64)]), return_counts=True)
        short = np.flatnonzero(counts)
        self.lengths = np.concatenate([short, values])  # ascending
        self.counts = np.concatenate([counts[short], extra])

    def quantiles(self) -> dict[str, int]:
        """The length at each of QUANTILES, as it occurs (the lower one between two)."""
        ends = np.cumsum(self.counts)
        at = [int(q * (int(ends[-1]) - 1)) for q in QUANTILES]
        found = self.lengths[np.searchsorted(ends, at, side="right")]
        return {f"{q:g}": int(length) for q, length in zip(QUANTILES, found, strict=True)}

    def picture(self, title: str) -> bytes:
        """A histogram over a logarithmic axis, as PNG. Empty documents are named in its corner."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        filled = self.lengths > 0
        lengths, counts = self.lengths[filled], self.counts[filled]
        low, high = int(lengths[0]), int(lengths[-1]) + 1
        edges = np.geomspace(low, high, max(2, int(np.log10(high / low) * _BINS_PER_DECADE) + 2))
        if high / low < 2:
            edges = np.array([low * 0.9, high * 1.1])
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        FigureCanvasAgg(figure)
        axes: Any = figure.subplots()
        axes.hist(lengths, bins=edges, weights=counts, color="#33658a", edgecolor="white", linewidth=0.5)
        axes.set_xscale("log")
        ends = np.cumsum(counts)
        median = int(lengths[np.searchsorted(ends, (ends[-1] + 1) // 2)])
        mean = float((lengths * counts).sum() / counts.sum())
        axes.axvline(median, color="#c0392b", label=f"median {median:,}")
        axes.axvline(mean, color="#c0392b", linestyle="--", label=f"mean {mean:,.0f}")
        empty = int(self.counts[~filled].sum())
        axes.legend(title=f"{empty:,} empty ones not shown" if empty else None)
        axes.set_title(title, parse_math=False)
        axes.set(xlabel="tokens in a document", ylabel="documents")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
        data = io.BytesIO()
        figure.savefig(data, format="png", dpi=120)
        return data.getvalue()
