from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from megapt.batch import StepBatch
from megapt.data.batches import BatchSchedule
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


@pytest.fixture
def train(corpus: Path) -> TokenDataset:
    return TokenDataset(corpus, "train", "90,10", sequence=16, seed=7)


def gather(ranks: list[StepBatch]) -> tuple[torch.Tensor, torch.Tensor]:
    micro_batches = [micro for rank in ranks for micro in rank.micro_batches]
    return torch.cat([m.tokens for m in micro_batches]), torch.cat([m.labels for m in micro_batches])


LAYOUTS = [(dp, micro) for dp in (1, 2, 4) for micro in (1, 2) if 8 % (dp * micro) == 0]


@pytest.mark.parametrize(("dp", "micro"), LAYOUTS)
def test_global_batch_is_the_same_in_every_layout(train: TokenDataset, dp: int, micro: int) -> None:
    schedule = BatchSchedule(16, ramp=(8, 8, 40))
    loaders = [StepLoader(train, schedule, micro, rank, dp, VOCABULARY) for rank in range(dp)]
    receipt, expected = Receipt(train.fingerprint), Receipt(train.fingerprint)
    for step in (0, 1, 2, 4, 5, 6, 30, 31, 3):
        ranks = [loader.step(step) for loader in loaders]
        size, first = schedule.size(step), schedule.first_sample(step)
        rows = torch.from_numpy(train.sample(np.arange(first, first + size)))
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
        receipt.advance(ranks[-1].sample_ids)
        for sample in range(first, first + size):
            expected.advance(np.array([sample]))
    assert receipt == expected
    for loader in loaders:
        loader.close()


def test_prefetch_changes_nothing(train: TokenDataset) -> None:
    schedule = BatchSchedule(4)
    steps = [0, 1, 2, 9, 10, 2, 2, 3, 100]
    found = []
    for prefetch in (0, 1, 3):
        with StepLoader(train, schedule, 2, 0, 1, VOCABULARY, prefetch) as loader:
            found.append(torch.stack([gather([loader.step(s)])[0] for s in steps]))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


class Source:
    """A data set that notes which thread reads what, and fails at one sample."""

    name = "source"
    num_samples_per_epoch = 10**9

    def __init__(self, broken: int = -1) -> None:
        self.broken = broken
        self.read: dict[int, str] = {}

    def sample(self, ids: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int64]:
        self.read[int(ids[0])] = threading.current_thread().name
        if self.broken in ids:
            raise OSError("the disk is gone")
        return np.repeat(np.asarray(ids, np.int64)[:, None], 5, axis=1)

    def loss_tokens(self, ids: npt.NDArray[np.integer[Any]]) -> int:
        return len(ids) * 4


def test_next_step_is_read_in_the_background() -> None:
    source = Source()
    with StepLoader(source, BatchSchedule(1), 1, 0, 1, VOCABULARY) as loader:
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

        def sample(self, ids: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int64]:
            self.ids.append(int(ids[0]))
            if ids[0] == 3:
                self.third.set()
            return super().sample(ids)

    source = Counting()
    with StepLoader(source, BatchSchedule(1), 1, 0, 1, VOCABULARY, prefetch=3) as loader:
        loader.step(0)
        assert source.third.wait(20)
        for step in (1, 2, 3):
            loader.step(step)
    assert all(source.ids.count(step) == 1 for step in range(4))


def test_error_of_the_thread_surfaces_in_its_step() -> None:
    with StepLoader(Source(broken=2), BatchSchedule(1), 1, 0, 1, VOCABULARY) as loader:
        loader.step(0)
        loader.step(1)
        for _ in range(2):  # and again when asked again
            with pytest.raises(OSError, match="the disk is gone"):
                loader.step(2)
        loader.step(3)


def test_close_ends_the_thread_and_the_loader() -> None:
    before = threading.active_count()
    loader = StepLoader(Source(), BatchSchedule(1), 1, 0, 1, VOCABULARY)
    loader.step(0)
    loader.close()
    loader.close()
    assert threading.active_count() == before
    with pytest.raises(RuntimeError, match="closed"):
        loader.step(1)


def test_token_outside_the_vocabulary(train: TokenDataset) -> None:
    highest = int(train.sample(np.arange(train.num_samples_per_epoch)).max())
    with StepLoader(train, BatchSchedule(100), 4, 0, 1, highest) as loader, \
            pytest.raises(UserError, match=rf"corpus \(train\) holds token id {highest}, .* {highest} ids"):
        for step in range(4):
            loader.step(step)
    with StepLoader(train, BatchSchedule(100), 4, 0, 1, highest + 1) as loader:
        for step in range(4):
            loader.step(step)


@pytest.mark.parametrize(("batch", "micro", "dp", "message"), [
    (10, 2, 2, r"10 samples .* 2 x .* size 2 = 4; .* 8 or 12; with 10, a micro-batch of 1 or 5 does"),
    (3, 2, 2, r"= 4; the nearest global batches that fit are 4$"),
    (8, 0, 2, "micro-batch of 0"),
])
def test_batches_that_cannot_be_cut(batch: int, micro: int, dp: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        StepLoader(Source(), BatchSchedule(batch), micro, 0, dp, VOCABULARY)


def test_ramp_sizes_are_checked_at_the_start() -> None:
    with pytest.raises(UserError, match="global batch of 6"):
        StepLoader(Source(), BatchSchedule(8, (4, 2, 1000)), 2, 0, 2, VOCABULARY)
    with pytest.raises(ValueError, match="rank 2"):
        StepLoader(Source(), BatchSchedule(8), 2, 2, 2, VOCABULARY)


@pytest.mark.parametrize(("dp", "micro"), LAYOUTS)
def test_evaluation_takes_the_same_samples_in_every_layout(corpus: Path, dp: int, micro: int) -> None:
    valid = TokenDataset(corpus, "valid", "70,30", sequence=16, seed=7)
    ranks = [list(eval_batches(valid, 3, 8, micro, rank, dp, VOCABULARY)) for rank in range(dp)]
    rows = torch.from_numpy(valid.sample(np.arange(24)))
    for k in range(3):
        tokens, labels = gather([rank[k] for rank in ranks])
        assert torch.equal(tokens, rows[8 * k:8 * k + 8, :-1])
        assert torch.equal(labels, rows[8 * k:8 * k + 8, 1:])
        assert ranks[0][k].loss_tokens == 8 * 16


def test_evaluation_beyond_the_data(corpus: Path) -> None:
    valid = TokenDataset(corpus, "valid", "70,30", sequence=16, seed=7)
    most = valid.num_samples_per_epoch // 8
    assert len(list(eval_batches(valid, most, 8, 2, 0, 2, VOCABULARY))) == most
    with pytest.raises(UserError, match=f"needs {8 * most + 8} samples, .* enough for {most} such batches"):
        eval_batches(valid, most + 1, 8, 2, 0, 2, VOCABULARY)
    with pytest.raises(UserError, match="not a positive multiple"):
        eval_batches(valid, 1, 7, 2, 0, 2, VOCABULARY)
