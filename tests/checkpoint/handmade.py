"""Checkpoints put together by hand: any tensors, cut at will, and an index that says whatever a test wants."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megapt import checkpoint
from megapt.checkpoint.index import Entry, Index, Slice, TensorIndex, marker_of
from megapt.checkpoint.tensorfile import NAMES, Slot, TensorFile
from megapt.mesh import ParallelMesh
from megapt.model.table import parameter_table
from tests.checkpoint.fakes import LLAMA, Layout, check_loaded, fragments, meta_of, true_value

ONE = ParallelMesh.create(1, 1, 1, torch.device("cpu"))
SMALL = LLAMA.model_copy(update={"layers": 1})
Tree = dict[str, Any]


def write(folder: Path, tensors: dict[tuple[str, str], Tensor], meta: Tree, parts: int = 1) -> Path:
    """A committed checkpoint of whole tensors by (name, kind), each cut into at most `parts` slices along dimension 0,
    which lie in as many files."""
    folder.mkdir(parents=True)
    found: dict[str, TensorIndex] = {}
    rows: list[list[tuple[str, str, int, Tensor]]] = [[] for _ in range(parts)]
    for (name, kind), tensor in tensors.items():
        entry = TensorIndex(tuple(tensor.shape), {})
        found.setdefault(name, entry).kinds[kind] = Entry(NAMES[tensor.dtype], ())
        at = 0
        for number, piece in enumerate(tensor.chunk(parts)):
            rows[number].append((name, kind, at, piece))
            at += len(piece)
    files = {}
    for number, own in enumerate(rows):
        path = folder / f"rank-{number:05d}-000.safetensors"
        file = TensorFile(path, [Slot(f"{k}/{n}", NAMES[p.dtype], tuple(p.shape)) for n, k, _, p in own])
        for name, kind, at, piece in own:
            crc = file.write(piece)
            before = found[name].kinds[kind]
            offset = (at, *(0 for _ in piece.shape[1:]))
            part = Slice(offset, tuple(piece.shape), path.name, f"{kind}/{name}", crc)
            found[name].kinds[kind] = Entry(before.dtype, (*before.slices, part))
        file.close()
        files[path.name] = path.stat().st_size
    commit(folder, Index(1, meta, found, files).encode())
    return folder


def weights(folder: Path, parts: int = 2) -> Path:
    """The true weights of SMALL."""
    table = parameter_table(SMALL)
    tensors = {(name, "weight"): true_value(name, "weight", spec.shape) for name, spec in table.items()}
    return write(folder, tensors, meta_of(SMALL), parts)


def commit(folder: Path, index: bytes) -> None:
    (folder / "index.json").write_bytes(index)
    (folder / "COMMITTED").write_bytes(marker_of(index))


def change(folder: Path, edit: Callable[[Tree], object]) -> None:
    """Edit the index, and commit it again as if it had been written so."""
    tree = json.loads((folder / "index.json").read_bytes())
    edit(tree)
    commit(folder, json.dumps(tree).encode())


def load(path: Path) -> None:
    """Load the weights of SMALL and compare every element."""
    target = fragments(SMALL, Layout(), 0, 0, 0, fill=float("nan"))
    checkpoint.load(path, target, ONE, SMALL, weights_only=True)
    check_loaded(target, kinds=("weight",))
