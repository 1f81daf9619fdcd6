"""The one place where a process joins the others: device, backend, process group."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from megapt.errors import UserError
from megapt.launcher import RankEnvironment, rank_environment

# Of a collective. What trains watches itself, and waits longer than it does, so that its report comes first.
TIMEOUT = timedelta(minutes=30)


def device_of(environment: RankEnvironment) -> torch.device:
    """The GPU with this rank's number on its node, or the CPU where there are none (or `DS_ACCELERATOR=cpu`).

    Some launchers show each rank its own GPU alone, so that a single visible one is taken.
    Raises UserError if the node shows several GPUs, but too few for this rank.
    """
    if not torch.cuda.is_available() or os.environ.get("DS_ACCELERATOR") == "cpu":
        return torch.device("cpu")
    visible, local = torch.cuda.device_count(), environment.local_rank
    if visible > 1 and local >= visible:
        raise UserError(
            f"rank {environment.rank} has number {local} on its node, but only {visible} GPUs are visible there: two "
            f"ranks would share one. Start at most {visible} ranks per node, or make more GPUs visible "
            "(CUDA_VISIBLE_DEVICES)"
        )
    return torch.device("cuda", 0 if visible == 1 else local)


def join(
    environment: RankEnvironment | None = None, timeout: timedelta = TIMEOUT
) -> tuple[RankEnvironment, torch.device]:
    """Join the process group that the launcher's variables describe; a world of one needs none.

    timeout: after which a collective that does not end is an error. Returns this rank's place and its device. NCCL on
    GPUs, gloo on CPUs. Raises UserError if the ranks cannot meet at the master's address and port.
    """
    environment = environment or rank_environment(dict(os.environ))
    device = device_of(environment)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if environment.world > 1:
        address = f"{environment.master_addr}:{environment.master_port}"
        try:
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                init_method=f"tcp://{address}",
                rank=environment.rank,
                world_size=environment.world,
                timeout=timeout,
            )
        except dist.DistNetworkError as error:
            raise UserError(
                f"rank {environment.rank} cannot meet the others at {address} ({str(error).splitlines()[0]}): "
                "MASTER_ADDR and MASTER_PORT must name rank 0's host and a port of it that no other program holds"
            ) from error
    return environment, device


def leave() -> None:
    """Leave after everybody has arrived here."""
    if dist.is_initialized():
        if dist.get_backend() == "nccl":
            dist.barrier(device_ids=[torch.cuda.current_device()])
        else:
            # gloo's other barrier leaves a tensor to a thread, which aborts the process if Python is ending by then.
            dist.monitored_barrier()
        dist.destroy_process_group()
