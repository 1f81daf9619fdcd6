from __future__ import annotations

import gzip
import json
import sys
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pytest

from megapt.data import pieces, streams
from megapt.data.build import build
from megapt.data.documents import read_texts
from megapt.data.indexed import IndexedReader
from megapt.data.pieces import Piece, WorkItem, list_sources, work_items
from megapt.data.statistics import LengthCounts
from megapt.errors import UserError

zstandard = pytest.importorskip("zstandard")
pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

TEXTS = [f"document {i}\n" * (i % 7) + "é漢🙂"[: i % 4] for i in range(120)] + ["", "x" * 3000]
LONG = "".join(f"line {i} ends.\n" + "　\n" * (i % 3) for i in range(900)).encode()


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE", 1000)
    monkeypatch.setattr(pieces, "LINES", 600)
    monkeypatch.setattr(pieces, "_WINDOW", 64)
    monkeypatch.setattr(streams, "BLOCK", 256)
    monkeypatch.setattr(LengthCounts, "picture", lambda self, title: b"picture")  # slow, and tested by itself


def lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def compressed(data: bytes, ending: str) -> bytes:
    if ending == "gz":  # two members, two frames
        return gzip.compress(data[:5000]) + gzip.compress(data[5000:])
    return b"".join(zstandard.compress(part) for part in (data[:5000], data[5000:]))


def items(*paths: Path) -> list[WorkItem]:
    return list(work_items(list_sources(paths)[0]))


def spans(work: list[WorkItem]) -> list[tuple[int, int, bool, bool]]:
    return [(piece.start, piece.stop, piece.first, piece.last) for item in work for piece in item.pieces]


@pytest.mark.parametrize("data", [
    b"word and\nmore words\n" * 300, b"no line ends at all " * 300, b"windows\r\n" * 700,
    "漢字かな".encode() * 500, b"\n" * 6000, "é\n".encode() * 2000, b"x" * 5999 + b"\n", LONG,
])
def test_long_documents_lose_nothing_at_the_cuts(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    (tmp_path / "b.txt").write_bytes(b"end")
    found = items(tmp_path / "a.txt", tmp_path / "b.txt")
    assert len(found) > 2
    assert max(p.stop - p.start for item in found for p in item.pieces) <= 2128
    report = build([tmp_path / "a.txt", tmp_path / "b.txt"], tmp_path / "out", "bytes", progress=False)
    reader = IndexedReader(tmp_path / "out")
    assert [reader.sequence(i).tolist() for i in range(2)] == [[*data, 256], [*b"end", 256]]
    assert (report.replaced, report.bytes) == (0, len(data) + 3)
    # The same document is cut at the same places in a file, in a compressed file and in memory.
    for ending in ("gz", "zst"):
        path = tmp_path / f"a.txt.{ending}"
        path.write_bytes(compressed(data, ending))
        assert spans(items(path)) == spans(items(tmp_path / "a.txt"))
        assert b"".join(p.data or b"" for item in items(path) for p in item.pieces) == data
    in_file = [stop - start for start, stop, _, _ in spans(items(tmp_path / "a.txt"))]
    assert [len(part) for part in pieces.cut_document(data)] == in_file


def test_best_place_to_cut_is_seen_across_windows(tmp_path: Path) -> None:
    for good in (1001, 1062, 1063, 1064, 1500):
        data = bytearray(b"x" * 5000)
        data[1005:1007] = b" \n"  # a worse place
        data[1030:1034] = "　\n".encode()  # and one that is as bad, beyond ASCII
        data[good:good + 1] = b"\n"
        if good == 1001:
            data[1005:1007] = b"xx"
        (tmp_path / "a.txt").write_bytes(data)
        assert items(tmp_path / "a.txt")[0].pieces[0].stop == good + 1


@pytest.mark.parametrize("ending", ["jsonl", "ndjson", "jsonl.gz", "jsonl.zst", "json.gz", "json.zst", "parquet"])
def test_every_kind_gives_the_same_texts(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    data = lines(TEXTS)
    if ending == "parquet":
        parquet.write_table(pyarrow.table({"id": range(len(TEXTS)), "text": TEXTS}), path, row_group_size=50)
    else:
        path.write_bytes(compressed(data, ending[-3:].lstrip(".")) if ending[-2:] in ("gz", "st") else data)
    assert "".join(read_texts([path], "text")) == "".join(TEXTS)
    found = items(path)
    assert len(found) > 2
    assert sum(item.cost for item in found) == path.stat().st_size
    for workers in (1, 2):
        build([path], tmp_path / f"out{workers}", "bytes", workers=workers, progress=False)
        reader = IndexedReader(tmp_path / f"out{workers}")
        rows = [b"".join(reader.sequence(i).astype("u1").tobytes()[:-1] for i in range(a, b))
                for a, b in zip(reader.document_boundaries, reader.document_boundaries[1:], strict=False)]
        assert rows == [text.encode() for text in TEXTS]


def test_work_goes_on_after_any_item(tmp_path: Path) -> None:
    for k in range(5):
        (tmp_path / f"{k}.txt").write_text("small " * 20 * k)
    (tmp_path / "2a.txt").write_bytes(LONG)
    (tmp_path / "2b.jsonl.gz").write_bytes(compressed(lines(TEXTS), "gz"))
    (tmp_path / "2c.jsonl").write_bytes(lines(TEXTS))
    (tmp_path / "2d.txt.zst").write_bytes(compressed(LONG, "zst"))
    (tmp_path / "2e.jsonl.gz").write_bytes(gzip.compress(b""))
    parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "3.parquet", row_group_size=50)
    sources, passed = list_sources([tmp_path])
    assert (len(sources), passed) == (11, 0)
    whole = list(work_items(sources))
    assert len(whole) > 40
    assert whole[-1].next_file == len(sources)
    for k, item in enumerate(whole):
        assert list(work_items(sources, item.next_file, item.next_skip)) == whole[k + 1:]


def test_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(lines(TEXTS))))
    assert list(read_texts(["-"], "text")) == [*TEXTS[:-1], "x" * 1000, "x" * 2000]
    monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(lines(TEXTS) + b"plain text\n")))
    with pytest.raises(UserError, match=f"standard input, line {len(TEXTS) + 1}: not valid JSON"):
        list(read_texts(["-"], "text"))


def test_line_numbers_in_compressed_files(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstandard.compress(lines(TEXTS) + b"\n\n[]\n"))
    with pytest.raises(UserError, match=f"a.jsonl.zst, line {len(TEXTS) + 3}: no \"text\" in it, only a list"):
        list(read_texts([path], "text"))


def test_damaged_files_are_named(tmp_path: Path) -> None:
    data = lines(TEXTS)
    for name, content, message in [
        ("a.jsonl.gz", gzip.compress(data)[:-20], "not a whole gzip file"),
        ("b.jsonl.gz", data, "not a whole gzip file"),
        ("c.jsonl.zst", zstandard.compress(data)[:-20], "last frame is cut short"),
        ("d.txt.zst", data, "not a zstandard"),
        ("e.parquet", data, "not a Parquet file"), ("f.parquet", b"", "not a Parquet file"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name} is .*{message}"):
            build([tmp_path / name], tmp_path / "out", "bytes", progress=False)
    assert not list(tmp_path.glob("out*"))


def test_columns_of_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    texts = pyarrow.array(["a", "b", "a"])
    columns = {"plain": texts, "large": texts.cast(pyarrow.large_string()), "coded": texts.dictionary_encode(),
               "raw": pyarrow.array([b"a", b"\xff", b"a"]), "number": pyarrow.array([1, 2, 3]),
               "holes": pyarrow.array(["a", None, "b"])}
    parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    for name in ("plain", "large", "coded"):
        assert list(read_texts([path], name)) == ["a", "b", "a"]
    assert list(read_texts([path], "raw")) == ["a", "\ufffd", "a"]
    for name, message in [("number", '"number" holds int64, not strings'), ("holes", 'row 2: "holes" holds nothing'),
                          ("none", """no column "none" in it, only 'plain', 'large'""")]:
        with pytest.raises(UserError, match=f"a.parquet.*{message}"):
            list(read_texts([path], name))
    with pytest.raises(UserError, match="a.parquet, row 2: not valid UTF-8"):
        build([path], tmp_path / "out", "bytes", "raw", progress=False, invalid="fail")


@pytest.mark.parametrize(("name", "library"), [("a.parquet", "pyarrow"), ("a.jsonl.zst", "zstandard")])
def test_missing_libraries_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, library: str) -> None:
    (tmp_path / name).write_bytes(b"")
    for module in [library, *(other for other in sys.modules if other.startswith(library + "."))]:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"{name} needs the {library} library: pip install megapt\[data\]"):
        list_sources([tmp_path])


def test_small_files_share_an_item(tmp_path: Path) -> None:
    for k in range(9):
        (tmp_path / f"{k}.txt").write_text("x" * 250)
    assert [len(item.pieces) for item in items(tmp_path)] == [3, 3, 3]
    assert items(tmp_path)[0].pieces[0] == Piece(str(tmp_path / "0.txt"), "text", 0, 250, cost=250)
