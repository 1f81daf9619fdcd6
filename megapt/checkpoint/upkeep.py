"""The checkpoints of a run: when one is due, where it goes, what stays, and what happens when one fails."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megapt.checkpoint import folders
from megapt.checkpoint.retention import Keep
from megapt.checkpoint.saving import Saved, Saver
from megapt.checkpoint.space import readable
from megapt.config import CheckpointConfig
from megapt.errors import UserError
from megapt.mesh import ParallelMesh
from megapt.parameters import ParameterTable
from megapt.zero.base import Fragment

CHECKPOINTS = "checkpoints"
EPHEMERAL = "ephemeral"


@dataclass(frozen=True)
class Place:
    """A folder of checkpoints, one every so many steps (0: none by the step)."""

    folder: Path
    every: int
    keep: Keep

    def due(self, step: int) -> bool:
        return self.every > 0 and step % self.every == 0


def places(config: CheckpointConfig, run: Path) -> list[Place]:
    """Where a run saves, the lasting checkpoints first."""
    folder, ephemeral = run / CHECKPOINTS, config.ephemeral
    found = [Place(folder, config.every, Keep(config.keep, config.keep_every or 0, config.keep_best))]
    if ephemeral is not None:
        where = Path(ephemeral.folder) if ephemeral.folder is not None else folder / EPHEMERAL
        found.append(Place(where, ephemeral.every, Keep(ephemeral.keep)))
    return found


def newest(found: list[Place]) -> Path | None:
    """The committed checkpoint of the highest step in all places; of two, the lasting one."""
    latest = [path for place in found if (path := folders.find_latest(place.folder)) is not None]
    return max(latest, key=folders.step_of, default=None)


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
        self._retry: tuple[int, Place] | None = None

    def claim(self) -> None:
        """Lock the places before anything is written there. For rank 0; UserError if another run writes to one."""
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
        self._settle(step)
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

    def _settle(self, step: int) -> None:
        """Wait for the save in the background."""
        place = self.saver.writing_to
        try:
            saved = self.saver.finish()
        except UserError as error:
            self._failed(step, next(p for p in self.places if p.folder == place), error)
            return
        if saved is not None:
            self._tell(saved)

    def _failed(self, step: int, place: Place, error: UserError) -> None:
        self._retry = (step + self.config.retry, place)
        if self.mesh.rank == 0:
            self.say(f"WARNING: {error}; training goes on, it is tried again at step {self._retry[0]} at the latest")
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
