from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megapt.data import raw, storage
from megapt.data.indexed import IndexedReader
from megapt.data.pair_writer import PairWriter, cut_lengths
from megapt.data.raw import from_raw, to_raw
from megapt.errors import UserError

EOD = 3


def documents(prefix: Path) -> list[list[int]]:
    reader = IndexedReader(prefix)
    reader.verify()
    return [reader.tokens(start, stop - start).tolist() for start, stop in
            (reader.token_range(*reader.document(d)) for d in range(reader.num_documents))]


def cut(tokens: list[int]) -> list[list[int]]:
    """Documents as the words say: each ends with the token, and what is left is one too."""
    found: list[list[int]] = [[]]
    for token in tokens:
        found[-1].append(token)
        if token == EOD:
            found.append([])
    return found if found[-1] else found[:-1]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(tokens=st.lists(st.integers(0, 4), max_size=60), piece=st.integers(1, 9))
def test_a_stream_is_cut_after_each_end(tmp_path_factory: pytest.TempPathFactory, tokens: list[int],
                                        piece: int) -> None:
    """Whatever the pieces in which it comes."""
    folder = tmp_path_factory.mktemp("raw")
    tokens = [*tokens, EOD, 1]
    np.array(tokens, "<u2").tofile(folder / "in.bin")
    stream = storage.LocalFile.stream
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage.LocalFile, "stream", lambda self, start, stop: stream(self, start, stop, 2 * piece))
        from_raw(folder / "in.bin", folder / "d", "uint16", eod=EOD)
    assert documents(folder / "d") == cut(tokens)


@pytest.mark.parametrize("npy", [False, True])
@pytest.mark.parametrize("dtype", raw._DTYPES)
def test_there_and_back(tmp_path: Path, dtype: str, npy: bool) -> None:
    tokens = np.array([5, 100, EOD, 7, 127], dtype)
    source = tmp_path / "in"
    if npy:
        with open(source, "wb") as file:
            np.save(file, tokens)
    else:
        tokens.tofile(source)
    pair = from_raw(source, tmp_path / "d", None if npy else dtype, eod=EOD, npy=npy)
    assert documents(tmp_path / "d") == [[5, 100, 3], [7, 127]]
    assert pair.dtype.name == {"uint32": "int32", "uint64": "int64"}.get(dtype, dtype)
    assert to_raw(tmp_path / "d", tmp_path / "out", dtype, npy=npy) == 5
    assert (tmp_path / "out").read_bytes() == source.read_bytes()
    if npy:
        assert np.load(tmp_path / "out").tolist() == tokens.tolist()


def test_without_an_end_all_is_one_document(tmp_path: Path) -> None:
    np.arange(10, dtype="<u2").tofile(tmp_path / "in")
    from_raw(tmp_path / "in", tmp_path / "d", "uint16", output_dtype="int32")
    assert documents(tmp_path / "d") == [list(range(10))]
    assert IndexedReader(tmp_path / "d").dtype == np.int32
    (tmp_path / "in").write_bytes(b"")
    from_raw(tmp_path / "in", tmp_path / "none", "uint16")
    assert documents(tmp_path / "none") == []


def test_a_document_too_long_for_one_sequence_becomes_several(tmp_path: Path) -> None:
    """More than 2^31 - 1 tokens between two ends, told to the cutter without the tokens."""
    limit = 2**31 - 1
    assert cut_lengths(2 * limit + 5) == [limit, limit, 5] and cut_lengths(limit) == [limit] and cut_lengths(0) == []
    with PairWriter(tmp_path / "d", "u1") as writer:
        cutter = raw._Cutter(writer, EOD)
        cutter._open = 2**31  # as add() counts tokens without an end
        cutter.add(np.array([1, EOD, 2, EOD, 4], np.uint8))
        cutter.close()
        assert (writer.num_sequences, writer.num_boundaries) == (4, 4)
        writer._lengths.seek(0)
        writer._boundaries.seek(0)
        assert np.frombuffer(writer._lengths.read(), "<i4").tolist() == [limit, 3, 2, 1]
        assert np.frombuffer(writer._boundaries.read(), "<i8").tolist() == [0, 2, 3, 4]


@pytest.mark.parametrize(("options", "message"), [
    ({"dtype": None}, "does not say its type"), ({"dtype": "float32"}, "never of type float32"),
    ({"dtype": "uint32"}, "10 bytes of tokens, not a multiple of 4"),
    ({"dtype": "uint16", "output_dtype": "uint8"}, "token 4: id 300 does not fit uint8"),
    ({"dtype": "uint16", "output_dtype": "uint32"}, "cannot hold uint32"),
    ({"dtype": "uint16", "eod": 9}, "token 9, which shall end documents, does not occur"),
    ({"dtype": "uint16", "eod": 70000}, "token 70000, which shall end documents, does not occur"),
    ({"dtype": None, "npy": True}, "is not a .npy file"),
])
def test_what_cannot_be_read_leaves_nothing(tmp_path: Path, options: dict[str, object], message: str) -> None:
    np.array([1, 2, 3, 4, 300], "<u2").tofile(tmp_path / "in")
    with pytest.raises(UserError, match=message):
        from_raw(tmp_path / "in", tmp_path / "d", **options)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_arrays_that_are_not_tokens(tmp_path: Path) -> None:
    for array, message in ((np.zeros((2, 3), "u2"), r"\[2, 3\]"), (np.zeros(3), "float64"),
                           (np.array([object()]), "object")):
        np.save(tmp_path / "in.npy", array, allow_pickle=True)
        with pytest.raises(UserError, match=message):
            from_raw(tmp_path / "in.npy", tmp_path / "d", None, npy=True)
    np.save(tmp_path / "in.npy", np.arange(9, dtype="u2"))
    with pytest.raises(UserError, match="holds uint16, not int32"):
        from_raw(tmp_path / "in.npy", tmp_path / "d", "int32", npy=True)
    whole = (tmp_path / "in.npy").read_bytes()
    (tmp_path / "in.npy").write_bytes(whole[:-1])
    with pytest.raises(UserError, match="cut short or damaged"):
        from_raw(tmp_path / "in.npy", tmp_path / "d", None, npy=True)


def test_big_endian_arrays(tmp_path: Path) -> None:
    np.save(tmp_path / "in.npy", np.array([1, 258], ">u2"))
    from_raw(tmp_path / "in.npy", tmp_path / "d", None, npy=True)
    assert documents(tmp_path / "d") == [[1, 258]]


def test_outputs_are_not_replaced_and_never_inputs(tmp_path: Path) -> None:
    np.arange(4, dtype="<u2").tofile(tmp_path / "d.bin")  # as nanoGPT names its streams
    with pytest.raises(UserError, match="d.bin is an input"):
        from_raw(tmp_path / "d.bin", tmp_path / "d", "uint16", overwrite=True)
    from_raw(tmp_path / "d.bin", tmp_path / "e", "uint16")
    with pytest.raises(UserError, match="exist already"):
        from_raw(tmp_path / "d.bin", tmp_path / "e", "uint16")
    with pytest.raises(UserError, match="e.bin is an input"):
        to_raw(tmp_path / "e", tmp_path / "e.bin", overwrite=True)
    with pytest.raises(UserError, match="d.bin exists already"):
        to_raw(tmp_path / "e", tmp_path / "d.bin")
    np.array([0, 1, 2, 300], "<u2").tofile(tmp_path / "f.bin")
    from_raw(tmp_path / "f.bin", tmp_path / "g", "uint16")
    with pytest.raises(UserError, match="token 3: id 300 does not fit uint8"):
        to_raw(tmp_path / "g", tmp_path / "small", "uint8")
    assert not (tmp_path / "small").exists()
