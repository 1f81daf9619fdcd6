"""Saving: fragments of tensor-parallel shards become rectangles of global tensors, and all commit at once."""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megapt.checkpoint import folders
from megapt.checkpoint.index import Entry, Index, Slice, TensorIndex, marker_of
from megapt.checkpoint.plan import Item, Piece, plan
from megapt.checkpoint.tensorfile import DTYPES, NAMES, TensorFile, checksum
from megapt.checkpoint.together import Together
from megapt.errors import UserError
from megapt.files import sync_folder, write_whole
from megapt.mesh import ParallelMesh
from megapt.parameters import ParameterTable
from megapt.zero.base import Fragment

FILE_BYTES = 2 << 30  # a rank's tensors are spread over files of about this size


@dataclass
class Written:
    """What one rank wrote: (name, kind, dtype, global shape, slice) of every rectangle; its files' sizes."""

    rows: list[tuple[str, str, str, tuple[int, ...], Slice]] = field(default_factory=list)
    files: dict[str, int] = field(default_factory=dict)


def save(
    folder: str | Path,
    step: int,
    fragments: Iterable[Fragment],
    mesh: ParallelMesh,
    meta: dict[str, Any],
    table: ParameterTable | None = None,
) -> Path:
    """Collective: write the checkpoint of `step` and return its folder, once it is committed.

    fragments: this rank's, of any ZeRO stage; meta: JSON that comes back from `load` (rank 0's is stored);
    with `table`, a parameter of the model that no rank holds is an error. Beyond the fragments, a rank holds
    one local shard at a time. Raises the same UserError on every rank if any of them fails; then
    nothing is left of this checkpoint, and older ones are whole. A step already committed is refused.
    """
    folder = Path(folder)
    together = Together(mesh, f"the checkpoint of step {step} was not saved to {folder}: ")
    if mesh.rank == 0:
        together.run(lambda: _prepare(folder, step, meta))
    together.agree()
    try:
        partial = folders.partial_folder(folder, step)
        together.run(lambda: _check_visible(partial))
        local = together.run(lambda: _own(fragments)) or {}
        together.agree()
        pieces = _gather_pieces(local, mesh)
        items = together.run(lambda: plan(pieces)) or []
        together.agree()
        written = _write_all(partial, items, local, mesh, together)
        together.agree()
        everything = _gather_written(written, mesh)
        if mesh.rank == 0:
            together.run(lambda: _commit(folder, step, meta, everything, table))
        together.agree()
    except UserError:
        if mesh.rank == 0:
            _discard(folder, step)
        raise
    return folders.step_folder(folder, step)


Local = dict[tuple[str, str], list[tuple[Piece, Tensor]]]


def _prepare(folder: Path, step: int, meta: dict[str, Any]) -> None:
    json.dumps(meta, allow_nan=False)
    final = folders.step_folder(folder, step)
    if folders.is_committed(final):
        raise UserError(f"{final.name} is already committed there; move it away, or use another folder")
    folder.mkdir(parents=True, exist_ok=True)
    partial = folders.partial_folder(folder, step)
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir()


def _check_visible(partial: Path) -> None:
    if not partial.is_dir():
        raise UserError(f"{partial}, made by rank 0, is not seen here: it must lie on a shared file system")


def _own(fragments: Iterable[Fragment]) -> Local:
    """This rank's pieces of the shards that are to be written, with the live tensors behind them."""
    local: Local = {}
    for fragment in fragments:
        parameter = fragment.parameter
        spec, shard = parameter.spec, parameter.shard
        writes = parameter.owner and spec.tied_to is None and shard.primary and shard.length > 0
        if not writes or fragment.numel == 0:
            continue
        for kind, tensor in fragment.tensors.items():
            assert tensor.shape == (fragment.numel,), f"{kind} of {spec.name}: {tuple(tensor.shape)}"
            stop = fragment.start + fragment.numel
            piece = Piece(spec.name, kind, NAMES[tensor.dtype], spec.shape, shard, fragment.start, stop)
            local.setdefault((spec.name, kind), []).append((piece, tensor.detach()))
    return local


def _gather_pieces(local: Local, mesh: ParallelMesh) -> list[list[Piece]]:
    own = [piece for pieces in local.values() for piece, _ in pieces]
    if mesh.dp.size == 1:
        return [own]
    gathered: list[Any] = [None] * mesh.dp.size
    dist.all_gather_object(gathered, own, group=mesh.dp.group)
    return gathered


def _write_all(
    partial: Path, items: list[Item], local: Local, mesh: ParallelMesh, together: Together
) -> Written:
    """Collective over dp. After a local failure the rank goes on sending, and drops what it receives."""
    files = _Files(partial, mesh.rank, [item for item in items if item.writer == mesh.dp.rank])
    try:
        for item in items:
            flat = _bring(item, local, mesh)
            if flat is not None:
                valid = item.shard.valid(flat.view(item.shard.shape))
                together.run(functools.partial(files.add, item, valid))
        together.run(files.close)
    finally:
        files.abandon()
    return files.written


def _bring(item: Item, local: Local, mesh: ParallelMesh) -> Tensor | None:
    """On the writer the flattened local shard [numel] (padding undefined), gathered over dp; else None."""
    here, key = mesh.dp.rank, (item.name, item.kind)
    operations = []
    flat = None
    if item.writer == here:
        numel = int(torch.Size(item.shard.shape).numel())
        flat = torch.empty(numel, dtype=DTYPES[item.dtype], device=mesh.device)
    for source, start, stop in item.sources:
        if source == here:
            part = _part(local[key], start, stop)
            if flat is not None:
                flat[start:stop].copy_(part)
            else:
                part = part.to(mesh.device).contiguous()
                to = mesh.dp.global_rank(item.writer)
                operations.append(dist.P2POp(dist.isend, part, to, group=mesh.dp.group))
        elif flat is not None:
            frm = mesh.dp.global_rank(source)
            operations.append(dist.P2POp(dist.irecv, flat[start:stop], frm, group=mesh.dp.group))
    if operations:
        # Batched, so that NCCL uses the group's communicator instead of making one for every pair of ranks.
        for work in dist.batch_isend_irecv(operations):
            work.wait()
    return flat


def _part(pieces: list[tuple[Piece, Tensor]], start: int, stop: int) -> Tensor:
    for piece, tensor in pieces:
        if piece.start <= start and stop <= piece.stop:
            return tensor[start - piece.start : stop - piece.start]
    raise AssertionError(f"no piece holds [{start}, {stop})")


class _Files:
    """The files of one rank, one open at a time."""

    def __init__(self, folder: Path, rank: int, items: list[Item]) -> None:
        self.written = Written()
        self._folder = folder
        self._groups = self._split(items)
        self._names = (f"rank-{rank:05d}-{number:03d}.safetensors" for number in range(len(items)))
        self._file: TensorFile | None = None
        self._left = 0

    @staticmethod
    def _split(items: list[Item]) -> Iterator[list[Item]]:
        group: list[Item] = []
        size = 0
        for item in items:
            size += item.slot.nbytes
            if group and size > FILE_BYTES:
                yield group
                group, size = [], item.slot.nbytes
            group.append(item)
        if group:
            yield group

    def add(self, item: Item, tensor: Tensor) -> None:
        if self._left == 0:
            self.close()
            group = next(self._groups)
            self._file = TensorFile(self._folder / next(self._names), [i.slot for i in group])
            self._left = len(group)
        assert self._file is not None
        tensor = tensor.cpu().contiguous()
        self._file.write(tensor)
        self._left -= 1
        slot = item.slot
        part = Slice(item.offset, slot.shape, self._file.path.name, slot.key, checksum(tensor))
        self.written.rows.append((item.name, item.kind, item.dtype, item.shape, part))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self.written.files[self._file.path.name] = self._file.size
            self._file = None

    def abandon(self) -> None:
        if self._file is not None:
            self._file.abandon()


def _gather_written(written: Written, mesh: ParallelMesh) -> list[Written]:
    if mesh.world == 1:
        return [written]
    everything: list[Any] | None = [None] * mesh.world if mesh.rank == 0 else None
    dist.gather_object(written, everything, dst=0)
    return everything or []


def _index(step: int, meta: dict[str, Any], everything: list[Written], table: ParameterTable | None) -> Index:
    tensors: dict[str, TensorIndex] = {}
    for name, kind, dtype, shape, part in (row for written in everything for row in written.rows):
        tensor = tensors.setdefault(name, TensorIndex(shape, {}))
        before = tensor.kinds.get(kind, Entry(dtype, ()))
        tensor.kinds[kind] = Entry(before.dtype, (*before.slices, part))
    if table is not None:
        names = [name for name, spec in table.items() if spec.tied_to is None]
        if missing := [name for name in names if name not in tensors]:
            raise UserError(f"no rank holds {', '.join(missing)}")
        tensors = {name: tensors[name] for name in names}
    files = {name: size for written in everything for name, size in written.files.items()}
    index = Index(step, meta, tensors, files)
    index.check()
    return index


def _commit(
    folder: Path, step: int, meta: dict[str, Any], everything: list[Written], table: ParameterTable | None
) -> None:
    data = _index(step, meta, everything, table).encode()
    partial, final = folders.partial_folder(folder, step), folders.step_folder(folder, step)
    write_whole(partial / folders.INDEX, data, make_folder=False)
    if final.exists():
        shutil.rmtree(final)  # torn: `_prepare` refuses a committed one
    os.rename(partial, final)
    sync_folder(folder)
    write_whole(final / folders.MARKER, marker_of(data), make_folder=False)


def _discard(folder: Path, step: int) -> None:
    """Free the space of a checkpoint that failed."""
    shutil.rmtree(folders.partial_folder(folder, step), ignore_errors=True)
    final = folders.step_folder(folder, step)
    if not folders.is_committed(final):
        shutil.rmtree(final, ignore_errors=True)
