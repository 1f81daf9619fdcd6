from __future__ import annotations

import hashlib
import itertools
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megapt.data import indexed, pair_writer
from megapt.data.indexed import CODES, IndexedReader, IndexedWriter, best_dtype
from megapt.errors import UserError

DOCUMENTS = [[1, 2, 3], [], [4], [5, 6, 7, 8, 9], [10, 11]]


def write_by_hand(prefix: Path, sequences: list[list[int]], boundaries: list[int], code: int = 8,
                  order: list[int] | None = None) -> None:
    """The format as its description has it, with struct alone; `order` lists sequences as the index shall."""
    letter = {1: "B", 2: "b", 3: "h", 4: "i", 5: "q", 8: "H"}[code]
    size = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 8: 2}[code]
    body, places = b"", []
    for sequence in sequences:
        places.append((len(sequence), len(body)))
        body += struct.pack(f"<{len(sequence)}{letter}", *sequence)
    places = [places[i] for i in (order if order is not None else range(len(places)))]
    index = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", code)
    index += struct.pack("<Q", len(places)) + struct.pack("<Q", len(boundaries))
    index += b"".join(struct.pack("<i", length) for length, _ in places)
    index += b"".join(struct.pack("<q", offset) for _, offset in places)
    index += b"".join(struct.pack("<q", boundary) for boundary in boundaries)
    assert len(body) == size * sum(map(len, sequences))
    Path(f"{prefix}.bin").write_bytes(body)
    Path(f"{prefix}.idx").write_bytes(index)


def write_documents(prefix: Path, documents: list[list[int]], dtype: str = "u2") -> None:
    with IndexedWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(document)


def flat(sequences: list[list[int]]) -> list[int]:
    return [token for sequence in sequences for token in sequence]


@pytest.mark.parametrize("code", sorted(CODES.values()))
def test_writer_matches_the_description_byte_for_byte(tmp_path: Path, code: int) -> None:
    dtype = {c: d for d, c in CODES.items()}[code]
    write_documents(tmp_path / "ours", DOCUMENTS, dtype.name)
    write_by_hand(tmp_path / "theirs", [d for d in DOCUMENTS if d], [0, 1, 1, 2, 3, 4], code)
    for ending in ("bin", "idx"):
        assert (tmp_path / f"ours.{ending}").read_bytes() == (tmp_path / f"theirs.{ending}").read_bytes()


def test_reader_gives_back_what_the_description_says(tmp_path: Path) -> None:
    sequences = [[1, 2, 3], [4, 65535], [6]]  # the first document has two sequences, the second none
    write_by_hand(tmp_path / "d", sequences, [0, 2, 2, 3])
    reader = IndexedReader(tmp_path / "d")
    assert reader.dtype == np.uint16
    assert (reader.num_sequences, reader.num_documents, reader.num_tokens) == (3, 3, 6)
    assert [reader.sequence(i).tolist() for i in range(len(reader))] == sequences
    assert reader.document_boundaries.tolist() == [0, 2, 2, 3]
    assert reader.lengths.tolist() == [3, 2, 1]
    assert reader.offsets.tolist() == [0, 6, 10]
    assert reader.tokens(1, 4).tolist() == [2, 3, 4, 65535]
    assert reader.token_range(1, 3) == (3, 6)
    assert reader.token_range(3, 3) == (6, 6)
    assert not reader.tokens(0, 6).flags.writeable
    assert reader.packed
    reader.verify()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(documents=st.lists(st.lists(st.integers(-2**31, 2**31 - 1), max_size=9), max_size=40))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]]) -> None:
    prefix = tmp_path_factory.mktemp("round") / "d"
    write_documents(prefix, documents, "i4")
    reader = IndexedReader(prefix)
    reader.verify()
    bounds = reader.document_boundaries.tolist()
    found = [flat([reader.sequence(i).tolist() for i in range(low, high)])
             for low, high in zip(bounds, bounds[1:], strict=False)]
    assert found == documents
    assert reader.tokens(0, reader.num_tokens).tolist() == flat(documents)


def test_index_that_is_not_packed_reads_in_index_order(tmp_path: Path) -> None:
    sequences = [[1, 2, 3], [4], [5, 6], [7, 8]]
    write_by_hand(tmp_path / "d", sequences, [0, 3], order=[3, 0, 2])
    reader = IndexedReader(tmp_path / "d")
    stream = [7, 8, 1, 2, 3, 5, 6]
    assert reader.num_tokens == 7
    assert not reader.packed
    for start in range(8):
        for count in range(8 - start):
            assert reader.tokens(start, count).tolist() == stream[start:start + count]
    assert [reader.token_range(i, 3) for i in range(4)] == [(0, 7), (2, 7), (5, 7), (7, 7)]
    reader.verify()


def test_documents_and_the_sequences_and_tokens_in_them(tmp_path: Path) -> None:
    """Empty documents hold nothing, and empty sequences are passed over, in both kinds of index."""
    sequences = [[1, 2, 3], [], [4, 5], [6]]
    write_by_hand(tmp_path / "d", sequences, [0, 0, 2, 2, 3, 4, 4])
    write_by_hand(tmp_path / "turned", sequences, [0, 0, 2, 2, 3, 4, 4], order=[3, 1, 2, 0])
    for name, holders in (("d", [0, 0, 0, 2, 2, 3]), ("turned", [0, 2, 2, 3, 3, 3])):
        reader = IndexedReader(tmp_path / name)
        assert [reader.document(d) for d in range(6)] == [(0, 0), (0, 2), (2, 2), (2, 3), (3, 4), (4, 4)]
        assert [reader.sequence_at(token) for token in range(6)] == holders
        assert [reader.document_at(i) for i in range(4)] == [1, 1, 3, 4]
        for call, bad in ((reader.document, 6), (reader.sequence_at, 6), (reader.document_at, 4)):
            for i in (-1, bad):
                with pytest.raises(IndexError):
                    call(i)


def test_views_are_of_the_file(tmp_path: Path) -> None:
    write_documents(tmp_path / "d", DOCUMENTS)
    reader = IndexedReader(tmp_path / "d")
    whole = reader.bin.read(0, reader.bin.size)
    for view in (reader.tokens(2, 5), reader.sequence(2)):
        assert np.shares_memory(view, whole) and not view.flags.writeable


def test_positions_outside_are_refused(tmp_path: Path) -> None:
    write_documents(tmp_path / "d", DOCUMENTS)
    reader = IndexedReader(tmp_path / "d")
    for start, count in [(-1, 2), (0, 12), (11, 1), (3, -1)]:
        with pytest.raises(IndexError):
            reader.tokens(start, count)
    for i in (-1, 4):
        with pytest.raises(IndexError):
            reader.sequence(i)
    with pytest.raises(IndexError):
        reader.token_range(2, 5)


@pytest.mark.parametrize("ending", ["bin", "idx"])
def test_truncated_at_every_length(tmp_path: Path, ending: str) -> None:
    write_documents(tmp_path / "d", DOCUMENTS)
    path = tmp_path / f"d.{ending}"
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.unlink()  # a file cut to nothing is flushed when it is closed
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="d.(bin|idx)"):
            IndexedReader(tmp_path / "d")
    path.write_bytes(whole + b"\0\0")
    with pytest.raises(UserError, match="d.(bin|idx)"):
        IndexedReader(tmp_path / "d")


def test_no_flipped_index_byte_leads_out_of_the_files(tmp_path: Path) -> None:
    """One damaged byte is refused, or shows as an index that is not packed, or moves a boundary."""
    write_documents(tmp_path / "d", DOCUMENTS)
    path = tmp_path / "d.idx"
    whole = path.read_bytes()
    boundaries = len(whole) - 8 * (len(DOCUMENTS) + 1)
    refused = 0
    for at in range(len(whole)):
        for flip in (0x01, 0x80, 0xFF):
            path.unlink()
            path.write_bytes(whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1:])
            try:
                reader = IndexedReader(tmp_path / "d")
                reader.verify()
            except UserError:
                refused += 1
                continue
            assert not reader.packed or at >= boundaries, (at, flip)
            stream = reader.tokens(0, reader.num_tokens).tolist()
            assert stream == flat([reader.sequence(i).tolist() for i in range(reader.num_sequences)])
    assert refused > 0.9 * 3 * len(whole)


def patch(path: Path, at: int, data: bytes) -> None:
    whole = bytearray(path.read_bytes())
    whole[at:at + len(data)] = data
    path.write_bytes(whole)


@pytest.mark.parametrize(("at", "data", "message"), [
    (0, b"X", "not a Megatron index"),
    (9, struct.pack("<Q", 2), "version 2"),
    (17, b"\x07", "float32"),
    (17, b"\x63", "unknown"),
    (18, struct.pack("<Q", 2**63), "declares"),
    (26, struct.pack("<Q", 0), "no document boundaries"),
    (34 + 4 * 3, struct.pack("<i", -1), "sequence 3 of 4"),
    (34 + 4 * 4 + 8 * 3, struct.pack("<q", 2**62), "sequence 3 of 4"),
    (34 + 12 * 4, struct.pack("<q", 1), "boundaries run from 1"),
    (34 + 12 * 4 + 8 * 5, struct.pack("<q", 9), "to 9"),
])
def test_damage_seen_on_opening(tmp_path: Path, at: int, data: bytes, message: str) -> None:
    write_documents(tmp_path / "d", DOCUMENTS)
    patch(tmp_path / "d.idx", at, data)
    with pytest.raises(UserError, match=message):
        IndexedReader(tmp_path / "d")


@pytest.mark.parametrize("offset", [-4, 2**63 - 2])
def test_damage_between_the_probes_is_found_by_verify_and_never_read(tmp_path: Path, offset: int) -> None:
    count = 1000
    write_documents(tmp_path / "d", [[i, i] for i in range(count)])
    offsets = 34 + 4 * count
    patch(tmp_path / "d.idx", offsets + 8 * 500, struct.pack("<q", offset))
    reader = IndexedReader(tmp_path / "d")
    with pytest.raises(UserError, match="sequence 500 of 1000"):
        reader.verify()
    with pytest.raises(UserError, match="sequence 500 of 1000"):
        reader.sequence(500)
    with pytest.raises(UserError, match="would span"):
        reader.token_range(500, 600)
    with pytest.raises(UserError, match="sequence 500 of 1000"):
        list(reader.entries(0, count))


def test_bad_offsets_of_an_index_that_is_not_packed(tmp_path: Path) -> None:
    for offset in (-2, 2**63 - 1, 2**63 - 4):
        write_by_hand(tmp_path / "d", [[1, 2, 3], [4], [5, 6], [7, 8]], [0, 3], order=[3, 0, 2])
        patch(tmp_path / "d.idx", 34 + 4 * 3 + 8, struct.pack("<q", offset))
        with pytest.raises(UserError, match="sequence 1 of 3"):
            IndexedReader(tmp_path / "d")


def test_verify_finds_bad_boundaries(tmp_path: Path) -> None:
    write_by_hand(tmp_path / "falls", [[1], [2], [3]], [0, 2, 1, 3])
    with pytest.raises(UserError, match="document 1 would end at sequence 1"):
        IndexedReader(tmp_path / "falls").verify()
    write_by_hand(tmp_path / "open", [[1], [2], [3]], [0, 2])
    with pytest.raises(UserError, match="documents end at sequence 2 of 3"):
        IndexedReader(tmp_path / "open").verify()


def test_multimodal_and_missing_files(tmp_path: Path) -> None:
    write_documents(tmp_path / "d", DOCUMENTS)
    with open(tmp_path / "d.idx", "ab") as file:
        file.write(bytes(4))
    with pytest.raises(UserError, match="multimodal"):
        IndexedReader(tmp_path / "d")
    with pytest.raises(UserError, match="without the ending"):
        IndexedReader(tmp_path / "d.bin")


def test_modes_are_read_by_who_is_told_of_them(tmp_path: Path) -> None:
    write_by_hand(tmp_path / "d", [[1], [2, 3], [4]], [0, 1, 3])
    with pytest.raises(UserError, match="modes"):
        IndexedReader(tmp_path / "d", multimodal=True)
    with open(tmp_path / "d.idx", "ab") as file:
        file.write(bytes([0, 1, 255]))
    reader = IndexedReader(tmp_path / "d", multimodal=True)
    assert reader.modes is not None and reader.modes.tolist() == [0, 1, -1]
    assert reader.tokens(0, 4).tolist() == [1, 2, 3, 4]
    reader.verify()


def test_empty_corpus(tmp_path: Path) -> None:
    write_documents(tmp_path / "d", [])
    reader = IndexedReader(tmp_path / "d")
    assert (reader.num_sequences, reader.num_documents, reader.num_tokens) == (0, 0, 0)
    assert reader.tokens(0, 0).tolist() == []
    reader.verify()


def test_fingerprint_is_that_of_the_description(tmp_path: Path) -> None:
    """Runs remember it: sizes and 64 evenly spread blocks of 4 KiB of the .idx and the .bin, whole if small."""
    write_documents(tmp_path / "d", np.arange(300_000).reshape(300, 1000).tolist(), "i4")
    digest = hashlib.blake2b(digest_size=16)
    small, large = ((tmp_path / f"d.{ending}").read_bytes() for ending in ("idx", "bin"))
    assert len(small) < 64 * 4096 < len(large)
    digest.update(struct.pack("<Q", len(small)) + small + struct.pack("<Q", len(large)))
    for k in range(64):
        start = (len(large) - 4096) * k // 63
        digest.update(large[start:start + 4096])
    reader = IndexedReader(tmp_path / "d")
    assert reader.fingerprint() == digest.hexdigest()
    told: list[int] = []
    assert reader.full_hash(told.append) == {"bin": hashlib.sha256(large).hexdigest(),
                                             "idx": hashlib.sha256(small).hexdigest()}
    assert sum(told) == len(small) + len(large)


def test_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    documents = rng.integers(0, 60000, (400, 800)).tolist()  # 640 kB, more than is read whole
    write_documents(tmp_path / "a", documents)
    os.makedirs(tmp_path / "other")
    for ending in ("bin", "idx"):
        (tmp_path / "other" / f"b.{ending}").write_bytes((tmp_path / f"a.{ending}").read_bytes())
    original = IndexedReader(tmp_path / "a").fingerprint()
    assert original == IndexedReader(tmp_path / "other" / "b").fingerprint()
    for at in (0, 640_000 - 1):
        patch(tmp_path / "other" / "b.bin", at, b"\xAA")
        changed = IndexedReader(tmp_path / "other" / "b").fingerprint()
        assert changed != original
        original = changed
    write_documents(tmp_path / "c", documents[:-1])
    assert IndexedReader(tmp_path / "c").fingerprint() != IndexedReader(tmp_path / "a").fingerprint()


def test_exception_leaves_nothing_new_and_nothing_lost(tmp_path: Path) -> None:
    write_documents(tmp_path / "old", DOCUMENTS)
    before = {p.name: hashlib.sha256(p.read_bytes()).digest() for p in tmp_path.iterdir()}
    for name in ("old", "new"):
        with pytest.raises(RuntimeError, match="midway"), IndexedWriter(tmp_path / name, "u2") as writer:
            writer.add_document([1, 2, 3])
            raise RuntimeError("midway")
    assert {p.name: hashlib.sha256(p.read_bytes()).digest() for p in tmp_path.iterdir()} == before


def test_old_index_never_describes_new_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fails between the two renames of an overwrite."""
    write_documents(tmp_path / "d", DOCUMENTS)
    replace = os.replace

    def fail_at_index(source: Path, target: Path) -> None:
        if target.suffix == ".idx":
            raise OSError("full")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_at_index)
    with pytest.raises(OSError, match="full"):
        write_documents(tmp_path / "d", [list(range(11))])
    assert os.listdir(tmp_path) == ["d.bin"]


def test_nothing_under_the_final_name_before_the_end(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "d", "u2") as writer:
        writer.add_document([1])
        assert not {"d.bin", "d.idx"} & set(os.listdir(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["d.bin", "d.idx"]


def test_more_documents_than_the_writer_holds_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexed, "_PENDING", 7)
    monkeypatch.setattr(pair_writer, "_CHUNK", 3)
    documents = [[i] * (i % 4) for i in range(50)]
    write_documents(tmp_path / "d", documents)
    write_by_hand(tmp_path / "e", [d for d in documents if d],
                  [0, *itertools.accumulate(bool(d) for d in documents)])
    for ending in ("bin", "idx"):
        assert (tmp_path / f"d.{ending}").read_bytes() == (tmp_path / f"e.{ending}").read_bytes()


def test_document_in_pieces(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "d", "u2") as writer:
        writer.extend([1, 2])
        writer.extend([])
        writer.extend(np.array([3], np.int64))
        writer.end_document()
        assert (writer.num_documents, writer.num_tokens) == (1, 3)
    assert IndexedReader(tmp_path / "d").sequence(0).tolist() == [1, 2, 3]
    with pytest.raises(RuntimeError, match="not closed"), IndexedWriter(tmp_path / "e", "u2") as writer:
        writer.extend([1])
    assert not (tmp_path / "e.idx").exists()


@pytest.mark.parametrize(("dtype", "tokens", "message"), [
    ("u2", [1, 65536], "65536 does not fit uint16"), ("u2", [-1], "-1 does not fit"),
    ("i4", np.array([2**31]), "does not fit int32"), ("u2", [0.5], "integers"), ("u2", [[1, 2]], "flat"),
])
def test_tokens_that_do_not_fit(tmp_path: Path, dtype: str, tokens: list[int], message: str) -> None:
    with pytest.raises(UserError, match=message), IndexedWriter(tmp_path / "d", dtype) as writer:
        writer.add_document(tokens)


def test_dtypes() -> None:
    assert [best_dtype(v).name for v in (257, 65499, 65500, 65536, 250000)] == ["uint16"] * 2 + ["int32"] * 3
    with pytest.raises(UserError, match="cannot hold float32"):
        IndexedWriter("unused", "f4")
