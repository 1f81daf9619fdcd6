"""`index.json`: what a checkpoint holds, tensor by tensor, and where. See docs/checkpoint-format.md."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megapt.checkpoint.folders import INDEX, MARKER, resolve
from megapt.checkpoint.rawfile import WIDTHS
from megapt.checkpoint.strict import LARGEST, Malformed, dimensions, member, parse, shown, typed
from megapt.errors import UserError

FORMAT = "megapt-checkpoint"
VERSION = 1
_MOST_BYTES = 4 << 30  # of an index; that of 405 billion parameters saved by 1,024 ranks has 50 MB
_CHECKSUM = re.compile(r"crc32:[0-9a-f]{8}")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,254}")


@dataclass(frozen=True, slots=True)
class Slice:
    """A rectangle of a global tensor: offset and shape per dimension, its file, key and checksum."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    key: str
    checksum: str

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


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

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Index:
    """tensors: by global parameter name; files: bytes of every tensor file; meta: given by the saver."""

    step: int
    meta: dict[str, Any]
    tensors: dict[str, TensorIndex]
    files: dict[str, int]

    def encode(self) -> bytes:
        tensors = {
            name: {"shape": tensor.shape, "kinds": {kind: _tree(entry) for kind, entry in tensor.kinds.items()}}
            for name, tensor in self.tensors.items()
        }
        tree = {"format": FORMAT, "version": VERSION, "step": self.step, "meta": self.meta, "tensors": tensors}
        return json.dumps(tree | {"files": self.files}, allow_nan=False, separators=(",", ":")).encode()

    @classmethod
    def decode(cls, data: bytes, path: Path) -> Index:
        """The index in a file's bytes. Keys that are not known are passed over; UserError where anything that is
        read is missing, of another type or impossible, naming the tensor."""
        try:
            tree = typed(parse(data), dict, "it")
            _check_version(tree)
            step, meta = member(tree, "step", int), member(tree, "meta", dict)
            files = _files(member(tree, "files", dict))
            tensors = {name: _tensor(name, value) for name, value in member(tree, "tensors", dict).items()}
        except Malformed as error:
            raise UserError(f"{path} is not an index: {error}") from None
        if not 0 <= step <= LARGEST:
            raise UserError(f"{path} is not an index: 'step' is {shown(step)}, not a number of steps")
        index = cls(step, meta, tensors, files)
        index.check()
        return index

    def check(self) -> None:
        """Every tensor is covered exactly once by its slices, which lie in listed files."""
        for name, tensor in self.tensors.items():
            for kind, entry in tensor.kinds.items():
                if not _covers(entry.slices, tensor.shape):
                    raise UserError(
                        f"{kind} of {name}: slices at {_some([s.offset for s in entry.slices])} of shapes "
                        f"{_some([s.shape for s in entry.slices])} do not make up the tensor of shape {tensor.shape}"
                    )
                for s in entry.slices:
                    if s.file not in self.files:
                        raise UserError(f"{kind} of {name} lies in the file {shown(s.file)}, which is not listed")

    def entries(self) -> Iterator[tuple[str, str, Entry]]:
        """(name, kind, entry) of all that is stored, in the stored order."""
        for name, tensor in self.tensors.items():
            for kind, entry in tensor.kinds.items():
                yield name, kind, entry

    def nbytes(self, name: str, kind: str) -> int:
        tensor = self.tensors[name]
        return tensor.numel * WIDTHS[tensor.kinds[kind].dtype]


def _tree(entry: Entry) -> dict[str, Any]:
    slices = [{name: getattr(part, name) for name in Slice.__slots__} for part in entry.slices]
    return {"dtype": entry.dtype, "slices": slices}


def _check_version(tree: dict[str, Any]) -> None:
    if (found := tree.get("format")) != FORMAT:
        raise Malformed(f"it has the format {shown(found)}, not {FORMAT!r}")
    found = tree.get("version")
    if type(found) is not int or found != VERSION:
        raise Malformed(f"it has format version {shown(found)}; legal here: {VERSION}")


def _files(tree: dict[str, Any]) -> dict[str, int]:
    for name, size in tree.items():
        if not _FILE_NAME.fullmatch(name):
            raise Malformed(
                f"the file name {shown(name)} is not plain; legal: letters, digits, '.', '_', '+' and '-', no folders"
            )
        if not 0 <= typed(size, int, f"the size of {name}") <= LARGEST:
            raise Malformed(f"the size of {name} is {shown(size)}")
    return tree


def _tensor(name: str, value: Any) -> TensorIndex:
    try:
        _check_name(name, "the name")
        tree = typed(value, dict, "the entry")
        shape = dimensions(tree, "shape")
        if math.prod(shape) * max(WIDTHS.values()) > LARGEST:
            raise Malformed(f"the shape {shown(list(shape))} has more elements than any file can hold")
        kinds = {kind: _entry(name, kind, entry, shape) for kind, entry in member(tree, "kinds", dict).items()}
    except Malformed as error:
        raise Malformed(f"{shown(name)[1:-1]}: {error}") from None
    return TensorIndex(shape, kinds)


def _entry(name: str, kind: str, value: Any, shape: tuple[int, ...]) -> Entry:
    try:
        _check_name(kind, "the kind")
        tree = typed(value, dict, "the entry")
        dtype = member(tree, "dtype", str)
        if dtype not in WIDTHS:
            raise Malformed(f"the dtype {shown(dtype)} is unknown; legal: {', '.join(WIDTHS)}")
        own = f"{kind}/{name}"
        return Entry(dtype, tuple(_slice(part, shape, own) for part in member(tree, "slices", list)))
    except Malformed as error:
        raise Malformed(f"{shown(kind)[1:-1]}: {error}") from None


def _slice(value: Any, whole: tuple[int, ...], own: str) -> Slice:
    tree = typed(value, dict, "a slice")
    offset, shape = dimensions(tree, "offset"), dimensions(tree, "shape")
    file, key, checksum = member(tree, "file", str), member(tree, "key", str), member(tree, "checksum", str)
    inside = len(offset) == len(shape) == len(whole)
    if not inside or any(at + n > extent for at, n, extent in zip(offset, shape, whole, strict=True)):
        raise Malformed(f"the slice at {shown(list(offset))} of shape {shown(list(shape))} lies outside of {whole}")
    if key != own and not key.startswith(f"{own}/"):  # or one tensor could pass for another of its shape
        raise Malformed(f"the key {shown(key)} is not {own!r} and does not go on after it with '/'")
    if not _CHECKSUM.fullmatch(checksum):
        raise Malformed(f"the checksum {shown(checksum)} is not 'crc32:' and eight digits from 0 to f")
    return Slice(offset, shape, file, key, checksum)


def _check_name(name: str, what: str) -> None:
    if not name.isprintable() or not 0 < len(name) <= 1000:
        raise Malformed(f"{what} {shown(name)} is empty, too long or not printable")


def _covers(slices: Sequence[Slice], whole: tuple[int, ...]) -> bool:
    """Whether rectangles cover a tensor exactly once, in time linear in their number.

    Their indicator functions must add up to the tensor's. Taking differences along every dimension leaves of a
    rectangle its corners, with alternating signs, and is one to one on functions that vanish far out: so it is enough
    that all corners but the tensor's own cancel.
    """
    if len(slices) == 1:
        return slices[0].shape == whole and not any(slices[0].offset)
    signs = [(-1) ** sum(corner) for corner in itertools.product((0, 1), repeat=len(whole))]
    left: dict[tuple[int, ...], int] = {}

    def add(offset: tuple[int, ...], shape: tuple[int, ...], factor: int) -> None:
        sides = [(at, at + n) for at, n in zip(offset, shape, strict=True)]
        for corner, sign in zip(itertools.product(*sides), signs, strict=True):
            left[corner] = left.get(corner, 0) + sign * factor

    for part in slices:
        add(part.offset, part.shape, 1)
    add((0,) * len(whole), whole, -1)
    return not any(left.values())


def _some(values: Sequence[object], most: int = 4) -> str:
    more = f" and {len(values) - most} more" if len(values) > most else ""
    return f"[{', '.join(map(str, values[:most]))}]{more}"


def marker_of(index: bytes) -> bytes:
    """Content of the marker file; in the form that `sha256sum --check COMMITTED` understands."""
    return f"{hashlib.sha256(index).hexdigest()}  {INDEX}\n".encode()


def read_index(path: str | Path, files: bool = True) -> Index:
    """The index of a checkpoint (a step folder, or whatever `resolve` accepts), its integrity checked.

    Checked are the marker, the index's hash, the format version, everything that the index says by itself and, with
    `files`, presence and size of every file. Raises UserError naming what is wrong.
    """
    folder = resolve(path)
    data = _read(folder, INDEX, _MOST_BYTES)
    if _read(folder, MARKER, 1 << 10) != marker_of(data):
        raise UserError(f"{folder} is damaged: the hash of {INDEX} is not the one in {MARKER}")
    index = Index.decode(data, folder / INDEX)
    if files:
        found = (file_problem(folder, name, size) for name, size in index.files.items())
        if problems := [problem for problem in found if problem]:
            raise UserError(f"{folder} is damaged: {'; '.join(problems)}")
    return index


def file_problem(folder: Path, name: str, size: int | None = None) -> str | None:
    """Why `name` is not a file of `folder` (of `size` bytes) that can be read; None if it is."""
    path = folder / name
    try:
        if path.is_symlink() and path.resolve().parent != folder.resolve():
            return f"{name} is a symbolic link out of the folder"
        if not path.is_file():
            return f"{name} is not a file" if path.exists() else f"{name} is missing"
        actual = path.stat().st_size
    except (OSError, RuntimeError) as error:  # RuntimeError: links that form a ring
        return f"{name}: {getattr(error, 'strerror', None) or error}"
    return f"{name} has {actual} bytes instead of {size}" if size not in (None, actual) else None


def _read(folder: Path, name: str, most: int) -> bytes:
    problem = file_problem(folder, name)
    try:
        if problem is None:
            with open(folder / name, "rb") as file:
                data = file.read(most + 1)
            if len(data) <= most:
                return data
            problem = f"{name} has more than {most:,} bytes"
    except OSError as error:
        problem = f"{name}: {error.strerror}"
    raise UserError(f"{folder} is damaged: {problem}")
