from __future__ import annotations

import errno
import json
import os
import subprocess
from pathlib import Path

import pytest

import megapt
from megapt.errors import UserError
from megapt.monitor import run_folder
from megapt.monitor.run_folder import RunFolder, describe_environment, git_state, write_whole


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name != ".lock"}


def test_first_start_writes_both_files(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "deep" / "run")
    folder.record("a: 1\n", {"host": "node1"})
    assert (folder.path / "config.yaml").read_text() == "a: 1\n"
    assert json.loads((folder.path / "environment.json").read_text()) == {"host": "node1"}
    assert names(folder.path) == {"config.yaml", "environment.json"}


def test_two_runs_cannot_hold_one_folder(tmp_path: Path) -> None:
    first = RunFolder(tmp_path)
    with pytest.raises(UserError, match="another run is writing"):
        RunFolder(tmp_path)
    del first
    RunFolder(tmp_path)


def test_a_file_system_without_locks_is_said_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_folder.fcntl, "flock", refuse)
    RunFolder(tmp_path).record("a: 1\n", {"host": "node1"})
    assert names(tmp_path) == {"config.yaml", "environment.json"}
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.out == ""
    assert f"{tmp_path} cannot be locked here (No locks available)" in captured.err


def test_resuming_unchanged_adds_nothing(tmp_path: Path) -> None:
    for _ in range(3):
        RunFolder(tmp_path).record("a: 1\n", {"host": "node1"})
    assert names(tmp_path) == {"config.yaml", "environment.json"}


def test_resuming_keeps_every_earlier_config(tmp_path: Path) -> None:
    for text in ("a: 1\n", "a: 2\n", "a: 2\n", "a: 1\n"):
        RunFolder(tmp_path).record(text, {"host": "node1"})
    texts = {path.name: path.read_text() for path in tmp_path.glob("config*")}
    assert texts == {"config.yaml": "a: 1\n", "config.1.yaml": "a: 2\n", "config.2.yaml": "a: 1\n"}


def test_numbers_count_as_numbers_and_other_files_are_ignored(tmp_path: Path) -> None:
    for number in range(11):
        RunFolder(tmp_path).record(f"a: {number}\n", {"host": "node1"})
    (tmp_path / "config.old.yaml").write_text("mine")
    RunFolder(tmp_path).record("b: 1\n", {"host": "node2"})
    assert (tmp_path / "config.11.yaml").read_text() == "b: 1\n"
    assert json.loads((tmp_path / "environment.1.json").read_text()) == {"host": "node2"}


def test_a_crash_before_the_rename_leaves_the_old_file_and_no_rubbish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_whole(tmp_path / "file", b"old")

    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(run_folder.os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        write_whole(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert names(tmp_path) == {"file"}


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="must be a folder"):
        RunFolder(tmp_path / "run")


def test_environment_holds_what_a_stranger_needs() -> None:
    environment = describe_environment(
        device="cpu", world_size=8, layout={"tp": 2, "pp": 4}, command=["a", "b"]
    )
    assert environment["versions"]["megapt"] == megapt.__version__
    assert all(environment["versions"][name] for name in ("python", "torch", "numpy"))
    assert environment["layout"] == {"tp": 2, "pp": 4}
    assert (environment["device"], environment["world_size"], environment["command"]) == (
        "cpu",
        8,
        ["a", "b"],
    )
    assert environment["host"]
    json.dumps(environment)


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.strip()


def test_git_state_tells_commit_and_dirt(tmp_path: Path) -> None:
    assert git_state(tmp_path) is None
    git(tmp_path, "init", "-q")
    (tmp_path / "__init__.py").write_text("a = 1\n")
    assert git_state(tmp_path) is None  # inside a work tree that does not track the code
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert git_state(tmp_path) == {"commit": commit, "dirty": False}
    (tmp_path / "notes").write_text("untracked")
    assert git_state(tmp_path) == {"commit": commit, "dirty": False}
    (tmp_path / "__init__.py").write_text("a = 2\n")
    assert git_state(tmp_path) == {"commit": commit, "dirty": True}
