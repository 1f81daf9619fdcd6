"""The folder that appears only if all went well, and that belongs to one conversion at a time."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megapt.convert.report import check_output, whole_folder
from megapt.errors import UserError


def test_one_conversion_at_a_time(tmp_path: Path) -> None:
    output = tmp_path / "output"
    with whole_folder(output) as first:
        (first / "weights").write_text("mine")
        with pytest.raises(UserError, match="another conversion is writing .*output"), whole_folder(output):
            pytest.fail("two at once")
        assert (first / "weights").read_text() == "mine"
    assert [path.name for path in tmp_path.rglob("*")] == ["output", "weights"]


def test_what_was_killed_is_cleared_and_what_was_made_meanwhile_stays(tmp_path: Path) -> None:
    left, output = tmp_path / ".output.partial", tmp_path / "output"
    (left / "checkpoints").mkdir(parents=True)
    (left / "link").symlink_to(tmp_path)
    with whole_folder(output) as folder:
        assert folder == left and not list(folder.iterdir())
        (folder / "weights").write_text("first")
    with pytest.raises(UserError, match="already exists and is not an empty folder"), whole_folder(output):
        pytest.fail("made already")
    assert (output / "weights").read_text() == "first" and not left.exists()


def test_a_link_in_place_of_the_hidden_folder_is_not_followed(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (tmp_path / ".output.partial").symlink_to(other)
    with pytest.raises(OSError), whole_folder(tmp_path / "output"):
        pytest.fail("followed")
    assert other.is_dir()


def test_folders_whose_place_nothing_can_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_output(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="is a mount point or"):
        patch.setattr(os.path, "ismount", lambda path: True)
        check_output(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="or the current folder, and cannot be replaced"):
        check_output(Path("."))
