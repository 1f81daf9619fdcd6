from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megapt.data import encode, pieces
from megapt.data.build import build
from megapt.data.build_state import WorkingFolder
from megapt.data.indexed import IndexedReader
from megapt.data.statistics import LengthCounts
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


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Drawing is the slowest part of a small build, and tested by itself."""
    if "picture" not in request.node.name and "names" not in request.node.name:
        monkeypatch.setattr(LengthCounts, "picture", lambda self, title: b"picture")


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
    assert (report.documents, report.files, report.passed_over, report.replaced) == (7, 5, 1, 0)
    assert (report.sequences, report.skipped, report.duplicates, report.engine) == (5, 0, 0, "bytes")
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
    monkeypatch.setattr(pieces, "LINES", 5_000)
    inputs = [tmp_path / f"{k}.jsonl" for k in (2, 0, 1)] + [tmp_path / "long.txt"]
    for workers in (1, 2):
        build(inputs, tmp_path / f"out{workers}", tmp_path / "tokenizer.json", "t", workers=workers,
              progress=False)
    assert encode._may_fork() or "torch" in sys.modules
    monkeypatch.setattr(encode, "_may_fork", lambda: False)  # workers that start afresh
    build(inputs, tmp_path / "out3", tmp_path / "tokenizer.json", "t", workers=2, progress=False)
    for ending in ("bin", "idx"):
        assert len({(tmp_path / f"out{k}.{ending}").read_bytes() for k in (1, 2, 3)}) == 1
    tokenizer = load(tmp_path / "tokenizer.json")
    expected = [texts[i] for k in (2, 0, 1) for i in range(40 * k, 40 * k + 40)] + ["\n".join(texts)]
    assert documents(tmp_path / "out1") == [[*tokenizer.encode(text), 0] for text in expected]


def test_json_lines_are_never_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "LINES", 100)
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
    ("[1]", "only a list", 2), ('{"text": ' + "[" * 100_000, "nested too deep", 1),
])
def test_bad_lines_are_named(tmp_path: Path, line: str, message: str, workers: int) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n\n' + line + '\n{"text": "fine"}\n')
    with pytest.raises(UserError, match=f"a.jsonl, line 3: .*{message}"):
        build([tmp_path / "a.jsonl"], tmp_path / "out", "bytes", workers=workers, progress=False)
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_bad_line_far_into_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "LINES", 100)
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


def test_failure_midway_leaves_no_output(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build([inputs / "a.txt"], tmp_path / "old", "bytes", progress=False)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("old.*")}
    assert len(before) == 4

    def append(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(WorkingFolder, "append", append)
    for name in ("new", "old"):
        with pytest.raises(KeyboardInterrupt):
            build([inputs], tmp_path / name, "bytes", progress=False, overwrite=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    assert not list(tmp_path.glob("*.building"))


def die(item: pieces.WorkItem) -> None:
    os._exit(1)


def test_dead_worker_is_reported(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "_encode", die)
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
        ([inputs / "d.txt"], "1 documents and no tokens"), ([Path("-"), Path("-")], "only once"),
        ([Path("/dev/null")], "neither a file nor a folder"),
    ]
    for given, message in cases:
        with pytest.raises(UserError, match=message):
            build(given, tmp_path / "out", "bytes", progress=False)
    with pytest.raises(UserError, match="empty name"):
        build([""], tmp_path / "out", "bytes")
    for output in ("", ".", f"{tmp_path}/", f"{tmp_path}/.."):
        with pytest.raises(UserError, match="names no file"):
            build([inputs], output, "bytes")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file.*(Not a directory|File exists)"):
        build([inputs], tmp_path / "file" / "out", "bytes", progress=False)
    for workers in (0, 10**6):
        with pytest.raises(UserError, match=f"{workers} workers are not possible on a machine of .* 1 to "):
            build([inputs], tmp_path / "out", "bytes", workers=workers)
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


def test_output_in_a_new_folder(inputs: Path, tmp_path: Path) -> None:
    build([inputs / "a.txt"], tmp_path / "deep" / "er" / "out", "bytes", progress=False)
    assert sorted(path.name for path in (tmp_path / "deep" / "er").iterdir()) == [
        "out.bin", "out.idx", "out.lengths.png", "out.report.json"]


def test_what_builds_wrote_is_no_input(inputs: Path, tmp_path: Path) -> None:
    build([inputs], tmp_path / "out", "bytes", progress=False)
    assert build([inputs], inputs / "out", "bytes", progress=False).passed_over == 1
    (inputs / "out.sha256").write_text("digest")
    (inputs / "other.building").mkdir()
    (inputs / "other.building" / "manifest.json").write_text("{}")
    (inputs / "my.report.json").write_text("mine")  # without a pair beside it
    report = build([inputs], inputs / "again", "bytes", progress=False)
    assert (report.files, report.passed_over) == (6, 6)
    assert as_text(documents(inputs / "again")) == [*TEXT, "mine"]


def test_names_that_are_no_text(inputs: Path, tmp_path: Path) -> None:
    """The picture of lengths has the output's name as its title."""
    name = os.fsdecode(b"o\xff$u$_$")
    build([inputs], tmp_path / name, "bytes", progress=False)
    assert (tmp_path / f"{name}.lengths.png").read_bytes().startswith(b"\x89PNG")


def test_unreadable_files_are_named(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, *rest: Any, **more: Any) -> Any:
        if str(path).endswith("a.txt"):
            raise PermissionError(13, "Permission denied", str(path))
        return open(path, *rest, **more)

    monkeypatch.setattr(pieces, "open", refuse, raising=False)
    with pytest.raises(UserError, match="a.txt: Permission denied$"):
        build([inputs], tmp_path / "out", "bytes", progress=False)


def test_an_input_that_changes_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    append = WorkingFolder.append
    for change, message in [(lambda: path.write_text('{"text": "other"}\n' * 2), r"changed.*from 18 to 36 bytes"),
                            (lambda: os.utime(path, ns=(1, 1)), "was written to"), (path.unlink, "was removed")]:
        path.write_text('{"text": "first"}\n')

        def and_change(*arguments: Any, change: Any = change) -> None:
            append(*arguments)
            change()

        monkeypatch.setattr(WorkingFolder, "append", and_change)
        with pytest.raises(UserError, match=f"a.jsonl {message}"):
            build([path], tmp_path / "out", "bytes", progress=False)
        assert not list(tmp_path.glob("out*"))


def test_invalid_text_by_choice(tmp_path: Path) -> None:
    lines = [b'{"text": "one"}', b'{"text": "two \xff"}', b'{"text": "\\udc00"}', b'{"text": "four"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "b.txt").write_bytes(b"five \xff\xfe")
    report = build([tmp_path], tmp_path / "out", "bytes", progress=False, invalid="skip")
    assert as_text(documents(tmp_path / "out")) == ["one", "four"]
    assert (report.skipped, report.replaced, report.documents) == (3, 0, 2)
    with pytest.raises(UserError, match=r"a.jsonl, line 2: not valid UTF-8 \(1 bad"):
        build([tmp_path], tmp_path / "new", "bytes", progress=False, invalid="fail")
    with pytest.raises(UserError, match=r"b.txt is not valid UTF-8 \(2 bad"):
        build([tmp_path / "b.txt"], tmp_path / "new", "bytes", progress=False, invalid="fail")
    assert not list(tmp_path.glob("new*"))


def test_duplicates_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(0)
    texts = [f"text {chance.randrange(60)} " * chance.randrange(1, 3) for _ in range(400)] + ["", ""]
    for k in range(2):
        lines = [json.dumps({"text": text}) + "\n" for text in texts[k::2]]
        (tmp_path / f"{k}.jsonl").write_text("".join(lines))
    # The same long document as text, as a line of JSON, and, once more, changed in its last byte.
    long = "".join(f"line {i} of a long one\n" for i in range(400))
    (tmp_path / "2.txt").write_text(long)
    lines = [json.dumps({"text": text}) + "\n" for text in ("x", long, "y", long + "!")]
    (tmp_path / "3.jsonl").write_text("".join(lines))
    (tmp_path / "4.txt").write_text(long)
    (tmp_path / "5.txt").write_text(long + "!")
    (tmp_path / "6.txt").write_text("the end")
    monkeypatch.setattr(pieces, "LINES", 500)
    monkeypatch.setattr(pieces, "PIECE", 1000)
    expected = list(dict.fromkeys([*texts[0::2], *texts[1::2], long, "x", "y", long + "!", "the end"]))
    for workers in (1, 2):
        report = build(sorted(tmp_path.glob("[0-9].*")), tmp_path / f"out{workers}", "bytes", progress=False,
                       dedup="exact", workers=workers)
        assert as_text(documents(tmp_path / f"out{workers}")) == expected
        assert report.duplicates == 402 + 8 - len(expected)
    plain = build([tmp_path / "2.txt", tmp_path / "4.txt"], tmp_path / "plain", "bytes", progress=False)
    assert (plain.documents, plain.duplicates) == (2, 0)


def test_skipped_long_document_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE", 1000)
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "b.txt").write_bytes(b"good line\n" * 500 + b"bad \xff line\n" + b"good line\n" * 500)
    (tmp_path / "c.txt").write_text("last")
    for invalid, expected in (("skip", ["first", "last"]), ("replace", None)):
        report = build([tmp_path / f"{k}.txt" for k in "abc"], tmp_path / invalid, "bytes", progress=False,
                       invalid=invalid)  # type: ignore[arg-type]
        assert expected is None or as_text(documents(tmp_path / invalid)) == expected
        assert (report.skipped, report.replaced) == ((1, 0) if invalid == "skip" else (0, 1))


@pytest.mark.parametrize("append_eod", [True, False])
def test_sentences_are_sequences(tmp_path: Path, append_eod: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["One. Two! Three?", "", "Alone", " \n", "A line\nAnother. And more"]
    sentences = [["One.", " Two!", " Three?"], [], ["Alone"], [" \n"], ["A line\n", "Another.", " And more"]]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    long = "This is one. This is two.\n" * 200  # cut between lines, and so between sentences
    (tmp_path / "b.txt").write_text(long)
    monkeypatch.setattr(pieces, "PIECE", 1000)
    report = build([tmp_path / "a.jsonl", tmp_path / "b.txt"], tmp_path / "out", "bytes", append_eod=append_eod,
                   progress=False, split_sentences=True)
    sentences.append(["This is one.", " This is two.\n"] * 200)
    reader = IndexedReader(tmp_path / "out")
    reader.verify()
    found = [reader.sequence(i).tolist() for i in range(reader.num_sequences)]
    expected = [list(sentence.encode()) + [256] * (append_eod and sentence is document[-1] and k == len(document) - 1)
                for document in sentences for k, sentence in enumerate(document)]
    assert found == expected
    assert reader.document_boundaries.tolist() == np.cumsum([0, *map(len, sentences)]).tolist()
    assert report.sequences == len(expected)


def test_report_and_picture(inputs: Path, tmp_path: Path) -> None:
    report = build([inputs], tmp_path / "out", "bytes", progress=False)
    written = json.loads((tmp_path / "out.report.json").read_text())
    assert (written["documents"], written["tokens"], written["sequences"]) == (7, report.tokens, 5)
    assert written["bytes_per_token"] == report.bytes / report.tokens
    lengths = sorted(len(text.encode()) + 1 if text else 0 for text in TEXT)
    assert written["document_length_quantiles"] == {
        "0": lengths[0], "0.01": lengths[0], "0.05": lengths[0], "0.25": lengths[1], "0.5": lengths[3],
        "0.75": lengths[4], "0.95": lengths[5], "0.99": lengths[5], "1": lengths[6]}
    assert written["tokenizer"] == {"path": "bytes", "sha256": load("bytes").fingerprint(), "vocabulary": 257,
                                    "eod": 256}
    names = [Path(entry["path"]).name for entry in written["inputs"]]
    assert names == ["a.txt", "code.py", "more.txt", "c.jsonl", "d.txt"]
    assert written["options"] == {"text_key": "text", "append_eod": True, "split_sentences": False,
                                  "invalid": "replace", "dedup": None}
    picture = (tmp_path / "out.lengths.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 5000
