from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from megapt.files import open_whole, temporary_name, write_whole


def test_a_file_appears_whole_with_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file"
    with open_whole(path) as file:
        file.write(b"one")
        file.flush()
        assert not path.exists()
        file.write(b", two")
    assert path.read_bytes() == b"one, two"
    write_whole(path, b"three")
    assert path.read_bytes() == b"three"
    assert os.listdir(path.parent) == ["file"]


def test_a_missing_folder_stays_missing_where_that_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "gone" / "file", b"data", make_folder=False)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                         call: str) -> None:
    write_whole(tmp_path / "file", b"old")

    def fail(*_: object) -> None:
        raise OSError("full")

    if call != "write":
        monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="full"), open_whole(tmp_path / "file") as file:
        file.write(b"new")
        if call == "write":
            fail()
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_bytes() == b"old"


def test_a_full_disk_names_the_file_that_was_wanted(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(OSError, match="No space") as full, open_whole(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(FileNotFoundError) as missing:
        write_whole(tmp_path / "gone" / "file", b"data", make_folder=False)
    assert (full.value.filename, missing.value.filename) == (str(path), str(tmp_path / "gone" / "file"))
    with pytest.raises(OSError, match="input") as other, open_whole(path):
        raise OSError(errno.EIO, "input/output error")  # of something else, for all that is known
    assert other.value.filename is None


def test_temporary_names_differ_and_lie_beside(tmp_path: Path) -> None:
    names = {temporary_name(tmp_path / "file") for _ in range(100)}
    assert len(names) == 100 and {name.parent for name in names} == {tmp_path}
