"""The commit of a checkpoint: the work of rank 0, in its own process or in its background writer's."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megapt.checkpoint import folders
from megapt.checkpoint.index import Entry, Index, Slice, TensorIndex, marker_of
from megapt.checkpoint.retention import Keep, prune
from megapt.checkpoint.written import Written, note_name
from megapt.errors import UserError
from megapt.files import sync_folder, write_whole

_AGAIN = 0.02


@dataclass(frozen=True)
class Commit:
    """What rank 0 needs to commit a checkpoint that `world` ranks write to the partial folder of `folder`.

    names: of all parameters, in their order, where it is known which there must be. keep: which checkpoints stay
    afterwards, None for all. attempt: part of the partial folder's name, the same on all ranks: a rank or a writer that
    outlived the job before finds no folder to write to.
    """

    folder: Path
    step: int
    meta: dict[str, Any]
    world: int
    names: list[str] | None = None
    keep: Keep | None = None
    attempt: str = field(default_factory=folders.new_attempt)

    @property
    def partial(self) -> Path:
        return folders.partial_folder(self.folder, self.step, self.attempt)

    @property
    def final(self) -> Path:
        return folders.step_folder(self.folder, self.step)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "folder": str(self.folder)}

    @classmethod
    def of(cls, tree: dict[str, Any]) -> Commit:
        keep = tree["keep"]
        return cls(**{**tree, "folder": Path(tree["folder"]), "keep": keep and Keep(**keep)})

    def prepare(self) -> list[str]:
        """Make the partial folder. What earlier saves left behind goes first: it takes up room. Returns warnings."""
        json.dumps(self.meta, allow_nan=False)
        if folders.is_committed(self.final):
            raise UserError(f"{self.final.name} is already committed there; move it away, or use another folder")
        folders.make(self.folder)
        _, problems = folders.clear_partials(self.folder)
        torn, more = folders.clear_torn(self.folder)
        self.partial.mkdir()
        warnings = [f"removed {path}, which was never committed" for path in torn]
        return warnings + [f"what an earlier save left cannot be removed: {error}" for error in problems + more]

    def complete(self, patience: float | None = None) -> list[str]:
        """Wait until every rank's note is there (at most `patience` seconds), commit, and remove what need not be
        kept. Returns warnings: once it is committed, nothing that goes wrong makes it a failure."""
        written = self._collect(patience)
        data = self._index(written).encode()
        for rank in range(self.world):
            (self.partial / note_name(rank)).unlink()
        write_whole(self.partial / folders.INDEX, data, make_folder=False)
        if folders.is_committed(self.final):
            raise UserError(f"{self.final} was committed there meanwhile")
        if self.final.exists():
            shutil.rmtree(self.final)
        os.rename(self.partial, self.final)
        warnings = []
        try:
            sync_folder(self.folder)
            write_whole(self.final / folders.MARKER, marker_of(data), make_folder=False)
        except OSError as error:
            if not folders.is_committed(self.final):
                raise
            warnings.append(f"{self.final} is committed, but might not survive a power cut: {error}")
        try:
            return warnings + self._tidy()
        except Exception as error:  # noqa: BLE001 (whatever it is, the checkpoint is there)
            return [*warnings, f"after the commit of {self.final}: {error!r}"]

    def discard(self) -> None:
        """Free the space of a checkpoint that failed."""
        shutil.rmtree(self.partial, ignore_errors=True)
        if not folders.is_committed(self.final):
            shutil.rmtree(self.final, ignore_errors=True)

    def _tidy(self) -> list[str]:
        if self.keep is None:
            return []
        _, problems = prune(self.folder, self.keep, self.final)
        warnings = [f"an older checkpoint could not be removed and takes up space: {error}" for error in problems]
        newest = folders.find_latest(self.folder)
        if newest is not None and folders.step_of(newest) > self.step:
            warnings.append(f"{newest} is a higher step than {self.final.name}; if it is of another run, move it away")
        return warnings

    def _collect(self, patience: float | None) -> list[Written]:
        deadline = None if patience is None else time.monotonic() + patience
        written = []
        for rank in range(self.world):
            path = self.partial / note_name(rank)
            while not path.exists():
                if not self.partial.is_dir():
                    raise UserError(f"{self.partial} was removed while it was being written")
                if deadline is not None and time.monotonic() > deadline:
                    raise UserError(f"{path} of rank {rank} is not seen by rank 0: it must lie on a shared file system")
                time.sleep(_AGAIN)
            written.append(Written.read(path))
        return written

    def _index(self, everything: list[Written]) -> Index:
        tensors: dict[str, TensorIndex] = {}
        for rectangle, file, crc in (row for written in everything for row in written.rows):
            part = Slice(rectangle.offset, rectangle.extent, file, rectangle.key, crc)
            tensor = tensors.setdefault(rectangle.name, TensorIndex(rectangle.shape, {}))
            before = tensor.kinds.get(rectangle.kind, Entry(rectangle.dtype, ()))
            tensor.kinds[rectangle.kind] = Entry(before.dtype, (*before.slices, part))
        if self.names is not None:
            if missing := [name for name in self.names if name not in tensors]:
                raise UserError(f"no rank holds {', '.join(missing)}")
            tensors = {name: tensors[name] for name in self.names}
        files = {name: size for written in everything for name, size in written.files.items()}
        index = Index(self.step, self.meta, tensors, files)
        index.check()
        return index
