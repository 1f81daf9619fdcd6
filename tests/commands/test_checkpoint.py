"""`megapt checkpoint` as typed: inspect, verify, diff, export-weights, average."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from megapt import checkpoint
from megapt.checkpoint import verify as job
from megapt.cli import app
from megapt.errors import UserError
from megapt.mesh import ParallelMesh
from tests.checkpoint import handmade
from tests.checkpoint.fakes import LLAMA, Layout, fragments, meta_of

SMALL = LLAMA.model_copy(update={"layers": 1})


def run(*words: Any) -> Result:
    """UserErrors pass through, as they do up to the entry point."""
    result = CliRunner().invoke(app, ["checkpoint", *(str(word) for word in words)])
    if isinstance(result.exception, UserError):
        raise result.exception
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    one = ParallelMesh.create(1, 1, 1, torch.device("cpu"))
    meta = {**meta_of(SMALL), "updates": 5, "versions": {"torch": "[bold]2.0"}, "loss": 2.5}
    return checkpoint.save(tmp_path / "run" / "checkpoints", 5, fragments(SMALL, Layout(), 0, 0, 0), one, meta)


def spoil(folder: Path) -> None:
    """The last byte of the last file."""
    file = max(folder.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def test_inspect(saved: Path) -> None:
    printed = run("inspect", saved.parent.parent, "--tensors").output
    for words in ("step", "1 layers, hidden 12", "4 heads (2 key/value)", "exp_avg_sq", "torch [bold]2.0", "2.5"):
        assert words in printed
    assert "head.weight [21, 12]: weight F32 in 1, exp_avg F32 in 1, exp_avg_sq F32 in 1\n" in printed
    found = json.loads(run("inspect", saved, "--json").output)
    assert (found["step"], found["loss"], found["model"]["hidden"]) == (5, 2.5, 12) and "tensors" not in found


def test_inspect_obeys_no_stranger(saved: Path) -> None:
    meta = {**meta_of(SMALL), "layout": {"\x1b[2J": "\x1b[31m"}, "versions": {"a\nb": 1}}
    one = ParallelMesh.create(1, 1, 1, torch.device("cpu"))
    printed = run("inspect", checkpoint.save(saved.parent, 6, fragments(SMALL, Layout(), 0, 0, 0), one, meta)).output
    assert "\x1b" not in printed and r"'\x1b[2J' '\x1b[31m'" in printed and r"'a\nb' 1" in printed


def test_diff_in_json_is_json(tmp_path: Path) -> None:
    for name, value in (("a", math.nan), ("b", 2.0)):
        handmade.write(tmp_path / name, {("norm.weight", "weight"): torch.tensor([1.0, value])}, {})
    result = run("diff", tmp_path / "a", tmp_path / "b", "--json")
    found = json.loads(result.output, parse_constant=pytest.fail)
    assert result.exit_code == 1 and found["tensors"][0]["largest"] is None and found["tensors"][0]["elements"] == 1


def test_verify(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run("verify", saved, saved.parent)
    assert result.exit_code == 0 and result.output.count(" is sound; 12 tensors, 36 slices, ") == 2
    spoil(saved)
    result = run("verify", saved)
    assert result.exit_code == 1
    assert "exp_avg_sq of head.weight: its checksum is" in result.output and "damaged: 1 problems" in result.output
    (report,) = json.loads(run("verify", saved, "--json").output)
    assert len(report["problems"]) == 1 and report["slices"] == 36
    (saved / "index.json").write_text("{}")
    result = run("verify", saved)
    assert result.exit_code == 1 and "the hash of index.json is not the one in COMMITTED" in result.output
    monkeypatch.setattr(job, "verify", lambda *_: pytest.fail("read before the paths were looked at"))
    with pytest.raises(UserError, match="there is no checkpoint"):
        run("verify", saved, tmp_path / "nowhere")


def test_average_diff_and_export(saved: Path, tmp_path: Path) -> None:
    assert run("average", tmp_path / "mean", saved, saved, "--weights", "1,3").exit_code == 0
    result = run("diff", saved, saved)
    assert result.exit_code == 0
    assert result.output == "36 tensors are equal bit for bit, 0 differ; 0 values of meta differ\n"
    result = run("diff", tmp_path / "mean", saved, "--ignore-meta")
    assert result.exit_code == 1
    assert "only in B: exp_avg of every tensor\nonly in B: exp_avg_sq of every tensor\n" in result.output
    assert "12 tensors are equal bit for bit, 0 differ\n" in result.output
    found = json.loads(run("diff", tmp_path / "mean", saved, "--json").output)
    assert found["surplus_kinds"] == ["exp_avg", "exp_avg_sq"]
    assert "meta.averaged" in [row[0] for row in found["meta"]]
    with pytest.raises(UserError, match="weights are numbers with commas"):
        run("average", tmp_path / "other", saved, saved, "--weights", "a,b")
    assert run("export-weights", saved, tmp_path / "weights", "--dtype", "bf16").exit_code == 0
    assert {file.name for file in (tmp_path / "weights").iterdir()} == {"model.safetensors", "config.json"}
    with pytest.raises(UserError, match="already exists"):
        run("export-weights", saved, tmp_path / "weights")
    assert run("export-weights", saved, tmp_path / "other", "--shard-gb", "inf").exit_code == 2
