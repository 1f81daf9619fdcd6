"""Input that cannot work is refused by the real command: one readable message, and nothing left behind."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from megapt.data.indexed import IndexedWriter
from megapt.errors import UserError
from megapt.monitor.watchdog import EXIT_STATUS
from tests.end_to_end import runs
from tests.end_to_end.runs import SCRIPT, Ranks

REFUSED = 2


@dataclass
class Setting:
    """What every case starts from: a config, its data, other data, and a run that stands at step 8 of 12."""

    config: Path
    data: Path
    other: Path
    run: Path


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    root = tmp_path_factory.mktemp("refusals")
    data, other = runs.corpus(root / "corpus"), runs.corpus(root / "other", seed=1)
    config = runs.write_config(root / "config.yaml", data, train={"steps": 12})
    run = root / "base"
    Ranks(root / "b", 1, ["--config", config, "train.steps=8", f"run.folder={run}"]).finish()
    return Setting(config, data, other, run)


def _snapshot(folder: Path) -> dict[Path, bytes]:
    # The lock is no content: whoever opens a run folder takes it.
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path: path.read_bytes() for path in files}


# By the command itself, before any rank exists.

BY_THE_COMMAND = {
    "world": (["--ranks", "3", "parallel.tensor=2"], ["world of 3 ranks", "tensor x pipeline = 2 x 1", "2 or 4"]),
    "data degree": (["--ranks", "2", "parallel.data=4"], ["parallel.data is 4", "set it to 2", "start 4 ranks"]),
    "heads": (["model.heads=3"], ["model.hidden: 32", "model.heads = 3", "30 or 33"]),
    "tensor": (["parallel.tensor=3"], ["parallel.tensor: 3", "model.heads = 4", "legal: 1, 2, 4"]),
    "layers": (["parallel.pipeline=5"], ["parallel.pipeline: 4 layers", "5 stages", "at most 4"]),
    "vocabulary": (["model.vocabulary=0"], ["`model.vocabulary`", "greater than or equal to 1", "given: 0"]),
    "sequence": (["batch.sequence=65"], ["batch.sequence: 65", "model.max_sequence = 64"]),
    "batch": (["batch.samples=7"], ["batch.samples = 7", "2 x 1", "6 or 8"]),
    "unknown key": (["model.layer=4"], ["unknown key `model.layer`", "did you mean `layers`?"]),
    "wrong type": (["train.steps=many"], ["`train.steps`", "'many'"]),
    "ZeRO 3": (
        ["zero.stage=3", "zero.backend=deepspeed", "parallel.pipeline=2"],
        ["zero.stage: deepspeed ZeRO 3", "pipeline = 2", "stage 0 or 1"],
    ),
}


@pytest.fixture(scope="module")
def commands(setting: Setting) -> dict[str, subprocess.Popen[str]]:
    """All of them at once: each is little more than the start of an interpreter."""
    return {
        name: runs.start("bash", SCRIPT, "--config", setting.config, *arguments, cwd=setting.config.parent)
        for name, (arguments, _) in BY_THE_COMMAND.items()
    }


@pytest.mark.parametrize("name", BY_THE_COMMAND)
def test_refused_by_the_command(setting: Setting, commands: dict[str, subprocess.Popen[str]], name: str) -> None:
    output, errors = commands[name].communicate(timeout=runs.TIMEOUT)
    assert (commands[name].returncode, output) == (REFUSED, "")
    # One line per problem: a number of heads can be wrong for more than one reason.
    assert errors.startswith("megapt: error: ") and errors.count("error:") == 1 and len(errors.splitlines()) <= 2
    for word in BY_THE_COMMAND[name][1]:
        assert word in errors
    assert not (setting.config.parent / "run").exists()


# By the ranks: what needs data, a checkpoint or the other ranks.

Prepare = Callable[[Setting, Path], Sequence[str | Path]]


def _fresh(*arguments: str) -> Prepare:
    return lambda setting, folder: arguments


def _empty_data(setting: Setting, folder: Path) -> Sequence[str | Path]:
    with IndexedWriter(folder.parent / "nothing", np.uint16):
        pass
    return [f"data.train={folder.parent / 'nothing'}"]


def _absent(setting: Setting, folder: Path) -> Sequence[str | Path]:
    return [f"checkpoint.load={setting.run / 'checkpoints' / 'step-00000099'}"]


def _torn(setting: Setting, folder: Path) -> Sequence[str | Path]:
    torn = folder.parent / "step-00000008"
    shutil.copytree(setting.run / "checkpoints" / "step-00000008", torn)
    (torn / "COMMITTED").unlink()
    return [f"checkpoint.load={torn}"]


def _resumed(*arguments: str) -> Prepare:
    def prepare(setting: Setting, folder: Path) -> Sequence[str | Path]:
        shutil.copytree(setting.run, folder)
        return [argument.format(other=setting.other) for argument in arguments]

    return prepare


def _loaded(*arguments: str) -> Prepare:
    return lambda setting, folder: [f"checkpoint.load={setting.run}", *arguments]


def _damaged(setting: Setting, folder: Path) -> Sequence[str | Path]:
    shutil.copytree(setting.run, folder)
    file = next((folder / "checkpoints" / "step-00000008").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    return []


def _damaged_metrics(setting: Setting, folder: Path) -> Sequence[str | Path]:
    shutil.copytree(setting.run, folder)
    metrics = folder / "metrics.jsonl"
    metrics.write_text("{torn\n" + metrics.read_text())
    return []


BY_THE_RANKS: dict[str, tuple[Prepare, list[str]]] = {
    "no such data": (_fresh("data.train=nowhere/corpus"), ["nowhere/corpus.idx"]),
    "empty data": (_empty_data, ["nothing", "no tokens"]),
    "no validation split": (_fresh("data.split=1,0,0"), ["valid", "split"]),
    "little validation data": (_fresh("data.split=79,1,0"), ["validation set", "train.validate_samples=0"]),
    "token ids": (_fresh("model.vocabulary=100"), ["holds token id", "vocabulary has 100 ids"]),
    "world": (_fresh("parallel.tensor=4"), ["world of 2 ranks", "start 4 ranks"]),
    "absent checkpoint": (_absent, ["there is no checkpoint", "step-00000004, step-00000008"]),
    "torn checkpoint": (_torn, ["step-00000008 holds no COMMITTED marker"]),
    "another model's run": (_resumed("model.ffn=64"), ["does not hold this model", "mlp.up.weight"]),
    "another model of the same shapes": (
        _resumed("model.heads=2", "model.kv_heads=1"),
        ["does not hold this model", "model.heads (stored 4, given 2)", "model.kv_heads (stored 2, given 1)"],
    ),
    "another model's weights": (_loaded("model.rope_theta=500"), ["model.rope_theta (stored 10000.0, given 500.0)"]),
    "changed batch": (_resumed("batch.samples=16"), ["batch.samples", "64 samples at step 8", "128"]),
    "changed data": (_resumed("data.train={other}"), ["the data is not what", "files"]),
    "changed seed": (_resumed("seed=5"), ["the data is not what", "seed: 1234 then, 5 now"]),
    "damaged checkpoint": (_damaged, ["step-00000008 is damaged", "checksum"]),
    "damaged metrics": (_damaged_metrics, ["line 1 of", "metrics.jsonl"]),
}


Refused = dict[str, tuple[Ranks, Path, dict[Path, bytes]]]


@pytest.fixture(scope="module")
def refused(setting: Setting, tmp_path_factory: pytest.TempPathFactory) -> Refused:
    """Two ranks per case, all at once: those that do not tell wait for a launcher that would end them."""
    started = {}
    for name, (prepare, _) in BY_THE_RANKS.items():
        place = tmp_path_factory.mktemp("case")
        folder = place / "run"
        arguments = prepare(setting, folder)
        before = _snapshot(folder)
        ranks = Ranks(place / "ranks", 2, ["--config", setting.config, f"run.folder={folder}", *arguments])
        started[name] = (ranks, folder, before)
    return started


@pytest.mark.parametrize("name", BY_THE_RANKS)
def test_refused_by_the_ranks(refused: Refused, name: str) -> None:
    ranks, folder, before = refused[name]
    codes, errors = ranks.wait(), ranks.errors()
    assert codes == [REFUSED, REFUSED], errors
    assert errors.startswith("megapt: error: ") and errors.count("error:") == 1, errors
    assert "Traceback" not in errors and "watchdog" not in errors
    for word in BY_THE_RANKS[name][1]:
        assert word in errors
    assert _snapshot(folder) == before and (bool(before) or not folder.exists())


# By one rank alone.


def _break_backend() -> None:
    import megapt.engine

    def refuse(*_: object) -> None:
        raise UserError("this rank's library is too old")

    megapt.engine.make_backend = refuse  # type: ignore[assignment]


def _break_receipt() -> None:
    from megapt.data.receipt import Receipt

    def refuse(*_: object) -> None:
        raise UserError("this rank's data is not what it was")

    Receipt.check = refuse  # type: ignore[method-assign]


@pytest.mark.parametrize("rank", [0, 1])
def test_what_one_rank_refuses_ends_the_others_at_once(setting: Setting, tmp_path: Path, rank: int) -> None:
    arguments = ["--config", setting.config, f"run.folder={tmp_path / 'run'}"]
    ranks = Ranks(tmp_path / "r", 2, arguments, before={rank: _break_backend})
    codes = ranks.wait()
    assert (codes[rank], codes[1 - rank]) == (REFUSED, EXIT_STATUS), ranks.errors()
    told = f"megapt: error: rank {rank} of 2: this rank's library is too old\n"
    assert ranks.err(rank) == told
    (line,) = [line for line in ranks.err(1 - rank).splitlines() if "leaving with status" in line]
    assert f"rank {rank} (pp 0, dp {rank}, tp 0) failed at step 0" in line and line.endswith("library is too old")
    assert "Traceback" not in ranks.errors() and not (tmp_path / "run").exists()


def test_what_one_rank_finds_in_a_checkpoint_is_said_once(setting: Setting, tmp_path: Path) -> None:
    shutil.copytree(setting.run, tmp_path / "run")
    arguments = ["--config", setting.config, f"run.folder={tmp_path / 'run'}"]
    ranks = Ranks(tmp_path / "r", 2, arguments, before={1: _break_receipt})
    assert ranks.wait() == [REFUSED, REFUSED], ranks.errors()
    assert ranks.errors() == "megapt: error: rank 1 (pp 0, dp 1, tp 0): this rank's data is not what it was\n"


# What is not refused.


def test_an_uncommitted_checkpoint_and_a_torn_line_are_passed_over(setting: Setting, tmp_path: Path) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    shutil.copytree(setting.run, run)
    (run / "checkpoints" / "step-00000008" / "COMMITTED").unlink()
    with (run / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 9, "lo')
    ranks = Ranks(tmp_path / "r", 1, ["--config", setting.config, f"run.folder={run}"]).finish()
    assert "step 4 of 12, resumed from" in ranks.out()
    Ranks(tmp_path / "w", 1, ["--config", setting.config, f"run.folder={whole}"]).finish()
    # Of the shorter run whose checkpoint this was, the learning rate of the first steps and its validation remain.
    assert [line["step"] for line in runs.curve(run)] == [line["step"] for line in runs.curve(whole)]
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert names == {"step-00000008", "step-00000012"}
    assert all((run / "checkpoints" / name / "COMMITTED").is_file() for name in names)


def test_missing_data_is_told_once_and_before_ranks_start(tmp_path: Path, setting: Setting) -> None:
    arguments = ["parallel.pipeline=2", "data.train=nowhere/corpus", f"run.folder={tmp_path / 'run'}"]
    command = runs.start("bash", SCRIPT, "--config", setting.config, *arguments)
    output, errors = command.communicate(timeout=runs.TIMEOUT)
    assert command.returncode == 2 and not output
    assert errors.startswith("megapt: error: nowhere/corpus") and len(errors.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_launcher_passes_one_message_on(tmp_path: Path, setting: Setting) -> None:
    """What only the ranks can find: each starts alone here, with nobody looking before them."""
    arguments = ["data.train=nowhere/corpus", f"run.folder={tmp_path / 'run'}"]
    command = runs.start("torchrun", "--nproc-per-node", "2", SCRIPT, "--config", setting.config, *arguments)
    output, errors = command.communicate(timeout=runs.TIMEOUT)
    assert command.returncode != 0
    assert (output + errors).count("megapt: error: rank 0 of 2: ") == 1
    assert errors.count("nowhere/corpus.idx does not exist") == 1 and not (tmp_path / "run").exists()
