"""The commit of a checkpoint: the work of rank 0, in its own process or in its background writer's."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megapt.checkpoint import folders
from megapt.checkpoint.index import Entry, Index, Slice, TensorIndex, marker_of
from megapt.checkpoint.retention import Keep, retain
from megapt.checkpoint.written import Written, note_name
from megapt.errors import UserError
from megapt.files import sync_folder, write_whole

_AGAIN = 0.02


@dataclass(frozen=True)
class Commit:
    """What rank 0 needs to commit a checkpoint that `world` ranks write to the partial folder of `folder`.

    names: of all parameters, in their order, where it is known which there must be. keep: which checkpoints stay
    afterwards, None for all.
    """

    folder: Path
    step: int
    meta: dict[str, Any]
    world: int
    names: list[str] | None = None
    keep: Keep | None = None

    @property
    def partial(self) -> Path:
        return folders.partial_folder(self.folder, self.step)

    @property
    def final(self) -> Path:
        return folders.step_folder(self.folder, self.step)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "folder": str(self.folder)}

    @classmethod
    def of(cls, tree: dict[str, Any]) -> Commit:
        keep = tree["keep"]
        return cls(**{**tree, "folder": Path(tree["folder"]), "keep": keep and Keep(**keep)})

    def prepare(self) -> None:
        """Make the partial folder. What earlier saves left behind goes first: it takes up room."""
        json.dumps(self.meta, allow_nan=False)
        if folders.is_committed(self.final):
            raise UserError(f"{self.final.name} is already committed there; move it away, or use another folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        folders.clear_partials(self.folder)
        self.partial.mkdir()

    def complete(self, patience: float | None = None) -> list[str]:
        """Wait until every rank's note is there (at most `patience` seconds), commit, and remove what need not be
        kept. Returns warnings: what could not be removed."""
        written = self._collect(patience)
        data = self._index(written).encode()
        for rank in range(self.world):
            (self.partial / note_name(rank)).unlink()
        write_whole(self.partial / folders.INDEX, data, make_folder=False)
        if self.final.exists():
            shutil.rmtree(self.final)  # torn: `prepare` refuses a committed one
        os.rename(self.partial, self.final)
        sync_folder(self.folder)
        write_whole(self.final / folders.MARKER, marker_of(data), make_folder=False)
        try:
            if self.keep is not None:
                retain(self.folder, self.keep)
        except OSError as error:
            return [f"older checkpoints in {self.folder} could not be removed and take up space: {error}"]
        return []

    def discard(self) -> None:
        """Free the space of a checkpoint that failed."""
        shutil.rmtree(self.partial, ignore_errors=True)
        if not folders.is_committed(self.final):
            shutil.rmtree(self.final, ignore_errors=True)

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
