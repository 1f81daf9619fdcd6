"""Starting DeepSpeed: on the right device, without a compiler, in silence, with the mesh's groups."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from megapt.errors import UserError
from megapt.mesh import Axis, ParallelMesh


class ParallelUnit:
    """The mesh as DeepSpeed asks for it. Its model-parallel group is pp x tp: norms and overflow travel on it."""

    def __init__(self, mesh: ParallelMesh, data: Axis) -> None:
        axes = {"data": data, "model": mesh.model, "tensor_model": mesh.tp, "pipeline_model": mesh.pp}
        for name, axis in axes.items():
            answers = {"group": axis.group or dist.group.WORLD, "rank": axis.rank, "world_size": axis.size}
            for question, answer in answers.items():
                setattr(self, f"get_{name}_parallel_{question}", _answer(answer))


def _answer(value: Any) -> Callable[[], Any]:
    return lambda: value


def load(device: torch.device) -> Any:
    """DeepSpeed for this device, without a compiler, and with a process group to work in."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", os.environ.get("OMPI_COMM_WORLD_LOCAL_RANK", "0"))
    if device.type == "cuda":
        # It takes the device's number from here, which is another one where a rank sees its own device only.
        os.environ["LOCAL_RANK"] = str(device.index or 0)
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator().device_name()
    if accelerator != device.type:
        raise UserError(
            f"DeepSpeed works on {accelerator}, but this run on {device.type}; set DS_ACCELERATOR={device.type}"
        )
    # An engine imports it as it is collected as garbage: within another import, Python 3.11 does not stand that.
    with contextlib.suppress(ImportError):
        importlib.import_module("deepspeed.utils.pin_memory")
    for handler in deepspeed.utils.logger.handlers:
        if type(handler) is logging.StreamHandler:  # its own; others may have added theirs
            handler.setStream(sys.stderr)
    # torch 2.13 renamed collectives that DeepSpeed calls by their old names, and would say so on every rank.
    warnings.filterwarnings("ignore", r".*is deprecated. Please use `torch.distributed", FutureWarning)
    if device.type == "cpu":
        # It would be compiled at start by g++ and ninja, and serves gloo's collectives only.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():  # a world of one
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return deepspeed


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """DeepSpeed prints its memory use while it starts: a matter for the debug log."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        yield
    for line in said.getvalue().splitlines():
        logging.getLogger(__name__).debug("%s", line)


def axis_of_one(mesh: ParallelMesh) -> Axis:
    """An axis with this rank alone. Collective over the world."""
    for axis in (mesh.dp, mesh.tp, mesh.pp):
        if axis.size == 1:
            return axis
    # Made by all ranks together: NCCL splits the new groups off the world's.
    return Axis(0, 1, dist.new_subgroups(group_size=1)[0])
