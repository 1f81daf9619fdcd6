"""A checkpoint exists only once it is whole, and a damaged one is never loaded."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from megapt import checkpoint
from megapt.checkpoint import Keep, Saver
from megapt.checkpoint import commit as committing
from megapt.checkpoint.commit import Commit
from megapt.checkpoint.index import marker_of
from megapt.checkpoint.rawfile import RawFile
from megapt.checkpoint.written import RankFiles
from megapt.errors import UserError
from megapt.mesh import ParallelMesh
from tests.checkpoint.fakes import LLAMA, Layout, check_loaded, fragments, meta_of

ONE = ParallelMesh.create(1, 1, 1, torch.device("cpu"))
SMALL = LLAMA.model_copy(update={"layers": 1})


def save(folder: Path, step: int) -> Path:
    return checkpoint.save(folder, step, fragments(SMALL, Layout(), 0, 0, 0), ONE, meta_of(SMALL))


def load(path: Path, verify: bool = True) -> None:
    target = fragments(SMALL, Layout(), 0, 0, 0, fill=float("nan"))
    checkpoint.load(path, target, ONE, SMALL, verify=verify)
    check_loaded(target)


def test_the_latest_is_found_by_scanning(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    assert checkpoint.find_latest(folder) is None
    paths = [save(folder, step) for step in (5, 120, 20)]
    (folder / "step-00000500").mkdir()  # never committed
    (folder / ".step-00000600.partial").mkdir()
    assert checkpoint.find_latest(folder) == paths[1]
    for path in (tmp_path / "run", folder, paths[1]):
        assert checkpoint.resolve(path) == paths[1]
    assert checkpoint.resolve(paths[0]) == paths[0]
    moved = paths[0].rename(tmp_path / "my best")
    assert checkpoint.resolve(moved) == moved
    load(tmp_path / "run")


def test_what_is_absent_or_torn_is_said(tmp_path: Path) -> None:
    save(tmp_path, 7)
    torn = save(tmp_path, 9)
    (torn / "COMMITTED").unlink()
    with pytest.raises(
        UserError, match="there is no checkpoint .*step-00000008; committed in .*: step-00000007$"
    ):
        checkpoint.resolve(tmp_path / "step-00000008")
    with pytest.raises(UserError, match="step-00000009 holds no COMMITTED.*committed in .*: step-00000007$"):
        load(torn)
    shutil.rmtree(tmp_path / "step-00000007")
    with pytest.raises(UserError, match="no committed checkpoint; cut short while .*: step-00000009"):
        load(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no committed checkpoint$"):
        checkpoint.resolve(tmp_path / "empty")


def test_a_committed_step_is_not_overwritten_but_a_torn_one_is(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    with pytest.raises(UserError, match="step-00000003 is already committed"):
        save(tmp_path, 3)
    load(path)
    (path / "COMMITTED").unlink()
    load(save(tmp_path, 3))


def test_meta_must_be_json(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="JSON"):
        checkpoint.save(tmp_path, 1, [], ONE, {"path": tmp_path})
    assert list(tmp_path.iterdir()) == []


def test_missing_and_truncated_files_are_named(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    (file,) = path.glob("*.safetensors")
    data = file.read_bytes()
    file.write_bytes(data[:-4])
    expected = f"step-00000001 is damaged: {file.name} has {len(data) - 4} bytes instead of {len(data)}"
    with pytest.raises(UserError, match=expected):
        load(path)
    file.unlink()
    with pytest.raises(UserError, match=f"{file.name} is missing"):
        load(path)
    with pytest.raises(UserError, match=f"{file.name} is missing"):
        next(checkpoint.load_weights(path))
    (path / "index.json").unlink()
    with pytest.raises(UserError, match="index.json is missing"):
        load(path)


def test_another_index_or_version_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    index = path / "index.json"
    tree = json.loads(index.read_text())
    index.write_text(json.dumps(tree | {"step": 2}))
    with pytest.raises(UserError, match="the hash of index.json is not the one in COMMITTED"):
        load(path)
    for change, message in (
        ({"version": 2}, "version 2; legal here: 1"),
        ({"format": "x"}, "the format 'x'"),
    ):
        data = json.dumps(tree | change).encode()
        index.write_bytes(data)
        (path / "COMMITTED").write_bytes(marker_of(data))
        with pytest.raises(UserError, match=message):
            load(path)


def test_no_flipped_byte_is_loaded(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    (file,) = path.glob("*.safetensors")
    data = file.read_bytes()
    body = 8 + int.from_bytes(data[:8], "little")
    for at in [*range(0, body, 37), *range(body, len(data), 997), len(data) - 1]:
        flipped = bytearray(data)
        flipped[at] ^= 0x10
        file.write_bytes(flipped)
        try:
            load(path)  # compares every value: a flip in what nothing depends on is harmless
        except UserError as error:
            assert file.name in str(error) and " of " in str(error)
        else:
            assert at < body, at
    tensor = json.loads(data[8:body])["exp_avg/norm.weight"]
    flipped = bytearray(data)
    flipped[body + tensor["data_offsets"][0]] ^= 1
    file.write_bytes(flipped)
    with pytest.raises(UserError, match=f"{file.name}, exp_avg of norm.weight: its checksum is"):
        load(path)
    with pytest.raises(AssertionError, match="exp_avg of norm.weight"):
        load(path, verify=False)
    # Weights alone are not touched by the damage.
    assert len(dict(checkpoint.load_weights(path, ["norm.weight"]))) == 1
    with pytest.raises(UserError, match="holds no nothing.weight"):
        next(checkpoint.load_weights(path, ["nothing.weight"]))


def _save_and_die(folder: Path, at: int) -> None:
    """Save step 2 and be killed before the `at`-th operation on the file system; exit 0 with fewer."""
    left = [at]

    def counted(function):  # type: ignore[no-untyped-def]
        def call(*args, **kwargs):  # type: ignore[no-untyped-def]
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return function(*args, **kwargs)

        return call

    os.fsync, os.replace, os.rename = counted(os.fsync), counted(os.replace), counted(os.rename)
    Path.mkdir = counted(Path.mkdir)  # type: ignore[method-assign]
    os.unlink, RawFile.append = counted(os.unlink), counted(RawFile.append)  # type: ignore[method-assign]
    save(folder, 2)
    os._exit(0)


def test_kill_9_at_any_moment_leaves_only_whole_checkpoints(tmp_path: Path) -> None:
    save(tmp_path, 1)
    context = multiprocessing.get_context("fork")
    seen = set()
    # The first moments one by one, then every fifth: 36 tensors are written in between.
    for at in [*range(4), *range(4, 60, 5), *range(36, 60)]:
        process = context.Process(target=_save_and_die, args=(tmp_path, at))
        process.start()
        process.join(30)
        latest = checkpoint.find_latest(tmp_path)
        assert latest is not None
        seen.add((process.exitcode, latest.name))
        assert len(checkpoint.committed(tmp_path)) == int(latest.name[-1])
        load(tmp_path)
        if latest.name == "step-00000002":
            shutil.rmtree(latest)
    killed = -signal.SIGKILL
    # Killed before the commit; killed after it (while syncing the folder's entry); not killed at all.
    assert seen == {(killed, "step-00000001"), (killed, "step-00000002"), (0, "step-00000002")}
    checkpoint.retain(tmp_path, Keep(1))
    assert not list(tmp_path.glob(".*.partial"))


def test_what_outlived_its_job_writes_nothing_to_the_next_one(tmp_path: Path) -> None:
    """A rank of a job whose rank 0 was killed goes on while the job started again saves the same step."""
    old, new = (Commit(tmp_path, 4, {"job": job}, 2) for job in ("old", "new"))
    old.prepare()
    begun = RankFiles(old.partial, 1, [])
    assert new.prepare() == []
    with pytest.raises(FileNotFoundError):
        begun.close()
    begun.abandon()
    with pytest.raises(FileNotFoundError):
        RankFiles(old.partial, 1, [])
    with pytest.raises(UserError, match="was removed while it was being written"):
        old.complete()
    old.discard()
    assert list(tmp_path.iterdir()) == [new.partial] and list(new.partial.iterdir()) == []
    for rank in (0, 1):
        files = RankFiles(new.partial, rank, [])
        files.close()
        files.abandon()
    assert new.complete() == [] and checkpoint.read_index(new.final).meta == {"job": "new"}


def test_what_was_committed_meanwhile_is_not_removed(tmp_path: Path) -> None:
    path = save(tmp_path / "elsewhere", 1)
    commit = Commit(tmp_path, 1, {}, 1)
    commit.prepare()
    files = RankFiles(commit.partial, 0, [])
    files.close()
    files.abandon()
    path.rename(commit.final)
    with pytest.raises(UserError, match="step-00000001 was committed there meanwhile"):
        commit.complete()
    commit.discard()
    load(tmp_path)


def test_torn_folders_are_removed_and_told(tmp_path: Path) -> None:
    torn = save(tmp_path, 3)
    (torn / "COMMITTED").unlink()
    (tmp_path / "step-00000005").mkdir()  # holds no index: it is none of ours
    saver = Saver(ONE)
    saved = saver.save(tmp_path, 4, fragments(SMALL, Layout(), 0, 0, 0), meta_of(SMALL))
    saver.close()
    assert saved is not None and saved.warnings == (f"removed {torn}, which was never committed",)
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000004", "step-00000005"}


def test_nothing_after_the_marker_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("anything")

    monkeypatch.setattr(committing, "prune", fail)
    saver = Saver(ONE)
    saved = saver.save(tmp_path, 4, fragments(SMALL, Layout(), 0, 0, 0), meta_of(SMALL), Keep(1))
    saver.close()
    saver.close()  # must not close what has the number of a closed descriptor by now
    assert saved is not None and saved.warnings == (f"after the commit of {saved.path}: RuntimeError('anything')",)
    load(tmp_path)
