"""`megapt data` as typed: inspect, verify, merge, split, convert."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from megapt.commands.data import app
from megapt.data.indexed import IndexedReader, IndexedWriter
from megapt.errors import UserError

TEXTS = ["Hello, [bold]world[/bold]!", "", "Second."]


def run(*words: Any) -> Result:
    """UserErrors pass through, as they do up to the entry point."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    if isinstance(result.exception, UserError):
        raise result.exception
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    with IndexedWriter(tmp_path / "d", "u2") as writer:
        for text in TEXTS:
            writer.add_document([*text.encode(), 256] if text else [])
    return tmp_path / "d"


def test_inspect_prints_figures_and_text(prefix: Path) -> None:
    printed = run("inspect", prefix, "--tokenizer", "bytes").output
    assert TEXTS[0] in printed
    for words in ("documents", "uint16", "first tokens", "72 101 108", IndexedReader(prefix).fingerprint(), "27 of 27"):
        assert words in printed
    printed = run("inspect", prefix, "--tokenizer", "bytes", "--document", 2, "--limit", 5).output
    assert "5 of 8 tokens:\nSecon" in printed


def test_inspect_as_json(prefix: Path) -> None:
    found = json.loads(run("inspect", prefix, "--json", "--tokenizer", "bytes", "--document", 2).output)
    assert found["document"] == {"number": 2, "tokens": 8, "shown": 8, "text": "Second."}
    assert (found["documents"], found["sequences"], found["tokens"], found["dtype"]) == (3, 2, 35, "uint16")
    assert found["bytes"] == {"bin": 70, "idx": 34 + 12 * 2 + 8 * 4} and found["packed"]
    assert found["lengths"] == {"sampled": None, "mean": 17.5, "min": 8, "5%": 8, "25%": 8, "50%": 8, "75%": 27,
                                "95%": 27, "max": 27}


def test_inspect_samples_lengths_of_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megapt.data import describe

    monkeypatch.setattr(describe, "READ_ALL", 99)
    monkeypatch.setattr(describe, "_RANGE", 1)
    with IndexedWriter(tmp_path / "d", "u2") as writer:
        for length in range(1, 102):
            writer.add_document([0] * length)
    lengths = json.loads(run("inspect", tmp_path / "d", "--json").output)["lengths"]
    assert (lengths["sampled"], lengths["mean"], lengths["min"], lengths["max"]) == (64, 51, 1, 101)
    assert abs(lengths["50%"] - 51) <= 1
    assert "of 64 sampled sequences" in " ".join(run("inspect", tmp_path / "d").output.split()).replace("│ │ ", "")


def test_inspect_refuses_what_is_not_there(prefix: Path) -> None:
    with pytest.raises(UserError, match="has no document 3; it has 3"):
        run("inspect", prefix, "--tokenizer", "bytes", "--document", 3)
    with IndexedWriter(prefix, "u2") as writer:
        writer.add_document([300])
    with pytest.raises(UserError, match="300 to 300, but bytes has ids below 257"):
        run("inspect", prefix, "--tokenizer", "bytes")
    with pytest.raises(UserError, match="nothing.idx does not exist"):
        run("inspect", f"{prefix}/nothing")


def test_verify_says_sound_or_damaged_by_exit_status(prefix: Path) -> None:
    sound = run("verify", prefix, "--vocabulary", 257)
    assert sound.exit_code == 0 and "is sound: 3 documents, 2 sequences, 35 tokens" in sound.output
    damaged = run("verify", prefix, "--vocabulary", 256)
    assert damaged.exit_code == 1 and "2 x token id outside the vocabulary of 256: token 26 (byte 52)" in damaged.output
    Path(f"{prefix}.bin").write_bytes(b"123")
    assert run("verify", prefix).exit_code == 1
    found = json.loads(run("verify", prefix, "--json").output)
    assert {finding["kind"] for finding in found["findings"]} == {"torn token", "out of range"}


def test_verify_writes_and_compares_hashes(prefix: Path) -> None:
    assert "as written down" not in run("verify", prefix, "--full").output
    run("verify", prefix, "--write-hash")
    assert subprocess.run(["sha256sum", "--check", "d.sha256"], cwd=prefix.parent, capture_output=True).returncode == 0
    assert "as written down" in run("verify", prefix, "--full").output
    with open(f"{prefix}.bin", "r+b") as file:
        file.write(b"J")
    assert run("verify", prefix).exit_code == 0
    changed = run("verify", prefix, "--full")
    assert changed.exit_code == 1 and "1 x hash: the .bin has SHA-256" in changed.output
    Path(f"{prefix}.bin").write_bytes(b"12")
    before = Path(f"{prefix}.sha256").read_bytes()
    assert run("verify", prefix, "--write-hash").exit_code == 1
    assert Path(f"{prefix}.sha256").read_bytes() == before  # a damaged pair gets no hash


def test_split_and_merge(prefix: Path) -> None:
    printed = run("split", prefix, "--shares", "2,1", "--names", "train,valid").output
    assert f"{prefix}_train.bin, {prefix}_train.idx: 2 documents, 1 sequences, 27 tokens of uint16" in printed
    run("merge", f"{prefix}2", f"{prefix}_train", f"{prefix}_valid")
    for ending in ("bin", "idx"):
        assert Path(f"{prefix}2.{ending}").read_bytes() == Path(f"{prefix}.{ending}").read_bytes()
    run("split", prefix, "--parts", 3, "--output", prefix.parent / "new" / "part")
    assert [IndexedReader(prefix.parent / "new" / f"part_{i}").num_tokens for i in range(3)] == [27, 0, 8]
    with pytest.raises(UserError, match="exist already"):
        run("split", prefix, "--shares", "2,1", "--names", "train,valid")
    run("split", prefix, "--shares", "2,1", "--names", "train,valid", "--overwrite")
    for words, message in ((["--parts", 2, "--shares", "1,1"], "either --parts, or --shares"), ([], "either --parts"),
                           (["--shares", "1,x"], 'not "1,x"'), (["--parts", 2, "--names", "a"], "name of its own")):
        with pytest.raises(UserError, match=message):
            run("split", prefix, *words)


def test_convert(prefix: Path) -> None:
    folder = prefix.parent
    assert "tokens of int32" in run("convert", prefix, folder / "wide", "--to-dtype", "int32").output
    run("convert", folder / "wide", folder / "stream.bin", "--to", "raw", "--to-dtype", "uint16")
    assert (folder / "stream.bin").read_bytes() == Path(f"{prefix}.bin").read_bytes()
    run("convert", folder / "stream.bin", folder / "back", "--from", "raw", "--dtype", "uint16", "--eod", 256)
    back = IndexedReader(folder / "back")
    assert (back.num_documents, back.lengths.tolist()) == (2, [27, 8])
    run("convert", prefix, folder / "array.npy", "--to", "npy")
    assert np.load(folder / "array.npy").dtype == np.uint16
    run("convert", folder / "array.npy", folder / "again", "--from", "npy", "--eod", 256)
    assert (folder / "again.idx").read_bytes() == (folder / "back.idx").read_bytes()
    for words, message in (
        ([prefix, folder / "x"], "--to-dtype says the type"),
        ([prefix, folder / "x", "--dtype", "uint16"], "--dtype and"),
        ([prefix, folder / "x", "--from", "raw", "--to", "npy"], "must be a pair"),
        ([folder / "stream.bin", folder / "x", "--from", "raw"], "does not say its type"),
        ([folder / "none", folder / "x", "--from", "raw", "--dtype", "uint16"], "none does not exist"),
        ([prefix, folder / "x", "--to-dtype", "float32"], "never of type float32"),
    ):
        with pytest.raises(UserError, match=message):
            run("convert", *words)
