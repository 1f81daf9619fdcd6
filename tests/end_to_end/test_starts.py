"""From what a run starts: given weights, given moments, nothing at all; and that nobody is surprised by fresh ones."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from megapt.checkpoint.lock import FolderLock
from tests.end_to_end import runs
from tests.end_to_end.runs import Ranks


@dataclass
class Setting:
    """base: a run that has made 6 steps."""

    root: Path
    config: Path
    base: Path

    def run(self, name: str, *arguments: str) -> tuple[Path, Ranks]:
        run = self.root / name / "run"
        words = ["--config", self.config, f"run.folder={run}", *arguments]
        return run, Ranks(self.root / name / "ranks", 1, words)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    root = tmp_path_factory.mktemp("starts")
    config = runs.write_config(root / "config.yaml", runs.corpus(root / "corpus"), train={"steps": 6})
    found = Setting(root, config, root)
    found.base, ranks = found.run("base")
    ranks.finish()
    assert "fresh weights" in ranks.out() and "WARNING" not in ranks.out()
    return found


def test_weights_alone_or_with_moments(setting: Setting) -> None:
    load = f"checkpoint.load={setting.base}"
    started = {
        name: setting.run(name, load, "train.steps=1", "optimizer.warmup_steps=0", *more)
        for name, more in (("weights", ()), ("moments", ("checkpoint.load_optimizer=true",)))
    }
    found = {}
    for name, (run, ranks) in started.items():
        ranks.finish()
        found[name] = runs.tensors(run)
        assert ("weights of" if name == "weights" else "weights and moments of") in ranks.out()
        meta = runs.meta(run)
        assert (meta["step"], meta["updates"]) == (1, 1 if name == "weights" else 7)
        assert meta["receipt"]["samples"] == 8  # the data begins anew
    base = runs.tensors(setting.base)
    for name, decay in (("exp_avg", 0.9), ("exp_avg_sq", 0.95)):
        key = ("embedding.weight", name)
        gradient = found["weights"][key]  # what the one step alone left
        rest = found["moments"][key] - decay * base[key]
        assert not torch.allclose(gradient, found["moments"][key], rtol=0.1)
        assert torch.allclose(rest, gradient, rtol=1e-3, atol=1e-6)


def test_missing_weights_are_an_error_unless_it_may_start_from_scratch(setting: Setting) -> None:
    missing = f"checkpoint.load={setting.root / 'nowhere'}"
    _, refused = setting.run("refused", missing)
    run, scratch = setting.run("scratch", missing, "--from-scratch")
    torn = setting.root / "torn" / "step-00000006"
    shutil.copytree(setting.base / "checkpoints" / "step-00000006", torn)
    (torn / "COMMITTED").unlink()
    _, still_refused = setting.run("torn", f"checkpoint.load={torn}", "--from-scratch")
    kept = setting.root / "kept" / "run"
    shutil.copytree(setting.base, kept)
    _, resumed = setting.run("kept", "--from-scratch")
    assert refused.wait() == [2] and still_refused.wait() == [2]
    assert "there is no checkpoint" in refused.err(0)
    assert "nowhere; --from-scratch would start from fresh weights instead" in refused.err(0)
    assert "holds no COMMITTED marker" in still_refused.err(0)
    assert f"WARNING: fresh weights: {missing.replace('=', ' = ')} does not exist\n" in scratch.finish().out()
    runs.assert_same_run(setting.base, run)
    assert "resumed from" in resumed.finish().out()
    assert f"from_scratch: {kept} has a committed checkpoint, which the run goes on from" in resumed.out()


def test_a_run_that_begins_again_says_so(setting: Setting) -> None:
    for name in ("torn", "gone"):
        run = setting.root / f"again-{name}" / "run"
        shutil.copytree(setting.base, run)
        for path in sorted((run / "checkpoints").iterdir()):
            (path / "COMMITTED").unlink() if name == "torn" else shutil.rmtree(path)
    _, torn = setting.run("again-torn")
    _, gone = setting.run("again-gone")
    warning = "WARNING: fresh weights: {} has metrics up to step 6{}, but no committed checkpoint\n"
    names = "step-00000004, step-00000006"
    for ranks, name, more in (
        (torn, "torn", f" and checkpoints that were never committed ({names})"),
        (gone, "gone", ""),
    ):
        assert warning.format(setting.root / f"again-{name}" / "run", more) in ranks.finish().out()
        runs.assert_same_run(setting.base, setting.root / f"again-{name}" / "run")


def test_two_jobs_do_not_share_a_folder(setting: Setting) -> None:
    """Runs of their own, but ephemeral checkpoints in one place."""
    shared = setting.root / "shared"
    lock = FolderLock(shared)
    _, ranks = setting.run("second", f"checkpoint.ephemeral={{every: 2, folder: {shared}}}")
    assert ranks.wait() == [2]
    assert ranks.err(0).startswith(f"megapt: error: another run is writing to {shared}; wait for it")
    lock.close()
    assert list(shared.iterdir()) == []
