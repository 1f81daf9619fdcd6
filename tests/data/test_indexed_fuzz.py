"""Damaged indices by the thousand: each is refused, or reads inside the files."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megapt.data.indexed import IndexedReader, open_pair
from megapt.data.verify import check_pair
from megapt.errors import UserError

COUNT = 6  # sequences
BIN = bytes(range(7, 7 + 2 * 15))
LENGTHS = [3, 0, 5, 1, 4, 2]
IDX = (b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, COUNT, 5) + struct.pack("<6i", *LENGTHS)
       + struct.pack("<6q", *(2 * sum(LENGTHS[:i]) for i in range(COUNT))) + struct.pack("<5q", 0, 1, 1, 4, 6))

# Where a field begins and how it is packed: version, dtype code, Ns, Nd, lengths, offsets, boundaries.
FIELDS = [(9, "<Q"), (17, "<B"), (18, "<Q"), (26, "<Q"), *((34 + 4 * i, "<i") for i in range(COUNT)),
          *((34 + 4 * COUNT + 8 * i, "<q") for i in range(COUNT)),
          *((34 + 12 * COUNT + 8 * i, "<q") for i in range(5))]
EDGES = [0, 1, 2, 3, 4, 5, 6, 7, 8, 29, 30, 31, 127, 255, 2**31 - 1, 2**32, 2**40, 2**62, 2**63 - 2, 2**63 - 1]


PLAN = 8  # bytes of chance that one damaged index is made of
BATCH = 10  # damaged indices per example: drawing is slower than reading


def damage(plan: bytes) -> bytes:
    """The index with one to three fields set to edges or their negatives, or with bytes put in or cut."""
    damaged = bytearray(IDX)
    if plan[0] >= 192:
        at = plan[1] % (len(IDX) + 1)
        damaged[at:at + plan[2] % 13] = plan[3:3 + plan[0] % 5]
        return bytes(damaged)
    for i in range(1 + plan[0] % 3):
        at, kind = FIELDS[plan[2 * i + 1] % len(FIELDS)]
        edge = plan[2 * i + 2]
        value = EDGES[edge % 128 % len(EDGES)] * (-1 if edge >= 128 else 1)
        size = struct.calcsize(kind)
        damaged[at:at + size] = (value % 256**size).to_bytes(size, "little")
    return bytes(damaged)


def exercise(prefix: Path) -> bool:
    """Everything a reader can do; whether the pair was taken."""
    idx, bin_ = open_pair(str(prefix))
    report = check_pair(idx, bin_, vocabulary=65536)
    try:
        reader = IndexedReader(prefix)
    except UserError as error:
        assert "d.idx" in str(error) or "d.bin" in str(error)
        assert report.findings, error  # what is refused is also found
        return False
    body, item = (prefix.parent / "d.bin").read_bytes(), reader.dtype.itemsize
    for i in range(reader.num_sequences):
        try:
            found = reader.sequence(i)
        except UserError:
            continue
        offset = int(reader.offsets[i])
        assert found.tobytes() == body[offset:offset + item * int(reader.lengths[i])]
        assert len(found) == int(reader.lengths[i])
    assert len(reader.tokens(0, reader.num_tokens)) == reader.num_tokens
    for call in (reader.verify, lambda: list(reader.entries(0, reader.num_sequences)),
                 lambda: [reader.document(d) for d in range(reader.num_documents)],
                 lambda: [reader.document_at(i) for i in range(reader.num_sequences)],
                 lambda: [reader.sequence_at(t) for t in range(reader.num_tokens)],
                 lambda: reader.token_range(0, reader.num_sequences // 2)):
        try:
            call()
        except UserError:
            assert report.findings
    return True


def test_ten_thousand_damaged_indices(tmp_path: Path) -> None:
    (tmp_path / "d.bin").write_bytes(BIN)
    seen: set[bytes] = set()
    taken = 0

    @settings(max_examples=1500, deadline=None, derandomize=True, database=None)
    @given(plans=st.binary(min_size=BATCH * PLAN, max_size=BATCH * PLAN))
    def each(plans: bytes) -> None:
        nonlocal taken
        for at in range(0, len(plans), PLAN):
            damaged = damage(plans[at:at + PLAN])
            if damaged not in seen:
                (tmp_path / "d.idx").unlink(missing_ok=True)  # a file cut to nothing is flushed when it is closed
                (tmp_path / "d.idx").write_bytes(damaged)
                taken += exercise(tmp_path / "d")
                seen.add(damaged)

    each()
    assert len(seen) >= 10_000 and taken >= 500, (len(seen), taken)


def test_the_undamaged_index_is_sound(tmp_path: Path) -> None:
    (tmp_path / "d.idx").write_bytes(IDX)
    (tmp_path / "d.bin").write_bytes(BIN)
    assert exercise(tmp_path / "d")
    assert not check_pair(*open_pair(str(tmp_path / "d"))).findings
    with pytest.raises(UserError, match="d.bin has 29 bytes"):
        (tmp_path / "d.bin").write_bytes(BIN[:-1])
        exercise(tmp_path / "d")
        IndexedReader(tmp_path / "d")
