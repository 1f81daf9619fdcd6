"""`megapt convert` as typed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from megapt import cli
from megapt.errors import UserError
from tests.convert import models


def run(*arguments: Any) -> str:
    result = CliRunner().invoke(cli.app, ["convert", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_there_and_back(tmp_path: Path) -> None:
    theirs, ours, back = models.save("qwen3", tmp_path / "theirs"), tmp_path / "ours", tmp_path / "back"
    output = run("from-hf", theirs, ours)
    assert "family: Qwen3" in output and "logits compared with transformers" in output and "all 4 layers" in output
    assert "\nmodel:\n" in output and f"load: {ours}" in output and output.endswith(f"written: {ours}\n")
    output = run("to-hf", ours, back, "--dtype", "bf16", "--shard-gb", 1e-5, "--compare-tokens", 20)
    assert "on 2 x 20 random tokens" in output and len(list(back.glob("model-*-of-*.safetensors"))) > 1
    output = run("to-hf", ours, tmp_path / "unseen", "--no-compare")
    assert "NOTHING WAS COMPARED" in output and "logits" not in output
    with pytest.raises(UserError, match="Phi 3 cannot express this model: .*; model.qk_norm is 'head'"):
        run("to-hf", ours, tmp_path / "phi", "--family", "phi3")
    with pytest.raises(UserError, match="family 'bloom' is unknown; legal: llama, mistral"):
        run("to-hf", ours, tmp_path / "bloom", "--family", "bloom")
    with pytest.raises(UserError, match="do not compute the same"):
        run("to-hf", ours, tmp_path / "strict", "--tolerance", 1e-12)
    assert not (tmp_path / "strict").exists() and not list(tmp_path.glob(".*"))
