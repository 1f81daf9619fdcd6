"""Saving: fragments of tensor-parallel shards become rectangles of global tensors, and all commit at once.

Pieces of a tensor that the ranks of a data-parallel group hold are sent to the one rank that writes it. What a rank
then has goes straight into its files, or, where training is to go on meanwhile, into memory that its background writer
reads. Everything from there on is the same: files, a note per rank, the commit by rank 0.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megapt.checkpoint.background import Writer
from megapt.checkpoint.choice import PATIENCE
from megapt.checkpoint.commit import Commit
from megapt.checkpoint.folders import is_committed, new_attempt
from megapt.checkpoint.gathering import Local, bring, from_leader, gather_pieces, local_pieces
from megapt.checkpoint.lock import FolderLock
from megapt.checkpoint.plan import Item, Piece, plan
from megapt.checkpoint.retention import Keep
from megapt.checkpoint.snapshot import Snapshot, places
from megapt.checkpoint.space import bytes_needed, check_space
from megapt.checkpoint.tensorfile import raw_bytes
from megapt.checkpoint.together import Together
from megapt.checkpoint.written import RankFiles, Rectangle
from megapt.errors import UserError
from megapt.mesh import ParallelMesh, all_reduce
from megapt.parameters import ParameterTable
from megapt.zero.base import Fragment

_AGAIN = 0.05
_SEEN_WITHIN = 60.0  # seconds until rank 0 must see what other machines have written to a shared file system


def save(
    folder: str | Path,
    step: int,
    fragments: Iterable[Fragment],
    mesh: ParallelMesh,
    meta: dict[str, Any],
    table: ParameterTable | None = None,
) -> Path:
    """Collective: write the checkpoint of `step` and return its folder, once it is committed; see `Saver.save`."""
    saver = Saver(mesh, table)
    try:
        saved = saver.save(folder, step, fragments, meta)
        assert saved is not None
        return saved.path
    finally:
        saver.close()


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is committed.

    nbytes: of all ranks' tensors. stall: seconds that training stood still for it; wait: before that, for the save
    before, which was still being written; write: from the snapshot (without one, from the beginning) to the commit.
    """

    path: Path
    step: int
    nbytes: int
    stall: float
    wait: float
    write: float
    background: bool
    warnings: tuple[str, ...] = ()


@dataclass
class _Flight:
    """A save whose snapshot is taken and whose files are being written. told: whether `hear` has told of its end;
    since: when that began (perf_counter)."""

    commit: Commit
    nbytes: int
    stall: float
    wait: float
    warnings: tuple[str, ...]
    told: bool = False
    since: float = field(default_factory=time.perf_counter)


@dataclass(frozen=True)
class _Plan:
    """Who writes what, as long as every rank of the group holds the same `pieces`.

    own, places: the rectangles that this rank writes, and where each stands in its snapshot of `snapshot` bytes;
    nbytes: of all ranks' tensors; needed: what they take on the disk.
    """

    pieces: list[Piece]
    items: list[Item]
    own: list[Rectangle]
    places: list[int]
    snapshot: int
    nbytes: int
    needed: int


class Saver:
    """Writes the checkpoints of one job, one at a time.

    table: the model's parameters; one that no rank holds is then an error. Rank 0 holds the lock of every folder that
    is written to. What is collective must be called by all ranks at the same place.
    """

    def __init__(self, mesh: ParallelMesh, table: ParameterTable | None = None) -> None:
        self.mesh = mesh
        self.leader = mesh.rank == 0
        self.names = None if table is None else [name for name, spec in table.items() if spec.tied_to is None]
        self._locks: dict[Path, FolderLock] = {}
        self._known: _Plan | None = None
        self._flight: _Flight | None = None
        self._snapshot: Snapshot | None = None
        self._writer: Writer | None = None
        self._waited = 0.0

    def claim(self, folder: Path) -> None:
        """Lock a folder that is written to. Rank 0 calls it; UserError if another run writes to it."""
        lock = self._locks.get(folder)
        if lock is not None and lock.held:
            return
        self._end_writer()  # the next one inherits the new lock
        if lock is not None:
            self._locks.pop(folder).close()
        self._locks[folder] = FolderLock(folder)

    def reserve(self, fragments: Iterable[Fragment]) -> None:
        """Collective: have plan, memory and writer ready before the first save in the background needs them."""
        what = "checkpoints cannot be saved in the background (checkpoint.asynchronous=false saves them without): "
        together = Together(self.mesh, what)
        planned, _ = self._plan(fragments, together)
        together.run(lambda: self._make_ready(planned).check_ready())
        together.agree()

    def save(
        self,
        folder: str | Path,
        step: int,
        fragments: Iterable[Fragment],
        meta: dict[str, Any],
        keep: Keep | None = None,
        background: bool = False,
    ) -> Saved | None:
        """Collective: write the checkpoint of `step`, after the one that is still being written.

        fragments: this rank's, of any ZeRO stage; meta: JSON that comes back from `load` (rank 0's is stored); keep:
        what stays in the folder after the commit, None for everything. With `background` it returns None as soon as
        the fragments are copied to memory of their own; `hear` or `finish` tell of the commit. Without, a rank holds
        one local shard at a time beyond the fragments. Raises the same AgreedError on every rank if any of them fails,
        now or with the save before; then nothing is left of that checkpoint, and older ones are whole. A step already
        committed is refused, as is one for which the disk has no room.
        """
        self.finish()
        started = time.perf_counter()
        waited, self._waited = self._waited, 0.0
        attempt = from_leader(new_attempt(), self.mesh)
        commit = Commit(Path(folder), step, meta, self.mesh.world, self.names, keep, attempt)
        together = Together(self.mesh, _not_saved(commit))
        planned, local = self._plan(fragments, together)
        prepared = together.run(lambda: self._prepare(commit, planned.needed)) if self.leader else None
        together.agree()
        warned = tuple(prepared or ())
        try:
            together.run(lambda: _check_visible(commit.partial))
            together.agree()
            if background:
                self._take_snapshot(planned, local, together)
                self._hand_over(commit, planned)
                self._flight = _Flight(commit, planned.nbytes, time.perf_counter() - started, waited, warned)
                return None
            self._write(commit.partial, planned, local, together)
            warnings = together.run(lambda: commit.complete(_SEEN_WITHIN)) if self.leader else None
            together.agree()
        except UserError:
            if self.leader:
                commit.discard()
            raise
        taken = time.perf_counter() - started
        return Saved(commit.final, step, planned.nbytes, taken, waited, taken, False, (*warned, *(warnings or ())))

    def hear(self) -> Saved | None:
        """Rank 0 is told once of the commit of the save in the background, as soon as it is known. Not collective."""
        if self._flight is None or self._writer is None:
            return None
        self._writer.hear()
        return self._tell() if self.leader and "committed" in self._writer.answers else None

    @property
    def failure(self) -> str | None:
        """Why this rank could not write its part of the save in the background, as far as `hear` has heard. The
        others learn of it in `finish`, which all must call then."""
        return self._writer.failure if self._flight is not None and self._writer is not None else None

    @property
    def writing_to(self) -> Path | None:
        """The folder of the save in the background that `finish` has yet to end; the same on all ranks."""
        return None if self._flight is None else self._flight.commit.folder

    def finish(self) -> Saved | None:
        """Collective: wait for the save in the background, if there is one. Rank 0 is told, unless `hear` has done so.

        Raises the same AgreedError on every rank if any of them failed; nothing is left of that checkpoint then.
        """
        flight, writer = self._flight, self._writer
        if flight is None:
            return None
        assert writer is not None
        together = Together(self.mesh, _not_saved(flight.commit))
        started = time.perf_counter()
        try:
            together.run(lambda: writer.wait("written"))
            together.agree()  # only now is it sure that rank 0's writer does not wait for a note that never comes
            if self.leader:
                together.run(lambda: _await_commit(writer, flight.commit))
            together.agree()
            return self._tell() if self.leader else None
        except UserError:
            if self.leader or not writer.alive:
                self._end_writer()
            if self.leader:
                flight.commit.discard()
            raise
        finally:
            self._flight = None
            self._waited += time.perf_counter() - started

    def close(self) -> None:
        """Let go of writer, memory and locks; a save that is still being written is lost: `finish` first."""
        self._end_writer()
        if self._snapshot is not None:
            self._snapshot.close()
            self._snapshot = None
        while self._locks:
            self._locks.popitem()[1].close()

    def _plan(self, fragments: Iterable[Fragment], together: Together) -> tuple[_Plan, Local]:
        """Collective: the plan for these fragments, which is made anew only where some rank's have changed."""
        local = together.run(lambda: local_pieces(fragments)) or {}
        together.agree()
        pieces = [piece for found in local.values() for piece, _ in found]
        changed = torch.tensor(int(self._known is None or self._known.pieces != pieces), device=self.mesh.device)
        if self.mesh.world > 1:
            all_reduce(changed)
        if changed.item() or self._known is None:
            items = together.run(functools.partial(plan, gather_pieces(pieces, self.mesh))) or []
            together.agree()
            own = [item.rectangle for item in items if item.writer == self.mesh.dp.rank]
            at, snapshot = places([rectangle.slot for rectangle in own])
            sizes = [sum(rectangle.slot.nbytes for rectangle in own), bytes_needed(own)]
            totals = torch.tensor(sizes, device=self.mesh.device)
            if self.mesh.world > 1:
                all_reduce(totals)
            self._known = _Plan(pieces, items, own, at, snapshot, *totals.tolist())
        return self._known, local

    def _prepare(self, commit: Commit, needed: int) -> list[str]:
        self.claim(commit.folder)
        warnings = commit.prepare()
        try:
            check_space(commit.partial, needed)
        except UserError:
            commit.discard()
            raise
        return warnings

    def _write(self, partial: Path, planned: _Plan, local: Local, together: Together) -> None:
        """Collective over dp. After a local failure the rank goes on sending, and drops what it receives."""
        files = together.run(lambda: RankFiles(partial, self.mesh.rank, planned.own))
        try:
            for item in planned.items:
                tensor = bring(item, local, self.mesh)
                if tensor is not None and files is not None:
                    together.run(functools.partial(_add, files, item.rectangle, tensor))
            if files is not None:
                together.run(files.close)
        finally:
            if files is not None:
                files.abandon()
        together.agree()

    def _take_snapshot(self, planned: _Plan, local: Local, together: Together) -> None:
        """Collective over dp, as `_write`; the copies have ended when it returns."""
        together.run(lambda: self._make_ready(planned))
        at = iter(planned.places)
        for item in planned.items:
            tensor = bring(item, local, self.mesh)
            if tensor is not None:
                together.run(functools.partial(self._copy, next(at), tensor))
        if self._snapshot is not None:
            together.run(self._snapshot.settle)
        together.agree()

    def _copy(self, at: int, tensor: Tensor) -> None:
        assert self._snapshot is not None
        self._snapshot.put(at, tensor)

    def _make_ready(self, planned: _Plan) -> Writer:
        if self._snapshot is None:
            self._snapshot = Snapshot(self.mesh.device)
        self._snapshot.reserve(planned.snapshot)
        if self._writer is None or not self._writer.alive:
            self._end_writer()
            locks = [lock.descriptor for lock in self._locks.values()]
            self._writer = Writer([self._snapshot.descriptor, *locks])
        return self._writer

    def _hand_over(self, commit: Commit, planned: _Plan) -> None:
        assert self._writer is not None and self._snapshot is not None
        self._writer.give(
            {
                "partial": str(commit.partial),
                "rank": self.mesh.rank,
                "rectangles": planned.own,
                "places": planned.places,
                "snapshot": self._snapshot.descriptor,
                "nbytes": planned.snapshot,
                "commit": commit.to_json() if self.leader else None,
            }
        )

    def _tell(self) -> Saved | None:
        flight, writer = self._flight, self._writer
        assert flight is not None and writer is not None
        if flight.told:
            return None
        flight.told = True
        commit, answers = flight.commit, writer.answers
        seconds = answers.get("seconds", time.perf_counter() - flight.since)
        warnings = (*flight.warnings, *answers.get("warnings", ()))
        return Saved(commit.final, commit.step, flight.nbytes, flight.stall, flight.wait, seconds, True, warnings)

    def _end_writer(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _not_saved(commit: Commit) -> str:
    return f"the checkpoint of step {commit.step} was not saved to {commit.folder}: "


def _await_commit(writer: Writer, commit: Commit) -> None:
    try:
        writer.wait("committed")
    except UserError:
        if not is_committed(commit.final):  # it may have died between the commit and its answer
            raise


def _check_visible(partial: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not partial.is_dir():
        if time.monotonic() > deadline:
            raise UserError(
                f"{partial}, made by rank 0, is not seen here after {PATIENCE:g} s: it must lie on a shared file system"
            )
        time.sleep(_AGAIN)


def _add(files: RankFiles, rectangle: Rectangle, tensor: Tensor) -> None:
    files.add(rectangle, raw_bytes(tensor.cpu()))
