"""Where checkpoints stand on disk, and which of them exist.

A checkpoint is a folder `step-00000120`. It exists once it holds the marker file `COMMITTED`; before that it is a
hidden folder `.step-00000120-1f0c9a3e.partial`, another one for every attempt to save it, or torn. No file points at
the newest one: the folder is scanned, so a stale pointer can never be followed.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from pathlib import Path

from megapt.errors import UserError
from megapt.files import sync_folder

MARKER = "COMMITTED"
INDEX = "index.json"
_STEP = re.compile(r"step-(\d{8,})")
_PARTIAL = re.compile(r"\.step-\d{8,}(-[0-9a-f]{8})?\.partial")


def step_folder(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def new_attempt() -> str:
    """What tells this attempt to save a step from all others, which may still have it open somewhere."""
    return secrets.token_hex(4)


def partial_folder(folder: Path, step: int, attempt: str) -> Path:
    return folder / f".step-{step:08d}-{attempt}.partial"


def make(folder: Path) -> None:
    """A folder with its parents, whose names survive a power cut."""
    if folder.is_dir():
        return
    make(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def is_committed(path: Path) -> bool:
    return (path / MARKER).is_file()


def committed(folder: str | Path) -> list[Path]:
    """The committed checkpoints in a checkpoints folder, lowest step first; empty without such a folder."""
    return sorted((path for path in _steps(Path(folder)) if is_committed(path)), key=step_of)


def find_latest(folder: str | Path) -> Path | None:
    """The committed checkpoint of the highest step in a checkpoints folder, None if there is none."""
    return next(reversed(committed(folder)), None)


def resolve(path: str | Path) -> Path:
    """The one checkpoint meant by a run folder (with `checkpoints/`), a checkpoints folder or a step folder.

    Raises UserError if nothing is there, or if what is there was never committed.
    """
    path = Path(path)
    if is_committed(path):
        return path
    if not path.is_dir():
        beside = f"; committed in {path.parent}: {found}" if (found := _listing(path.parent)) else ""
        raise UserError(f"there is no checkpoint {path}{beside}")
    if (path / INDEX).exists() or _STEP.fullmatch(path.name) or _PARTIAL.fullmatch(path.name):
        raise UserError(
            f"{path} holds no {MARKER} marker: its saving was cut short and it must not be loaded; "
            f"committed in {path.parent}: {_listing(path.parent) or 'none'}"
        )
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    latest = find_latest(folder)
    if latest is not None:
        return latest
    cut = torn(folder)
    raise UserError(
        f"{folder} holds no committed checkpoint"
        + (f"; cut short while being saved, not to be loaded: {', '.join(cut)}" if cut else "")
    )


def torn(folder: Path) -> list[str]:
    """Names of the checkpoints there that were never committed."""
    return sorted(path.name for path in [*_steps(folder), *_partials(folder)] if not is_committed(path))


def clear_partials(folder: Path) -> tuple[list[Path], list[OSError]]:
    """Remove what interrupted saves and removals left behind; for rank 0, while no save is under way. Returns what is
    gone, and why the rest is not."""
    return _clear(_partials(folder))


def clear_torn(folder: Path) -> tuple[list[Path], list[OSError]]:
    """The same for step folders with an index and no marker: killed between the last two moments of the commit."""
    return _clear([path for path in _steps(folder) if _is_torn(path)])


def _is_torn(path: Path) -> bool:
    # Of two questions about files, the cache of a shared file system may answer one with what was before.
    try:
        names = os.listdir(path)
    except OSError:
        return False  # nobody may look into it, nor remove it
    return INDEX in names and MARKER not in names


def _clear(paths: list[Path]) -> tuple[list[Path], list[OSError]]:
    removed, problems = [], []
    for path in paths:
        try:
            _delete(path)
            removed.append(path)
        except OSError as error:
            problems.append(error)
    return removed, problems


def remove(path: Path) -> None:
    """Remove a committed checkpoint. Renamed first: a removal cut short must not leave one with missing files."""
    hidden = partial_folder(path.parent, step_of(path), new_attempt())
    path.rename(hidden)
    sync_folder(path.parent)
    _delete(hidden)


def _delete(path: Path) -> None:
    """A folder with all it holds; of a link to one, only the link. OSErrors carry the whole path."""
    try:
        if path.is_symlink():
            path.unlink()
        else:
            shutil.rmtree(path)
    except OSError as error:
        name = Path(os.fsdecode(error.filename or path)).name  # rmtree names what is inside by its name alone
        where = path if name == path.name else path / name
        raise OSError(error.errno, error.strerror, str(where)) from error


def step_of(path: Path) -> int:
    """The step that a step folder's name says."""
    match = _STEP.fullmatch(path.name)
    assert match
    return int(match.group(1))


def _steps(folder: Path) -> list[Path]:
    return _matching(folder, _STEP)


def _partials(folder: Path) -> list[Path]:
    return _matching(folder, _PARTIAL)


def _matching(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if pattern.fullmatch(p.name) and p.is_dir())


def _listing(folder: Path) -> str:
    return ", ".join(path.name for path in committed(folder))
