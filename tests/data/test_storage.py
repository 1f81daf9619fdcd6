"""Local files that change under a reader, and copies that keep holes."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megapt.data.indexed import IndexedReader, IndexedWriter
from megapt.data.storage import LocalFile, sha256
from megapt.errors import UserError


def pair(prefix: Path, count: int = 3000) -> IndexedReader:
    with IndexedWriter(prefix, "u2") as writer:
        for start in range(0, count, 1000):
            writer.add_document(np.arange(start, start + 1000) % 65536)
    return IndexedReader(prefix)


def cut(path: Path) -> None:
    os.truncate(path, 10)


def grow(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"more")


def edit(path: Path) -> None:
    with open(path, "r+b") as file:
        file.write(b"\xff")
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))  # as a clock fine enough would have it


@pytest.mark.parametrize("change", [cut, grow, edit])
@pytest.mark.parametrize("ending", ["bin", "idx"])
def test_a_file_changed_in_place_is_noticed(tmp_path: Path, change: Callable[[Path], None], ending: str) -> None:
    reader = pair(tmp_path / "d")
    assert reader.tokens(1500, 2).tolist() == [1500, 1501]
    path = tmp_path / f"d.{ending}"
    change(path)
    calls: list[Callable[[], object]] = [reader.check_unchanged, lambda: reader.sequence(2), reader.verify]
    if ending == "bin":
        calls += [lambda: reader.tokens(2000, 5), lambda: list(reader.bin.stream(0, reader.bin.size))]
    else:
        calls += [lambda: reader.token_range(0, 2), lambda: reader.document(1), lambda: reader.document_at(1),
                  lambda: reader.sequence_at(5), lambda: list(reader.entries(0, 3))]
    for call in calls:
        with pytest.raises(UserError, match=f"d.{ending} changed while it was in use"):
            call()


def test_a_file_cut_short_ends_no_process(tmp_path: Path) -> None:
    """A touched page beyond the end would be SIGBUS, so the reader lives in a process of its own."""
    pair(tmp_path / "d", 200_000)
    program = ("import os, sys\n"
               "from megapt.data.indexed import IndexedReader\n"
               "from megapt.errors import UserError\n"
               "reader = IndexedReader(sys.argv[1])\n"
               "os.truncate(sys.argv[1] + '.bin', 100)\n"
               "try:\n"
               "    reader.tokens(150_000, 4097).sum()\n"
               "except UserError as error:\n"
               "    print(error)\n")
    found = subprocess.run([sys.executable, "-c", program, str(tmp_path / "d")], capture_output=True, text=True,
                           check=True)
    assert "d.bin changed while it was in use: it has 100 bytes, but had 400000" in found.stdout


def test_a_file_that_another_was_renamed_over_reads_on(tmp_path: Path) -> None:
    reader, other = pair(tmp_path / "d"), pair(tmp_path / "other", 1000)
    os.replace(other.bin.name, reader.bin.name)
    os.unlink(reader.idx.name)
    assert reader.tokens(2990, 10).tolist() == list(range(2990, 3000))
    assert reader.sequence(2).tolist() == list(range(2000, 3000))
    reader.verify()


def test_what_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing does not exist"):
        LocalFile(tmp_path / "nothing")
    with pytest.raises(UserError, match="is not a file"):
        LocalFile(tmp_path)


def test_a_stream_goes_past_the_map_in_pieces(tmp_path: Path) -> None:
    data = np.random.default_rng(0).integers(0, 256, 10_007, np.uint8).tobytes()
    (tmp_path / "f").write_bytes(data)
    file = LocalFile(tmp_path / "f")
    for start, stop, piece in [(0, 10_007, 1000), (3, 9999, 7000), (5, 5, 10), (0, 10_007, 1 << 20)]:
        pieces = [bytes(part) for part in file.stream(start, stop, piece)]
        assert b"".join(pieces) == data[start:stop] and all(len(part) == piece for part in pieces[:-1])


@pytest.mark.parametrize("copies", [True, False])
def test_a_copy_keeps_holes_and_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copies: bool) -> None:
    """8 MiB of which three pages are data; once as the system copies, once where it cannot."""
    if not copies:
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    with open(tmp_path / "from", "wb") as file:
        for at in (12_345, 2 << 20, 5 << 20):
            file.seek(at)
            file.write(os.urandom(4096))
        file.truncate(8 << 20)
    told: list[int] = []
    with open(tmp_path / "to", "w+b") as target:
        target.write(b"abc")
        LocalFile(tmp_path / "from").copy_to(target, 1000, 8 << 20, told.append)
        target.write(b"xyz")
    assert sum(told) == (8 << 20) - 1000
    copied, original = (tmp_path / "to").read_bytes(), (tmp_path / "from").read_bytes()
    assert copied == b"abc" + original[1000:] + b"xyz"
    if (tmp_path / "from").stat().st_blocks * 512 < 1 << 20:  # the file system has holes
        assert (tmp_path / "to").stat().st_blocks * 512 < 1 << 20
    assert sha256(LocalFile(tmp_path / "to")) == hashlib.sha256(copied).hexdigest()
