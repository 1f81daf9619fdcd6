from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from megapt.batch import IGNORE, StepBatch
from megapt.data.batches import BatchSchedule
from megapt.data.composite import CompositeDataset, Objective
from megapt.data.dataset import TokenDataset
from megapt.data.indexed import IndexedWriter
from megapt.data.loader import StepLoader, eval_batches
from megapt.data.receipt import Receipt
from megapt.errors import UserError

VOCABULARY = 1000


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    with IndexedWriter(tmp_path / "corpus", "u2") as writer:
        for length in rng.integers(1, 60, 200):
            writer.add_document(rng.integers(0, VOCABULARY, length))
    return tmp_path / "corpus"


def opened(corpus: Path, split: str, shares: str, vocabulary: int = VOCABULARY, **more: Any) -> CompositeDataset:
    objective = Objective(more.pop("documents", False))
    return CompositeDataset({"c": TokenDataset(corpus, split, shares, 16, 7, **more)}, vocabulary, objective=objective)


@pytest.fixture
def train(corpus: Path) -> CompositeDataset:
    return opened(corpus, "train", "90,10")


def rows_of(data: CompositeDataset, ids: npt.NDArray[np.integer[Any]]) -> torch.Tensor:
    return torch.from_numpy(data.sources["c"].sample(ids))


def gather(ranks: list[StepBatch]) -> tuple[torch.Tensor, torch.Tensor]:
    micro_batches = [micro for rank in ranks for micro in rank.micro_batches]
    return torch.cat([m.tokens for m in micro_batches]), torch.cat([m.labels for m in micro_batches])


LAYOUTS = [(dp, micro) for dp in (1, 2, 4) for micro in (1, 2) if 8 % (dp * micro) == 0]


@pytest.mark.parametrize(("dp", "micro"), LAYOUTS)
def test_global_batch_is_the_same_in_every_layout(train: CompositeDataset, dp: int, micro: int) -> None:
    schedule = BatchSchedule(16, ramp=(8, 8, 40))
    loaders = [StepLoader(train, schedule, micro, rank, dp) for rank in range(dp)]
    receipt, expected = Receipt.of(train), Receipt.of(train)
    for step in (0, 1, 2, 4, 5, 6, 30, 31, 3):
        ranks = [loader.step(step) for loader in loaders]
        size, first = schedule.size(step), schedule.first_sample(step)
        rows = rows_of(train, np.arange(first, first + size))
        tokens, labels = gather(ranks)
        assert torch.equal(tokens, rows[:, :-1])
        assert torch.equal(labels, rows[:, 1:])
        for rank in ranks:
            assert rank.sample_ids.tolist() == list(range(first, first + size))
            assert rank.loss_tokens == size * 16
            assert len(rank.micro_batches) == size // dp // micro
            for micro_batch in rank.micro_batches:
                assert micro_batch.tokens.shape == micro_batch.labels.shape == (micro, 16)
                assert micro_batch.tokens.dtype == micro_batch.labels.dtype == torch.int64
                assert micro_batch.tokens.is_contiguous()
        receipt.advance(train, ranks[-1].sample_ids)
        for sample in range(first, first + size):
            expected.advance(train, np.array([sample]))
    assert receipt == expected
    for loader in loaders:
        loader.close()


def test_prefetch_changes_nothing(train: CompositeDataset) -> None:
    schedule = BatchSchedule(4)
    steps = [0, 1, 2, 9, 10, 2, 2, 3, 100]
    found = []
    for prefetch, workers in ((0, 1), (1, 1), (3, 1), (4, 3)):
        with StepLoader(train, schedule, 2, 0, 1, prefetch, workers) as loader:
            found.append(torch.stack([gather([loader.step(s)])[0] for s in steps]))
    assert all(torch.equal(found[0], other) for other in found[1:])


class Source:
    """A data set that notes which thread reads what, and fails at one sample."""

    name = "source"
    sequence = 4
    num_samples_per_epoch = 10**9

    def __init__(self, broken: int = -1) -> None:
        self.broken = broken
        self.read: dict[int, str] = {}

    def fill(
        self, ids: npt.NDArray[np.integer[Any]], tokens: npt.NDArray[np.int64], labels: npt.NDArray[np.int64]
    ) -> None:
        self.read[int(ids[0])] = threading.current_thread().name
        if self.broken in ids:
            raise OSError("the disk is gone")
        tokens[:] = labels[:] = np.asarray(ids)[:, None]

    def loss_tokens(self, ids: npt.NDArray[np.integer[Any]]) -> int:
        return len(ids) * 4


def test_next_step_is_read_in_the_background() -> None:
    source = Source()
    with StepLoader(source, BatchSchedule(1), 1, 0, 1) as loader:
        loader.step(0)
        for step in range(1, 4):
            assert int(loader.step(step).micro_batches[0].tokens[0, 0]) == step
    main = threading.current_thread().name
    assert source.read[0] == main
    assert all(source.read[step].startswith("data") for step in range(1, 4))


def test_steps_read_ahead_are_read_once() -> None:
    class Counting(Source):
        def __init__(self) -> None:
            super().__init__()
            self.ids: list[int] = []
            self.third = threading.Event()

        def fill(self, ids: npt.NDArray[np.integer[Any]], *rows: npt.NDArray[np.int64]) -> None:
            self.ids.append(int(ids[0]))
            if ids[0] == 3:
                self.third.set()
            super().fill(ids, *rows)

    source = Counting()
    with StepLoader(source, BatchSchedule(1), 1, 0, 1, prefetch=3) as loader:
        loader.step(0)
        assert source.third.wait(20)
        for step in (1, 2, 3):
            loader.step(step)
    assert all(source.ids.count(step) == 1 for step in range(4))


def test_error_of_the_thread_surfaces_in_its_step() -> None:
    with StepLoader(Source(broken=2), BatchSchedule(1), 1, 0, 1) as loader:
        loader.step(0)
        loader.step(1)
        for _ in range(2):  # and again when asked again
            with pytest.raises(OSError, match="the disk is gone"):
                loader.step(2)
        loader.step(3)


def test_close_ends_the_thread_and_the_loader() -> None:
    before = threading.active_count()
    loader = StepLoader(Source(), BatchSchedule(1), 1, 0, 1)
    loader.step(0)
    loader.close()
    loader.close()
    assert threading.active_count() == before
    with pytest.raises(RuntimeError, match="closed"):
        loader.step(1)


@pytest.mark.parametrize("dtype", ["u2", "i4", "i8"])
def test_token_outside_the_vocabulary(tmp_path: Path, dtype: str) -> None:
    for name, odd in (("fine", 0), ("high", 500), ("low", -1 if dtype != "u2" else 501), ("giant", 2**40)):
        if odd > 2**16 and dtype != "i8":
            continue
        with IndexedWriter(tmp_path / name, dtype) as writer:
            writer.add_document([*range(400), odd, *range(400)])
        with StepLoader(opened(tmp_path / name, "train", "1", 500), BatchSchedule(60), 4, 0, 1) as loader:
            if name == "fine":
                loader.step(0)
                continue
            with pytest.raises(UserError, match=rf"{name} \(train\) holds token id {odd}, .* 500 ids"):
                loader.step(0)


def test_documents_of_micro_batches(corpus: Path, train: CompositeDataset) -> None:
    data = opened(corpus, "train", "90,10", documents=True)
    ends = np.cumsum(data.sources["c"].reader.lengths)
    plain, cut = StepLoader(train, BatchSchedule(8), 2, 0, 2), StepLoader(data, BatchSchedule(8), 2, 0, 2)
    with plain, cut:
        for step in (0, 3, 77):
            rows = rows_of(train, cut.step(step).sample_ids)
            starts = data.sources["c"].places(cut.step(step).sample_ids)[1]
            for k, (one, other) in enumerate(
                zip(plain.step(step).micro_batches, cut.step(step).micro_batches, strict=True)
            ):
                # Tokens and labels stay what they are: the label after a document is the next one's first token.
                assert torch.equal(one.tokens, other.tokens) and torch.equal(one.labels, other.labels)
                assert torch.equal(other.tokens, rows[2 * k:2 * k + 2, :-1])
                assert one.documents is None and other.documents is not None
                lengths = []
                for start in starts[2 * k:2 * k + 2].tolist():
                    ring = [*ends[ends <= data.sources["c"].num_tokens], *(ends + data.sources["c"].num_tokens)]
                    inner = [int(e) - start for e in ring if start < e < start + 16]
                    lengths += np.diff([0, *inner, 16]).tolist()
                documents = other.documents
                assert list(documents.lengths) == lengths and sum(lengths) == 32
                assert documents.cu_seqlens.dtype == torch.int32 and documents.positions.dtype == torch.int64
                assert documents.cu_seqlens.tolist() == [0, *np.cumsum(lengths).tolist()]
                assert documents.positions.tolist() == [p for n in lengths for p in range(n)]


@pytest.mark.parametrize("packing", ["best_fit", "document"])
def test_whole_documents_and_padding(corpus: Path, tmp_path: Path, packing: str) -> None:
    data = opened(corpus, "train", "90,10", packing=packing, cache=tmp_path / "cache", documents=True)
    source = data.sources["c"]
    stream = source.reader.tokens(0, source.reader.num_tokens)
    with StepLoader(data, BatchSchedule(8), 4, 0, 1) as loader:
        batch = loader.step(2)
    pieces = source.pieces(batch.sample_ids)
    tokens, labels = (torch.zeros(8, 16, dtype=torch.int64), torch.full((8, 16), IGNORE))
    lengths: list[list[int]] = [[] for _ in range(8)]
    for row, column, start, length in zip(pieces.row, pieces.column, pieces.start, pieces.length, strict=True):
        text = torch.from_numpy(stream[start:start + length].astype(np.int64))
        shown = min(16, int(length))
        tokens[row, column:column + shown] = text[:shown]
        labels[row, column:column + length - 1] = text[1:]
        lengths[row].append(shown)
    found = gather([batch])
    assert torch.equal(found[0], tokens) and torch.equal(found[1], labels)
    assert batch.loss_tokens == int((labels != IGNORE).sum())
    for k, micro_batch in enumerate(batch.micro_batches):
        padded = [[*row, 16 - sum(row)] if sum(row) < 16 else row for row in lengths[4 * k:4 * k + 4]]
        assert micro_batch.documents is not None
        assert micro_batch.documents.lengths == tuple(n for row in padded for n in row)


def test_the_last_validation_sample_is_padded(corpus: Path) -> None:
    data = opened(corpus, "valid", "70,30", documents=True)
    last = data.num_samples_per_epoch - 1
    source = data.sources["c"]
    rest = source.num_tokens - 16 * last
    assert 1 < rest < 16
    tokens, labels = (np.empty((1, 16), np.int64) for _ in range(2))
    rows = data.fill(np.array([last]), tokens, labels)
    assert rows is not None and rows.length.sum() == 16 and rows.length[-1] == 16 - rest
    assert (labels[0, rest - 1:] == IGNORE).all() and (labels[0, :rest - 1] == tokens[0, 1:rest]).all()
    assert data.loss_tokens(np.array([last])) == rest - 1


@pytest.mark.parametrize(("batch", "micro", "dp", "message"), [
    (10, 2, 2, r"10 samples .* 2 x .* size 2 = 4; .* 8 or 12; with 10, a micro-batch of 1 or 5 does"),
    (3, 2, 2, r"= 4; the nearest global batches that fit are 4$"),
    (8, 0, 2, "micro-batch of 0"),
])
def test_batches_that_cannot_be_cut(batch: int, micro: int, dp: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        StepLoader(Source(), BatchSchedule(batch), micro, 0, dp)


def test_ramp_sizes_are_checked_at_the_start() -> None:
    with pytest.raises(UserError, match="global batch of 6"):
        StepLoader(Source(), BatchSchedule(8, (4, 2, 1000)), 2, 0, 2)
    with pytest.raises(ValueError, match="rank 2"):
        StepLoader(Source(), BatchSchedule(8), 2, 2, 2)


@pytest.mark.parametrize(("dp", "micro"), LAYOUTS)
def test_evaluation_takes_the_same_samples_in_every_layout(corpus: Path, dp: int, micro: int) -> None:
    valid = opened(corpus, "valid", "70,30")
    ranks = [list(eval_batches(valid, 3, 8, micro, rank, dp)) for rank in range(dp)]
    rows = rows_of(valid, np.arange(24))
    for k in range(3):
        tokens, labels = gather([rank[k] for rank in ranks])
        assert torch.equal(tokens, rows[8 * k:8 * k + 8, :-1])
        assert torch.equal(labels, rows[8 * k:8 * k + 8, 1:])
        assert ranks[0][k].loss_tokens == 8 * 16


def test_evaluation_beyond_the_data(corpus: Path) -> None:
    valid = opened(corpus, "valid", "70,30")
    most = valid.num_samples_per_epoch // 8
    assert len(list(eval_batches(valid, most, 8, 2, 0, 2))) == most
    with pytest.raises(UserError, match=f"needs {8 * most + 8} samples, .* enough for {most} such batches"):
        eval_batches(valid, most + 1, 8, 2, 0, 2)
    with pytest.raises(UserError, match="not a positive multiple"):
        eval_batches(valid, 1, 7, 2, 0, 2)
