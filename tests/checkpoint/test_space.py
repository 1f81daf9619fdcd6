"""Full disks, lost permissions, vanished folders: what was there stays whole, and what is wrong is said."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from megapt import checkpoint
from megapt.checkpoint import Saver, saving, space
from megapt.checkpoint.lock import FolderLock
from megapt.errors import UserError
from megapt.mesh import ParallelMesh
from tests.checkpoint.fakes import LLAMA, Layout, check_loaded, fragments, meta_of

ONE = ParallelMesh.create(1, 1, 1, torch.device("cpu"))
MODEL = LLAMA.model_copy(update={"vocabulary": 4000})  # 1.2 MB with its moments


def save(saver: Saver, folder: Path, step: int, background: bool) -> None:
    saver.save(folder, step, fragments(MODEL, Layout(), 0, 0, 0), meta_of(MODEL), background=background)
    saver.finish()


def check(folder: Path, step: int) -> None:
    """The checkpoint of that step is the newest, and all that is there."""
    assert [path.name for path in folder.iterdir() if path.name != ".lock"] == [f"step-{step:08d}"]
    target = fragments(MODEL, Layout(), 0, 0, 0, fill=0.0)
    checkpoint.load(folder, target, ONE, MODEL)
    check_loaded(target)


@pytest.fixture
def saver() -> Iterator[Saver]:
    made = Saver(ONE)
    yield made
    made.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Two megabytes: room for one checkpoint."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_is_seen_before_writing(small_disk: Path, saver: Saver, background: bool) -> None:
    folder = small_disk / "run"
    save(saver, folder, 1, background)
    with pytest.raises(
        UserError, match=r"step 2 was not saved .* needs 1\.\d MB, but .* has \d+\.\d KB left; make room"
    ):
        save(saver, folder, 2, background)
    check(folder, 1)
    shutil.rmtree(folder / "step-00000001")
    save(saver, folder, 3, background)
    check(folder, 3)


@pytest.mark.parametrize("background", [False, True])
def test_a_disk_that_fills_meanwhile(
    small_disk: Path, saver: Saver, background: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if another program took the room between the look and the writing."""
    folder = small_disk / "run"
    save(saver, folder, 1, background)
    monkeypatch.setattr(saving, "check_space", lambda *_: None)
    with pytest.raises(UserError, match="step 2 was not saved .*No space left on device.*rank-00000-000.safetensors"):
        save(saver, folder, 2, background)
    check(folder, 1)


def test_room_is_told_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no small disk can be mounted, at least the arithmetic; a file system that tells no size is believed."""
    real = os.statvfs(tmp_path)
    fields = list(real)
    fields[1], fields[2], fields[4] = 4096, 10**6, 1000  # f_frsize, f_blocks, f_bavail
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result(fields))
    space.check_space(tmp_path, 4096 * 1000)
    with pytest.raises(UserError, match="it needs 5.0 GB, but the file system of .* has 4.1 MB left"):
        space.check_space(tmp_path, 5 * 10**9)
    fields[2] = 0
    space.check_space(tmp_path, 5 * 10**9)
    assert [space.readable(n) for n in (0, 999, 1000, 1_500_000, 2 * 10**18)] == [
        "0 bytes", "999 bytes", "1.0 KB", "1.5 MB", "2000.0 PB",
    ]  # fmt: skip


def _vanishes(folder: Path) -> None:
    shutil.rmtree(folder)


def _is_a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("in the way")


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize(("harm", "refused"), [(_vanishes, False), (_is_a_file, True)])
def test_a_folder_that_is_lost(
    tmp_path: Path, saver: Saver, background: bool, harm: Callable[[Path], None], refused: bool
) -> None:
    folder = tmp_path / "run"
    save(saver, folder, 1, background)
    harm(folder)
    if refused:
        with pytest.raises(UserError, match="step 2 was not saved"):
            save(saver, folder, 2, background)
        folder.unlink()
    save(saver, folder, 3, background)
    check(folder, 3)
    with pytest.raises(UserError, match="another run is writing"):
        _impatient(lambda: Saver(ONE).claim(folder))  # the folder made anew is locked as well


@pytest.mark.parametrize("background", [False, True])
def test_no_permission(tmp_path: Path, saver: Saver, background: bool) -> None:
    folder = tmp_path / "run"
    save(saver, folder, 1, background)
    if not _forbid(folder, True):
        pytest.skip("this file system has no immutable folders")
    try:
        with pytest.raises(UserError, match="step 2 was not saved.*(not permitted|denied)"):
            save(saver, folder, 2, background)
    finally:
        _forbid(folder, False)
    check(folder, 1)
    save(saver, folder, 3, background)


def test_a_leftover_that_stays_is_a_warning(tmp_path: Path, saver: Saver) -> None:
    left = tmp_path / ".step-00000001.partial"
    left.mkdir()
    (left / "file").touch()
    if not _forbid(left, True):
        pytest.skip("this file system has no immutable folders")
    try:
        saved = saver.save(tmp_path, 2, fragments(MODEL, Layout(), 0, 0, 0), meta_of(MODEL))
    finally:
        _forbid(left, False)
    assert saved is not None and len(saved.warnings) == 1
    assert "what an earlier save left cannot be removed" in saved.warnings[0]
    assert str(left / "file") in saved.warnings[0]
    save(saver, tmp_path, 3, False)
    assert not left.exists()


def test_a_folder_that_became_read_only_ends_no_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    saver = Saver(ONE)
    save(saver, folder, 1, False)
    descriptor = saver._locks[folder].descriptor
    if not _forbid(folder, True):
        pytest.skip("this file system has no immutable folders")
    try:
        saver.close()
    finally:
        _forbid(folder, False)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    _impatient(lambda: FolderLock(folder).close())


def _forbid(folder: Path, forbidden: bool) -> bool:
    """Whether the folder takes no new names now, or takes them again. What modes forbid, root may do all the same."""
    if os.geteuid() == 0:
        command = ["chattr", "+i" if forbidden else "-i", folder]
        return subprocess.run(command, capture_output=True).returncode == 0
    folder.chmod(0o555 if forbidden else 0o755)
    return True


def _impatient(work: Callable[[], None]) -> None:
    from megapt.checkpoint import lock

    patience, lock.PATIENCE = lock.PATIENCE, 0.2
    try:
        work()
    finally:
        lock.PATIENCE = patience
