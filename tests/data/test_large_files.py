"""Sizes beyond 2^31 in every count, as sparse files: large to look at, some kilobytes on the disk."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from megapt.data.indexed import IndexedReader, IndexedWriter
from megapt.data.pair_writer import PairWriter
from megapt.data.transfer import copy_documents, merge, split
from megapt.data.verify import check_pair

LONG = 2**31 - 1  # tokens, the most that a sequence can have


def sparse_pair(prefix: Path, empty: int, long: list[int], code: int, tokens: dict[int, int]) -> None:
    """`empty` documents of an empty sequence each, then one document per length in `long`; zeros but for `tokens`."""
    item = {4: 4, 8: 2}[code]
    total, count = empty + len(long), len(long)
    ends = np.cumsum(long, dtype=np.int64) * item
    try:
        with open(f"{prefix}.idx", "wb") as file:
            file.write(struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, code, total, total + 1))
            file.truncate(34 + 12 * total + 8 * (total + 1))
            file.seek(34 + 4 * empty)
            file.write(np.array(long, "<i4").tobytes())
            file.seek(34 + 4 * total + 8 * empty)
            file.write(np.concatenate([[0], ends[:-1]]).astype("<i8").tobytes())
            file.seek(34 + 12 * total + 8 * empty)
            file.write(np.arange(empty, empty + count + 1).astype("<i8").tobytes())
        with open(f"{prefix}.bin", "wb") as file:
            file.truncate(int(ends[-1]))
            for at, value in tokens.items():
                file.seek(at * item)
                file.write(value.to_bytes(item, "little"))
    except OSError as error:
        pytest.skip(f"the file system has no sparse files of this size: {error}")


def run_alone(program: str, prefix: Path) -> str:
    """What a fresh process prints; it knows `peak`, the most KiB that it ever had in memory."""
    # Not getrusage: its peak includes that of the process it was forked from.
    peak = "def peak(): return int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])\n"
    command = [sys.executable, "-c", peak + program, str(prefix)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_a_trillion_tokens_open_at_once(tmp_path: Path) -> None:
    """10^12 tokens in 10^9 documents: 2 TB and 20 GB to look at. Time and memory are those of a fresh process."""
    sparse_pair(tmp_path / "d", 10**9 - 500, [2 * 10**9] * 500, 8, {10**12 - 1: 4711})
    program = """if True:
        import json, sys, time
        from megapt.data.indexed import IndexedReader
        start = time.perf_counter()
        reader = IndexedReader(sys.argv[1])
        fingerprint = reader.fingerprint()
        seconds = time.perf_counter() - start
        found = [reader.num_tokens, reader.num_documents, int(reader.tokens(10**12 - 2, 2)[1]),
                 reader.sequence_at(10**12 - 1), reader.document_at(10**9 - 1), *reader.token_range(0, 10**9 - 1),
                 reader.lengths.shape[0]]
        print(json.dumps([seconds, peak(), found]))
    """
    seconds, kilobytes, found = json.loads(run_alone(program, tmp_path / "d"))
    assert found == [10**12, 10**9, 4711, 10**9 - 1, 10**9 - 1, 0, 10**12 - 2 * 10**9, 10**9]
    assert seconds < 1 and kilobytes < 200_000, (seconds, kilobytes)


def test_positions_beyond_32_bits(tmp_path: Path) -> None:
    sparse_pair(tmp_path / "d", 0, [LONG] * 3, 4, {LONG: 17, 3 * LONG - 1: 19})
    reader = IndexedReader(tmp_path / "d")
    assert reader.num_tokens == 3 * LONG
    assert reader.tokens(3 * LONG - 2, 2).tolist() == [0, 19]
    assert int(reader.sequence(1)[0]) == 17
    assert reader.token_range(1, 3) == (LONG, 3 * LONG)
    reader.verify()
    assert len(reader.fingerprint()) == 32


def test_merge_and_split_past_2_31_bytes(tmp_path: Path) -> None:
    """Two pairs of 16 GiB and one of some bytes; all offsets but the first are beyond 32 bits."""
    sparse_pair(tmp_path / "a", 1, [LONG, LONG], 4, {0: 5, 2 * LONG - 1: 6})
    sparse_pair(tmp_path / "b", 0, [LONG, LONG - 7], 4, {LONG: 7})
    with IndexedWriter(tmp_path / "c", "i4") as writer:
        writer.add_document([8, 9])
    merged = merge([tmp_path / name for name in "abc"], tmp_path / "all")
    if (tmp_path / "a.bin").stat().st_blocks < 1000:
        assert (tmp_path / "all.bin").stat().st_blocks < 1000  # 512 bytes each: the holes are still holes
    assert merged.lengths.tolist() == [0, LONG, LONG, LONG, LONG - 7, 2]
    assert merged.offsets.tolist() == [4 * n for n in (0, 0, LONG, 2 * LONG, 3 * LONG, 4 * LONG - 7)]
    assert merged.document_boundaries.tolist() == [0, 1, 2, 3, 4, 5, 6]
    end = merged.num_tokens
    assert end == 4 * LONG - 5
    marks = [(0, 5), (2 * LONG - 1, 6), (2 * LONG, 0), (3 * LONG, 7), (end - 3, 0), (end - 2, 8), (end - 1, 9)]
    assert [(at, int(merged.tokens(at, 1)[0])) for at, _ in marks] == marks
    merged.verify()

    low, high = split(tmp_path / "all", [tmp_path / "low", tmp_path / "high"], [4, 2])
    assert low.lengths.tolist() == [0, LONG, LONG, LONG] and high.lengths.tolist() == [LONG - 7, 2]
    assert int(low.tokens(2 * LONG - 1, 1)[0]) == 6
    assert [int(high.tokens(at, 1)[0]) for at in (0, LONG - 7, LONG - 6)] == [7, 8, 9]
    for part in (low, high):
        assert not check_pair(part.idx, part.bin).findings


def test_sequences_beyond_2_31(tmp_path: Path) -> None:
    """The last documents of 2^31 + 1000, taken out, and put behind as many again."""
    sparse_pair(tmp_path / "d", 2**31 + 997, [3, 2, 1], 8, {0: 1, 3: 2, 5: 3})
    reader = IndexedReader(tmp_path / "d")
    assert reader.num_documents == 2**31 + 1000
    with PairWriter(tmp_path / "tail", "u2") as writer:
        copy_documents(reader, 2**31 + 997, 2**31 + 1000, writer, lambda count: None)
        writer.finish()
        writer.commit()
    tail = IndexedReader(tmp_path / "tail")
    assert tail.lengths.tolist() == [3, 2, 1] and tail.document_boundaries.tolist() == [0, 1, 2, 3]
    assert tail.tokens(0, 6).tolist() == [1, 0, 0, 2, 0, 3]

    class Recorder(PairWriter):
        """Stands where 2^31 + 7 sequences have been written already."""

        def add_boundaries(self, boundaries: npt.NDArray[np.integer[Any]]) -> None:
            recorded.extend(boundaries.tolist())

    recorded: list[int] = []
    with Recorder(tmp_path / "more", "u2") as writer:
        writer.num_sequences = 2**31 + 7
        copy_documents(tail, 0, 3, writer, lambda count: None)
    assert recorded == [0, 2**31 + 8, 2**31 + 9, 2**31 + 10]


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    """A pair of 100 MB of tokens and 100 MB of index is merged and verified in less memory than either takes."""
    count = 5_000_000
    with PairWriter(tmp_path / "d", "i4") as writer:
        for start in range(0, count, 1_000_000):
            writer.write(np.arange(5_000_000) + start)
            writer.add_sequences(np.full(1_000_000, 5))
            writer.add_boundaries(np.arange(start + 1, start + 1_000_001))
        writer.finish()
        writer.commit()
    program = """if True:
        import sys
        from megapt.data.indexed import open_pair
        from megapt.data.transfer import convert, merge
        from megapt.data.verify import check_pair
        base = peak()
        merge([sys.argv[1]], sys.argv[1] + "2")
        assert not check_pair(*open_pair(sys.argv[1] + "2"), vocabulary=2**31).findings
        print(peak() - base)
    """
    assert int(run_alone(program, tmp_path / "d")) < 100_000  # KiB
    for ending in ("bin", "idx"):
        path = tmp_path / f"d.{ending}"
        assert path.stat().st_size >= 100_000_000
        path.unlink()
        (tmp_path / f"d2.{ending}").unlink()
