"""What this rank holds of a checkpoint, and how a rank that writes a tensor gets the pieces that others hold."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megapt.checkpoint.plan import Item, Piece
from megapt.checkpoint.tensorfile import DTYPES, NAMES
from megapt.mesh import ParallelMesh
from megapt.zero.base import Fragment

T = TypeVar("T")
Local = dict[tuple[str, str], list[tuple[Piece, Tensor]]]


def local_pieces(fragments: Iterable[Fragment]) -> Local:
    """This rank's pieces of the shards that are to be written, with the live tensors behind them, by name and kind."""
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


def gather_pieces(own: list[Piece], mesh: ParallelMesh) -> list[list[Piece]]:
    """Collective over dp: the pieces of every rank of the group."""
    if mesh.dp.size == 1:
        return [own]
    gathered: list[Any] = [None] * mesh.dp.size
    dist.all_gather_object(gathered, own, group=mesh.dp.group)
    return gathered


def from_leader(value: T, mesh: ParallelMesh) -> T:
    """Collective: the value that rank 0 has."""
    if mesh.world == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, device=mesh.device)
    return values[0]


def bring(item: Item, local: Local, mesh: ParallelMesh) -> Tensor | None:
    """Collective over dp: on the writer the rectangle, a live view where it holds all of it; None elsewhere."""
    here = mesh.dp.rank
    extent = item.rectangle.extent
    if len(item.sources) == 1:
        ((source, start, stop),) = item.sources
        assert source == item.writer
        if source != here:
            return None
        if stop - start == prod(extent):
            return _part(local[item.key], start, stop).view(extent)
    operations = []
    flat = None
    if item.writer == here:
        flat = torch.empty(prod(item.shard.shape), dtype=DTYPES[item.rectangle.dtype], device=mesh.device)
    for source, start, stop in item.sources:
        if source == here:
            part = _part(local[item.key], start, stop)
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
    return None if flat is None else item.shard.valid(flat.view(item.shard.shape))


def _part(pieces: list[tuple[Piece, Tensor]], start: int, stop: int) -> Tensor:
    for piece, tensor in pieces:
        if piece.start <= start and stop <= piece.stop:
            return tensor[start - piece.start : stop - piece.start]
    raise AssertionError(f"no piece holds [{start}, {stop})")
