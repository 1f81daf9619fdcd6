"""Megatron's data order, index for index: GPTDataset's three indices and BlendedDataset's two (megatron-core 0.16.1),
vectorised, for runs that must see what a run of theirs saw."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megapt.data.order import SPLITS
from megapt.errors import UserError
from megapt.files import StrPath, open_whole, write_whole

Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]
Indices = npt.NDArray[np.integer[Any]]

_THRESHOLD = 0.80  # a last epoch that is needed for less than this share is shuffled by itself
_CHUNK = 1 << 20  # entries of the document index handled at a time
_BLOCK = 4096  # bytes per block of a cached file's digest
_BLOCKS = 64  # blocks per digest
_RUNS = 2048  # parts of a blend computed side by side
_NAMES = ("document", "sample", "shuffle")


class Pieces(NamedTuple):
    """What one sample is made of, in reading order, each int64 [p]: tokens [offset, offset + length) of a sequence."""

    sequences: Int64
    offsets: Int64
    lengths: Int64


class _Epochs(NamedTuple):
    """Steps 1, 2 and 5 of the order: how often the documents are read, and how many samples that makes."""

    number: int
    separate: bool  # whether the last epoch is shuffled by itself
    before_last: int  # samples in front of a separate last epoch
    samples: int


class MegatronOrder:
    """The samples of one split as megatron-core's GPTDataset orders them, index for index.

    `lengths` are the tokens of the split's sequences (int32 [n], for instance a slice of the `.idx` file's),
    the first of which has number `first_sequence` in its file. The documents are read as often as
    `num_samples` samples need (None: once), shuffled, laid end to end and cut every `sequence` tokens; the
    samples are shuffled in turn. As documents are shuffled, a sample is gathered from pieces of several.

    `add_extra_token`: samples have sequence + 1 tokens and share one with their neighbour. `drop_last=False`,
    for "valid" alone, as theirs: the last, partial sample counts too, and its pieces fall short.

    Attributes: `num_samples`, which may exceed the number asked for; `document_index` (int32 [epochs * n]),
    `sample_index` (int32 or int64 [num_samples + 1, 2]: position in document_index, offset), `shuffle_index`
    (uint32 or int64 [num_samples]).

    With a folder `cache` the indices are kept there under a name made from `fingerprint` (of the data's
    CONTENTS) and all parameters, and are mapped into memory; whoever builds first does no harm to others who
    build at the same time, and files that are cut short or belong to something else are built again.

    UserError if the split has no sample, or numbers exceed what their format holds.
    """

    kind = "megatron-1"

    def __init__(self, lengths: npt.NDArray[np.integer[Any]], sequence: int, seed: int, num_samples: int | None,
                 split_name: str, first_sequence: int = 0, add_extra_token: bool = True, drop_last: bool = True,
                 cache: StrPath | None = None, fingerprint: str = "") -> None:
        if split_name not in SPLITS:
            raise UserError(f'there is no split "{split_name}"; one of {", ".join(SPLITS)} is needed')
        if split_name != "valid" and not drop_last:
            raise UserError(f"a partial last sample can be kept in valid alone, not in {split_name}")
        if sequence < 1 or (num_samples is not None and num_samples < 1):
            raise UserError(f"{num_samples} samples of {sequence} tokens are not possible; both must be 1 or more")
        if not 0 <= seed < 2**32:
            raise UserError(f"a seed of {seed} is not possible in Megatron's order; it must be 0 to {2**32 - 1}")
        if first_sequence + len(lengths) > 2**31:
            raise UserError(f"{first_sequence + len(lengths)} sequences exceed Megatron's index, which numbers at most "
                            f"{2**31}; merge fewer corpora into one file, or use our own order")
        if cache is not None and not fingerprint:
            raise ValueError("a cache needs the data's fingerprint, or it could not tell corpora apart")
        self._lengths, self._sequence, self._seed = lengths, sequence, seed
        self._first, self._extra, self._drop_last = first_sequence, int(add_extra_token), drop_last
        described = {"kind": self.kind, "data": fingerprint, "first": first_sequence, "sequences": len(lengths),
                     "sequence": sequence, "seed": seed, "requested": num_samples, "extra": self._extra,
                     "drop_last": drop_last}
        arrays = _load(Path(cache), described) if cache is not None else None
        if arrays is None:
            arrays = self._build(num_samples, split_name)
            if cache is not None:
                _store(Path(cache), described, arrays)
                arrays = _load(Path(cache), described) or arrays
        self.document_index, self.sample_index, self.shuffle_index = arrays
        self.num_samples = len(self.sample_index) - 1

    def pieces(self, sample_ids: npt.NDArray[np.integer[Any]]) -> list[Pieces]:
        """What samples [n] are made of, none of it empty. IndexError outside [0, num_samples).

        A sample's lengths sum to sequence + add_extra_token, or less where its end is padded.
        """
        ids = np.asarray(sample_ids, np.int64)
        if ids.size and (int(ids.min()) < 0 or int(ids.max()) >= self.num_samples):
            raise IndexError(f"samples {int(ids.min())} to {int(ids.max())} of {self.num_samples}")
        rows = self.shuffle_index[ids].astype(np.int64)
        begins, ends = self.sample_index[rows].tolist(), self.sample_index[rows + 1].tolist()
        return [self._between(begin, end) for begin, end in zip(begins, ends, strict=True)]

    def _between(self, begin: list[int], end: list[int]) -> Pieces:
        sequences = self.document_index[begin[0]:end[0] + 1].astype(np.int64)
        offsets = np.zeros_like(sequences)
        offsets[0] = begin[1]
        stops = self._lengths[sequences - self._first].astype(np.int64)
        stops[-1] = end[1] + self._extra
        some = stops > offsets
        return Pieces(sequences[some], offsets[some], (stops - offsets)[some])

    def _build(self, num_samples: int | None, split_name: str) -> tuple[Indices, Indices, Indices]:
        tokens = int(np.sum(self._lengths, dtype=np.int64))
        epochs = self._plan(num_samples, tokens)
        if epochs.samples < 1:
            raise UserError(f"{tokens} tokens in {split_name} are too few for one sample of {self._sequence} + "
                            f"{self._extra} tokens; the longest possible sequence is {max(tokens - self._extra, 0)}")
        random = np.random.RandomState(self._seed)
        documents = np.arange(self._first, self._first + len(self._lengths), dtype=np.int32)
        document_index = np.tile(documents, epochs.number)
        cut = len(document_index) - (len(documents) if epochs.separate else 0)
        random.shuffle(document_index[:cut])
        random.shuffle(document_index[cut:])
        sample_index = self._sample_index(document_index, tokens * epochs.number, epochs.samples)
        first = epochs.before_last if epochs.separate else epochs.samples
        kind = np.uint32 if epochs.samples < 2**32 - 2 else np.int64
        parts = np.arange(first, dtype=kind), np.arange(first, epochs.samples, dtype=kind)
        random.shuffle(parts[0])
        random.shuffle(parts[1])
        return document_index, sample_index, np.concatenate(parts)

    def _plan(self, num_samples: int | None, tokens: int) -> _Epochs:
        size, extra = self._sequence, self._extra
        count = 1
        if num_samples is not None and tokens:
            count = max(1, -(-(num_samples * size + extra) // tokens))
        before_last = ((count - 1) * tokens - extra) // size
        separate = False
        if num_samples is not None and count > 1:
            separate = num_samples - before_last < int(_THRESHOLD * ((tokens - extra) // size))
        labels = count * tokens - extra
        samples = labels // size
        if not self._drop_last:  # in float32, as theirs: above 2^24 tokens it may miss the true number
            samples = int(np.ceil(np.int64(labels).astype(np.float32) / np.float32(size)))
        return _Epochs(count, separate, before_last, samples)

    def _sample_index(self, document_index: Indices, tokens: int, samples: int) -> Indices:
        """Row k says where sample k begins: at token k * sequence of the documents laid end to end.

        Without the extra token a row is instead the place just behind token k * sequence - 1, which may be the
        end of a document. Rows past the last whole sample stand at the last document's last possible begin.
        """
        largest = max(len(document_index), int(self._lengths.max()))
        index = np.zeros((samples + 1, 2), np.int32 if largest <= 2**31 - 1 else np.int64)
        behind = 1 - self._extra
        whole = min(samples, (tokens - self._extra) // self._sequence)
        row, before = 1, 0
        for start in range(0, len(document_index), _CHUNK):
            sizes = self._lengths[document_index[start:start + _CHUNK] - self._first].astype(np.int64)
            ends = before + np.cumsum(sizes)
            before = int(ends[-1])
            stop = min(whole, (before - 1 + behind) // self._sequence) + 1
            marks = np.arange(row, stop, dtype=np.int64) * self._sequence - behind
            at = np.searchsorted(ends, marks, side="right")
            index[row:stop, 0] = start + at
            index[row:stop, 1] = marks + behind - (ends[at] - sizes[at])
            row = max(row, stop)
        last = int(self._lengths[int(document_index[-1]) - self._first])
        index[whole + 1:] = (len(document_index) - 1, last - self._extra)
        return index


def megatron_blend_sizes(weights: Sequence[float], size: int,
                         surplus: float = 0.005) -> tuple[list[float], list[int], list[int]]:
    """How Megatron shares `size` samples out: (normalised weights [k], samples used [k], samples built [k]).

    Each data set is built with its third figure as `num_samples`; the blend is
    `megatron_blend(normalised weights, sum(samples used))`, slightly longer than `size`.
    """
    normal = _normalised(weights).tolist()
    used = [math.ceil(size * weight) for weight in normal]
    return normal, used, [math.ceil(target * (1 + surplus)) for target in used]


def megatron_blend(weights: Sequence[float], size: int | None) -> tuple[npt.NDArray[np.int16], Int64]:
    """BlendedDataset's (dataset_index, dataset_sample_index), each [size]: whose sample each one is, and which.

    Step n goes to the data set that is furthest behind its share, argmax of w_i * max(n, 1) - count_i in
    float64, the lowest index on ties. Where users give no weights, theirs are the data sets' sample counts.
    With `size` None the weights must be such counts, and each data set is drawn exactly once through.

    UserError for weights that are not positive and finite, or not whole where they must be.
    """
    if not weights or not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise UserError(f"Megatron's blends need positive weights, not {list(weights)}")
    if len(weights) >= 32767:
        raise UserError(f"Megatron's blends hold fewer than 32767 data sets, not {len(weights)}")
    limits: Float64 | None = None
    if size is None:
        if any(weight != int(weight) for weight in weights):
            raise UserError(f"without a size the weights are numbers of samples, whole ones, not {list(weights)}")
        counts = [int(weight) for weight in weights]
        size = sum(counts)
        limits = np.array(counts, np.float64)
        shares = limits / np.float64(size)
    else:
        shares = _normalised(weights)
    datasets = _furthest_behind(shares, size, limits)
    ordinals = np.empty(size, np.int64)
    order = np.argsort(datasets, kind="stable")
    firsts = np.concatenate([[0], np.cumsum(np.bincount(datasets, minlength=len(shares)))])
    ordinals[order] = np.arange(size) - firsts[datasets[order]]
    return datasets, ordinals


def _normalised(weights: Sequence[float]) -> Float64:
    values = np.array(weights, np.float64)
    return values / np.sum(values)


def _furthest_behind(shares: Float64, size: int, limits: Float64 | None) -> npt.NDArray[np.int16]:
    """The greedy choice at each of `size` steps, computed in up to `_RUNS` consecutive runs side by side.

    A run needs the counts [k] it begins with, known for the first alone. The others begin with a guess, each
    share rounded; as the choice always favours who is behind, runs from different counts soon meet. A run
    whose guess was not what the run before it ended with is computed again from there, until all agree; the
    first run is right, so then all are.
    """
    runs = max(1, min(_RUNS, size // 4096))
    length = -(-size // runs)
    choices = np.empty((length, runs), np.int16)
    firsts = np.arange(runs, dtype=np.int64) * length
    begins = _rounded_shares(shares, firsts)
    ends = np.empty_like(begins)
    todo = np.arange(runs)
    while len(todo):
        counts, rows = begins[todo], np.arange(len(todo))
        error = np.empty_like(counts)
        for t in range(length):
            steps = np.maximum(firsts[todo] + t, 1).astype(np.float64)
            np.multiply(steps[:, None], shares, out=error)
            error -= counts
            if limits is not None:
                error[counts >= limits] = -np.inf
            chosen = error.argmax(axis=1)
            choices[t, todo] = chosen
            counts[rows, chosen] += 1
        ends[todo] = counts
        todo = np.flatnonzero((ends[:-1] != begins[1:]).any(axis=1)) + 1
        begins[todo] = ends[todo - 1]
    return choices.T.reshape(-1)[:size]


def _rounded_shares(shares: Float64, steps: Int64) -> Float64:
    """Whole counts [steps, k] near steps * shares that sum to steps: the largest remainders are rounded up."""
    ideal = steps[:, None] * shares
    counts = np.floor(ideal)
    rank = np.argsort(np.argsort(counts - ideal, axis=1, kind="stable"), axis=1)
    counts += rank < (steps - counts.sum(axis=1))[:, None]
    return counts


def _paths(folder: Path, described: dict[str, Any]) -> tuple[Path, list[Path]]:
    text = json.dumps(described, sort_keys=True)
    key = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    return folder / f"{key}.json", [folder / f"{key}.{name}.npy" for name in _NAMES]


def _load(folder: Path, described: dict[str, Any]) -> tuple[Indices, Indices, Indices] | None:
    """The cached indices, mapped; None if they are absent, cut short or not what their description says."""
    description, files = _paths(folder, described)
    try:
        found = json.loads(description.read_text())
        if found["order"] != described or found["files"] != [_digest(path) for path in files]:
            return None
        document, sample, shuffle = (np.load(path, mmap_mode="r") for path in files)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return document, sample, shuffle


def _store(folder: Path, described: dict[str, Any], arrays: tuple[Indices, Indices, Indices]) -> None:
    """The description comes last: where there is one, its files are whole."""
    description, files = _paths(folder, described)
    try:
        for path, array in zip(files, arrays, strict=True):
            with open_whole(path) as file:
                np.save(file, array)
        content = {"order": described, "files": [_digest(path) for path in files]}
        write_whole(description, json.dumps(content, indent=1).encode())
    except OSError as error:
        raise UserError(f"the index cache {folder} cannot be written ({error.strerror or error}); name a folder that "
                        "can, or none to keep the indices in memory") from error


def _digest(path: Path) -> str:
    """A hash of a file's size and of up to 64 blocks of 4 KiB, evenly spread, both ends included."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        digest.update(size.to_bytes(8, "little"))
        starts = {max(size - _BLOCK, 0) * k // (_BLOCKS - 1) for k in range(_BLOCKS)}
        for start in sorted(starts):
            file.seek(start)
            digest.update(file.read(_BLOCK))
    return digest.hexdigest()
