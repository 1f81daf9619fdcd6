"""`index.json`: what a checkpoint holds, tensor by tensor, and where. See docs/checkpoint-format.md."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from megapt.checkpoint.folders import INDEX, MARKER, resolve
from megapt.errors import UserError

FORMAT = "megapt-checkpoint"
VERSION = 1


@dataclass(frozen=True)
class Slice:
    """A rectangle of a global tensor: offset and shape per dimension, its file, key and checksum."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    key: str
    checksum: str

    def overlap(self, offset: tuple[int, ...], shape: tuple[int, ...]) -> list[tuple[int, int]] | None:
        """[begin, end) per dimension, in global indices, shared with another rectangle; None if empty."""
        spans = [
            (max(a, b), min(a + m, b + n))
            for a, m, b, n in zip(self.offset, self.shape, offset, shape, strict=True)
        ]
        return None if any(begin >= end for begin, end in spans) else spans


@dataclass(frozen=True)
class Entry:
    """One kind (`weight`, or `exp_avg`, `exp_avg_sq` of AdamW, `momentum` of Muon) of a parameter; dtype in
    safetensors' words: `F32`."""

    dtype: str
    slices: tuple[Slice, ...]


@dataclass(frozen=True)
class TensorIndex:
    """A parameter: global shape, and its entries by kind."""

    shape: tuple[int, ...]
    kinds: dict[str, Entry]


@dataclass(frozen=True)
class Index:
    """tensors: by global parameter name; files: bytes of every tensor file; meta: given by the saver."""

    step: int
    meta: dict[str, Any]
    tensors: dict[str, TensorIndex]
    files: dict[str, int]

    def encode(self) -> bytes:
        tree = {"format": FORMAT, "version": VERSION, **asdict(self)}
        return json.dumps(tree, allow_nan=False, separators=(",", ":")).encode()

    @classmethod
    def decode(cls, data: bytes, path: Path) -> Index:
        tree = json.loads(data)
        if tree.get("format") != FORMAT:
            raise UserError(f"{path} has the format {tree.get('format')!r}, not {FORMAT!r}")
        if tree.get("version") != VERSION:
            raise UserError(f"{path} has format version {tree.get('version')!r}; legal here: {VERSION}")
        tensors = {
            name: TensorIndex(
                tuple(tensor["shape"]),
                {
                    kind: Entry(e["dtype"], tuple(map(_slice, e["slices"])))
                    for kind, e in tensor["kinds"].items()
                },
            )
            for name, tensor in tree["tensors"].items()
        }
        index = cls(tree["step"], tree["meta"], tensors, tree["files"])
        index.check()
        return index

    def check(self) -> None:
        """Every tensor is covered exactly once by its slices, which lie in listed files."""
        for name, tensor in self.tensors.items():
            for kind, entry in tensor.kinds.items():
                covered = sum(math.prod(s.shape) for s in entry.slices)
                if covered != math.prod(tensor.shape) or any(
                    a.overlap(b.offset, b.shape) for a, b in combinations(entry.slices, 2)
                ):
                    raise UserError(
                        f"{kind} of {name}: slices at {[s.offset for s in entry.slices]} of shapes "
                        f"{[s.shape for s in entry.slices]} do not make up the tensor of shape {tensor.shape}"
                    )
                for s in entry.slices:
                    if s.file not in self.files or Path(s.file).name != s.file:
                        raise UserError(f"{kind} of {name} lies in the file {s.file!r}, which is not listed")


def _slice(tree: dict[str, Any]) -> Slice:
    return Slice(tuple(tree["offset"]), tuple(tree["shape"]), tree["file"], tree["key"], tree["checksum"])


def marker_of(index: bytes) -> bytes:
    """Content of the marker file; in the form that `sha256sum --check COMMITTED` understands."""
    return f"{hashlib.sha256(index).hexdigest()}  {INDEX}\n".encode()


def read_index(path: str | Path, files: bool = True) -> Index:
    """The index of a checkpoint (a step folder, or whatever `resolve` accepts), its integrity checked.

    Checked are the marker, the index's hash, the format version and, with `files`, presence and size of every
    file. Raises UserError naming what is wrong.
    """
    folder = resolve(path)
    try:
        data = (folder / INDEX).read_bytes()
    except FileNotFoundError:
        raise UserError(f"{folder} is damaged: {INDEX} is missing") from None
    if (folder / MARKER).read_bytes() != marker_of(data):
        raise UserError(f"{folder} is damaged: the hash of {INDEX} is not the one in {MARKER}")
    index = Index.decode(data, folder / INDEX)
    if files:
        found = (_file_problem(folder / name, size) for name, size in index.files.items())
        if problems := [problem for problem in found if problem]:
            raise UserError(f"{folder} is damaged: {'; '.join(problems)}")
    return index


def _file_problem(path: Path, size: int) -> str | None:
    if not path.is_file():
        return f"{path.name} is missing"
    actual = path.stat().st_size
    return None if actual == size else f"{path.name} has {actual} bytes instead of {size}"
