"""Data as a config names it, and what `megapt data show` says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from megapt.batch import IGNORE
from megapt.config import Config, dump, from_tree
from megapt.data.indexed import IndexedWriter
from megapt.data.loader import StepLoader
from megapt.data.megatron_order import megatron_blend
from megapt.data.open import open_train, open_valid, schedule
from megapt.data.show import config_of, print_sources, read_step, show
from megapt.data.tokenizers import load, train_bpe
from megapt.errors import UserError

TEXTS = [f"document {i} tells of {'many ' * (i % 5)}things and ends here" for i in range(60)]
NAMES = ("web", "books", "code")


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three corpora of the same kind of text, 1 : 2 : 3 in size, and a tokenizer that knows <mask>."""
    root = tmp_path_factory.mktemp("corpora")
    train_bpe(TEXTS, 300, root / "plain.json")
    model = Tokenizer.from_file(str(root / "plain.json"))
    model.add_special_tokens(["<mask>"])
    model.save(str(root / "tokenizer.json"))
    tokenizer = load(root / "tokenizer.json")
    for size, name in enumerate(NAMES, 1):
        with IndexedWriter(root / name, "u2") as writer:
            for text in TEXTS * size:
                writer.add_document([*tokenizer.encode(f"{name}: {text}"), tokenizer.eod or 0])
    return root


def config(root: Path, objective: str = "next_token", **data: Any) -> Config:
    train = data.pop("train", [{"path": str(root / name)} for name in NAMES])
    return from_tree({
        "objective": objective,
        "model": {
            "layers": 1, "hidden": 8, "heads": 1, "ffn": 8, "vocabulary": data.pop("vocabulary", 320),
            "attention": "bidirectional" if objective == "masked_lm" else "causal",
        },
        "data": {
            "train": train, "tokenizer": str(root / "tokenizer.json"), "cache": str(root / "cache"),
            **({} if "valid" in data else {"split": "80,20,0"}), **data,
        },
        "batch": {"sequence": 16, "samples": 8, "micro": 2},
        "train": data.pop("length", {"steps": 40}),
    }).config  # fmt: skip


def sources(root: Path, **each: list[Any]) -> list[dict[str, Any]]:
    rows = zip(*([(key, value) for value in values] for key, values in each.items()), strict=True)
    return [{"path": str(root / name), **dict(row)} for name, row in zip(NAMES, rows, strict=True)]


# Opening


def test_without_weights_all_sources_end_together(corpora: Path) -> None:
    data = open_train(config(corpora), 320)
    uses = data.describe(data.num_samples_per_epoch)
    assert [use.name for use in uses] == list(NAMES)
    assert [use.epochs for use in uses] == pytest.approx([1, 1, 1], abs=0.02)
    assert sum(use.samples for use in uses) == data.num_samples_per_epoch
    assert uses[2].available > 2.9 * uses[0].available


def test_weights_budgets_and_phases(corpora: Path) -> None:
    weighted = open_train(config(corpora, train=sources(corpora, weight=[1.0, 1.0, 2.0])), 320)
    assert weighted.source_samples(320) == {"web": 80, "books": 80, "code": 160}
    budgets = sources(corpora, tokens=[1600, 320, 3200])
    assert open_train(config(corpora, train=budgets), 320).source_samples(320) == {"web": 100, "books": 20, "code": 200}
    with pytest.raises(UserError, match="budgets make 5,120 tokens, but the run has 16,000; set train.tokens=5120"):
        open_train(config(corpora, train=budgets), 1000)
    phases = [{"from_token": 1600, "weights": {"code": 1.0}}]
    phased = open_train(config(corpora, train=sources(corpora, weight=[1.0, 1.0, 0.5]), phases=phases), 320)
    assert phased.source_samples(320) == {"web": 40, "books": 40, "code": 240}
    assert set(phased.locate(np.arange(100, 320))[0].tolist()) == {2}
    with pytest.raises(UserError, match="no source can have a budget"):
        open_train(config(corpora, train=budgets, phases=phases), 320)
    with pytest.raises(UserError, match="`tokens` shares the run out among sources, but web is the only one"):
        open_train(config(corpora, train=budgets[:1]), 320)
    facts = [open_train(config(corpora, train=t), 320).facts() for t in (budgets, sources(corpora, weight=[1.0] * 3))]
    assert facts[0].keys() == facts[1].keys() and facts[0]["blend"] != facts[1]["blend"]
    assert facts[0]["web seed"] == "1234" and facts[0]["objective"] == "next_token"


def test_megatron_blend(corpora: Path) -> None:
    weights = [0.2, 0.3, 0.5]
    data = open_train(config(corpora, train=sources(corpora, weight=weights), order="megatron"), 320)
    source, ordinal = data.locate(np.arange(320))
    expected = megatron_blend(weights, 320)
    assert source.tolist() == expected[0].tolist() and ordinal.tolist() == expected[1].tolist()
    assert data.source_samples(320) == dict(zip(NAMES, np.bincount(source).tolist(), strict=True))
    for wrong, message in (
        ({"train": sources(corpora, tokens=[1, 1, 1])}, "needs a `weight` for every source"),
        ({"phases": [{"from_token": 16, "weights": {"web": 1.0}}]}, "Megatron's blends keep their weights"),
    ):
        with pytest.raises(UserError, match=message):
            open_train(config(corpora, order="megatron", **wrong), 320)
    for train in (str(corpora / "web"), sources(corpora, weight=weights)):
        with pytest.raises(UserError, match="keeps all 10,000,000,000,000,000 samples of the run in memory"):
            open_train(config(corpora, order="megatron", train=train), 10**16)


def test_a_blend_is_the_same_in_every_layout(corpora: Path) -> None:
    settings = config(corpora, packing="best_fit", train=sources(corpora, weight=[1.0, 2.0, 3.0]))
    data = open_train(settings, 320)
    batches, _ = schedule(settings)
    found = []
    for dp, micro, workers in ((1, 8, 1), (2, 2, 2), (4, 1, 1)):
        loaders = [StepLoader(data, batches, micro, rank, dp, 2, workers) for rank in range(dp)]
        steps = [[loader.step(s) for loader in loaders] for s in (0, 1, 5)]
        found.append([
            [np.concatenate([getattr(m, name).numpy() for b in ranks for m in b.micro_batches]).tolist()
             for name in ("tokens", "labels")]
            + [[n for b in ranks for m in b.micro_batches for n in m.documents.lengths], ranks[0].loss_tokens]
            for ranks in steps
        ])  # fmt: skip
        for loader in loaders:
            loader.close()
    assert found[0] == found[1] == found[2]


def test_validation_sets(corpora: Path) -> None:
    sets = open_valid(config(corpora, train=sources(corpora, weight=[1.0, 1.0, 2.0])))
    assert [(one.name, one.weight) for one in sets] == [("web", 0.25), ("books", 0.25), ("code", 0.5)]
    assert sets[0].data.sources["web"].first_token > 0
    own = open_valid(config(corpora, valid=str(corpora / "web")))
    assert [(one.name, one.weight) for one in own] == [("web", 1.0)] and own[0].data.sources["web"].first_token == 0
    assert open_train(config(corpora, valid=str(corpora / "web")), 320).sources["code"].sequences == (0, 180)
    fim = {"prefix": "<mask>", "middle": "<|endoftext|>", "suffix": "a"}
    settings = config(corpora, fim=fim, train=str(corpora / "web"))
    assert open_train(settings, 320).objective.fim is not None and open_valid(settings)[0].data.objective.fim is None


def test_what_an_objective_needs_of_the_tokenizer(corpora: Path) -> None:
    with pytest.raises(UserError, match="data.tokenizer must say whose they are"):
        open_train(config(corpora, "masked_lm", masked_lm={"mask": "<mask>"}, tokenizer=None), 320)
    with pytest.raises(UserError, match=r"has no token '<hole>'; its special tokens are <mask>, <\|endoftext\|>"):
        open_train(config(corpora, "masked_lm", masked_lm={"mask": "<hole>"}), 320)
    with pytest.raises(UserError, match="model.vocabulary = 300 is too small.* id 300 .*at least 301"):
        open_train(config(corpora, "masked_lm", masked_lm={"mask": "<mask>"}, vocabulary=300), 320)


# Showing


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_show_says_what_the_loader_reads(corpora: Path, packing: str) -> None:
    settings = config(corpora, packing=packing)
    batches, steps = schedule(settings)
    data = open_train(settings, batches.first_sample(steps))
    with StepLoader(data, batches, 2, 0, 1) as loader:
        batch = loader.step(6)
    shown = list(read_step(settings, 7))
    assert [one.id for one in shown] == batch.sample_ids.tolist() == list(range(48, 56))
    for one, tokens, labels in zip(
        shown,
        (row for m in batch.micro_batches for row in m.tokens.tolist()),
        (row for m in batch.micro_batches for row in m.labels.tolist()),
        strict=True,
    ):
        assert list(one.tokens) == tokens and list(one.labels) == labels
        reader = data.sources[one.source].reader
        for part in one.parts:
            text = reader.sequence(part.document)
            assert len(text) == part.size
            assert text[part.offset:part.offset + part.length].tolist() == tokens[part.column:part.column + part.length]
        assert packing == "best_fit" or sum(part.length for part in one.parts) == 16
    assert list(read_step(settings, 7, 3)) == shown[3:4]
    for step, sample, message in ((0, None, "steps 1 to 40"), (41, None, "steps 1 to 40"), (1, 8, "samples 0 to 7")):
        with pytest.raises(UserError, match=message):
            read_step(settings, step, sample)


def test_show_prints(corpora: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = config(corpora, packing="document")
    show(settings, 2, text=True)
    out = capsys.readouterr().out
    assert out.count("sample ") == 16 and out.count("  tokens: ") == 8
    assert "': document " not in out and " tells of" in out
    assert "epoch 0, sample " in out and "columns 0-15: document " in out
    show(config(corpora, "masked_lm", masked_lm={"mask": "<mask>"}), 2, sample=0)
    assert capsys.readouterr().out.splitlines()[-1].split().count(".") == 14  # 2 of 16 are predicted
    with pytest.raises(UserError, match="names no tokenizer"):
        show(config(corpora, tokenizer=None), 2, text=True)
    print_sources(open_train(settings, 320), 320)
    table = capsys.readouterr().out
    assert all(name in table for name in NAMES) and "epochs" in table and "phase" not in table
    phases = [{"from_token": token, "weights": {"web": 3, "code": 1}} for token in (1601, 10**6)]
    print_sources(open_train(config(corpora, train=sources(corpora, weight=[1.0, 1.0, 2.0]), phases=phases), 320), 320)
    assert capsys.readouterr().out.splitlines()[-3:] == [
        "phase from token 0: web 25.00 %, books 25.00 %, code 50.00 %",
        "phase from token 1,616: web 75.00 %, code 25.00 %",  # whole samples
        "phase from token 1,000,000: web 75.00 %, code 25.00 %; not reached in this run",
    ]


def test_config_of_a_run_folder(corpora: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run folder"):
        config_of(tmp_path)
    settings = config(corpora)
    (tmp_path / "config.yaml").write_text(dump(settings))
    assert config_of(tmp_path) == settings
    (tmp_path / "config.10.yaml").write_text(dump(settings).replace("steps: 40", "steps: 50"))
    (tmp_path / "config.9.yaml").write_text(dump(settings))
    assert config_of(tmp_path).train.steps == 50 and config_of(tmp_path, ["train.steps=60"]).train.steps == 60
    assert config_of(tmp_path / "config.yaml") == settings


def test_labels_of_a_blend_with_padding(corpora: Path) -> None:
    data = open_train(config(corpora, packing="document"), 320)
    tokens, labels = (np.empty((64, 16), np.int64) for _ in range(2))
    rows = data.fill(np.arange(64), tokens, labels)
    assert rows is not None and np.bincount(rows.row, rows.length).tolist() == [16] * 64
    assert data.loss_tokens(np.arange(64)) == (labels != IGNORE).sum()
    used = data.token_counts(np.arange(64))
    assert sum(used.values()) == 64 * 16 - (rows.length[1:][rows.row[1:] == rows.row[:-1]]).sum()
