"""Which documents were seen before, by a hash of their text."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

HASH = np.dtype("S16")  # compares as 16 bytes would: all have that length


class SeenHashes:
    """The hashes seen so far: 16 bytes each, and as much again for a moment while sorted runs are merged.

    A look-up costs O(log n); adding costs O(log n) per hash on average (the logarithmic method of Bentley & Saxe 1980,
    "Decomposable searching problems": runs grow by merging).
    """

    def __init__(self, hashes: npt.NDArray[Any] | None = None) -> None:
        self._runs: list[npt.NDArray[Any]] = []
        if hashes is not None and len(hashes):
            self._runs.append(np.sort(hashes))

    def add(self, hashes: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """Which of these hashes [n] of dtype HASH occur here for the first time, in their order; all are seen
        afterwards."""
        fresh = np.zeros(len(hashes), bool)
        if not len(hashes):
            return fresh
        unique, first = np.unique(hashes, return_index=True)
        known = np.zeros(len(unique), bool)
        for run in self._runs:
            at = np.minimum(np.searchsorted(run, unique), len(run) - 1)
            known |= run[at] == unique
        fresh[first[~known]] = True
        if not known.all():
            self._runs.append(unique[~known])
        while len(self._runs) > 1 and len(self._runs[-2]) <= 2 * len(self._runs[-1]):
            self._runs[-2:] = [np.sort(np.concatenate(self._runs[-2:]), kind="stable")]
        return fresh
