"""The checkpoints of a run: when one is due, where it goes, what stays, and what happens when one fails."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megapt.checkpoint import folders
from megapt.checkpoint.choice import choose
from megapt.checkpoint.gathering import from_leader
from megapt.checkpoint.index import read_index
from megapt.checkpoint.retention import Keep
from megapt.checkpoint.saving import Saved, Saver
from megapt.checkpoint.space import readable
from megapt.config import CheckpointConfig
from megapt.errors import UserError
from megapt.files import write_whole
from megapt.mesh import ParallelMesh
from megapt.parameters import ParameterTable
from megapt.zero.base import Fragment

CHECKPOINTS = "checkpoints"
EPHEMERAL = "ephemeral"
IDENTITY = ".id"  # in the run folder: what its checkpoints elsewhere are known by, also where the folder was copied


@dataclass(frozen=True)
class Place:
    """A folder of checkpoints, one every so many steps (0: none by the step). apart: not in the run folder, so that
    those of other runs may lie there."""

    folder: Path
    every: int
    keep: Keep
    apart: bool = False

    def due(self, step: int) -> bool:
        return self.every > 0 and step % self.every == 0


def places(config: CheckpointConfig, run: Path) -> list[Place]:
    """Where a run saves, the lasting checkpoints first."""
    folder, ephemeral = run / CHECKPOINTS, config.ephemeral
    found = [Place(folder, config.every, Keep(config.keep, config.keep_every or 0, config.keep_best))]
    if ephemeral is not None:
        where = Path(ephemeral.folder) if ephemeral.folder is not None else folder / EPHEMERAL
        apart = not where.resolve().is_relative_to(run.resolve())
        found.append(Place(where, ephemeral.every, Keep(ephemeral.keep), apart))
    return found


def identity(run: Path) -> str:
    """What a run folder is known by: what stands in it, else what may be written there."""
    try:
        return (run / IDENTITY).read_text().strip()
    except (FileNotFoundError, NotADirectoryError):
        return secrets.token_hex(8)


def newest(
    found: list[Place], run_id: str, say: Callable[[str], None] = lambda line: None, below: int | None = None
) -> Path | None:
    """The run's committed checkpoint of the highest step (below `below`) in all places; of two, the lasting one."""
    latest = [path for place in found if (path := _newest_of(place, run_id, say, below)) is not None]
    return max(latest, key=folders.step_of, default=None)


def _newest_of(place: Place, run_id: str, say: Callable[[str], None], below: int | None) -> Path | None:
    others = []
    own = None
    for path in reversed(folders.committed(place.folder)):
        if below is not None and folders.step_of(path) >= below:
            continue
        if not place.apart or read_index(path, files=False).meta.get("run") == run_id:
            own = path
            break
        others.append(path)
    if others:
        say(f"WARNING: {', '.join(map(str, others))}: of another run; not resumed")
    return own


def leftovers(found: list[Place]) -> list[str]:
    """Names of checkpoints that were never committed."""
    return [name for place in found for name in folders.torn(place.folder)]


class Upkeep:
    """Saves a run's checkpoints.

    say: prints a line, on rank 0; measure: takes figures of a step for the metrics, on rank 0; agree: collective,
    whether some rank had a reason at the step before. Everything but the constructor and `claim` is collective.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        run: Path,
        mesh: ParallelMesh,
        table: ParameterTable,
        say: Callable[[str], None],
        measure: Callable[[int, dict[str, float]], None],
        agree: Callable[[str | None], bool],
    ) -> None:
        self.config, self.mesh = config, mesh
        self.say, self.measure, self.agree = say, measure, agree
        self.places = places(config, run)
        self.saver = Saver(mesh, table)
        self._run = run
        self._id = identity(run)
        self._retry: tuple[int, Place] | None = None

    def choose(self) -> Path | None:
        """The checkpoint that the run goes on from, None if it has none; see `choice.choose`."""
        self._id = from_leader(self._id, self.mesh)
        say = self.say if self.mesh.rank == 0 else lambda line: None
        return choose(self.mesh, lambda: newest(self.places, self._id, say))

    def without(self, damaged: Path) -> str:
        """Advice to whoever cannot go on from this one."""
        try:
            older = newest(self.places, self._id, below=folders.step_of(damaged))
        except UserError:
            older = None
        return "" if older is None else f"; move {damaged.name} away to go on from {older}"

    def claim(self) -> None:
        """Lock the places before anything is written there, and leave the run's identity in its folder. For rank 0;
        UserError if another run writes to one."""
        if not (self._run / IDENTITY).exists():
            write_whole(self._run / IDENTITY, f"{self._id}\n".encode())
        for place in self.places:
            try:
                self.saver.claim(place.folder)
            except OSError:
                pass  # what is wrong with the folder is told when a checkpoint cannot be saved to it

    def reserve(self, fragments: Iterable[Fragment]) -> None:
        """Before the first step: the memory for snapshots, if there will be any."""
        if self.config.asynchronous and any(place.every for place in self.places):
            self.saver.reserve(fragments)

    def due(self, step: int) -> bool:
        return self._place(step) is not None

    def save(self, step: int, fragments: Iterable[Fragment], meta: dict[str, Any], final: bool) -> None:
        """Write the checkpoint of a step. A failure leaves older ones whole and training going: it is told, and tried
        again. That of the final one, for which nothing more comes, is raised (AgreedError)."""
        self._settle(step, final)
        meta = {**meta, "run": self._id}
        place = (None if final else self._place(step)) or self.places[0]
        background = self.config.asynchronous and not final
        try:
            saved = self.saver.save(place.folder, step, fragments, meta, place.keep, background)
        except UserError as error:
            if final:
                raise
            self._failed(step, place, error)
            return
        if self._retry is not None and self._retry[1] == place:
            self._retry = None
        if saved is not None:
            self._tell(saved)

    def watch(self, step: int) -> None:
        """After every step: tell of what was committed meanwhile, and learn of failures of any rank."""
        saved = self.saver.hear()
        if saved is not None:
            self._tell(saved)
        if self.agree(self.saver.failure):
            self._settle(step)

    def close(self) -> None:
        """At the end of the run, after the final checkpoint."""
        self.saver.close()

    def _place(self, step: int) -> Place | None:
        """Where a checkpoint of this step is due."""
        due = next((place for place in self.places if place.due(step)), None)
        if due is None and self._retry is not None and step >= self._retry[0]:
            return self._retry[1]
        return due

    def _settle(self, step: int, ending: bool = False) -> None:
        """Wait for the save in the background. ending: the run saves once more, and no training follows."""
        place = self.saver.writing_to
        try:
            saved = self.saver.finish()
        except UserError as error:
            self._failed(step, next(p for p in self.places if p.folder == place), error, ending)
            return
        if saved is not None:
            self._tell(saved)

    def _failed(self, step: int, place: Place, error: UserError, ending: bool = False) -> None:
        self._retry = (step + self.config.retry, place)
        if self.mesh.rank == 0:
            more = f"training goes on, it is tried again at step {self._retry[0]} at the latest"
            self.say(f"WARNING: {error}; {'the last checkpoint follows' if ending else more}")
            self.measure(step, {"save_failed": 1})

    def _tell(self, saved: Saved) -> None:
        if self.mesh.rank != 0:
            return
        stall, write = (
            f"{seconds:.2f} s ({readable(round(saved.nbytes / max(seconds, 1e-9)))}/s)"
            for seconds in (saved.stall, saved.write)
        )
        wait = f", waited {saved.wait:.2f} s for the one before" if saved.wait >= 0.01 else ""
        how = f"stall {stall}{wait}, write {write} in the background" if saved.background else f"write {write}{wait}"
        self.say(f"step {saved.step} | saved {saved.path} | {readable(saved.nbytes)} | {how}")
        figures = {"save_bytes": saved.nbytes, "save_stall": saved.stall, "save_wait": saved.wait}
        self.measure(saved.step, {**figures, "save_write": saved.write})
        for warning in saved.warnings:
            self.say(f"WARNING: {warning}")
