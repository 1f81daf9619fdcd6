"""Runs on corpora that others made, or that lie elsewhere: read as they are, to the same losses and receipts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megapt.data.indexed import IndexedReader
from megapt.data.show import check_run, config_of, read_step
from megapt.errors import UserError
from tests.data.test_remote import Handler, put
from tests.data.test_remote import server as server  # the fixture
from tests.end_to_end import runs
from tests.end_to_end.runs import Ranks

DOCUMENTS = 80

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # theirs


def _megatron_corpus(prefix: Path, like: IndexedReader) -> None:
    """The same documents by megatron-core's own writer, as its preprocessing calls it."""
    theirs = pytest.importorskip("megatron.core.datasets.indexed_dataset", exc_type=ImportError)
    import torch

    builder = theirs.IndexedDatasetBuilder(f"{prefix}.bin", dtype=theirs.DType.optimal_dtype(runs.VOCABULARY))
    for number in range(len(like)):
        tokens = like.sequence(number).tolist()
        builder.add_document(torch.tensor(tokens), [len(tokens)])
    builder.finalize(f"{prefix}.idx")


@pytest.fixture
def started(tmp_path: Path, server: str) -> Iterator[dict[str, Path]]:
    """Runs of the same config on our corpus, one that Megatron made, and one behind http; their folders."""
    ours = runs.corpus(tmp_path / "ours", DOCUMENTS)
    _megatron_corpus(tmp_path / "theirs", IndexedReader(ours))
    put(f"{server}/corpus", ours)
    prefixes = {"ours": ours, "theirs": tmp_path / "theirs", "http": f"{server}/corpus"}
    train = {"train": {"steps": 3, "validate_samples": 8}}
    config = runs.write_config(tmp_path / "config.yaml", ours, **train)
    arguments = {name: (f"data.train={prefix}", f"run.folder={tmp_path / name}") for name, prefix in prefixes.items()}
    ranks = [Ranks(tmp_path / f"r-{name}", 1, ["--config", config, *more]) for name, more in arguments.items()]
    for each in ranks:
        each.finish()
    yield {name: tmp_path / name for name in prefixes}


def _receipt(folder: Path, name: str) -> dict[str, Any]:
    """Without the source's name, which the chain does not hold."""
    receipt = dict(runs.meta(folder)["receipt"])
    for key in ("source_samples", "source_tokens"):
        receipt[key] = receipt[key][name]
    return receipt


def test_a_corpus_of_megatron_and_one_behind_http_train_unchanged(started: dict[str, Path]) -> None:
    labels = {"ours": "ours", "theirs": "theirs", "http": "corpus"}
    whole = runs.curve(started["ours"])
    assert ["valid_loss" in line for line in whole] == [False, False, False, True]
    for name, label in labels.items():
        assert runs.curve(started[name]) == whole, name
        assert _receipt(started[name], label) == _receipt(started["ours"], "ours"), name
    assert list((started["http"] / "cache").glob("*.block")) and Handler.requests
    shown = [list(read_step(config_of(started[name]), 2)) for name in labels]
    assert [[one.tokens for one in step] for step in shown] == [[one.tokens for one in shown[0]]] * 3

    # What a run read is told from the data that it read, or not at all.
    check_run(started["ours"], config_of(started["ours"]))
    runs.corpus(started["ours"].parent / "ours", DOCUMENTS, seed=5)
    with pytest.raises(UserError, match="is not what the first 24 samples of this run came from .files: "):
        check_run(started["ours"], config_of(started["ours"]))
