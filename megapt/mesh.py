"""The mesh: which rank stands where on the axes pp, dp, tp, and the process groups along them.

Ranks are laid out with tp innermost, so that tensor-parallel peers are neighbours inside a node, then dp, then pp:
rank = (pp_rank * dp + dp_rank) * tp + tp_rank. The mesh is passed explicitly; there are no globals.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megapt.errors import UserError
from megapt.operations import OPERATIONS, Issued

# torch 2.13 renamed these two collectives and warns at the old names; torch 2.11 has only those.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


# Collectives and transfers go through these, so that a report of a hang can say where each rank was. Those that are not
# asynchronous have ended when they return.


def all_gather(
    out: torch.Tensor, tensor: torch.Tensor, group: dist.ProcessGroup | None = None, async_op: bool = False
) -> Issued:
    """The members' tensors one after the other along dimension 0, into `out`."""
    operation = OPERATIONS.note("all-gather", group, tensor)
    return operation.issued(_all_gather(out, tensor, group=group, async_op=async_op))


def reduce_scatter(
    out: torch.Tensor, tensor: torch.Tensor, group: dist.ProcessGroup | None = None, async_op: bool = False
) -> Issued:
    """The members' sum; each member's part of dimension 0 into its `out`."""
    operation = OPERATIONS.note("reduce-scatter", group, tensor)
    return operation.issued(_reduce_scatter(out, tensor, group=group, async_op=async_op))


def all_reduce(
    tensor: torch.Tensor,
    op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
    group: dist.ProcessGroup | None = None,
    async_op: bool = False,
) -> Issued:
    """In place."""
    operation = OPERATIONS.note("all-reduce", group, tensor)
    return operation.issued(dist.all_reduce(tensor, op=op, group=group, async_op=async_op))


def all_to_all(
    out: torch.Tensor,
    tensor: torch.Tensor,
    received: list[int] | None,
    sent: list[int] | None,
    group: dist.ProcessGroup | None,
    async_op: bool = False,
) -> Issued:
    """`sent[r]` rows of `tensor` go to member r, `received[r]` rows of `out` come from it; None: as many for each."""
    operation = OPERATIONS.note("all-to-all", group, tensor)
    return operation.issued(dist.all_to_all_single(out, tensor, received, sent, group=group, async_op=async_op))


def send(tensor: torch.Tensor, peer: int, group: dist.ProcessGroup | None, content: str) -> Issued:
    """To the world's rank `peer`; `tensor` must stay as it is until it has left. content: what it is, for reports, in
    the same words as its receiver's."""
    operation = OPERATIONS.note("send", group, tensor, peer, content)
    return operation.issued(dist.isend(tensor, peer, group=group))


def receive(buffer: torch.Tensor, peer: int, group: dist.ProcessGroup | None, content: str) -> Issued:
    """From the world's rank `peer`; `buffer` is filled once the result was waited for."""
    operation = OPERATIONS.note("receive", group, buffer, peer, content)
    return operation.issued(dist.irecv(buffer, peer, group=group))


@dataclass(frozen=True)
class Axis:
    """One axis as seen by this rank: its coordinate, the axis' size, its process group (None in a world of one)."""

    rank: int
    size: int
    group: dist.ProcessGroup | None

    def all_reduce(self, tensor: torch.Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> torch.Tensor:
        """In place; nothing to do on an axis of one."""
        if self.size > 1:
            all_reduce(tensor, op, self.group)
        return tensor

    def global_rank(self, rank: int) -> int:
        """The world rank of the member with coordinate `rank`."""
        if self.group is None:
            return 0
        return dist.get_global_rank(self.group, rank)


@dataclass(frozen=True)
class ParallelMesh:
    """Axes of the cluster. `model` is pp x tp: the ranks that together hold one replica of the model."""

    pp: Axis
    dp: Axis
    tp: Axis
    model: Axis
    rank: int
    world: int
    device: torch.device

    @classmethod
    def create(cls, pipeline: int, data: int, tensor: int, device: torch.device) -> ParallelMesh:
        """Collective over the world (none is needed for a world of one).

        Raises UserError unless pipeline x data x tensor is the world size.
        """
        world = dist.get_world_size() if dist.is_initialized() else 1
        if pipeline * data * tensor != world:
            sizes = f"{pipeline} x {data} x {tensor}"
            raise UserError(f"pipeline x data x tensor = {sizes} is not the world of {world} ranks")
        if world == 1:
            one = Axis(0, 1, None)
            return cls(one, one, one, one, 0, 1, device)
        mesh = init_device_mesh(device.type, (pipeline, data, tensor), mesh_dim_names=("pp", "dp", "tp"))
        model = mesh["pp", "tp"]._flatten("model")
        pp, dp, tp = (_axis(mesh[name]) for name in ("pp", "dp", "tp"))
        made = cls(pp, dp, tp, _axis(model), dist.get_rank(), world, device)
        OPERATIONS.forget(made.rank)
        for name, axis in (("pp", pp), ("dp", dp), ("tp", tp), ("pp x tp", made.model)):
            OPERATIONS.name(axis.group, f"{name} ranks")
        return made

    @property
    def coordinates(self) -> tuple[int, int, int]:
        return self.pp.rank, self.dp.rank, self.tp.rank

    def describe(self, rank: int) -> str:
        """A rank's place in words, for messages."""
        return describe_rank(rank, self.dp.size, self.tp.size)


def describe_rank(rank: int, data: int, tensor: int) -> str:
    """The place in words of a rank in a mesh of these sizes, where no mesh has been made yet."""
    pp, rest = divmod(rank, data * tensor)
    return f"rank {rank} (pp {pp}, dp {rest // tensor}, tp {rest % tensor})"


def _axis(mesh: DeviceMesh) -> Axis:
    return Axis(mesh.get_local_rank(), mesh.size(), mesh.get_group())
