"""Trials: their times correct the plan, failures are survived, the fastest is written."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from megapt.cli import app
from megapt.config import load
from megapt.errors import UserError
from megapt.plan.search import Option, Plan, search
from megapt.plan.tune import Trial, fit, lines, parts, reason, tune
from tests.plan.planning import config, gpu, loaded


@pytest.fixture(scope="module")
def plan() -> Plan:
    return search(config(), 8, gpu(), top=12)


def test_factors_are_found_again() -> None:
    planned = np.array([[3.0, 0.0, 0.1], [2.0, 1.0, 0.2], [2.0, 0.5, 1.0], [3.0, 2.0, 0.3], [2.5, 0.1, 0.1]])
    factors = np.array([1.5, 4.0, 2.0])
    found = np.array(fit(planned, planned @ factors))
    assert np.abs(planned @ found / (planned @ factors) - 1).max() < 0.03
    assert found[1] > found[2] > found[0]
    # A single trial tells one factor only, and none goes below nothing.
    assert fit(planned[:1], np.array([6.2])) == pytest.approx((2.0,) * 3, rel=1e-6)
    assert min(fit(np.array([[1.0, 1.0, 0.0], [1.0, 2.0, 0.0]]), np.array([2.0, 1.0]))) > 0


def test_times_are_fed_back(plan: Plan) -> None:
    """Where collectives take ten times as long as planned, trials turn to layouts that have fewer."""
    factors = np.array([1.2, 10.0, 1.2])
    ran: list[Option] = []

    def run(option: Option) -> Trial:
        ran.append(option)
        if len(ran) == 2:
            return Trial(option, None, error="it broke")
        return Trial(option, float(parts(option) @ factors))

    said: list[str] = []
    tuning = tune(loaded(), plan, 6, 5, run, said.append)
    assert len(ran) == len(tuning.trials) == 6 and len({option.layout for option in ran}) == 6
    assert tuning.best is not None
    assert tuning.best.seconds == min(t.seconds for t in tuning.trials if t.seconds is not None)
    assert "failed: it broke" in said[1] and "it broke" in "\n".join(lines(tuning))
    done = [trial for trial in tuning.trials if trial.seconds is not None]
    for trial in done:
        assert trial.seconds is not None
        assert tuning.corrected(trial.option) == pytest.approx(trial.seconds, rel=0.1)
    with pytest.raises(UserError, match="none of 2 layouts could be run: .*broken"):
        tune(loaded(), plan, 2, 5, lambda option: Trial(option, None, error="broken"), said.append)


def test_the_line_that_says_most() -> None:
    output = """W1121 torch/distributed/run.py: some warning
    Traceback (most recent call last):
      File "x.py", line 1
    torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB
    torch.distributed.elastic.multiprocessing.errors.ChildFailedError: megapt FAILED"""
    assert reason(output).startswith("torch.OutOfMemoryError: CUDA out of memory")
    assert reason("megapt: error: rank 0: no\nValueError: x") == "megapt: error: rank 0: no"
    assert reason("") == "the ranks ended without a word"


def test_on_two_ranks_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    tree = {
        "precision": "fp32",
        "model": {"layers": 2, "hidden": 64, "heads": 4, "ffn": 128, "vocabulary": 256, "max_sequence": 64},
        "data": {"train": "data/none"},
        "batch": {"sequence": 64, "samples": 8},
        "train": {"steps": 10},
    }
    source, out = tmp_path / "tiny.yaml", tmp_path / "tuned.yaml"
    source.write_text(yaml.safe_dump(tree))
    words = ["tune", str(source), "--trials", "1", "--steps", "2", "--ranks", "2", "--write", str(out)]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    measured = re.findall(r"^ +([\d.]+) +([\d.]+) +([\d.]+) +[-+][\d.]+%  (tp=\S+)", result.output, re.M)
    assert len(measured) == 1 and float(measured[0][0]) > 0, result.output
    written = load(out).config
    assert f"tp={written.parallel.tensor},pp={written.parallel.pipeline}," in measured[0][3]
    assert "measured s" in out.read_text()
