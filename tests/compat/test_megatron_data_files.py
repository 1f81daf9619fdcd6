"""Both directions against megatron-core's own `indexed_dataset`, files compared byte for byte."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megapt.data.build import build
from megapt.data.indexed import CODES, IndexedReader, IndexedWriter, best_dtype
from megapt.data.raw import from_raw
from megapt.data.transfer import merge, split
from megapt.errors import UserError

theirs = pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="megatron-core is not installed",
                             exc_type=ImportError)

# Documents as lists of sequences: empty ones at both ends, in a row, and an empty sequence inside a document.
DOCUMENTS: list[list[list[int]]] = [
    [], [[1, 2, 3]], [], [], [[4], [5, 6]], [[7, 8, 9, 10]], [[11], [], [12]], [[127]], []]


def write_theirs(prefix: Path, documents: list[list[list[int]]], dtype: Any, modes: bool = False) -> None:
    import torch

    builder = theirs.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype, multimodal=modes)
    count = itertools.count()
    for document in documents:
        for sequence in document:
            builder.add_item(torch.tensor(sequence, dtype=torch.int64), mode=next(count) % 3)
        builder.end_document()
    builder.finalize(f"{prefix}.idx")


def write_ours(prefix: Path, documents: list[list[list[int]]], dtype: Any) -> None:
    """Our writer makes one sequence of a document."""
    with IndexedWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document([token for sequence in document for token in sequence])


def read_theirs(prefix: Path, **options: Any) -> tuple[list[list[int]], list[int]]:
    dataset = theirs.IndexedDataset(str(prefix), **options)
    return [dataset[i].tolist() for i in range(len(dataset))], dataset.document_indices.tolist()


def read_ours(prefix: Path) -> tuple[list[list[int]], list[int]]:
    reader = IndexedReader(prefix)
    reader.verify()
    return [reader.sequence(i).tolist() for i in range(len(reader))], reader.document_boundaries.tolist()


@pytest.mark.parametrize("dtype", sorted(CODES, key=str), ids=str)
def test_our_reader_reads_their_files(tmp_path: Path, dtype: np.dtype[Any]) -> None:
    write_theirs(tmp_path / "d", DOCUMENTS, dtype.type)
    expected = [sequence for document in DOCUMENTS for sequence in document]
    assert read_ours(tmp_path / "d") == (expected, [0, 0, 1, 1, 1, 3, 4, 7, 8, 8])
    reader = IndexedReader(tmp_path / "d")
    assert reader.dtype == dtype
    assert [reader.document(d) for d in (0, 4, 6)] == [(0, 0), (1, 3), (4, 7)]
    assert reader.tokens(0, reader.num_tokens).tolist() == [*range(1, 13), 127]


@pytest.mark.parametrize("dtype", sorted(CODES, key=str), ids=str)
def test_their_files_and_ours_are_the_same_bytes(tmp_path: Path, dtype: np.dtype[Any]) -> None:
    whole = [[[token for sequence in document for token in sequence]] if any(document) else []
             for document in DOCUMENTS]
    write_theirs(tmp_path / "theirs", whole, dtype.type)
    write_ours(tmp_path / "ours", whole, dtype)
    for ending in ("bin", "idx"):
        assert (tmp_path / f"ours.{ending}").read_bytes() == (tmp_path / f"theirs.{ending}").read_bytes()
    for mapped in (True, False):
        found = read_theirs(tmp_path / "ours", mmap=mapped)
        assert found == read_ours(tmp_path / "ours")
    assert theirs.IndexedDataset(str(tmp_path / "ours")).index.dtype == dtype


def test_several_sequences_per_document_pass_through_merge_and_split(tmp_path: Path) -> None:
    """Cut and joined again, their files are the same bytes; and our merge is their merge."""
    write_theirs(tmp_path / "a", DOCUMENTS, np.int32)
    parts = [tmp_path / "one", tmp_path / "two", tmp_path / "three"]
    split(tmp_path / "a", parts, [1, 1, 1])
    assert read_theirs(parts[1])[0] == [[4], [5, 6], [7, 8, 9, 10]]
    merge(parts, tmp_path / "again")
    builder = theirs.IndexedDatasetBuilder(f"{tmp_path}/merged.bin", dtype=np.int32)
    for part in parts:
        builder.add_index(str(part))
    builder.finalize(f"{tmp_path}/merged.idx")
    for ending in ("bin", "idx"):
        original = (tmp_path / f"a.{ending}").read_bytes()
        assert (tmp_path / f"again.{ending}").read_bytes() == original
        assert (tmp_path / f"merged.{ending}").read_bytes() == original


def test_dtype_of_a_vocabulary() -> None:
    for vocabulary in (1, 257, 32000, 65499, 65500, 65501, 65536, 128256, 2**31 - 1):
        assert best_dtype(vocabulary) == theirs.DType.optimal_dtype(vocabulary)


def test_dtype_codes() -> None:
    for dtype, code in CODES.items():
        assert theirs.DType.code_from_dtype(dtype.type) == code


def test_modes_of_a_multimodal_corpus(tmp_path: Path) -> None:
    """Only who is told of the modes reads them; nobody takes them for something else."""
    write_theirs(tmp_path / "d", DOCUMENTS, np.uint16, modes=True)
    with pytest.raises(UserError, match="multimodal"):
        IndexedReader(tmp_path / "d")
    reader = IndexedReader(tmp_path / "d", multimodal=True)
    reader.verify()
    dataset = theirs.IndexedDataset(str(tmp_path / "d"), multimodal=True)
    assert reader.modes is not None and reader.modes.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    for i in range(len(reader)):
        tokens, mode = dataset[i]
        assert reader.sequence(i).tolist() == tokens.tolist() and reader.modes[i] == mode
    write_theirs(tmp_path / "text", DOCUMENTS, np.uint16)
    with pytest.raises(UserError, match="modes"):
        IndexedReader(tmp_path / "text", multimodal=True)


def test_a_corpus_cut_by_us_reads_there(tmp_path: Path) -> None:
    np.array([5, 6, 0, 7, 0, 0, 8], np.uint16).tofile(tmp_path / "stream.bin")
    from_raw(tmp_path / "stream.bin", tmp_path / "d", "uint16", eod=0)
    assert read_theirs(tmp_path / "d") == ([[5, 6, 0], [7, 0], [0], [8]], [0, 1, 2, 3, 4])


@pytest.mark.parametrize("sentences", [False, True])
def test_what_data_build_wrote_reads_there(tmp_path: Path, sentences: bool) -> None:
    texts = ["One. Two.", "", "Three"]
    (tmp_path / "text.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))
    build([tmp_path / "text.jsonl"], tmp_path / "d", "bytes", split_sentences=sentences, progress=False)
    one = [[*b"One."], [*b" Two.", 256]] if sentences else [[*b"One. Two.", 256]]
    assert read_theirs(tmp_path / "d") == ([*one, [*b"Three", 256]], [0, len(one), len(one), len(one) + 1])
    write_theirs(tmp_path / "theirs", [one, [], [[*b"Three", 256]]], theirs.DType.optimal_dtype(257))
    for ending in ("bin", "idx"):
        assert (tmp_path / f"d.{ending}").read_bytes() == (tmp_path / f"theirs.{ending}").read_bytes()
