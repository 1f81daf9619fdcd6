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
from megapt.operations import OPERATIONS

# torch 2.13 renamed these two collectives and warns at the old names; torch 2.11 has only those.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_gather(
    out: torch.Tensor, tensor: torch.Tensor, group: dist.ProcessGroup | None = None, async_op: bool = False
) -> dist.Work | None:
    """The members' tensors one after the other along dimension 0, into `out`."""
    OPERATIONS.note("all-gather", group, tensor)
    return _all_gather(out, tensor, group=group, async_op=async_op)


def reduce_scatter(
    out: torch.Tensor, tensor: torch.Tensor, group: dist.ProcessGroup | None = None, async_op: bool = False
) -> dist.Work | None:
    """The members' sum; each member's part of dimension 0 into its `out`."""
    OPERATIONS.note("reduce-scatter", group, tensor)
    return _reduce_scatter(out, tensor, group=group, async_op=async_op)


def all_reduce(
    tensor: torch.Tensor,
    op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
    group: dist.ProcessGroup | None = None,
    async_op: bool = False,
) -> dist.Work | None:
    """In place."""
    OPERATIONS.note("all-reduce", group, tensor)
    return dist.all_reduce(tensor, op=op, group=group, async_op=async_op)


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
        OPERATIONS.forget()
        for name, axis in (("pp", pp), ("dp", dp), ("tp", tp), ("model", made.model)):
            OPERATIONS.name(axis.group, name)
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
