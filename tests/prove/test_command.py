"""`megapt prove` as it is typed: certificate, exit status, explanations, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from megapt.commands.prove import prove
from megapt.errors import UserError

CONFIG = """
precision: bf16
model: {layers: 28, hidden: 3072, heads: 24, kv_heads: 8, ffn: 8192, vocabulary: 128256, tied_embeddings: true,
  bias: qkv, logit_softcap: 30.0, rope_scaling: {kind: llama3, factor: 32.0}}
data: {train: none, packing: best_fit}
batch: {sequence: 2048, samples: 8}
train: {steps: 1, z_loss: 1.0e-4}
"""


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()
    app.command()(prove)
    return app


@pytest.fixture
def config(tmp_path: Path) -> str:
    (tmp_path / "model.yaml").write_text(CONFIG)
    return str(tmp_path / "model.yaml")


def test_a_configurations_shape_is_certified(app: typer.Typer, config: str, tmp_path: Path) -> None:
    layouts = "tp=2,zero=native-1,vocabulary=32;pp=2,schedule=zb-h1,recompute=selective;dp=2,zero=deepspeed-3"
    out = tmp_path / "certificate"
    result = CliRunner().invoke(app, [config, "model.bias=all", "--layouts", layouts, "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "4 of 4 layouts compute the same as one process" in result.output
    facts = json.loads((out / "certificate.json").read_text())
    assert facts["passed"] and facts["shapes"]["model"]["bias"] == "all"
    assert len(facts["layouts"]) == 4  # three, and one process that reads what is left
    for layout in facts["layouts"]:
        assert {
            "first loss",
            "first gradient",
            "loss",
            "gradient",
            "norm",
            "weight",
            "exp_avg",
            "resumed weight",
        } <= set(layout["quantities"])
        for value in layout["quantities"].values():
            assert 0 <= value["ratio"] < 1
            assert value["error"] / value["bound"] == pytest.approx(value["ratio"], rel=1e-3)
        # DeepSpeed too is exact until its first update.
        assert layout["quantities"]["first gradient"]["bound"] < 1e-12
    (plain,) = facts["plain_torch"].values()
    assert plain["weight"]["ratio"] < 1 and plain["gradient"]["bound"] < 1e-12
    assert {"torch", "deepspeed", "commit", "date"} <= set(facts["environment"])
    text = (out / "certificate.md").read_text()
    assert "All 4 layouts compute the same." in text and "model tp=2,zero=native-1,vocabulary=32" in text
    assert (out / "certificate.png").read_bytes().startswith(b"\x89PNG")


def test_why_says_that_nothing_differs(app: typer.Typer, config: str) -> None:
    result = CliRunner().invoke(app, ["--why", "tp=1", "tp=2,recompute=full", config, "--precision", "fp32"])
    assert result.exit_code == 0, result.output
    assert "tp=2,recompute=full computes what tp=1 does" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quick", "--full"], "choose one of"),
        (["--layouts", "tp=2", "--ranks", "4"], "--ranks limits --quick and --full"),
        (["--why", "tp=1", "tp=2", "--out", "x"], "--why writes no certificate"),
        (["--why", "tp=1", "tp=2,optimizer=muon"], "of one optimizer"),
        (["--why", "tp=1", "tp=5"], "must divide model.heads"),
        (["--layouts", ";"], "no layout was given"),
        (["--layouts", "tp=2,dp=1000000"], "free memory of this machine bears"),
        (["missing.yaml"], "does not exist"),
        (["model.layers=2"], "give one CONFIG"),
    ],
)
def test_refusals_come_before_any_rank(app: typer.Typer, arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, UserError)
    assert message in str(result.exception)
