from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from megapt.data import build as build_module
from megapt.data import pieces
from megapt.data.build import build
from megapt.data.indexed import IndexedReader, IndexedWriter
from megapt.data.tokenizers import load, train_bpe
from megapt.errors import UserError


def documents(prefix: Path) -> list[list[int]]:
    reader = IndexedReader(prefix)
    reader.verify()
    bounds = reader.document_boundaries.tolist()
    return [[t for i in range(low, high) for t in reader.sequence(i).tolist()]
            for low, high in zip(bounds, bounds[1:], strict=False)]


def as_text(rows: list[list[int]]) -> list[str]:
    tokenizer = load("bytes")
    assert all(row[-1] == 256 and 256 not in row[:-1] for row in rows if row)
    return [tokenizer.decode(row) for row in rows]


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    root = tmp_path / "in"
    (root / "b" / "deep").mkdir(parents=True)
    (root / ".hidden").mkdir()
    (root / "a.txt").write_text("first é\n")
    (root / "b" / "code.py").write_text("print(1)\n")
    (root / "b" / "deep" / "more.txt").write_text("deep")
    lines = [{"text": "one\nline", "other": 1}, {"text": ""}, {"text": "zwei"}]
    (root / "c.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    (root / "d.txt").write_text("")
    (root / "picture.png").write_bytes(b"\x89PNG\0\0")
    (root / ".hidden" / "x.txt").write_text("unseen")
    return root


TEXT = ["first é\n", "print(1)\n", "deep", "one\nline", "", "zwei", ""]


def test_all_kinds_of_input_in_order(inputs: Path, tmp_path: Path) -> None:
    report = build([inputs], tmp_path / "out", "bytes", progress=False)
    assert as_text(documents(tmp_path / "out")) == TEXT
    assert (report.documents, report.files, report.skipped, report.replaced) == (7, 5, 1, 0)
    assert report.tokens == sum(len(t.encode()) + 1 for t in TEXT if t)
    assert report.bytes == sum(p.stat().st_size for p in inputs.rglob("*.*")
                               if p.suffix in (".txt", ".py", ".jsonl") and ".hidden" not in str(p))
    assert report.seconds > 0
    build([inputs / "c.jsonl", inputs / "a.txt"], tmp_path / "two", "bytes", progress=False, append_eod=False)
    two = [bytes(row).decode() for row in documents(tmp_path / "two")]
    assert two == ["one\nline", "", "zwei", "first é\n"]


def test_same_files_for_any_number_of_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta\n", "\n\n", "epsilon\n  "]
    texts = [" ".join(words[i] for i in rng.integers(0, 6, n)) for n in rng.integers(1, 400, 120)]
    for k in range(3):
        lines = [json.dumps({"t": text}) + "\n" for text in texts[40 * k:40 * k + 40]]
        (tmp_path / f"{k}.jsonl").write_text("".join(lines))
    (tmp_path / "long.txt").write_text("\n".join(texts))
    train_bpe(texts, 400, tmp_path / "tokenizer.json")
    monkeypatch.setattr(pieces, "PIECE", 10_000)  # many work items; workers get their limits from here
    inputs = [tmp_path / f"{k}.jsonl" for k in (2, 0, 1)] + [tmp_path / "long.txt"]
    for workers in (1, 2):
        build(inputs, tmp_path / f"out{workers}", tmp_path / "tokenizer.json", "t", workers=workers,
              progress=False)
    for ending in ("bin", "idx"):
        assert (tmp_path / f"out1.{ending}").read_bytes() == (tmp_path / f"out2.{ending}").read_bytes()
    tokenizer = load(tmp_path / "tokenizer.json")
    expected = [texts[i] for k in (2, 0, 1) for i in range(40 * k, 40 * k + 40)] + ["\n".join(texts)]
    assert documents(tmp_path / "out1") == [[*tokenizer.encode(text), 0] for text in expected]


@pytest.mark.parametrize("data", [
    b"word and\nmore words\n" * 300, b"no line ends at all " * 300, b"windows\r\n" * 700,
    "漢字かな".encode() * 500, b"\n" * 6000, "é\n".encode() * 2000, b"x" * 5999 + b"\n",
])
def test_long_documents_lose_nothing_at_the_cuts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                 data: bytes) -> None:
    monkeypatch.setattr(pieces, "PIECE", 1000)
    monkeypatch.setattr(pieces, "_WINDOW", 64)
    (tmp_path / "a.txt").write_bytes(data)
    (tmp_path / "b.txt").write_bytes(b"end")
    items = list(pieces.work_items([tmp_path / "a.txt", tmp_path / "b.txt"]))
    assert len(items) > 2
    assert max(p.stop - p.start for item in items for p in item) <= 2128
    report = build([tmp_path / "a.txt", tmp_path / "b.txt"], tmp_path / "out", "bytes", progress=False)
    assert documents(tmp_path / "out") == [[*data, 256], [*b"end", 256]]
    assert report.replaced == 0


def test_best_place_to_cut_is_seen_across_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE", 1000)
    monkeypatch.setattr(pieces, "_WINDOW", 64)
    for good in (1001, 1062, 1063, 1064, 1500):
        data = bytearray(b"x" * 5000)
        data[1005:1007] = b" \n"  # a worse place
        data[good:good + 1] = b"\n"
        (tmp_path / "a.txt").write_bytes(data)
        assert next(pieces.work_items([tmp_path / "a.txt"]))[0].stop == good + 1


def test_json_lines_are_never_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE", 100)
    monkeypatch.setattr(pieces, "_WINDOW", 16)
    texts = ["x" * n for n in (5, 700, 3, 90, 250, 1, 1, 1)] * 5
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    build([tmp_path / "a.jsonl"], tmp_path / "out", "bytes", progress=False)
    assert as_text(documents(tmp_path / "out")) == texts


def test_invalid_characters_are_replaced_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfbad \xff\xfe end \xef\xbf\xbd")
    lines = [b'{"text": "half \\ud83d of"}', b'{"text": "raw \xff"}', b'{"text": "\\ud83d\\ude42"}']
    (tmp_path / "b.jsonl").write_bytes(b"\n".join(lines))
    report = build([tmp_path], tmp_path / "out", "bytes", progress=False)
    texts = as_text(documents(tmp_path / "out"))
    assert texts == ["bad \ufffd\ufffd end \ufffd", "half \ufffd of", "raw \ufffd", "🙂"]
    assert report.replaced == 4


@pytest.mark.parametrize(("line", "message", "workers"), [
    ('{"text": 3}', '"text" holds a int', 1), ('{"body": "x"}', """no "text" in it, only 'body'""", 1),
    ("[1]", "only a list", 1), ('{"text": ', "not valid JSON", 1), ("{}", "only nothing", 1),
    ("[1]", "only a list", 2),
])
def test_bad_lines_are_named(tmp_path: Path, line: str, message: str, workers: int) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n\n' + line + '\n{"text": "fine"}\n')
    with pytest.raises(UserError, match=f"a.jsonl, line 3: .*{message}"):
        build([tmp_path / "a.jsonl"], tmp_path / "out", "bytes", workers=workers, progress=False)
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_bad_line_far_into_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE", 100)
    fine = '{"text": "fine"}\n' * 40
    (tmp_path / "a.jsonl").write_text("\ufeff" + fine + "[]\n" + fine)
    with pytest.raises(UserError, match="a.jsonl, line 41: "):
        build([tmp_path / "a.jsonl"], tmp_path / "out", "bytes", progress=False)


def test_existing_output_is_kept_unless_told(inputs: Path, tmp_path: Path) -> None:
    build([inputs / "a.txt"], tmp_path / "out", "bytes", progress=False)
    before = (tmp_path / "out.bin").read_bytes()
    with pytest.raises(UserError, match="exist already"):
        build([inputs], tmp_path / "out", "bytes", progress=False)
    assert (tmp_path / "out.bin").read_bytes() == before
    build([inputs], tmp_path / "out", "bytes", progress=False, overwrite=True)
    assert as_text(documents(tmp_path / "out")) == TEXT


def test_failure_midway_leaves_no_output(inputs: Path, tmp_path: Path,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    build([inputs / "a.txt"], tmp_path / "old", "bytes", progress=False)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("old.*")}
    writes = []

    def extend(self: IndexedWriter, tokens: list[int]) -> None:
        writes.append(tokens)
        if len(writes) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(IndexedWriter, "extend", extend)
    for name in ("new", "old"):
        writes.clear()
        with pytest.raises(KeyboardInterrupt):
            build([inputs], tmp_path / name, "bytes", progress=False, overwrite=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def die(item: list[pieces.Piece]) -> None:
    os._exit(1)


def test_dead_worker_is_reported(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_module, "_encode", die)
    with pytest.raises(UserError, match="one of 2 worker processes died"):
        build([inputs], tmp_path / "out", "bytes", workers=2, progress=False)
    assert not list(tmp_path.glob("out*"))


def test_refusals(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.jsonl").write_text("\n\n")
    cases: list[tuple[list[Path], str]] = [
        ([tmp_path / "empty"], "no text files"), ([], "empty list of inputs"),
        ([tmp_path / "none"], "does not exist"), ([inputs / "picture.png"], "not text"),
        ([tmp_path / "blank.jsonl"], "0 documents and no tokens"),
        ([inputs / "d.txt"], "1 documents and no tokens"),
    ]
    for given, message in cases:
        with pytest.raises(UserError, match=message):
            build(given, tmp_path / "out", "bytes", progress=False)
    with pytest.raises(UserError, match="0 workers"):
        build([inputs], tmp_path / "out", "bytes", workers=0)
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "t.json"))
    with pytest.raises(UserError, match="which token ends a document"):
        build([inputs], tmp_path / "out", tmp_path / "t.json")
    assert not list(tmp_path.glob("out*"))


def test_progress_goes_to_standard_error(inputs: Path, tmp_path: Path,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    build([inputs], tmp_path / "out", "bytes")
    out, err = capsys.readouterr()
    assert out == ""
    assert "tokenizing" in err
    assert "7 documents" in err
