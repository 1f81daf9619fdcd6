"""Inputs cut into pieces of bounded size, in input order: the units that workers read and encode.

A file is text (one document), JSON lines (a document per line) or Parquet (a document per row); text and JSON lines
may be compressed. Workers read plain files and Parquet themselves; what must be read from its beginning, a
compressed file or standard input, is read here and travels with the piece.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from megapt.data import streams
from megapt.errors import UserError
from megapt.files import StrPath

LINES = 1 << 20  # bytes of whole lines, or of small files, in a work item
PIECE = 4 << 20  # bytes at which a document of more than twice as many is cut
STDIN = "-"

_WINDOW = 1 << 16  # bytes looked at once in search of a place to cut
_AROUND = 3  # bytes of the longest blank character, seen on both sides of a cut
_BUILT = (".bin", ".idx", ".report.json", ".lengths.png", ".sha256")  # behind a pair's prefix
_FILES = 256  # small files per work item

Kind = Literal["text", "jsonl", "parquet"]

# White space beyond ASCII, by length: regular expressions over bytes do not know it.
_BLANK_2, _BLANK_3 = rb"\xc2[\x85\xa0]", rb"\xe1\x9a\x80|\xe2\x80[\x80-\x8a\xa8\xa9\xaf]|\xe2\x81\x9f|\xe3\x80\x80"

# Where a long document may be cut, best first: between a line that does not end in a blank and one that does not
# begin with one (byte-level pre-tokenizers never join across it, so the tokens stay the same), after any line, before
# any character.
_CUTS = (
    re.compile(rb"(?<!\s)(?<!%b)(?<!%b)\n(?!\s|%b|%b|\Z)" % (_BLANK_2, _BLANK_3, _BLANK_2, _BLANK_3)),
    re.compile(rb"\n"),
    re.compile(rb"(?=[^\x80-\xbf])"),
)


@dataclass(frozen=True)
class Source:
    """An input file. `compression`: "gz", "zst" or "". `size`, `mtime_ns`: as found (0 for standard input)."""

    path: str
    kind: Kind
    compression: str
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Piece:
    """Bytes [start, stop) of the text in a file, or row group `start` of a Parquet file.

    `first`, `last`: whether a text document begins and ends here (lines and rows are always whole documents).
    `cost`: bytes of the file used up. `data`: the bytes themselves where a stream gave them, and then `line` is the
    number of the first line; otherwise the worker reads the file.
    """

    path: str
    kind: Kind
    start: int
    stop: int
    first: bool = True
    last: bool = True
    cost: int = 0
    line: int = 0
    data: bytes | None = None


@dataclass(frozen=True)
class WorkItem:
    """Pieces that one worker encodes together. To go on after it, begin at file `next_file` and pass over
    `next_skip` of its items."""

    pieces: list[Piece]
    next_file: int
    next_skip: int

    @property
    def cost(self) -> int:
        """Bytes of files used up."""
        return sum(piece.cost for piece in self.pieces)

    def without_data(self) -> WorkItem:
        """The item without the bytes that a stream gave it."""
        return WorkItem([replace(piece, data=None) for piece in self.pieces], self.next_file, self.next_skip)


def list_sources(inputs: Iterable[StrPath]) -> tuple[list[Source], int]:
    """The files to read, and how many were passed over.

    A folder stands for the files below it, sorted by path, without hidden ones (a name that begins with ".") and
    without two kinds that are counted: binary ones of unknown kind (a NUL among the first 8 KiB), and what a build
    wrote there. What one is writing is left out too. "-" is standard input.
    UserError if an input does not exist, is named itself and is binary, or needs a library that is missing.
    """
    sources: list[Source] = []
    passed = 0
    for given in inputs:
        try:
            found = list(_sources(os.fspath(given)))
        except OSError as error:
            raise UserError(f"{error.filename or given}: {error.strerror}") from error
        passed += found.count(None)
        sources += filter(None, found)
    if sum(source.path == STDIN for source in sources) > 1:
        raise UserError("standard input (-) is named more than once; it can be read only once")
    return sources, passed


def work_items(sources: list[Source], file: int = 0, skip: int = 0) -> Iterator[WorkItem]:
    """All work from file number `file` on, less its first `skip` items.

    Small files share an item, any other file has items of its own. The cuts depend on the files alone, so they are
    the same for any number of workers and after any interruption.
    """
    small: list[Piece] = []
    for number in range(file, len(sources)):
        source = sources[number]
        whole = _whole(source)
        if whole is not None:
            small.append(whole)
            if sum(piece.cost for piece in small) >= LINES or len(small) >= _FILES:
                yield WorkItem(small, number + 1, 0)
                small = []
            continue
        if small:
            yield WorkItem(small, number, 0)
            small = []
        before: Piece | None = None
        done = 0
        for piece in _cut(source):
            if before is not None:
                done += 1
                if number > file or done > skip:
                    yield WorkItem([before], number, done)
            before = piece
        if before is not None:  # the last item of a file leads to the next file
            yield WorkItem([before], number + 1, 0)
    if small:
        yield WorkItem(small, len(sources), 0)


def cut_document(text: bytes) -> Iterator[bytes]:
    """A document that is in memory, cut where the same document would be cut in a file."""
    start = 0
    while start < len(text):
        stop = len(text)
        if len(text) - start > 2 * PIECE:
            stop = _find_cut(partial(_slice, text), start + PIECE, len(text), _CUTS)
        yield text[start:stop]
        start = stop


def _sources(name: str) -> Iterator[Source | None]:
    """The files that one input stands for, None for each that is passed over."""
    path = Path(name)
    if name == "":
        raise UserError('an input is "", the empty name; name files, folders, or - for standard input')
    if name == STDIN:
        yield Source(STDIN, "jsonl", "", 0, 0)
    elif path.is_dir():
        for found in sorted(_walk(path)):
            yield None if _is_built(found) else _source(found)
    elif not path.exists():
        raise UserError(f"input {path} does not exist")
    elif not path.is_file():
        raise UserError(f"input {path} is neither a file nor a folder; to read from a pipe, give - and send JSON lines "
                        "to standard input")
    else:
        source = _source(path)
        if source is None:
            raise UserError(f"{path} is not text (it has NUL bytes); inputs are UTF-8 text, .jsonl, these two "
                            "compressed (.gz, .zst), and .parquet")
        yield source


def _source(path: Path) -> Source | None:
    """None for a binary file of unknown kind."""
    state = path.stat()
    name, compression = path.name.lower(), ""
    for ending in ("gz", "zst"):
        if name.endswith("." + ending):
            name, compression = name.removesuffix("." + ending), ending
    kind: Kind = "text"
    # Web corpora hold JSON lines in files named .json.gz; a plain .json is most often one text.
    if name.endswith((".jsonl", ".ndjson")) or (compression and name.endswith(".json")):
        kind = "jsonl"
    elif name.endswith(".parquet") and not compression:
        kind = "parquet"
    elif not compression and _is_binary(path):
        return None
    if kind == "parquet":
        streams.parquet(str(path))
    elif compression == "zst":
        streams.zstandard(str(path))
    return Source(str(path), kind, compression, state.st_size, state.st_mtime_ns)


def _walk(folder: Path) -> Iterator[Path]:
    for root, folders, names in os.walk(folder, onerror=_refuse):
        folders[:] = [name for name in folders if not name.startswith(".") and not name.endswith(".building")]
        for name in names:
            path = Path(root, name)
            if not name.startswith(".") and path.is_file():
                yield path


def _refuse(error: OSError) -> None:
    raise error


def _is_built(path: Path) -> bool:
    """Whether this belongs to a pair: text as much of it is, it must not become the next build's input."""
    prefixes = [path.name.removesuffix(ending) for ending in _BUILT if path.name.endswith(ending)]
    return any(path.with_name(prefix + ".idx").exists() for prefix in prefixes)


def _is_binary(path: Path) -> bool:
    with open(path, "rb") as file:
        return b"\0" in file.read(8192)


def _whole(source: Source) -> Piece | None:
    """A plain file too small to cut, as one piece."""
    limit = {"text": 2 * PIECE, "jsonl": LINES, "parquet": 0}[source.kind]
    if source.compression or source.path == STDIN or source.kind == "parquet" or source.size > limit:
        return None
    return Piece(source.path, source.kind, 0, source.size, cost=source.size)


def _cut(source: Source) -> Iterator[Piece]:
    if source.kind == "parquet":
        return _cut_parquet(source)
    if source.compression or source.path == STDIN:
        return (_cut_lines_stream if source.kind == "jsonl" else _cut_text_stream)(source)
    return _cut_plain(source)


def _cut_plain(source: Source) -> Iterator[Piece]:
    lines, size, start = source.kind == "jsonl", source.size, 0
    step, limit, cuts = (LINES, LINES, _CUTS[1:2]) if lines else (PIECE, 2 * PIECE, _CUTS)
    with open(source.path, "rb") as file:
        def read(at: int, count: int) -> bytes:
            file.seek(at)
            return file.read(count)

        while start < size:
            stop = size if size - start <= limit else _find_cut(read, start + step, size, cuts)
            yield Piece(source.path, source.kind, start, stop, lines or start == 0, lines or stop == size, stop - start)
            start = stop


def _cut_parquet(source: Source) -> Iterator[Piece]:
    with streams.parquet(source.path) as file:
        groups = file.num_row_groups
    for group in range(groups):
        cost = source.size * (group + 1) // groups - source.size * group // groups
        yield Piece(source.path, "parquet", group, group + 1, cost=cost)


def _cut_lines_stream(source: Source) -> Iterator[Piece]:
    stream = streams.Blocks(source.path, source.compression)
    waiting: list[bytes] = []
    start, line, used, held = 0, 1, 0, 0
    for block in stream:
        waiting.append(block)
        held += len(block)
        cut = block.rfind(b"\n") + 1
        if held >= LINES and cut:
            data = b"".join([*waiting[:-1], block[:cut]])
            waiting = [block[cut:]]
            held = len(waiting[0])
            yield Piece(source.path, "jsonl", start, start + len(data), cost=stream.used - used, line=line, data=data)
            start, line, used = start + len(data), line + data.count(b"\n"), stream.used
    data = b"".join(waiting)
    if data:
        yield Piece(source.path, "jsonl", start, start + len(data), cost=stream.used - used, line=line, data=data)


def _cut_text_stream(source: Source) -> Iterator[Piece]:
    stream = streams.Blocks(source.path, source.compression)
    buffer = bytearray()
    start = used = 0
    for block in stream:
        buffer += block
        while len(buffer) > 3 * PIECE + _WINDOW:  # enough for all that _find_cut may look at
            stop = _find_cut(partial(_slice, buffer), PIECE, len(buffer), _CUTS)
            yield Piece(source.path, "text", start, start + stop, start == 0, False, stream.used - used,
                        data=bytes(buffer[:stop]))
            del buffer[:stop]
            start, used = start + stop, stream.used
    pieces = list(cut_document(bytes(buffer))) or [b""]
    for number, data in enumerate(pieces):
        last = number == len(pieces) - 1
        yield Piece(source.path, "text", start, start + len(data), start == 0, last, stream.used - used, data=data)
        start, used = start + len(data), stream.used


def _slice(data: bytes | bytearray, at: int, count: int) -> bytes:
    return bytes(data[at:at + count])


def _find_cut(read: Callable[[int, int], bytes], position: int, size: int, cuts: tuple[re.Pattern[bytes], ...]) -> int:
    """The first place to cut at or after `position`; a better kind of place is preferred within one more piece, and
    the last kind is looked for to the end."""
    for cut in cuts:
        reach = size if cut is cuts[-1] else min(size, position + PIECE)
        for start in range(position, reach, _WINDOW):
            before = min(start, _AROUND)
            window = read(start - before, before + _WINDOW + 1 + _AROUND)
            found = cut.search(window, before)
            if found and found.end() <= before + _WINDOW + 1:
                return start - before + found.end()
    return size


def check_unchanged(sources: Iterable[Source]) -> None:
    """UserError names a file that is not as `list_sources` found it."""
    for source in sources:
        if source.path == STDIN:
            continue
        try:
            state = os.stat(source.path)
        except FileNotFoundError:
            raise UserError(f"{source.path} was removed while it was read; build again") from None
        if state.st_size != source.size:
            raise UserError(f"{source.path} changed while it was read, from {source.size:,} to {state.st_size:,} "
                            "bytes; build again when it is complete")
        if state.st_mtime_ns != source.mtime_ns:
            raise UserError(f"{source.path} was written to while it was read; build again when it is complete")
