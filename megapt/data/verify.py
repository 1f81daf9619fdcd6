"""Every defect that a `.bin/.idx` pair can have, found in one pass over each file and in bounded memory."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megapt.data.index_format import Header, read_header
from megapt.data.storage import Progress, Storage, sha256
from megapt.errors import UserError
from megapt.files import StrPath, write_whole

_CHUNK = 1 << 18  # index entries looked at together
_SHOWN = 3  # examples of each kind of finding

# What an index that lists its sequences in an order of its own, or only some of them, shows as well.
ORDER = ("gap", "overlap", "trailing bytes in the .bin")


@dataclass
class Finding:
    """One kind of defect: how often it occurs, and the first few of them in words."""

    kind: str
    count: int = 0
    examples: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        more = f" (and {self.count - len(self.examples):,} more)" if self.count > len(self.examples) else ""
        return f"{self.kind}: {'; '.join(self.examples)}{more}"


@dataclass
class Report:
    """What was found. `empty_sequences` are legal, and told for they are rare; the hashes are hexadecimal SHA-256 of
    "bin" and "idx", if asked for."""

    findings: list[Finding] = field(default_factory=list)
    sequences: int = 0
    documents: int = 0
    tokens: int = 0
    empty_sequences: int = 0
    hashes: dict[str, str] = field(default_factory=dict)

    def add(self, kind: str, count: int, *examples: str) -> None:
        """Count `count` more of a kind."""
        for finding in self.findings:
            if finding.kind == kind:
                break
        else:
            self.findings.append(finding := Finding(kind))
        finding.count += count
        finding.examples.extend(examples[:_SHOWN - len(finding.examples)])


def check_pair(idx: Storage, bin: Storage, vocabulary: int | None = None, full: bool = False,
               multimodal: bool = False, progress: Progress = lambda count: None) -> Report:
    """Look at every index entry; with `vocabulary` or `full` also read every token, once.

    `vocabulary`: ids are below it. `full`: hash both files. `progress` is told bytes, `work_bytes` in all.
    """
    report = Report()
    bin.check()
    try:
        header = read_header(idx)
    except UserError as error:
        report.add("header", 1, str(error))
        return report
    report.sequences, report.documents = header.sequences, header.boundaries - 1
    report.tokens = bin.size // header.dtype.itemsize
    if bin.size % header.dtype.itemsize:
        report.add("torn token", 1, f"{bin.name} has {bin.size} bytes, {bin.size % header.dtype.itemsize} more than "
                                    f"whole tokens of {header.dtype.itemsize} bytes ({header.dtype.name})")
    if _check_size(idx, header, multimodal, report):
        _check_entries(idx, bin, header, report, progress)
        _check_boundaries(idx, header, report, progress)
    if vocabulary is not None or full:
        digest = hashlib.sha256() if full else None
        _check_tokens(bin, header.dtype, vocabulary, digest, report, progress)
        if digest is not None:
            report.hashes = {"bin": digest.hexdigest(), "idx": sha256(idx, progress)}
    return report


def work_bytes(idx: Storage, bin: Storage, vocabulary: int | None, full: bool) -> int:
    """The bytes that `check_pair` reads of files without a defect."""
    return idx.size * (1 + full) + bin.size * (full or vocabulary is not None)


def hash_file(prefix: StrPath) -> Path:
    """The file beside a pair that holds its hashes, in the form that `sha256sum --check` reads."""
    return Path(f"{os.fspath(prefix)}.sha256")


def write_hashes(prefix: StrPath, hashes: dict[str, str]) -> Path:
    """Write `hash_file(prefix)`."""
    path = hash_file(prefix)
    name = path.name.removesuffix(".sha256")
    write_whole(path, "".join(f"{digest}  {name}.{ending}\n" for ending, digest in hashes.items()).encode())
    return path


def compare_hashes(prefix: StrPath, report: Report) -> bool:
    """Add a finding for each hash that differs from `hash_file(prefix)`; False if there is no such file.

    UserError if the file is not one of hashes.
    """
    path = hash_file(prefix)
    if not path.exists():
        return False
    expected: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        digest, _, name = line.partition("  ")
        expected[name.rpartition(".")[2]] = digest.lower()
    if set(expected) != {"bin", "idx"}:
        raise UserError(f"{path} does not hold one line for the .bin and one for the .idx, each a SHA-256, two spaces "
                        "and a name; write it anew with --write-hash once the data is known to be good")
    for ending, digest in report.hashes.items():
        if digest != expected[ending]:
            report.add("hash", 1, f"the .{ending} has SHA-256 {digest}, but {path} says {expected[ending]}")
    return True


def _check_size(idx: Storage, header: Header, multimodal: bool, report: Report) -> bool:
    """Whether the columns are all there."""
    expected = header.end + header.sequences * multimodal
    if idx.size < expected:
        report.add("index cut short", 1,
                   f"{idx.name} has {idx.size} bytes of the {expected} that its header declares ({header.sequences} "
                   f"sequences, {header.boundaries} document boundaries)"
                   + ("; its entries were not looked at" if idx.size < header.end else ""))
        return idx.size >= header.end
    if idx.size > expected:
        modes = idx.size == header.end + header.sequences
        report.add("trailing bytes in the index", 1,
                   f"{idx.name} has {idx.size - expected} bytes after the {expected} that its header declares"
                   + (", as many as sequences: it may be of a multimodal corpus (--multimodal)" if modes else ""))
    return True


def _check_entries(idx: Storage, bin: Storage, header: Header, report: Report, progress: Progress) -> None:
    item = header.dtype.itemsize
    end, sound, number = 0, True, 0  # of the sequence before
    for lengths, offsets in zip(_column(idx, header.lengths_at, header.sequences, "<i4", progress),
                                _column(idx, header.offsets_at, header.sequences, "<i8", progress), strict=True):
        lengths = lengths.astype(np.int64)
        report.empty_sequences += int(np.count_nonzero(lengths == 0))
        negative = lengths < 0
        # Compared by subtraction, since a damaged offset near 2^63 would make a sum wrap around.
        outside = ~negative & ((offsets < 0) | (offsets > bin.size - lengths * item))
        good = ~negative & ~outside
        ends = offsets + lengths * item
        before = np.concatenate([[end], ends[:-1]])
        known = good & np.concatenate([[sound], good[:-1]])

        def place(i: int, number: int = number, lengths: npt.NDArray[Any] = lengths,
                  offsets: npt.NDArray[Any] = offsets) -> str:
            return f"sequence {number + i} of {header.sequences} ({lengths[i]} tokens at byte {offsets[i]})"

        for at in _each(negative, "wrong length", report):
            report.add("wrong length", 0, f"{place(at)} has a length below 0")
        for at in _each(outside, "out of range", report):
            report.add("out of range", 0, f"{place(at)} does not lie inside the {bin.size} bytes of {bin.name}")
        for at in _each(good & (offsets % item != 0), "misaligned", report):
            report.add("misaligned", 0, f"{place(at)} does not begin at a multiple of {item} bytes")
        for at in _each(known & (offsets > before), "gap", report):
            report.add("gap", 0, f"{offsets[at] - before[at]} bytes belong to no sequence before {place(at)}")
        for at in _each(known & (offsets < before), "overlap", report):
            report.add("overlap", 0,
                       f"{place(at)} begins {before[at] - offsets[at]} bytes before the end of the one before")
        end, sound, number = int(ends[-1]), bool(good[-1]), number + len(lengths)
    if sound and end < bin.size:
        report.add("trailing bytes in the .bin", 1,
                   f"{bin.name} has {bin.size - end} bytes after byte {end}, where the last sequence ends")


def _check_boundaries(idx: Storage, header: Header, report: Report, progress: Progress) -> None:
    last, number = 0, 0
    for block in _column(idx, header.boundaries_at, header.boundaries, "<i8", progress):
        if not number and block[0] != 0:
            report.add("document index begins late", 1, f"the first document begins at sequence {block[0]}, not at 0")
        before = np.concatenate([[block[0] if not number else last], block[:-1]])
        falls, beyond = "document index falls", "document index out of range"
        for at in _each(block < before, falls, report):
            report.add(falls, 0, f"document {number + at - 1} would end at sequence {block[at]}, before its start "
                                 f"{before[at]}")
        for at in _each((block < 0) | (block > header.sequences), beyond, report):
            report.add(beyond, 0, f"boundary {number + at} is sequence {block[at]} of {header.sequences}")
        last, number = int(block[-1]), number + len(block)
    if 0 <= last < header.sequences:
        report.add("document index ends early", 1,
                   f"the documents end at sequence {last} of {header.sequences}: the last one was not closed")


def _check_tokens(bin: Storage, dtype: np.dtype[Any], vocabulary: int | None, digest: Any, report: Report,
                  progress: Progress) -> None:
    number = 0
    for piece in bin.stream(0, bin.size):
        if digest is not None:
            digest.update(piece.data)
        if vocabulary is not None:
            ids = piece[:len(piece) - len(piece) % dtype.itemsize].view(dtype)
            if len(ids) and (int(ids.max()) >= vocabulary or int(ids.min()) < 0):
                kind = f"token id outside the vocabulary of {vocabulary}"
                for at in _each((ids >= vocabulary) | (ids < 0), kind, report):
                    report.add(kind, 0, f"token {number + at} (byte {(number + at) * dtype.itemsize}) is {ids[at]}")
            number += len(ids)
        progress(len(piece))


def _each(bad: npt.NDArray[np.bool_], kind: str, report: Report) -> list[int]:
    """Count the marked entries; the first few of them are to be described."""
    count = int(np.count_nonzero(bad))
    if not count:
        return []
    report.add(kind, count)
    return [int(at) for at in np.flatnonzero(bad)[:_SHOWN]]


def _column(idx: Storage, start: int, count: int, dtype: str, progress: Progress) -> Iterator[npt.NDArray[Any]]:
    size = np.dtype(dtype).itemsize
    for piece in idx.stream(start, start + count * size, _CHUNK * size):
        progress(len(piece))
        yield piece.view(dtype)
