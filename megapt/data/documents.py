"""The documents inside a piece of input: decoded, taken out of JSON or Parquet, and checked."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from megapt.data import pieces, streams
from megapt.data.pieces import STDIN, Piece, cut_document, list_sources, work_items
from megapt.errors import UserError
from megapt.files import StrPath

Invalid = Literal["replace", "skip", "fail"]

_ROWS = 1000  # of a Parquet file in memory at a time
_MARK = "\ufffd"


@dataclass(frozen=True)
class Part:
    """Text of a document, or of a part of it; `first` and `last` say whether the document begins and ends here.

    `bytes`: size of the text in its file, JSON's syntax included. `replaced`: invalid bytes or characters that became
    U+FFFD.
    """

    text: str
    first: bool
    last: bool
    bytes: int
    replaced: int


def read_parts(piece: Piece, text_key: str, invalid: Invalid = "replace") -> Iterator[Part]:
    """The documents in a piece, those of more than 8 MiB in parts.

    UserError if a line of JSON lines or a row is not a record with a string under `text_key`, and, if `invalid` is
    "fail", if a text is not valid UTF-8.
    """
    if piece.kind == "parquet":
        yield from _read_rows(piece, text_key, invalid)
        return
    data = piece.data
    if data is None:
        with open(piece.path, "rb") as file:
            file.seek(piece.start)
            data = file.read(piece.stop - piece.start)
        if len(data) != piece.stop - piece.start:
            raise UserError(f"{piece.path} became shorter while it was read; build again when it is complete")
    read = len(data)
    if piece.start == 0:
        data = data.removeprefix(b"\xef\xbb\xbf")
    if piece.kind == "jsonl":
        yield from _read_lines(piece, data, text_key, invalid)
    else:
        text, replaced = decode(data)
        if replaced and invalid == "fail":
            raise UserError(f"{_name(piece)} is not valid UTF-8 ({replaced} bad bytes between bytes {piece.start} and "
                            f"{piece.stop}); {_ADVICE}")
        yield Part(text, piece.first, piece.last, read, replaced)


def read_texts(inputs: Iterable[StrPath], text_key: str) -> Iterator[str]:
    """The texts of files and folders in order, long documents in parts. UserError if there is no text in them."""
    sources, _ = list_sources(inputs)
    if not sources:
        raise UserError(f"no text files in {', '.join(map(str, inputs))}")
    some = False
    for item in work_items(sources):
        for piece in item.pieces:
            for part in read_parts(piece, text_key):
                some = some or bool(part.text)
                yield part.text
    if not some:
        raise UserError(f"the {len(sources)} input files hold no text")


def decode(data: bytes) -> tuple[str, int]:
    """UTF-8 as text, and the number of its faults, each of which became U+FFFD."""
    try:
        return data.decode(), 0
    except UnicodeDecodeError:
        text = data.decode("utf-8", "replace")
        return text, text.count(_MARK) - data.count(_MARK.encode())


_ADVICE = "set invalid to replace or skip, or repair the file"


def _read_lines(piece: Piece, data: bytes, key: str, invalid: Invalid) -> Iterator[Part]:
    start, number = 0, 0
    while start < len(data):
        stop = data.find(b"\n", start) + 1 or len(data)
        line = data[start:stop]
        if not line.isspace():
            try:
                text, replaced = _json_text(line, key)
                if replaced and invalid == "fail":
                    raise UserError(f"not valid UTF-8 ({replaced} bad characters); {_ADVICE}")
            except UserError as error:
                before = piece.line if piece.data is not None else _line(piece.path, piece.stop - len(data))
                raise UserError(f"{_name(piece)}, line {before + number}: {error}") from error
            yield from _cut(text, len(line), replaced)
        start, number = stop, number + 1


def _json_text(line: bytes, key: str) -> tuple[str, int]:
    source, replaced = decode(line)
    try:
        record = json.loads(source)
    except ValueError as error:
        raise UserError(f"not valid JSON ({error})") from error
    except RecursionError as error:
        raise UserError("not valid JSON (nested too deep)") from error
    if not isinstance(record, dict) or key not in record:
        keys = ", ".join(map(repr, list(record)[:20])) if isinstance(record, dict) else f"a {type(record).__name__}"
        raise UserError(f'no "{key}" in it, only {keys or "nothing"}; name the key that holds the text')
    text = record[key]
    if not isinstance(text, str):
        raise UserError(f'"{key}" holds a {type(text).__name__}, not a string')
    if "\\u" in source and not _encodable(text):  # JSON can spell half of a surrogate pair, which is no character
        clean = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return clean, replaced + clean.count(_MARK) - text.count(_MARK)
    return text, replaced


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_rows(piece: Piece, key: str, invalid: Invalid) -> Iterator[Part]:
    import pyarrow

    with streams.parquet(piece.path) as file:
        names = file.schema_arrow.names
        if key not in names:
            raise UserError(f'{piece.path}: no column "{key}" in it, only {", ".join(map(repr, names[:20]))}; name the '
                            "column that holds the text")
        row = sum(file.metadata.row_group(group).num_rows for group in range(piece.start))
        try:
            for batch in file.iter_batches(_ROWS, row_groups=[piece.start], columns=[key]):
                column = batch.column(0)
                if not pyarrow.types.is_binary(column.type):
                    if not _is_text(column.type):
                        raise UserError(f'{piece.path}: column "{key}" holds {column.type}, not strings')
                    column = column.cast(pyarrow.large_binary())
                for value in column.to_pylist():
                    row += 1
                    if value is None:
                        raise UserError(f'{piece.path}, row {row}: "{key}" holds nothing, not a string')
                    text, replaced = decode(value)
                    if replaced and invalid == "fail":
                        raise UserError(f"{piece.path}, row {row}: not valid UTF-8 ({replaced} bad characters); "
                                        f"{_ADVICE}")
                    yield from _cut(text, len(value), replaced)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{piece.path}, row group {piece.start}: cannot be read: {error}") from error


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return any(is_kind(kind) for is_kind in (types.is_string, types.is_large_string, types.is_string_view,
                                             types.is_large_binary))


def _cut(text: str, size: int, replaced: int) -> Iterator[Part]:
    """A document in memory, in parts where it is long."""
    if len(text) <= pieces.PIECE // 2:  # a character takes 4 bytes at most
        yield Part(text, True, True, size, replaced)
        return
    data = text.encode()
    del text
    at = 0
    for piece in cut_document(data):
        first, at = at == 0, at + len(piece)
        yield Part(piece.decode(), first, at == len(data), size if first else 0, replaced if first else 0)


def _name(piece: Piece) -> str:
    return "standard input" if piece.path == STDIN else piece.path


def _line(path: str, at: int) -> int:
    lines, left = 1, at
    with open(path, "rb") as file:
        while left > 0 and (block := file.read(min(left, 1 << 20))):
            lines += block.count(b"\n")
            left -= len(block)
    return lines
