from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megapt.data.dataset import TokenDataset
from megapt.data.indexed import IndexedReader, IndexedWriter
from megapt.data.packing import Boundaries, Pieces, best_fit, packed_index
from megapt.errors import UserError

SEQUENCE = 16


def write(prefix: Path, lengths: list[int]) -> Path:
    """Documents of these lengths; token i of the stream is i. Document ends cannot be seen from tokens."""
    at = 0
    with IndexedWriter(prefix, np.int32) as writer:
        for length in lengths:
            writer.add_document(range(at, at + length))
            at += length
    return prefix


def lengths_of(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(1, 40, count).tolist()


# Best fit


def slow_best_fit(lengths: list[int], room: int) -> list[int]:
    """Rooms left in the bins of best-fit decreasing, one piece at a time, ascending."""
    bins: list[int] = []
    for length in sorted(lengths, reverse=True):
        fits = [left for left in bins if left >= length]
        if fits:
            bins.remove(min(fits))
            bins.append(min(fits) - length)
        else:
            bins.append(room - length)
    return sorted(bins)


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 40).flatmap(lambda room: st.tuples(st.just(room), st.lists(st.integers(1, room), max_size=80))))
def test_best_fit_is_best_fit_decreasing(case: tuple[int, list[int]]) -> None:
    room, lengths = case
    bins, count = best_fit(np.array(lengths, np.int64), room)
    assert set(bins.tolist()) == set(range(count))
    loads = np.bincount(bins, lengths, count) if lengths else np.empty(0)
    assert sorted((room - loads).astype(int).tolist()) == slow_best_fit(lengths, room)


def test_best_fit_leaves_little_padding() -> None:
    lengths = np.minimum(np.random.default_rng(0).lognormal(5, 1, 50_000).astype(np.int64) + 1, 2048)
    _, count = best_fit(lengths, 2048)
    assert lengths.sum() / (count * 2048) > 0.999


# Boundaries


def test_boundaries_are_found_in_the_index(tmp_path: Path) -> None:
    lengths = lengths_of(300)
    reader = IndexedReader(write(tmp_path / "c", lengths))
    ends = np.cumsum(lengths)
    found = Boundaries(reader).locate(np.arange(reader.num_tokens))
    assert found.tolist() == np.searchsorted(ends, np.arange(reader.num_tokens), side="right").tolist()
    start = np.array([0, 5, int(ends[-1]) - 7])
    pieces = Boundaries(reader).cut(np.arange(3), start, np.array([100, 1, 7]))
    for row, first, length in ((0, 0, 100), (1, 5, 1), (2, int(ends[-1]) - 7, 7)):
        at = pieces.row == row
        inner = [int(e) for e in ends if first < e < first + length]
        assert (pieces.start[at]).tolist() == [first, *inner]
        assert (pieces.start[at] + pieces.length[at]).tolist() == [*inner, first + length]
        assert pieces.column[at].tolist() == [0, *(e - first for e in inner)]
        assert pieces.ends[at].tolist() == [True] * len(inner) + [first + length in ends]


def test_empty_sequences_are_passed_over(tmp_path: Path) -> None:
    import struct

    from megapt.data.index_format import Header

    lengths = np.array([0, 3, 0, 0, 4, 0], "<i4")
    offsets = (np.cumsum(lengths) - lengths).astype("<i8") * 2
    header = Header(np.dtype("<u2"), 6, 7).pack()
    (tmp_path / "c.idx").write_bytes(header + lengths.tobytes() + offsets.tobytes() + struct.pack("<7q", *range(7)))
    (tmp_path / "c.bin").write_bytes(np.arange(7, dtype="<u2").tobytes())
    reader = IndexedReader(tmp_path / "c")
    pieces = Boundaries(reader).cut(np.zeros(1, np.int64), np.array([1]), np.array([6]))
    assert (pieces.start.tolist(), pieces.length.tolist(), pieces.ends.tolist()) == ([1, 3], [2, 4], [True, True])
    index = packed_index(reader, (0, 6), 5, "document", None, tmp_path / "cache", say=lambda _: None)
    assert index.num_items == 2


def test_neighbouring_pieces_are_read_at_once() -> None:
    row, start = np.array([0, 0, 0, 1, 1]), np.array([4, 6, 30, 33, 34])
    length = np.array([2, 3, 3, 1, 2])
    pieces = Pieces.of(row, start, length, np.zeros(5, bool))
    assert pieces.column.tolist() == [0, 2, 5, 0, 1]
    assert list(pieces.runs()) == [(0, 0, 4, 5), (0, 5, 30, 3), (1, 0, 33, 3)]
    within = pieces.within(6)
    assert (within.row.tolist(), within.length.tolist()) == ([0, 0, 0, 1, 1], [2, 3, 1, 1, 2])
    assert list(Pieces.of(row[:0], start[:0], length[:0], np.zeros(0, bool)).runs()) == []


# The index


@pytest.mark.parametrize("packing", ["best_fit", "document"])
@pytest.mark.parametrize("split", ["train", "valid"])
def test_every_token_lies_in_one_sample_of_an_epoch(tmp_path: Path, packing: str, split: str) -> None:
    lengths = [*lengths_of(200), 100, 16, 17, 32, 33]
    prefix = write(tmp_path / "c", lengths)
    data = TokenDataset(prefix, split, "60,40", SEQUENCE, 3, packing=packing, cache=tmp_path / "cache")  # type: ignore[arg-type]
    total = data.num_samples_per_epoch
    ends = np.cumsum(lengths)
    low, high = data.first_token, data.first_token + data.num_tokens
    epochs = range(2) if split == "train" else range(1)
    orders = []
    for epoch in epochs:
        ids = np.arange(epoch * total, (epoch + 1) * total)
        pieces = data.pieces(ids)
        assert (pieces.length <= SEQUENCE + 1).all() and (pieces.column + pieces.length <= SEQUENCE + 1).all()
        # Inputs cover the split once; heads of longer documents show their last token as a label only.
        spans = zip(pieces.start.tolist(), pieces.length.tolist(), strict=True)
        read = np.concatenate([np.arange(start, start + min(length, SEQUENCE)) for start, length in spans])
        assert np.array_equal(np.sort(read), np.arange(low, high))
        # A document that fits is in one piece, and each piece lies in one document.
        whole = [n for n in lengths if n <= SEQUENCE]
        document = np.searchsorted(ends, pieces.start, side="right")
        assert np.array_equal(document, np.searchsorted(ends, pieces.start + pieces.length - 1, side="right"))
        assert np.bincount(document).max() > 1 and whole
        short = np.flatnonzero(np.bincount(document, minlength=len(lengths))[document] > 1)
        assert all(lengths[d] > SEQUENCE for d in document[short])
        closed = (pieces.length <= SEQUENCE) & np.isin(pieces.start + pieces.length, ends)
        assert np.array_equal(pieces.ends, closed)
        if packing == "document":
            assert len(pieces.row) == total
        tokens, labels = data.counts(ids)
        assert tokens.tolist() == np.bincount(pieces.row, np.minimum(pieces.length, SEQUENCE)).tolist()
        assert labels.sum() == pieces.length.sum() - len(pieces.length)
        orders.append(data.places(ids)[1].tolist())
    if split == "train":
        assert sorted(orders[0]) == sorted(orders[1]) and orders[0] != orders[1]
    else:
        with pytest.raises(IndexError, match=f"of {total} in"):
            data.sample(np.array([total]))


def test_best_fit_packs_well_and_is_kept(tmp_path: Path) -> None:
    reader = IndexedReader(write(tmp_path / "c", lengths_of(2000)))
    said: list[str] = []
    built = packed_index(reader, (0, 2000), 64, "best_fit", 1, tmp_path / "cache", said.append)
    assert said[0].startswith("packing 2,000 documents of ") and "packed 2,000 pieces into" in said[-1]
    assert reader.num_tokens / (built.num_items * 64) > 0.99
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*")}
    again = packed_index(reader, (0, 2000), 64, "best_fit", 1, tmp_path / "cache", said.append)
    assert len(said) == 2 and again.num_items == built.num_items
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.partial")} == {}
    assert all(p.stat().st_mtime_ns == t for p, t in before.items() if p.is_file() and p.suffix != ".lock")
    for other in ({"seed": 2}, {"sequence": 65}, {"sequences": (0, 1999)}, {"packing": "document"}):
        arguments = {"sequences": (0, 2000), "sequence": 64, "packing": "best_fit", "seed": 1} | other
        packed_index(reader, cache=tmp_path / "cache", say=said.append, **arguments)  # type: ignore[arg-type]
    assert len(said) == 10


def test_rebuilt_corpora_get_another_index(tmp_path: Path) -> None:
    counts = []
    for count in (50, 40):
        reader = IndexedReader(write(tmp_path / "c", lengths_of(count, seed=count)))
        index = packed_index(reader, (0, count), 16, "document", None, tmp_path / "cache", say=lambda _: None)
        counts.append(index.num_items)
    assert counts == [sum(-(-n // 16) for n in lengths_of(c, seed=c)) for c in (50, 40)]


def test_windows_and_ranks_that_build_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megapt.data.packing.WINDOW", 64)
    # As on a file system without locks: all build.
    monkeypatch.setattr("megapt.data.packing.fcntl.flock", lambda *_: (_ for _ in ()).throw(OSError("no locks")))
    reader = IndexedReader(write(tmp_path / "c", lengths_of(300)))
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(
            packed_index(reader, (0, 300), 16, "best_fit", 1, tmp_path / "cache", say=lambda _: None)))
        for _ in range(4)
    ]  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len({index.num_items for index in found}) == 1
    pieces = found[0].pieces(np.arange(found[0].num_items), np.arange(found[0].num_items))
    assert np.minimum(pieces.length, 16).sum() == reader.num_tokens
    assert [p.name for p in (tmp_path / "cache").iterdir() if "partial" in p.name] == []


def test_what_an_index_cannot_be_built_of(tmp_path: Path) -> None:
    reader = IndexedReader(write(tmp_path / "c", [3, 4]))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="data.cache"):
        packed_index(reader, (0, 2), 4, "document", None, tmp_path / "file", say=lambda _: None)
    index = packed_index(reader, (0, 2), 4, "document", None, tmp_path / "cache", say=lambda _: None)
    assert index.num_items == 2
    folder = next((tmp_path / "cache").glob("document-*[0-9a-f]"))
    for name, kept in (("pieces", -12), ("pieces", 7), ("pieces", 0), ("bins", 0), ("bins", None)):
        whole = (folder / name).read_bytes()
        (folder / name).unlink()
        if kept is not None:
            (folder / name).write_bytes(whole[:kept])
        with pytest.raises(UserError, match="damaged.*remove it"):
            packed_index(reader, (0, 2), 4, "document", None, tmp_path / "cache", say=lambda _: None)
        (folder / name).write_bytes(whole)


@pytest.mark.parametrize(("packing", "order"), [
    ("concatenate", "arithmetic"), ("best_fit", "arithmetic"), ("concatenate", "megatron"),
])
def test_a_remote_corpus_gives_the_same_samples(tmp_path: Path, packing: Any, order: Any) -> None:
    import fsspec

    prefix = write(tmp_path / "c", lengths_of(300))
    memory = fsspec.filesystem("memory")
    for ending in (".bin", ".idx"):
        memory.pipe_file(f"/packing/c{ending}", prefix.with_suffix(ending).read_bytes())
    ids = np.arange(40)
    found = []
    for place in (prefix, "memory://packing/c"):
        cache = tmp_path / ("local" if place is prefix else "remote")
        data = TokenDataset(
            place, "train", "90,10", SEQUENCE, 3, packing=packing, order=order, total_samples=40, cache=cache
        )
        pieces = data.pieces(ids, documents=True)
        found.append([data.sample(ids).tolist(), pieces.start.tolist(), pieces.ends.tolist(), data.facts])
    assert found[0] == found[1]
