"""Input files as pieces of bounded size, in input order, and the documents inside a piece."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megapt.errors import UserError
from megapt.files import StrPath

PIECE = 4 << 20  # bytes read and encoded at a time
_WINDOW = 1 << 16  # bytes looked at once in search of a place to cut
_FILES = 256  # small files per work item

# Where a long document may be cut, best first: after a line that ends in a letter and before one that begins
# with a letter (byte-level pre-tokenizers never join across it, so the tokens stay the same), after any line,
# before any character.
_CUTS = (re.compile(rb"\S\n(?=\S)"), re.compile(rb"\n"), re.compile(rb"(?=[^\x80-\xbf])"))


@dataclass(frozen=True)
class Piece:
    """Bytes [start, stop) of a file of `size` bytes: whole lines of a .jsonl, or all or part of one
    document."""

    path: str
    start: int
    stop: int
    size: int

    @property
    def jsonl(self) -> bool:
        return self.path.endswith(".jsonl")


@dataclass(frozen=True)
class Part:
    """The text of a document, or of a part of it; `last` says whether the document ends here."""

    text: str
    last: bool


def list_files(inputs: Iterable[StrPath]) -> tuple[list[Path], int]:
    """The files to read, and how many were passed over.

    A folder stands for the files below it, sorted by path, without hidden ones (a name that begins with ".")
    and without binary ones (a NUL among the first 8 KiB), which are counted. UserError if an input does not
    exist, or is named itself and is binary.
    """
    files: list[Path] = []
    skipped = 0
    for given in map(Path, inputs):
        if given.is_file():
            if _is_binary(given):
                raise UserError(f"{given} is not text (it has NUL bytes); inputs are UTF-8 text or .jsonl "
                                "files")
            files.append(given)
        elif given.is_dir():
            found = sorted(_walk(given))
            text = [path for path in found if not _is_binary(path)]
            skipped += len(found) - len(text)
            files += text
        else:
            raise UserError(f"input {given} does not exist")
    return files, skipped


def work_items(files: Iterable[Path]) -> Iterator[list[Piece]]:
    """Pieces of about PIECE bytes each, small files together in one item; the same for any number of
    workers."""
    item: list[Piece] = []
    for path in files:
        for piece in _cut_file(path):
            item.append(piece)
            if sum(p.stop - p.start for p in item) >= PIECE or len(item) >= _FILES:
                yield item
                item = []
    if item:
        yield item


def read_parts(piece: Piece, text_key: str) -> tuple[list[Part], int]:
    """The documents (or the part of one) in a piece, and how many invalid bytes or characters became U+FFFD.

    UserError if a line of a .jsonl is not an object with a string under `text_key`.
    """
    with open(piece.path, "rb") as file:
        file.seek(piece.start)
        data = file.read(piece.stop - piece.start)
    if len(data) != piece.stop - piece.start:
        raise UserError(f"{piece.path} became shorter while it was read; build again when it is complete")
    if piece.start == 0:
        data = data.removeprefix(b"\xef\xbb\xbf")
    if not piece.jsonl:
        text, replaced = _decode(data)
        return [Part(text, piece.stop == piece.size)], replaced
    parts: list[Part] = []
    replaced, at = 0, piece.stop - len(data)
    for line in data.split(b"\n"):
        if line.strip():
            text, bad = _json_text(line, text_key, piece.path, at)
            parts.append(Part(text, True))
            replaced += bad
        at += len(line) + 1
    return parts, replaced


def _walk(folder: Path) -> Iterator[Path]:
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(root, name)
            if not name.startswith(".") and path.is_file():
                yield path


def _is_binary(path: Path) -> bool:
    with open(path, "rb") as file:
        return b"\0" in file.read(8192)


def _cut_file(path: Path) -> Iterator[Piece]:
    size = path.stat().st_size
    if size == 0 and path.suffix != ".jsonl":
        yield Piece(str(path), 0, 0, 0)  # an empty file is an empty document
    cuts = _CUTS[1:2] if path.suffix == ".jsonl" else _CUTS
    start = 0
    while start < size:
        stop = size if size - start <= 2 * PIECE else _find_cut(path, start + PIECE, size, cuts)
        yield Piece(str(path), start, stop, size)
        start = stop


def _find_cut(path: Path, position: int, size: int, cuts: tuple[re.Pattern[bytes], ...]) -> int:
    """The first place to cut at or after `position`; a better kind of place is preferred within one more
    piece, and the last kind is looked for to the end of the file."""
    with open(path, "rb") as file:
        for cut in cuts:
            reach = size if cut is cuts[-1] else min(size, position + PIECE)
            for start in range(position, reach, _WINDOW):
                file.seek(start)
                found = cut.search(file.read(_WINDOW + 2))  # overlapping by the longest context of a cut
                if found:
                    return start + found.end()
    return size


def _decode(data: bytes) -> tuple[str, int]:
    try:
        return data.decode(), 0
    except UnicodeDecodeError:
        text = data.decode("utf-8", "replace")
        return text, text.count("\ufffd") - data.count("\ufffd".encode())


def _json_text(line: bytes, key: str, path: str, at: int) -> tuple[str, int]:
    source, replaced = _decode(line)
    try:
        record = json.loads(source)
    except ValueError as error:
        raise UserError(f"{path}, line {_line_number(path, at)}: not valid JSON ({error})") from error
    if not isinstance(record, dict) or key not in record:
        keys = ", ".join(map(repr, record)) if isinstance(record, dict) else f"a {type(record).__name__}"
        raise UserError(f'{path}, line {_line_number(path, at)}: no "{key}" in it, only {keys or "nothing"}; '
                        'name the '
                        "key that holds the text")
    text = record[key]
    if not isinstance(text, str):
        raise UserError(f'{path}, line {_line_number(path, at)}: "{key}" holds a {type(text).__name__}, '
                        "not a string")
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair, which is no character
        clean = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return clean, replaced + clean.count("\ufffd") - text.count("\ufffd")
    return text, replaced


def _line_number(path: str, at: int) -> int:
    lines, left = 1, at
    with open(path, "rb") as file:
        while left > 0 and (block := file.read(min(left, 1 << 20))):
            lines += block.count(b"\n")
            left -= len(block)
    return lines
