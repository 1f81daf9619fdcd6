"""MegatronOrder beside a literal restatement of the published algorithm; tests/compat holds it against theirs."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest

from megapt.data.megatron_order import MegatronOrder, megatron_blend, megatron_blend_sizes
from megapt.errors import UserError


def restated(lengths: list[int], sequence: int, seed: int, num_samples: int | None, extra: int,
             drop_last: bool) -> tuple[list[int], list[list[int]], list[int], bool]:
    """The three indices, token by token, and whether the last epoch is shuffled by itself."""
    tokens, epochs = sum(lengths), 1
    while num_samples is not None and epochs * tokens < num_samples * sequence + extra:
        epochs += 1
    before_last = ((epochs - 1) * tokens - extra) // sequence
    separate = epochs > 1 and num_samples - before_last < int(0.80 * ((tokens - extra) // sequence))
    random = np.random.RandomState(seed)
    documents: list[int] = []
    for times in ((epochs - 1, 1) if separate else (epochs,)):
        part = np.array(list(range(len(lengths))) * times)
        random.shuffle(part)
        documents += part.tolist()
    places = [(d, at) for d, document in enumerate(documents) for at in range(lengths[document])]
    whole = (len(places) - extra) // sequence
    rows = [[0, 0]]
    for k in range(1, whole + 1):
        d, at = places[k * sequence - (1 - extra)]
        rows.append([d, at + (1 - extra)])
    if not drop_last and (len(places) - extra) % sequence:
        rows.append([len(documents) - 1, lengths[documents[-1]] - extra])
    first, shuffled = before_last if separate else len(rows) - 1, []
    for low, high in ((0, first), (first, len(rows) - 1)):
        part = np.arange(low, high)
        random.shuffle(part)
        shuffled += part.tolist()
    return documents, rows, shuffled, separate


def test_indices_follow_the_restated_algorithm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megapt.data.megatron_order._CHUNK", 7)  # so that documents come in many blocks
    random = np.random.default_rng(0)
    separate = 0
    for trial in range(150):
        lengths = random.integers(0, 30, int(random.integers(3, 40)))
        if lengths.sum() < 20:
            continue
        sequence, extra, drop_last = int(random.integers(1, 18)), trial % 2, trial % 3 != 0
        num_samples = None if trial % 5 == 0 else int(random.integers(1, 4 * lengths.sum() // sequence + 2))
        name = "train" if drop_last else "valid"
        order = MegatronOrder(lengths.astype(np.int32), sequence, trial, num_samples, name, 0, bool(extra), drop_last)
        documents, rows, shuffled, apart = restated(lengths.tolist(), sequence, trial, num_samples, extra, drop_last)
        assert order.document_index.tolist() == documents
        assert order.sample_index.tolist() == rows
        assert order.shuffle_index.tolist() == shuffled
        assert order.num_samples >= (num_samples or 1)
        separate += apart
    assert 10 < separate < 100


def test_pieces_are_the_documents_end_to_end() -> None:
    lengths = np.random.default_rng(1).integers(0, 20, 60).astype(np.int32)
    for extra in (True, False):
        order = MegatronOrder(lengths, 16, 5, 70, "train", first_sequence=1000, add_extra_token=extra)
        stream = [(int(s), at) for s in order.document_index for at in range(lengths[s - 1000])]
        assert order.document_index.min() == 1000
        for i, pieces in enumerate(order.pieces(np.arange(order.num_samples))):
            begin = int(order.shuffle_index[i]) * 16
            read = [(s, at + k) for s, at, n in zip(*(part.tolist() for part in pieces), strict=True) for k in range(n)]
            assert read == stream[begin:begin + 16 + extra]
            assert pieces.lengths.min() > 0
        with pytest.raises(IndexError):
            order.pieces(np.array([order.num_samples]))


def test_partial_last_sample_ends_with_the_documents() -> None:
    lengths = np.array([10, 13], np.int32)
    order = MegatronOrder(lengths, 8, 5, None, "valid", drop_last=False)
    assert order.num_samples == 3
    totals = [int(pieces.lengths.sum()) for pieces in order.pieces(np.argsort(order.shuffle_index))]
    assert totals == [9, 9, 7]
    assert MegatronOrder(lengths, 8, 5, None, "valid").num_samples == 2


def cached(folder: Path, lengths: np.ndarray, fingerprint: str = "x", seed: int = 1) -> MegatronOrder:
    return MegatronOrder(lengths, 16, seed, 50, "train", cache=folder, fingerprint=fingerprint)


def test_cache_is_mapped_and_keyed_by_contents(tmp_path: Path) -> None:
    lengths = np.random.default_rng(1).integers(0, 20, 60).astype(np.int32)
    plain = MegatronOrder(lengths, 16, 1, 50, "train")
    built, loaded = cached(tmp_path / "new", lengths), cached(tmp_path / "new", lengths)
    for order in (built, loaded):
        assert isinstance(order.sample_index, np.memmap)
        for name in ("document_index", "sample_index", "shuffle_index"):
            assert np.array_equal(getattr(order, name), getattr(plain, name))
    files = {path.name for path in (tmp_path / "new").iterdir()}
    assert len(files) == 4
    # A corpus rebuilt at the same path, or another seed, does not meet the old index.
    other = cached(tmp_path / "new", lengths[:40], fingerprint="y")
    assert int(other.document_index.max()) == 39
    assert cached(tmp_path / "new", lengths, seed=2).document_index.tolist() != plain.document_index.tolist()
    assert len(list((tmp_path / "new").iterdir())) == 12
    with pytest.raises(ValueError, match="fingerprint"):
        cached(tmp_path, lengths, fingerprint="")


def test_damaged_caches_are_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = np.random.default_rng(1).integers(0, 20, 60).astype(np.int32)
    expected = np.array(cached(tmp_path, lengths).sample_index)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == 4
    for name in names:
        path = tmp_path / name
        whole = path.read_bytes()
        foreign = json.dumps({"order": {"seed": 9}, "files": []}).encode()
        for content in (b"", whole[:-8], whole[:-8] + bytes(8), foreign, b"{}", b"[1]", None):
            path.unlink()
            if content is not None:
                path.write_bytes(content)
            assert np.array_equal(cached(tmp_path, lengths).sample_index, expected), (name, content)
            assert path.read_bytes() == whole
    built = []
    monkeypatch.setattr(MegatronOrder, "_build", lambda *args: built.append(args))
    cached(tmp_path, lengths)
    assert not built  # a whole cache is not built again


def test_builders_at_the_same_time_do_no_harm(tmp_path: Path) -> None:
    lengths = np.random.default_rng(1).integers(0, 20, 2000).astype(np.int32)
    expected = MegatronOrder(lengths, 16, 1, 50, "train").sample_index
    orders: list[MegatronOrder] = []
    threads = [threading.Thread(target=lambda: orders.append(cached(tmp_path, lengths))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(orders) == 6
    assert all(np.array_equal(order.sample_index, expected) for order in orders)
    assert len(list(tmp_path.iterdir())) == 4  # nothing temporary is left


def test_unwritable_cache_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cache .*file.* cannot be written"):
        cached(tmp_path / "file", np.full(9, 99, np.int32))


def test_errors() -> None:
    lengths = np.full(3, 5, np.int32)
    with pytest.raises(UserError, match=r"15 tokens in test .* 15 \+ 1 .* longest possible sequence is 14"):
        MegatronOrder(lengths, 15, 1, None, "test")
    assert MegatronOrder(lengths, 14, 1, None, "test").num_samples == 1
    assert MegatronOrder(lengths, 15, 1, None, "test", add_extra_token=False).num_samples == 1
    with pytest.raises(UserError, match='no split "training"'):
        MegatronOrder(lengths, 5, 1, None, "training")
    with pytest.raises(UserError, match="valid alone, not in train"):
        MegatronOrder(lengths, 5, 1, None, "train", drop_last=False)
    with pytest.raises(UserError, match="seed of -1"):
        MegatronOrder(lengths, 5, -1, None, "train")
    with pytest.raises(UserError, match="0 tokens in train are too few"):
        MegatronOrder(np.zeros(3, np.int32), 5, 1, 10, "train")
    with pytest.raises(UserError, match="0 samples of 5"):
        MegatronOrder(lengths, 5, 1, 0, "train")
    with pytest.raises(UserError, match="at most 2147483648"):
        MegatronOrder(lengths, 5, 1, None, "train", first_sequence=2**31 - 2)


def greedy(shares: list[float], size: int, limits: list[int] | None) -> list[int]:
    counts, chosen = [0] * len(shares), []
    for n in range(size):
        best, most = -1, -np.inf
        for i, share in enumerate(shares):
            if limits is not None and counts[i] == limits[i]:
                continue
            error = share * float(max(n, 1)) - float(counts[i])
            if error > most:
                best, most = i, error
        counts[best] += 1
        chosen.append(best)
    return chosen


def test_blends_follow_the_restated_greedy_choice() -> None:
    random = np.random.default_rng(2)
    tried: list[list[float]] = [[2], [1, 1], [0.1, 0.2, 0.7], [1] * 6, np.exp(random.normal(0, 3, 12)).tolist()]
    for weights in tried:
        shares = (np.array(weights) / np.sum(np.array(weights, np.float64))).tolist()
        datasets, ordinals = megatron_blend(weights, 9000)  # two runs side by side
        assert datasets.tolist() == greedy(shares, 9000, None)
        for i in range(len(weights)):
            assert ordinals[datasets == i].tolist() == list(range(int((datasets == i).sum())))
    for counts in ([3], [1, 5000, 4000], [70, 1, 1, 900, 33]):
        datasets, _ = megatron_blend(counts, None)
        assert datasets.tolist() == greedy([n / float(sum(counts)) for n in counts], sum(counts), counts)


def test_blend_sizes_and_errors() -> None:
    normal, used, built = megatron_blend_sizes([1, 2, 1], 1001)
    assert (normal, used, built) == ([0.25, 0.5, 0.25], [251, 501, 251], [253, 504, 253])
    for bad in ([], [1, 0], [1, -1], [float("nan")], [float("inf"), 1]):
        with pytest.raises(UserError, match="positive weights"):
            megatron_blend(bad, 5)
    with pytest.raises(UserError, match="whole ones"):
        megatron_blend([1.5, 2], None)
