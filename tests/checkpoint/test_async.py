"""Saved in the background: the same files, whatever happens to the live tensors, the writers or the rank."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import pytest
import torch

from megapt import checkpoint
from megapt.checkpoint import Saver, lock
from megapt.checkpoint.background import Writer
from megapt.checkpoint.lock import FolderLock
from megapt.checkpoint.snapshot import Snapshot, places
from megapt.errors import UserError
from megapt.mesh import ParallelMesh
from megapt.prove.ranks import Ranks
from tests.checkpoint.async_ranks import LAYOUTS, both_ways, failing
from tests.checkpoint.fakes import LLAMA, Layout, check_loaded, fragments, meta_of

ONE = ParallelMesh.create(1, 1, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def four_ranks() -> Iterator[Ranks]:
    with Ranks(4) as ranks:
        yield ranks


@pytest.mark.parametrize("piece_bytes", [16 << 20, 1], ids=["gathered", "in pieces"])
def test_the_background_writes_the_same_files(tmp_path: Path, four_ranks: Ranks, piece_bytes: int) -> None:
    four_ranks.run(both_ways, str(tmp_path), piece_bytes)
    for number, layout in enumerate(LAYOUTS):
        one, other = (tmp_path / f"{number}-{where}" / "step-00000001" for where in ("foreground", "background"))
        files = sorted(path.name for path in one.iterdir())
        assert files == sorted(path.name for path in other.iterdir())
        assert files[:2] == ["COMMITTED", "index.json"] and len(files) == 2 + layout.pp * layout.dp * layout.tp
        for name in files:
            assert (one / name).read_bytes() == (other / name).read_bytes(), name
        assert {path.name for path in other.parent.iterdir()} == {"step-00000001", "step-00000002"}
        slices = [len(t.kinds["weight"].slices) for t in checkpoint.read_index(other).tensors.values()]
        assert (max(slices) > layout.tp) == (piece_bytes == 1)
        target = fragments(LLAMA, Layout(), 0, 0, 0, fill=float("nan"))
        checkpoint.load(other, target, ONE, LLAMA)
        check_loaded(target)


def test_a_writer_that_fails_loses_its_checkpoint_alone(tmp_path: Path) -> None:
    with Ranks(2) as ranks:
        first, second = ranks.run(failing, str(tmp_path))
    assert first == second
    killed, limited = first
    assert "step 2 was not saved" in killed and "rank 1 (pp 0, dp 1, tp 0): its background writer was killed" in killed
    assert "step 3 was not saved" in limited and "rank 1 (pp 0, dp 1, tp 0): [Errno 27] File too large" in limited
    assert "rank 0 (" not in killed + limited
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000001", "step-00000004"}


def _start_to_save(folder: Path, pipe: Connection) -> None:
    """Step 1 in peace; step 2 is with a writer that is not allowed to work."""
    saver = Saver(ONE)
    for step in (1, 2):
        if step == 2:
            assert saver._writer is not None
            os.kill(saver._writer.pid, signal.SIGSTOP)
            pipe.send(saver._writer.pid)
        saver.save(folder, step, fragments(LLAMA, Layout(), 0, 0, 0), meta_of(LLAMA), background=True)
        if step == 1:
            saver.finish()
    pipe.send("under way")
    time.sleep(600)


def test_kill_9_takes_the_writer_along_and_leaves_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_start_to_save, args=(tmp_path, there))
    process.start()
    there.close()
    writer = psutil.Process(here.recv())
    assert here.recv() == "under way"
    process.kill()
    process.join()
    monkeypatch.setattr(lock, "PATIENCE", 0.2)
    with pytest.raises(UserError, match="another run is writing to"):
        FolderLock(tmp_path)  # its writer is still there, and would write if it could
    writer.send_signal(signal.SIGCONT)
    psutil.wait_procs([writer], timeout=30)
    assert not psutil.pid_exists(writer.pid) or writer.status() == psutil.STATUS_ZOMBIE
    assert [path.name for path in checkpoint.committed(tmp_path)][0] == "step-00000001"
    saver = Saver(ONE)
    saver.save(tmp_path, 3, fragments(LLAMA, Layout(), 0, 0, 0), meta_of(LLAMA))
    saver.close()
    target = fragments(LLAMA, Layout(), 0, 0, 0, fill=0.0)
    checkpoint.load(tmp_path, target, ONE, LLAMA)
    check_loaded(target)
    assert not list(tmp_path.glob(".*"))


def _save_and_wait(folder: Path, pipe: Connection) -> None:
    saver = Saver(ONE)
    saver.save(folder, 1, fragments(LLAMA, Layout(), 0, 0, 0), meta_of(LLAMA), background=True)
    saver.finish()
    assert saver._writer is not None
    pipe.send(saver._writer.pid)
    time.sleep(600)


def test_kill_9_takes_a_writer_without_work_along(tmp_path: Path) -> None:
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_save_and_wait, args=(tmp_path, there))
    process.start()
    there.close()
    writer = psutil.Process(here.recv())
    process.kill()
    process.join()
    _, alive = psutil.wait_procs([writer], timeout=30)
    assert not alive or writer.status() == psutil.STATUS_ZOMBIE
    FolderLock(tmp_path).close()


def test_a_lock_whose_file_was_just_given_back_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its holder removes the file between our opening and locking it."""
    really, removed = lock.fcntl.flock, []

    def flock(descriptor: int, operation: int) -> None:
        really(descriptor, operation)
        if not removed:
            removed.append(descriptor)
            (tmp_path / ".lock").unlink()

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    made = FolderLock(tmp_path)
    assert removed and made.held
    made.close()


def test_one_folder_one_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "PATIENCE", 0.2)
    folder = tmp_path / "run"
    first, second = Saver(ONE), Saver(ONE)
    first.claim(folder)
    partial = folder / ".step-00000002.partial"
    partial.mkdir()
    refusal = r"was not saved .*: another run is writing to .*run; wait for it, stop it \(process \d+ on .+\), or"
    with pytest.raises(UserError, match=refusal):
        second.save(folder, 2, [], {})
    assert partial.is_dir()  # which may be what the other one is writing
    second.claim(tmp_path / "elsewhere")
    first.close()
    second.claim(folder)
    shutil.rmtree(folder)
    folder.mkdir()
    third = FolderLock(folder)  # what was locked is gone, and this is another folder
    with pytest.raises(UserError, match="another run"):
        second.claim(folder)
    third.close()
    second.close()
    assert list(folder.iterdir()) == []


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    FolderLock(tmp_path).close()
    assert "cannot be locked here (Operation not supported); start no second run" in capsys.readouterr().err


def test_snapshots_hold_any_tensor() -> None:
    """Contiguous or not, of any dtype; a larger one replaces the memory."""
    for count in (3, 7):
        tensors = [
            torch.randn(count, 5),
            torch.randn(count, 6)[:, :4],
            torch.randn(count).bfloat16(),
            torch.randn(4, count, dtype=torch.float64).T,
        ]
        slots = [
            checkpoint.rawfile.Slot("x", name, tuple(t.shape)) for name, t in zip(DTYPE_NAMES, tensors, strict=True)
        ]
        found, nbytes = places(slots)
        snapshot = Snapshot(torch.device("cpu"))
        snapshot.reserve(1)
        snapshot.reserve(nbytes)
        for at, tensor in zip(found, tensors, strict=True):
            snapshot.put(at, tensor)
        data = os.pread(snapshot.descriptor, nbytes, 0)
        for at, tensor in zip(found, tensors, strict=True):
            copy = torch.frombuffer(bytearray(data[at:]), dtype=tensor.dtype, count=tensor.numel())
            assert at % 64 == 0 and torch.equal(copy.view(tensor.shape), tensor)
        snapshot.close()


DTYPE_NAMES = ("F32", "F32", "BF16", "F64")


def test_the_writer_imports_no_torch() -> None:
    import subprocess

    program = "import json, sys, megapt.checkpoint.writer; print(json.dumps(sorted(sys.modules)))"
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert not {"torch", "numpy"} & set(json.loads(output))


def test_a_writer_that_dies_after_the_commit_has_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether its answer still came or not."""
    saver = Saver(ONE)
    hear = Writer.hear

    def without_answer(writer: Writer, seconds: float = 0.0) -> None:
        hear(writer, seconds)
        for name in ("committed", "seconds", "warnings"):
            writer.answers.pop(name, None)

    for step in (1, 2):
        saver.save(tmp_path, step, fragments(LLAMA, Layout(), 0, 0, 0), meta_of(LLAMA), background=True)
        writer = saver._writer
        assert writer is not None
        while "committed" not in writer.answers:
            writer.hear(60.0)
        os.kill(writer.pid, signal.SIGKILL)
        if step == 2:
            monkeypatch.setattr(Writer, "hear", without_answer)
            writer.answers.pop("committed")
        while "died" not in writer.answers:
            writer.hear(60.0)
        assert saver.failure is None or step == 2
        saved = saver.finish()
        assert saved is not None and saved.path.name == f"step-0000000{step}" and saved.write > 0
    saver.close()
    assert len(checkpoint.committed(tmp_path)) == 2


def test_a_writer_lives_before_it_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('from the current folder')")
    monkeypatch.chdir(tmp_path)
    saver = Saver(ONE)
    saver.reserve(fragments(LLAMA, Layout(), 0, 0, 0))
    saver.close()
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(UserError, match="cannot be saved in the background .* writer ended with status 1"):
        saver.reserve(fragments(LLAMA, Layout(), 0, 0, 0))
    saver.close()


def test_a_job_is_given_whatever_the_writer_does() -> None:
    writer = Writer([])
    os.kill(writer.pid, signal.SIGSTOP)
    given = threading.Thread(target=writer.give, args=({"commit": None, "rectangles": "x" * (1 << 20)},), daemon=True)
    given.start()
    given.join(10.0)
    blocked = given.is_alive()
    os.kill(writer.pid, signal.SIGKILL)
    given.join(10.0)
    writer.close()
    assert not blocked
