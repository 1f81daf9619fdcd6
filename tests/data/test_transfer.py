from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megapt.data import indexed, transfer
from megapt.data.indexed import IndexedReader, IndexedWriter
from megapt.data.pair_writer import PairWriter
from megapt.data.transfer import convert, merge, split
from megapt.errors import UserError

Documents = list[list[list[int]]]  # documents of sequences of tokens


def write(prefix: Path, documents: Documents, dtype: str = "i4") -> None:
    with PairWriter(prefix, dtype) as writer:
        for document in documents:
            writer.write(np.array([token for sequence in document for token in sequence], np.int64))
            writer.add_sequences(np.array([len(sequence) for sequence in document], np.int64))
            writer.add_boundaries(np.array([writer.num_sequences]))
        writer.finish()
        writer.commit()


def read(prefix: Path) -> Documents:
    reader = IndexedReader(prefix)
    reader.verify()
    return [[reader.sequence(i).tolist() for i in range(*reader.document(d))] for d in range(reader.num_documents)]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


CORPORA = st.lists(st.lists(st.lists(st.lists(st.integers(-2**31, 2**31 - 1), max_size=3), max_size=3), max_size=6),
                   min_size=1, max_size=4)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(corpora=CORPORA, block=st.integers(1, 4))
def test_merged_and_split_again(tmp_path_factory: pytest.TempPathFactory, corpora: list[Documents], block: int) -> None:
    """Whatever the blocks in which the index goes by."""
    folder = tmp_path_factory.mktemp("m")
    for i, documents in enumerate(corpora):
        write(folder / f"in{i}", documents)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(indexed, "_CHUNK", block)
        patch.setattr(transfer, "_CHUNK", block)
        merge([folder / f"in{i}" for i in range(len(corpora))], folder / "all")
        assert read(folder / "all") == [document for documents in corpora for document in documents]
        sizes = [len(documents) for documents in corpora]
        if min(sizes):
            split(folder / "all", [folder / f"out{i}" for i in range(len(sizes))], sizes)
            for i in range(len(sizes)):
                for ending in ("bin", "idx"):
                    assert (folder / f"out{i}.{ending}").read_bytes() == (folder / f"in{i}.{ending}").read_bytes()


def test_shares_round_to_documents_and_cover_them(tmp_path: Path) -> None:
    documents = [[[i]] for i in range(11)]
    write(tmp_path / "d", documents)
    names = [tmp_path / name for name in ("a", "b", "c")]
    parts = split(tmp_path / "d", names, [0.8, 0.1, 0.1])
    assert [part.num_documents for part in parts] == [9, 1, 1]
    assert [document for name in names for document in read(name)] == documents
    told: list[int] = []
    split(tmp_path / "d", names, [1, 1, 1], overwrite=True, progress=told.append)
    assert [len(read(name)) for name in names] == [4, 3, 4] and sum(told) == 44


def test_an_order_of_its_own_becomes_that_of_the_file(tmp_path: Path) -> None:
    """Sequences listed backwards, or only some of them, come out in the index's order."""
    write(tmp_path / "d", [[[1, 2]], [[3, 4], [5, 6]]])
    path = tmp_path / "d.idx"
    whole = bytearray(path.read_bytes())
    whole[34 + 12:34 + 36] = np.array([16, 8, 0], "<i8").tobytes()
    path.write_bytes(whole)
    assert not IndexedReader(tmp_path / "d").packed
    merged = merge([tmp_path / "d", tmp_path / "d"], tmp_path / "e")
    assert merged.packed and read(tmp_path / "e") == 2 * [[[5, 6]], [[3, 4], [1, 2]]]


def test_dtypes_change_where_the_tokens_fit(tmp_path: Path) -> None:
    documents = [[[1, 65535], []], [], [[7]]]
    write(tmp_path / "narrow", documents, "u2")
    assert convert(tmp_path / "narrow", tmp_path / "wide", "i4").dtype == np.int32
    assert read(tmp_path / "wide") == documents
    convert(tmp_path / "wide", tmp_path / "again", "u2")
    for ending in ("bin", "idx"):
        assert (tmp_path / f"again.{ending}").read_bytes() == (tmp_path / f"narrow.{ending}").read_bytes()
    before = files(tmp_path)
    with pytest.raises(UserError, match="token 1: id 65535 does not fit int16"):
        convert(tmp_path / "wide", tmp_path / "small", "i2")
    with pytest.raises(UserError, match="only pairs of one dtype can be merged, not .*narrow uint16, .*wide int32"):
        merge([tmp_path / "narrow", tmp_path / "wide"], tmp_path / "both")
    assert files(tmp_path) == before


def test_outputs_are_not_replaced_and_never_inputs(tmp_path: Path) -> None:
    write(tmp_path / "a", [[[1]], [[2]]])
    write(tmp_path / "b", [[[3]]])
    os.symlink(tmp_path / "a.bin", tmp_path / "link.bin")
    os.link(tmp_path / "a.idx", tmp_path / "hard.idx")
    (tmp_path / "sub").mkdir()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises(UserError, match="b.bin, .*b.idx exist already"):
        merge([tmp_path / "a"], tmp_path / "b")
    for output in ("a", "link", "hard", "sub/../a"):
        with pytest.raises(UserError, match="is an input"):
            merge([tmp_path / "a", tmp_path / "b"], tmp_path / output, overwrite=True)
    with pytest.raises(UserError, match="is an input"):
        split(tmp_path / "a", [tmp_path / "c", tmp_path / "a"], [1, 1], overwrite=True)
    with pytest.raises(UserError, match="outputs are local"):
        merge([tmp_path / "a"], "s3://bucket/b")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    merge([tmp_path / "a"], tmp_path / "b", overwrite=True)
    assert read(tmp_path / "b") == [[[1]], [[2]]]


@pytest.mark.parametrize(("shares", "names", "message"), [
    ([1, 1, 1], "xyz", "x would hold none of the 1 documents"), ([1, -1], "xy", "above 0"), ([0, 1], "xy", "above 0"),
    ([float("nan"), 1], "xy", "above 0"), ([1, 1], "xx", "name of its own"), ([1, 1], "xyz", "name of its own"),
])
def test_splits_that_cannot_be(tmp_path: Path, shares: list[float], names: str, message: str) -> None:
    write(tmp_path / "d", [[[1]]])
    with pytest.raises(UserError, match=message):
        split(tmp_path / "d", [tmp_path / name for name in names], shares)
    assert sorted(os.listdir(tmp_path)) == ["d.bin", "d.idx"]


@pytest.mark.parametrize(("at", "value"), [(34 + 4 * 3 + 8, 2**40), (34 + 12 * 3 + 8, 3), (34 + 12 * 3 + 16, -1)])
def test_damage_is_not_carried_on(tmp_path: Path, at: int, value: int) -> None:
    """An offset outside the file; boundaries that fall; and nothing is left behind."""
    write(tmp_path / "d", [[[1]], [[2]], [[3]]])
    path = tmp_path / "d.idx"
    whole = bytearray(path.read_bytes())
    whole[at:at + 8] = value.to_bytes(8, "little", signed=True)
    path.write_bytes(whole)
    for call in (lambda: merge([tmp_path / "d"], tmp_path / "e"),
                 lambda: split(tmp_path / "d", [tmp_path / "e", tmp_path / "f"], [2, 1])):
        with pytest.raises(UserError, match=r"d\.idx"):
            call()
    assert sorted(os.listdir(tmp_path)) == ["d.bin", "d.idx"]


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow beyond 64 KiB; the system says so as it says that a disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("dtype", ["i4", "i8"])  # copied by the system, and written by us
def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path, request: pytest.FixtureRequest, dtype: str) -> None:
    for name in "ab":
        write(tmp_path / name, [[[1] * 10_000]])
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    before = files(tmp_path)
    request.getfixturevalue("small_files")
    for call in (lambda: convert(tmp_path / "c", tmp_path / "d", dtype),
                 lambda: write(tmp_path / "d", [[[1] * 20_000]], dtype),
                 lambda: IndexedWriter(tmp_path / "d", dtype).__enter__().__exit__(
                     OSError, OSError(errno.ENOSPC, "No space left on device"), None)):
        with pytest.raises(UserError, match=r"d\.bin cannot be written: (File too large|No space left)"):
            call()
    assert files(tmp_path) == before


def test_parts_appear_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full in the last part: none of them is there."""
    write(tmp_path / "d", [[[1]], [[2]], [[3]]])
    finish, calls = PairWriter.finish, []

    def fail(self: PairWriter) -> None:
        calls.append(self)
        if len(calls) == 3:
            raise OSError("full")
        finish(self)

    monkeypatch.setattr(PairWriter, "finish", fail)
    with pytest.raises(OSError, match="full"):
        split(tmp_path / "d", [tmp_path / name for name in "abc"], [1, 1, 1])
    assert sorted(os.listdir(tmp_path)) == ["d.bin", "d.idx"]


def test_an_output_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    write(tmp_path / "d", [[[1, 2]]])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/out\.bin cannot be written: (Not a directory|File exists)"):
        merge([tmp_path / "d"], tmp_path / "file" / "out")
