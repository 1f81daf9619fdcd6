"""What a run reads does not depend on how many ranks read it, nor on where it was stopped; its receipts show it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers import Tokenizer
from typer.testing import CliRunner

from megapt.data.indexed import IndexedWriter
from megapt.data.show import config_of, read_step, verify_receipt
from megapt.data.tokenizers import load, train_bpe
from megapt.errors import UserError
from tests.end_to_end import runs
from tests.end_to_end.runs import Ranks

STEPS = (4, 8, 12)


def _config(path: Path, data: dict[str, Any], objective: str = "next_token", **sections: Any) -> Path:
    """The tiny Llama's config with these values for `data`."""
    runs.write_config(path, path.parent / "unused", **sections)
    tree: dict[str, Any] = yaml.safe_load(path.read_text())
    tree["data"] |= data
    path.write_text(yaml.safe_dump(tree | {"objective": objective}))
    return path


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of dp 2 that goes on with dp 1 and ends with dp 4, and one of dp 1 that was never stopped."""
    root = tmp_path_factory.mktemp("order")
    blend = [
        {"path": str(runs.corpus(root / "prose", 120)), "weight": 3.0},
        {"path": str(runs.corpus(root / "verse", 60, seed=1)), "weight": 1.0},
    ]
    phases = [{"from_token": 6 * 8 * 16, "weights": {"verse": 1.0, "prose": 1.0}}]
    config = _config(
        root / "config.yaml",
        {"train": blend, "phases": phases, "packing": "best_fit"},
        optimizer={"schedule": "constant"},
        train={"steps": STEPS[-1], "validate_samples": 8},
    )
    arguments = ["--config", config]
    whole = Ranks(root / "w", 1, [*arguments, f"run.folder={root / 'whole'}"])
    for world, steps in zip((2, 1, 4), STEPS, strict=True):
        ranks = Ranks(root / f"r{world}", world, [*arguments, f"run.folder={root / 'moved'}", f"train.steps={steps}"])
        assert ("fresh weights" in ranks.finish().out()) == (world == 2)
    whole.finish()
    return root


def test_receipts_are_the_same(root: Path) -> None:
    moved, whole = runs.meta(root / "moved"), runs.meta(root / "whole")
    assert moved["receipt"] == whole["receipt"]
    receipt = whole["receipt"]
    assert receipt["samples"] == 96 and receipt["source_samples"] == {"prose": 36 + 24, "verse": 12 + 24}
    assert 0 < receipt["source_tokens"]["prose"] <= 60 * 16 and len(receipt["chain"]) == 32
    losses = [[line["loss"] for line in runs.curve(root / name) if "loss" in line] for name in ("moved", "whole")]
    assert len(losses[0]) == STEPS[-1] and losses[0] == pytest.approx(losses[1], rel=2e-4)


def test_sources_are_told_and_validated_apart(root: Path) -> None:
    said = (root / "w" / "out.0").read_text()
    assert "sources" in said and "prose" in said and "62.50 %" in said
    last = runs.curve(root / "whole")[-1]
    parts = [last["valid_loss/prose"], last["valid_loss/verse"]]
    assert last["valid_loss"] == pytest.approx(0.75 * parts[0] + 0.25 * parts[1]) and last["valid_samples"] == 16


def test_show_and_verify(root: Path) -> None:
    config = config_of(root / "moved")
    assert config.train.steps == STEPS[-1]
    assert "96 samples" in verify_receipt(config, root / "moved")
    names = [shown.source for step in (1, 12) for shown in read_step(config, step)]
    assert (names[:8].count("verse"), names[8:].count("verse")) == (2, 4)
    with pytest.raises(UserError, match="data is not what"):
        verify_receipt(config_of(root / "moved", ["seed=7"]), root / "moved")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.phases=[]"], ["blend: "]),
        (["seed=9"], ["prose seed: 1234 then, 9 now", "verse seed"]),
        (["data.split=70,30,0"], ["prose tokens: ", "verse tokens: "]),
        (["data.packing=concatenate"], ["prose order: "]),
    ],
)
def test_a_resume_names_what_differs(root: Path, overrides: list[str], words: list[str]) -> None:
    from megapt.data.open import open_train, schedule
    from megapt.data.receipt import Receipt

    config = config_of(root / "moved", overrides)
    batches, steps = schedule(config)
    receipt = Receipt.from_dict(runs.meta(root / "moved")["receipt"])
    with pytest.raises(UserError) as error:
        receipt.check(open_train(config, batches.first_sample(steps)))
    assert all(word in str(error.value) for word in words)


def test_show_as_a_command(root: Path) -> None:
    import typer

    from megapt.commands.data_show import show

    app = typer.Typer()
    app.command()(show)
    result = CliRunner().invoke(app, ["--config", str(root / "moved"), "--step", "3", "--sample", "1", "--text"])
    assert result.exit_code == 0 and result.output.startswith("sample 17: ") and "  text: '" in result.output
    result = CliRunner().invoke(app, ["--config", str(root / "moved"), "--verify-receipt", str(root / "moved")])
    assert result.exit_code == 0 and "step 12: 96 samples" in result.output
    assert isinstance(CliRunner().invoke(app, ["--config", str(root / "moved")]).exception, UserError)


# Masked language models


def _masked(root: Path) -> Path:
    """Words in a pattern that the words on both sides tell, and a config that learns them."""
    words = "one two three four five six seven eight".split()
    train_bpe([" ".join(words)] * 50, 280, root / "plain.json")
    model = Tokenizer.from_file(str(root / "plain.json"))
    model.add_special_tokens(["<mask>"])
    model.save(str(root / "tokenizer.json"))
    tokenizer = load(root / "tokenizer.json")
    with IndexedWriter(root / "corpus", "u2") as writer:
        for k in range(200):
            turned = words[k % 8:] + words[:k % 8]
            writer.add_document([*tokenizer.encode(" " + " ".join(turned * 2)), tokenizer.eod or 0])
    tokens = {"tokenizer": str(root / "tokenizer.json"), "masked_lm": {"mask": "<mask>", "whole_word": True}}
    return _config(
        root / "config.yaml",
        {"train": str(root / "corpus"), **tokens},
        "masked_lm",
        model={"attention": "bidirectional", "vocabulary": tokenizer.vocabulary},
        train={"steps": 8, "validate_samples": 16},
    )


def test_masked_lm_trains_the_same_in_every_layout(tmp_path: Path) -> None:
    config = _masked(tmp_path)
    layouts = {"one": (1, ()), "two": (2, ("batch.micro=1",)), "cut": (2, ("parallel.tensor=2", "data.workers=2"))}
    started = {
        name: Ranks(tmp_path / f"r-{name}", world, ["--config", config, f"run.folder={tmp_path / name}", *more])
        for name, (world, more) in layouts.items()
    }
    for ranks in started.values():
        ranks.finish()
    one = runs.curve(tmp_path / "one")
    assert one[-1]["valid_loss"] < one[0]["loss"]
    for name in ("two", "cut"):
        for mine, theirs in zip(runs.curve(tmp_path / name), one, strict=True):
            assert mine == pytest.approx(theirs, rel=2e-4)
        assert json.dumps(runs.meta(tmp_path / name)["receipt"]) == json.dumps(runs.meta(tmp_path / "one")["receipt"])
    shutil.rmtree(tmp_path / "two")
