"""The folder of a run: which config, which code and which machines made the numbers beside it."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import megapt
from megapt.errors import UserError
from megapt.files import write_whole


class RunFolder:
    """Folder of one run, resumed or not; made and written by rank 0 alone.

    The first start writes ``config.yaml`` and ``environment.json``. A later start of the same run keeps every
    earlier file and adds ``config.<n>.yaml`` and ``environment.<n>.json`` (n = 1, 2, ...) where they differ
    from the latest one, so the highest number is what runs now and the whole history stays readable.

    Holds the folder's lock as long as it lives (the process, at most): two runs writing one curve and one set of
    checkpoints would ruin both. On a file system without locks it says so on stderr and goes on.

    Raises:
        UserError: ``path`` exists and is not a folder, or cannot be made, or another run holds it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"run folder: {self.path} must be a folder that exists or can be made ({error.strerror}); "
                f"name another one."
            ) from error
        self._lock = open(self.path / ".lock", "a")  # closing it gives the lock back
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise UserError(
                f"run folder: another run is writing to {self.path}; wait for it, stop it, or name another folder"
            ) from error
        except OSError as error:  # some shared file systems have no locks, and a run must still be possible there
            print(
                f"run folder: {self.path} cannot be locked here ({error.strerror}); start no second run in it",
                file=sys.stderr,
            )

    def record(self, config_text: str, environment: Mapping[str, Any]) -> None:
        """Write the config (YAML) and the environment (``describe_environment``), each whole or not."""
        self._add("config", ".yaml", config_text)
        self._add("environment", ".json", json.dumps(environment, indent=2, sort_keys=True) + "\n")

    def _add(self, stem: str, suffix: str, text: str) -> None:
        versions = self._versions(stem, suffix)
        data = text.encode()
        if not versions:
            write_whole(self.path / f"{stem}{suffix}", data)
        elif versions[max(versions)].read_bytes() != data:
            write_whole(self.path / f"{stem}.{max(versions) + 1}{suffix}", data)

    def _versions(self, stem: str, suffix: str) -> dict[int, Path]:
        pattern = re.compile(rf"{re.escape(stem)}(?:\.(\d+))?{re.escape(suffix)}")
        matches = ((pattern.fullmatch(path.name), path) for path in self.path.iterdir())
        return {int(match[1] or 0): path for match, path in matches if match}


def describe_environment(
    *, device: str, world_size: int, layout: Mapping[str, Any], command: Sequence[str] | None = None
) -> dict[str, Any]:
    """What a stranger needs to repeat the run: versions, code, machine, layout and command line.

    Args:
        device: the device in words, such as ``"cpu"`` or ``"NVIDIA H100 80GB HBM3"``.
        world_size: number of ranks.
        layout: sizes of the mesh axes and whatever else describes the layout; JSON values.
        command: the command line, ``sys.argv`` when left out.
    """
    return {
        "versions": versions(),
        "git": git_state(Path(megapt.__file__).parent),
        "host": socket.gethostname(),
        "system": platform.platform(),
        "device": device,
        "world_size": world_size,
        "layout": dict(layout),
        "command": list(sys.argv if command is None else command),
    }


@cache
def versions() -> dict[str, str | None]:
    """Of Python, this package and those that compute; None for one that is not installed."""
    packages = {name: _version(name) for name in ("torch", "deepspeed", "numpy")}
    return {"python": platform.python_version(), "megapt": megapt.__version__, **packages}


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit and dirty flag of the git work tree that tracks the code in ``folder``; ``None`` without one.

    An installed package may lie inside somebody else's repository; a folder whose ``__init__.py`` is not
    tracked is therefore not taken for part of one.
    """
    if _git(folder, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit = _git(folder, "rev-parse", "HEAD")
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    if commit is None or changes is None:
        return None
    return {"commit": commit, "dirty": bool(changes)}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def _version(package: str) -> str | None:
    # Reading the installed metadata spares the import, which takes seconds for deepspeed.
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
