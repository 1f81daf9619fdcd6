"""The folder in which a build grows, so that it survives being killed and never holds its tokens twice.

`PREFIX.building/` holds tokens, sequence lengths and document boundaries as plain arrays that only grow, and
`state.json`, which says how much of them counts and at which work item to go on. Every few seconds the arrays are
flushed to the disk and then the state is replaced; what lies beyond the sizes it states is cut off when a build goes
on. `manifest.json` says of which inputs, tokenizer and options all this is. At the end the tokens become `PREFIX.bin`
by a rename.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from megapt.data.dedup import HASH, SeenHashes
from megapt.data.encode import Encoded, combine
from megapt.data.index_format import MAX_LENGTH, Header, write_index
from megapt.data.pieces import WorkItem
from megapt.errors import UserError
from megapt.files import sync_file, sync_folder, write_whole

FORMAT = 1  # of the working folder: one of another number is not gone on with
COMMIT_SECONDS = 5.0  # between two commits

_CHUNK = 1 << 20  # index entries handled at a time
_TOKENS, _LENGTHS, _BOUNDARIES, _HASHES = "tokens.bin", "lengths.i32", "boundaries.i64", "hashes.bin"
_STATE, _MANIFEST, _INDEX = "state.json", "manifest.json", "tokens.idx"


@dataclass
class OpenDocument:
    """A document whose end has not come: where it began, the length of its last sequence so far, the hashes of its
    parts. `dropped`: it is being left out, and what comes of it is passed over."""

    token: int
    sequence: int
    length: int = 0
    bad: bool = False
    dropped: bool = False
    hashes: list[str] = field(default_factory=list)


@dataclass
class State:
    """How far a build is.

    `next_file`, `next_skip`: see `pieces.WorkItem`. `hashes`: written. `used`: bytes of the input files used up.
    `open`: the document in which the last item ended. `whole`: nothing is left but to give the files their names. The
    others are as in `build.BuildReport`.
    """

    next_file: int = 0
    next_skip: int = 0
    tokens: int = 0
    sequences: int = 0
    documents: int = 0
    hashes: int = 0
    bytes: int = 0
    replaced: int = 0
    skipped: int = 0
    duplicates: int = 0
    seconds: float = 0.0
    used: int = 0
    engine: str = ""
    open: OpenDocument | None = None
    whole: bool = False


class WorkingFolder:
    """Appends encoded items to the arrays of a build and, at the end, makes them the `.bin/.idx` pair.

    `state` is what is done, on disk as of the last `commit`. Documents marked bad and, with `dedup`, those whose hash
    was seen are left out and counted. UserError if another process builds at this place.
    """

    def __init__(self, prefix: str, dtype: np.dtype[Any], join_parts: bool, dedup: bool) -> None:
        self.path = Path(prefix + ".building")
        self.prefix, self.dtype, self.join_parts, self.dedup = prefix, dtype, join_parts, dedup
        self.state = State()
        self._files: dict[str, IO[bytes]] = {}
        self._seen = SeenHashes()
        self._lock: IO[bytes] | None = None
        self.started = False  # whether work is on disk that a later build can go on from

    def lock(self) -> None:
        """Make the folder, and keep other processes out of it until `close`."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.path / "lock", "wb")  # noqa: SIM115
        try:  # a lock of this process alone: neither its workers nor its death leave it behind
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            self._lock = None
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            raise self._taken() from None
        with suppress(FileNotFoundError):  # a build that just ended removed the folder, and another may have made it
            if os.path.samestat(os.fstat(self._lock.fileno()), os.stat(self.path / "lock")):
                return
        self._lock.close()
        self._lock = None
        raise self._taken()

    def _taken(self) -> UserError:
        return UserError(f"another process is building {self.prefix} now; wait for it or choose another output")

    def manifest(self) -> dict[str, Any] | None:
        """The manifest of an unfinished build here, and its state; None if there is none."""
        try:
            manifest: dict[str, Any] = json.loads((self.path / _MANIFEST).read_bytes())
            state = json.loads((self.path / _STATE).read_bytes())
        except FileNotFoundError:
            return None
        if manifest.get("format") == FORMAT:  # another's state may have other fields
            state["open"] = state["open"] and OpenDocument(**state["open"])
            self.state = State(**state)
            self._note_start()
        else:
            self.started = True
        return manifest

    def begin(self, manifest: dict[str, Any]) -> None:
        """Start from nothing."""
        self.clear()
        self.state, self.started = State(), False
        for name in (_TOKENS, _LENGTHS, _HASHES):
            (self.path / name).write_bytes(b"")
        (self.path / _BOUNDARIES).write_bytes(bytes(8))
        write_whole(self.path / _STATE, json.dumps(dataclasses.asdict(self.state)).encode())
        write_whole(self.path / _MANIFEST, json.dumps(manifest).encode())

    def open(self) -> None:
        """Get ready to append after what `state` counts."""
        for name, size in self._sizes().items():
            path = self.path / name
            if path.stat().st_size < size:
                raise UserError(f"{path} was cut short; remove {self.path} and build again")
            os.truncate(path, size)
            self._files[name] = open(path, "ab", buffering=1 << 20)  # noqa: SIM115
        if self.dedup:
            self._seen = SeenHashes(np.fromfile(self.path / _HASHES, HASH))
        self._committed = time.monotonic()

    def append(self, item: Encoded, work: WorkItem) -> None:
        """Add the documents of a work item."""
        documents = len(item.documents)
        ends = np.cumsum(item.documents)
        tokens = np.concatenate([[0], np.cumsum(item.lengths)])
        first = 0
        if item.continues:
            self._go_on(item, int(ends[0]), int(tokens[ends[0]]), over=documents > 1 or not item.open)
            first = 1
        last = documents - 1 if item.open and first < documents else documents
        if first < last:
            starts = ends - item.documents
            self._add_whole(item, first, last, starts, ends, tokens)
        if last < documents:
            state, start = self.state, int(ends[last] - item.documents[last])
            state.open = OpenDocument(state.tokens, state.sequences)
            self._extend(item, start, int(ends[last]), int(tokens[start]), int(tokens[ends[last]]), last)
        self.state.bytes += item.bytes
        self.state.replaced += item.replaced
        self.state.used += work.cost
        self.state.next_file, self.state.next_skip = work.next_file, work.next_skip
        if time.monotonic() - self._committed >= COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Bring everything to the disk, so that the build can go on from here."""
        for file in self._files.values():
            sync_file(file)
        write_whole(self.path / _STATE, json.dumps(dataclasses.asdict(self.state)).encode())
        self._note_start()
        self._committed = time.monotonic()

    def document_lengths(self) -> Iterator[npt.NDArray[np.int64]]:
        """Tokens of every document in order, a chunk at a time; after `commit`."""
        lengths = _column(self.path / _LENGTHS, "<i4")
        boundaries = _column(self.path / _BOUNDARIES, "<i8")
        for start in range(0, len(boundaries) - 1, _CHUNK):
            block = boundaries[start:start + _CHUNK + 1]
            ends = np.concatenate([[0], np.cumsum(lengths[block[0]:block[-1]], dtype=np.int64)])
            yield np.diff(ends[block - block[0]])

    def write_index(self) -> None:
        """Write the `.idx`, still inside the folder, and count the build whole; after `commit`."""
        header = Header(self.dtype, self.state.sequences, self.state.documents + 1)
        with open(self.path / _INDEX, "wb", buffering=1 << 20) as file:
            size = write_index(file, header, lambda: _parts(self.path / _LENGTHS, "<i4"),
                               _parts(self.path / _BOUNDARIES, "<i8"))
            sync_file(file)
        assert size == self.state.tokens * self.dtype.itemsize, self.prefix
        self.state.whole = True
        self.commit()

    def publish(self, others: list[str]) -> None:
        """Give the pair and the files named `others` in the folder their names under the prefix, and remove the folder.
        A whole build that was killed in here goes on in here."""
        folder = Path(self.prefix).parent
        if (self.path / _TOKENS).exists():
            # An old index must never describe the new tokens, not even between two renames.
            Path(self.prefix + ".idx").unlink(missing_ok=True)
        for name, ending in [(_TOKENS, ".bin"), *((other, f".{other}") for other in others), (_INDEX, ".idx")]:
            with suppress(FileNotFoundError):
                os.replace(self.path / name, self.prefix + ending)
        sync_folder(folder)
        self.remove()

    def close(self) -> None:
        """Close the files and let go of the folder."""
        for file in self._files.values():
            with suppress(OSError):  # what cannot be flushed is beyond the last commit
                file.close()
        self._files = {}
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def clear(self) -> None:
        """Remove what the folder holds."""
        for name in os.listdir(self.path):
            if name != "lock":
                (self.path / name).unlink()

    def remove(self) -> None:
        """Remove the folder with all its work, if it is ours."""
        if self._lock is not None:
            shutil.rmtree(self.path, ignore_errors=True)
        self.close()

    def _note_start(self) -> None:
        self.started = self.state.whole or (self.state.next_file, self.state.next_skip) != (0, 0)

    def _sizes(self) -> dict[str, int]:
        state = self.state
        return {_TOKENS: state.tokens * self.dtype.itemsize, _LENGTHS: 4 * state.sequences,
                _BOUNDARIES: 8 * (state.documents + 1), _HASHES: HASH.itemsize * state.hashes}

    def _go_on(self, item: Encoded, sequences: int, tokens: int, over: bool) -> None:
        """The item's first document, which began in an earlier item and is over or not."""
        opened, state = self.state.open, self.state
        assert opened is not None
        if not opened.dropped:
            opened.bad |= bool(item.bad[0])
            if item.hashes is not None:
                opened.hashes.append(_padded(item.hashes[0]).hex())
        if over and not opened.dropped:
            if opened.bad:
                state.skipped += 1
                self._drop(opened)
            elif opened.hashes and not self._is_fresh(opened):
                state.duplicates += 1
                self._drop(opened)
        if not opened.dropped:
            self._write(item, 0, sequences, 0, tokens)
        if over:
            if not opened.dropped:
                self._close_document(opened)
            state.open = None

    def _extend(self, item: Encoded, first: int, last: int, start: int, stop: int, document: int) -> None:
        """The beginning of a document that goes on in the next item."""
        opened = self.state.open
        assert opened is not None
        opened.bad = bool(item.bad[document])
        if item.hashes is not None:
            opened.hashes.append(_padded(item.hashes[document]).hex())
        self._write(item, first, last, start, stop)

    def _write(self, item: Encoded, first: int, last: int, start: int, stop: int) -> None:
        """Tokens and sequences of the open document."""
        opened, state = self.state.open, self.state
        assert opened is not None
        self._files[_TOKENS].write(item.tokens[start:stop].data)
        state.tokens += stop - start
        if self.join_parts:
            opened.length += stop - start
            _check_length(opened.length, state.documents)
        else:
            self._files[_LENGTHS].write(item.lengths[first:last].astype("<i4").data)
            state.sequences += last - first

    def _is_fresh(self, opened: OpenDocument) -> bool:
        digest = np.array([combine([bytes.fromhex(part) for part in opened.hashes])], HASH)
        if not self._seen.add(digest)[0]:
            return False
        self._files[_HASHES].write(digest.data)
        self.state.hashes += 1
        return True

    def _close_document(self, opened: OpenDocument) -> None:
        state = self.state
        if self.join_parts and opened.length:
            self._files[_LENGTHS].write(np.array([opened.length], "<i4").data)
            state.sequences += 1
        self._files[_BOUNDARIES].write(np.array([state.sequences], "<i8").data)
        state.documents += 1

    def _drop(self, opened: OpenDocument) -> None:
        """Cut off what was written of a document. The state says so first: it must never count bytes that are gone."""
        state = self.state
        opened.dropped, opened.hashes = True, []
        state.tokens, state.sequences = opened.token, opened.sequence
        self.commit()
        for name, size in self._sizes().items():
            self._files[name].truncate(size)

    def _add_whole(self, item: Encoded, first: int, last: int, starts: npt.NDArray[Any], ends: npt.NDArray[Any],
                   tokens: npt.NDArray[Any]) -> None:
        """Documents [first, last) of the item, which begin and end in it."""
        state = self.state
        keep = ~item.bad[first:last]
        state.skipped += int((~keep).sum())
        if item.hashes is not None:
            hashes = item.hashes[first:last]
            fresh = self._seen.add(hashes[keep])
            state.duplicates += int((~fresh).sum())
            keep[keep] = fresh
            self._files[_HASHES].write(hashes[keep].data)
            state.hashes += int(keep.sum())
        begin, end = int(starts[first]), int(ends[last - 1])
        flat, lengths = item.tokens[tokens[begin]:tokens[end]], item.lengths[begin:end]
        counts = item.documents[first:last]
        if not keep.all():
            owned = np.repeat(keep, counts)
            flat, lengths, counts = flat[np.repeat(owned, lengths)], lengths[owned], counts[keep]
        if len(lengths):
            _check_length(int(lengths.max()), state.documents + int(np.argmax(np.repeat(counts, counts))))
        self._files[_TOKENS].write(flat.data)
        self._files[_LENGTHS].write(lengths.astype("<i4").data)
        self._files[_BOUNDARIES].write((state.sequences + np.cumsum(counts)).astype("<i8").data)
        state.tokens += len(flat)
        state.sequences += len(lengths)
        state.documents += len(counts)


def _padded(digest: bytes) -> bytes:
    """numpy hands out an "S16" without the NULs at its end."""
    return digest.ljust(HASH.itemsize, b"\0")


def _check_length(length: int, document: int) -> None:
    if length > MAX_LENGTH:
        raise UserError(f"document {document} has {length} tokens or more; the format holds at most {MAX_LENGTH} in "
                        "one sequence: split the document, or build with split_sentences")


def _parts(path: Path, dtype: str) -> Iterator[npt.NDArray[Any]]:
    column = _column(path, dtype)
    return (column[start:start + _CHUNK] for start in range(0, len(column), _CHUNK))


def _column(path: Path, dtype: str) -> npt.NDArray[Any]:
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)
