"""Which checkpoints stay: by scanning the committed ones, never by a list that could be wrong."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from megapt.checkpoint import folders
from megapt.checkpoint.index import read_index
from megapt.errors import UserError


@dataclass(frozen=True)
class Keep:
    """The newest `last` checkpoints, those of every `every`-th step (0: none for that), and the `best` ones.

    The best are those of the lowest validation loss, as their meta has it (`validation`: {"step", "loss"}). Of several
    checkpoints after one validation, the first is the one that was measured.
    """

    last: int
    every: int = 0
    best: int = 0


def retain(folder: str | Path, keep: Keep) -> list[Path]:
    """Remove the committed checkpoints that need not be kept, and what interrupted saves left behind.

    Not collective: for rank 0, after a save, while none is under way. Returns the removed paths. UserError if
    some could not be removed.
    """
    if keep.last < 1:
        raise UserError(f"{keep.last} checkpoints cannot be kept; the newest one always stays: keep at least 1")
    folder = Path(folder)
    left, problems = folders.clear_partials(folder)
    removed, more = prune(folder, keep)
    if problems or more:
        raise UserError(f"not everything could be removed from {folder}: {'; '.join(map(str, problems + more))}")
    return left + removed


def prune(folder: Path, keep: Keep, just: Path | None = None) -> tuple[list[Path], list[OSError]]:
    """Remove the committed checkpoints that need not be kept; `just`, which was saved just now, stays whatever its
    step. Returns what is gone, and why the rest is not."""
    paths = folders.committed(folder)
    kept = {just, *paths[-keep.last :]}
    if keep.every:
        kept |= {path for path in paths if folders.step_of(path) % keep.every == 0}
    if keep.best:
        kept |= set(best(paths, keep.best))
    removed, problems = [], []
    for path in paths:
        if path in kept:
            continue
        try:
            folders.remove(path)
            removed.append(path)
        except OSError as error:
            problems.append(error)
    return removed, problems


def best(paths: list[Path], count: int) -> list[Path]:
    """The `count` of lowest validation loss among checkpoints in the order of their steps, the lowest first.

    One that does not say a finite loss is none of them; so is one whose index is damaged, which is not the time to
    complain about.
    """
    measured: dict[int, tuple[float, Path]] = {}
    for path in paths:
        try:
            validation = read_index(path, files=False).meta.get("validation")
        except UserError:
            continue
        if isinstance(validation, dict):
            step, loss = validation.get("step"), validation.get("loss")
            if type(step) is int and isinstance(loss, (int, float)) and math.isfinite(loss):
                measured.setdefault(step, (loss, path))
    ranking = sorted(measured.values(), key=lambda found: found[0])
    return [path for _, path in ranking[:count]]
