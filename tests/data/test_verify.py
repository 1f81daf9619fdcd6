"""Each defect planted by hand, and found by name, number and place."""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megapt.data import verify as module
from megapt.data.indexed import IndexedReader, IndexedWriter, open_pair
from megapt.data.verify import Report, check_pair, compare_hashes, hash_file, work_bytes, write_hashes
from megapt.errors import UserError

DOCUMENTS = [[1, 2, 3], [], [4], [5, 6, 7, 8, 9], [10, 11]]
SEQUENCES, BOUNDARIES = 4, 6
LENGTHS, OFFSETS, DOCS = 34, 34 + 4 * SEQUENCES, 34 + 12 * SEQUENCES


def write(prefix: Path, documents: list[list[int]] | None = None, dtype: str = "u2") -> None:
    with IndexedWriter(prefix, dtype) as writer:
        for document in DOCUMENTS if documents is None else documents:
            writer.add_document(document)


def patch(path: Path, at: int, kind: str, value: int) -> None:
    whole = bytearray(path.read_bytes())
    struct.pack_into(kind, whole, at, value)
    path.write_bytes(whole)


def append(path: Path, data: bytes) -> None:
    with open(path, "ab") as file:
        file.write(data)


def cut(path: Path, by: int) -> None:
    path.write_bytes(path.read_bytes()[:-by])


def check(prefix: Path, vocabulary: int | None = None, full: bool = False, multimodal: bool = False) -> Report:
    return check_pair(*open_pair(str(prefix)), vocabulary, full, multimodal)


def found(report: Report) -> dict[str, tuple[int, str]]:
    return {finding.kind: (finding.count, "; ".join(finding.examples)) for finding in report.findings}


def length(i: int, value: int) -> Callable[[Path], None]:
    return lambda prefix: patch(Path(f"{prefix}.idx"), LENGTHS + 4 * i, "<i", value)


def offset(i: int, value: int) -> Callable[[Path], None]:
    return lambda prefix: patch(Path(f"{prefix}.idx"), OFFSETS + 8 * i, "<q", value)


def boundary(i: int, value: int) -> Callable[[Path], None]:
    return lambda prefix: patch(Path(f"{prefix}.idx"), DOCS + 8 * i, "<q", value)


@pytest.mark.parametrize(("damage", "expected"), [
    (lambda p: cut(Path(f"{p}.bin"), 4), {"out of range": (1, "sequence 3 of 4 .2 tokens at byte 18. .* 18 bytes")}),
    (lambda p: cut(Path(f"{p}.bin"), 1), {"torn token": (1, "21 bytes, 1 more"), "out of range": (1, "sequence 3")}),
    (lambda p: append(Path(f"{p}.bin"), bytes(4)), {"trailing bytes in the .bin": (1, "4 bytes after byte 22")}),
    (lambda p: cut(Path(f"{p}.idx"), 3), {"index cut short": (1, "127 bytes of the 130")}),
    (lambda p: append(Path(f"{p}.idx"), b"12"), {"trailing bytes in the index": (1, "2 bytes after the 130")}),
    (lambda p: append(Path(f"{p}.idx"), b"1234"), {"trailing bytes in the index": (1, "multimodal")}),
    (lambda p: patch(Path(f"{p}.idx"), 9, "<Q", 3), {"header": (1, "version 3")}),
    (lambda p: Path(f"{p}.idx").write_bytes(b"MMID"), {"header": (1, "4 bytes, but its header")}),
    (lambda p: patch(Path(f"{p}.idx"), 18, "<Q", 2**60), {"index cut short": (1, "130 bytes of the")}),
    (length(1, -1), {"wrong length": (1, r"sequence 1 of 4 \(-1 tokens at byte 6\)")}),
    (length(2, 4), {"gap": (1, "2 bytes belong to no sequence before sequence 3")}),
    (length(2, 6), {"overlap": (1, "sequence 3 of 4 .* begins 2 bytes before")}),
    (length(3, 1), {"trailing bytes in the .bin": (1, "2 bytes after byte 20")}),
    (length(3, 2**31 - 1), {"out of range": (1, "sequence 3 of 4 .2147483647 tokens")}),
    (offset(0, 2), {"gap": (1, "2 bytes belong to no sequence before sequence 0"), "overlap": (1, "sequence 1 ")}),
    (offset(2, 7), {"misaligned": (1, "sequence 2 .* multiple of 2"), "overlap": (1, "sequence 2 "),
                     "gap": (1, "sequence 3 ")}),
    (offset(1, -2), {"out of range": (1, "sequence 1 .* byte -2")}),
    (offset(1, 2**63 - 1), {"out of range": (1, "sequence 1 ")}),
    (boundary(0, 1), {"document index begins late": (1, "begins at sequence 1, not at 0")}),
    (boundary(3, 0), {"document index falls": (1, "document 2 would end at sequence 0, before its start 1")}),
    (boundary(2, 9), {"document index falls": (1, "document 2 would end at sequence 2, before its start 9"),
                      "document index out of range": (1, "boundary 2 is sequence 9 of 4")}),
    (boundary(5, 3), {"document index ends early": (1, "end at sequence 3 of 4")}),
    (boundary(1, -1), {"document index falls": (1, "document 0 would end at sequence -1"),
                       "document index out of range": (1, "boundary 1 is sequence -1")}),
])
def test_each_defect_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None],
                              expected: dict[str, tuple[int, str]]) -> None:
    """In one block and in blocks of two entries alike."""
    write(tmp_path / "d")
    assert not check(tmp_path / "d").findings
    damage(tmp_path / "d")
    for block in (1 << 18, 2, 1):
        monkeypatch.setattr(module, "_CHUNK", block)
        report = found(check(tmp_path / "d", vocabulary=12))
        assert {kind: count for kind, (count, _) in report.items()} == {kind: c for kind, (c, _) in expected.items()}
        for kind, (_, words) in expected.items():
            assert re.search(words, report[kind][1]), report[kind][1]


def test_many_defects_are_counted_and_few_are_shown(tmp_path: Path) -> None:
    write(tmp_path / "d", [[i, i] for i in range(1000)])
    cut(tmp_path / "d.bin", 4 * 400)
    finding, = check(tmp_path / "d").findings
    assert (finding.kind, finding.count, len(finding.examples)) == ("out of range", 400, 3)
    assert "sequence 600 of 1000" in finding.examples[0] and str(finding).endswith("(and 397 more)")


def test_token_ids_are_held_against_the_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "d", [[0, 5, 9], [10], [-1, 2**31 - 1]], "i4")
    assert not check(tmp_path / "d").findings  # not asked
    finding, = check(tmp_path / "d", vocabulary=10).findings
    assert finding.kind == "token id outside the vocabulary of 10" and finding.count == 3
    assert finding.examples == ["token 3 (byte 12) is 10", "token 4 (byte 16) is -1", "token 5 (byte 20) is 2147483647"]
    assert check(tmp_path / "d", vocabulary=2**31).findings[0].count == 1


def test_what_is_legal_but_rare(tmp_path: Path) -> None:
    for documents in ([], [[], []]):
        write(tmp_path / "d", documents)
        assert not check(tmp_path / "d", vocabulary=1, full=True).findings
    write(tmp_path / "d")
    length(0, 0)(tmp_path / "d")
    assert check(tmp_path / "d").empty_sequences == 1
    write(tmp_path / "d")
    append(tmp_path / "d.idx", bytes(SEQUENCES))
    assert not check(tmp_path / "d", multimodal=True).findings
    write(tmp_path / "d")
    assert found(check(tmp_path / "d", multimodal=True)) == {"index cut short": (
        1, f"{tmp_path}/d.idx has 130 bytes of the 134 that its header declares (4 sequences, 6 document boundaries)")}


def test_an_index_with_an_order_of_its_own_is_told_of(tmp_path: Path) -> None:
    """The reader takes such an index; a check of everything shows it."""
    write(tmp_path / "d", [[1, 2], [3, 4], [5, 6]])
    for i, at in enumerate((8, 4, 0)):
        patch(tmp_path / "d.idx", 34 + 12 + 8 * i, "<q", at)
    IndexedReader(tmp_path / "d").verify()
    report = found(check(tmp_path / "d"))
    assert report["overlap"][0] == 2 and report["gap"][0] == 1


def test_hashes_are_compared_with_those_written_down(tmp_path: Path) -> None:
    prefix = tmp_path / "corpus.v1"
    write(prefix)
    report = check(prefix, full=True)
    bodies = {ending: Path(f"{prefix}.{ending}").read_bytes() for ending in ("bin", "idx")}
    assert report.hashes == {ending: hashlib.sha256(body).hexdigest() for ending, body in bodies.items()}
    assert not compare_hashes(prefix, report)  # there is no such file
    assert write_hashes(prefix, report.hashes) == hash_file(prefix) == tmp_path / "corpus.v1.sha256"
    assert hash_file(prefix).read_text().splitlines()[0] == f"{report.hashes['bin']}  corpus.v1.bin"
    assert compare_hashes(prefix, report) and not report.findings
    patch(tmp_path / "corpus.v1.bin", 4, "<H", 77)  # a sound pair with another token
    changed = check(prefix, full=True)
    assert not changed.findings
    assert compare_hashes(prefix, changed)
    assert [finding.kind for finding in changed.findings] == ["hash"] and ".bin has SHA-256" in str(changed.findings[0])
    hash_file(prefix).write_text("something else\n")
    with pytest.raises(UserError, match="--write-hash"):
        compare_hashes(prefix, changed)


def test_progress_is_told_every_byte(tmp_path: Path) -> None:
    write(tmp_path / "d", np.arange(4000).reshape(40, 100).tolist())
    for vocabulary, full in ((None, False), (5000, False), (None, True), (5000, True)):
        told: list[int] = []
        idx, bin_ = open_pair(str(tmp_path / "d"))
        check_pair(idx, bin_, vocabulary, full, progress=told.append)
        assert sum(told) == work_bytes(idx, bin_, vocabulary, full) - 34  # the header
