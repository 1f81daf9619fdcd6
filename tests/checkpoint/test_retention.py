"""Which checkpoints stay, found out by looking at what is there."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megapt import checkpoint
from megapt.checkpoint import Keep, Saver
from megapt.checkpoint.upkeep import newest, places
from megapt.config import CheckpointConfig, EphemeralConfig
from megapt.errors import UserError
from megapt.mesh import ParallelMesh
from tests.checkpoint.fakes import LLAMA, Layout, check_loaded, fragments, meta_of

ONE = ParallelMesh.create(1, 1, 1, torch.device("cpu"))
SMALL = LLAMA.model_copy(update={"layers": 1})


def save(folder: Path, step: int, loss: Any = None, at: Any = None) -> Path:
    validation = None if loss is None else {"step": step if at is None else at, "loss": loss}
    meta: dict[str, Any] = {**meta_of(SMALL), "validation": validation}
    return checkpoint.save(folder, step, fragments(SMALL, Layout(), 0, 0, 0), ONE, meta)


def steps(folder: Path) -> list[int]:
    return [int(path.name[5:]) for path in checkpoint.committed(folder)]


def test_the_newest_stay_and_leftovers_go(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    (tmp_path / ".step-00000005.partial").mkdir()
    (tmp_path / "notes").mkdir()
    removed = checkpoint.retain(tmp_path, Keep(2))
    assert {p.name for p in removed} == {".step-00000005.partial", "step-00000001", "step-00000002"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes", "step-00000003", "step-00000004"]
    with pytest.raises(UserError, match="keep at least 1"):
        checkpoint.retain(tmp_path, Keep(0))
    checkpoint.retain(tmp_path, Keep(5))
    target = fragments(SMALL, Layout(), 0, 0, 0, fill=0.0)
    checkpoint.load(tmp_path / "step-00000003", target, ONE, SMALL)
    check_loaded(target)


def test_every_nth_step_and_the_best_stay(tmp_path: Path) -> None:
    """Step 12 was saved after the validation of step 10 and is not what was measured; step 8 measured nothing."""
    losses = {2: 3.0, 4: 1.0, 6: 2.5, 8: None, 10: 1.5, 14: 9.0, 16: float("1e30"), 20: 8.0}
    for step, loss in losses.items():
        save(tmp_path, step, loss)
    save(tmp_path, 12, 1.5, at=10)
    damaged = save(tmp_path, 18, 0.1)
    (damaged / "index.json").write_text("{}")
    checkpoint.retain(tmp_path, Keep(1, every=8, best=2))
    assert steps(tmp_path) == [4, 8, 10, 16, 20]
    checkpoint.retain(tmp_path, Keep(2))
    assert steps(tmp_path) == [16, 20]


def test_of_a_link_only_the_link_is_removed(tmp_path: Path) -> None:
    elsewhere = save(tmp_path / "elsewhere", 1)
    folder = tmp_path / "here"
    save(folder, 2)
    (folder / "step-00000001").symlink_to(elsewhere)
    (folder / ".step-00000007.partial").symlink_to(elsewhere)
    checkpoint.retain(folder, Keep(1))
    assert [path.name for path in folder.iterdir()] == ["step-00000002"]
    assert checkpoint.resolve(elsewhere) == elsewhere and list(elsewhere.glob("*.safetensors"))


def test_the_newest_of_both_kinds_is_resumed(tmp_path: Path) -> None:
    for given in (None, str(tmp_path / "fast")):
        found = places(CheckpointConfig(every=4, ephemeral=EphemeralConfig(every=2, folder=given)), tmp_path)
        lasting, ephemeral = (place.folder for place in found)
        assert lasting == tmp_path / "checkpoints"
        assert newest(found, "me") is None
        save(lasting, 4)
        save(ephemeral, 2)
        assert newest(found, "me") == lasting / "step-00000004"
        path = save(ephemeral, 6)
        assert newest(found, "me", below=6) == lasting / "step-00000004"
        assert newest(found, "me") == path
        (path / "COMMITTED").unlink()
        assert newest(found, "me") == lasting / "step-00000004"
        assert checkpoint.resolve(tmp_path) == lasting / "step-00000004"
        shutil.rmtree(lasting)


def test_validations_of_other_programs_are_passed_over(tmp_path: Path) -> None:
    save(tmp_path, 1, 2.0)
    save(tmp_path, 2, "low")
    save(tmp_path, 3, 1.0, at=[3])
    for step, validation in ((4, 0.5), (5, [])):
        meta = {**meta_of(SMALL), "validation": validation}
        checkpoint.save(tmp_path, step, fragments(SMALL, Layout(), 0, 0, 0), ONE, meta)
    checkpoint.retain(tmp_path, Keep(1, best=3))
    assert steps(tmp_path) == [1, 5]


def test_what_was_just_saved_stays_below_a_higher_step(tmp_path: Path) -> None:
    save(tmp_path, 100)
    saver = Saver(ONE)
    for step, background in ((2, False), (4, True)):
        own = fragments(SMALL, Layout(), 0, 0, 0)
        saved = saver.save(tmp_path, step, own, meta_of(SMALL), Keep(1), background) or saver.finish()
        assert saved is not None and steps(tmp_path) == [step, 100]
        assert [line.split("/")[-1] for line in saved.warnings] == [
            f"step-00000100 is a higher step than step-{step:08d}; if it is of another run, move it away"
        ]
    saver.close()
