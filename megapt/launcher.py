"""Which rank this process is, under any launcher, and the command that starts the ranks of one machine.

DeepSpeed's launcher and torchrun say it in RANK, WORLD_SIZE and so on; Open MPI and Slurm in variables of
their own. `rank_environment` reads all of them into one record; `prepare_rank` writes that record back as the
variables that torch.distributed and DeepSpeed read. Neither makes a process group.
"""

from __future__ import annotations

import base64
import json
import os
import re
import socket
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass

from megapt.errors import UserError

DEFAULT_PORT = 29500


@dataclass(frozen=True)
class RankEnvironment:
    """A rank's place among the processes of a run, and where rank 0 listens.

    `launcher` is "deepspeed", "torchrun", "open mpi", "slurm", "variables" (RANK and WORLD_SIZE set by
    something else) or "single" (no launcher: a world of one). Port 0, only ever in a world of one, means any
    free port.
    """

    rank: int
    local_rank: int
    world: int
    local_world: int
    master_addr: str
    master_port: int
    launcher: str

    def variables(self) -> dict[str, str]:
        """The environment variables that torch.distributed and DeepSpeed read."""
        return {
            "RANK": str(self.rank),
            "LOCAL_RANK": str(self.local_rank),
            "WORLD_SIZE": str(self.world),
            "LOCAL_WORLD_SIZE": str(self.local_world),
            "LOCAL_SIZE": str(self.local_world),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
        }


def rank_environment(environ: Mapping[str, str]) -> RankEnvironment:
    """Read a rank's place from environment variables; changes nothing.

    The innermost launcher is believed: RANK before Open MPI before Slurm, since torchrun may run inside
    `srun` and Open MPI's own daemons are started by Slurm. Slurm counts as the launcher only for a step of
    several tasks: a batch script, an interactive shell and a one-task step also carry SLURM_PROCID=0.

    Raises UserError for variables that are missing, malformed or contradict each other.
    """
    if "RANK" in environ:
        found = _from_variables(environ)
    elif "OMPI_COMM_WORLD_RANK" in environ:
        found = _from_open_mpi(environ)
    elif _is_slurm_rank(environ):
        found = _from_slurm(environ)
    else:
        return RankEnvironment(0, 0, 1, 1, "127.0.0.1", 0, "single")
    if not (
        0 <= found.local_rank < found.local_world <= found.world
        and found.local_rank <= found.rank < found.world
    ):
        raise UserError(
            f"the launcher's variables ({found.launcher}) contradict each other: rank {found.rank} of "
            f"{found.world}, local rank {found.local_rank} of {found.local_world}; needed: 0 <= local rank < "
            "local ranks <= ranks and local rank <= rank < ranks"
        )
    if not 0 < found.master_port < 65536 and found.world > 1:
        raise UserError(
            f"MASTER_PORT = {found.master_port} is not a port; legal: 1 to 65535, e.g. {DEFAULT_PORT}"
        )
    return found


def _from_variables(environ: Mapping[str, str]) -> RankEnvironment:
    world = _number(environ, "WORLD_SIZE")
    if world > 1:
        missing = [name for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if not environ.get(name)]
        if missing:
            raise UserError(
                f"RANK = {environ['RANK']} and WORLD_SIZE = {world} are set but {' and '.join(missing)} "
                f"{'is' if len(missing) == 1 else 'are'} not; set LOCAL_RANK to the rank within the machine "
                "(0 where each machine runs one), MASTER_ADDR and MASTER_PORT to where rank 0 listens, or "
                "start with torchrun"
            )
    launcher = "variables"
    if "TORCHELASTIC_RUN_ID" in environ:
        launcher = "torchrun"
    elif "CROSS_RANK" in environ:
        launcher = "deepspeed"
    # Without a count of local ranks one machine is assumed: it only decides how cores are shared out.
    local_world = next(
        (_number(environ, n) for n in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if n in environ), world
    )
    return RankEnvironment(
        rank=_number(environ, "RANK"),
        local_rank=_number(environ, "LOCAL_RANK", 0),
        world=world,
        local_world=local_world,
        master_addr=environ.get("MASTER_ADDR") or "127.0.0.1",
        master_port=_number(environ, "MASTER_PORT", 0),
        launcher=launcher,
    )


def _from_open_mpi(environ: Mapping[str, str]) -> RankEnvironment:
    world = _number(environ, "OMPI_COMM_WORLD_SIZE")
    local_world = _number(environ, "OMPI_COMM_WORLD_LOCAL_SIZE", world)
    address = environ.get("MASTER_ADDR")
    if not address and local_world < world:
        raise UserError(
            f"mpirun started {world} ranks, {local_world} of them on this machine, but MASTER_ADDR is not "
            "set; pass the first host's name or address to all ranks: mpirun -x MASTER_ADDR=HOST "
            f"-x MASTER_PORT={DEFAULT_PORT} ..."
        )
    return RankEnvironment(
        rank=_number(environ, "OMPI_COMM_WORLD_RANK"),
        local_rank=_number(environ, "OMPI_COMM_WORLD_LOCAL_RANK"),
        world=world,
        local_world=local_world,
        master_addr=address or "127.0.0.1",
        master_port=_number(environ, "MASTER_PORT", DEFAULT_PORT),
        launcher="open mpi",
    )


def _slurm_tasks(environ: Mapping[str, str]) -> int:
    return _number(environ, "SLURM_STEP_NUM_TASKS", _number(environ, "SLURM_NTASKS", 1))


def _is_slurm_rank(environ: Mapping[str, str]) -> bool:
    # The body of a batch script is no task of a step, yet it sees SLURM_PROCID=0 and the whole job's
    # SLURM_NTASKS.
    batch_script = environ.get("ENVIRONMENT") == "BATCH" and "SLURM_STEP_ID" not in environ
    return "SLURM_PROCID" in environ and not batch_script and _slurm_tasks(environ) > 1


def _from_slurm(environ: Mapping[str, str]) -> RankEnvironment:
    world = _slurm_tasks(environ)
    nodelist = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
    hosts = expand_nodelist(nodelist) if nodelist else []
    nodes = _number(environ, "SLURM_STEP_NUM_NODES", _number(environ, "SLURM_NNODES", len(hosts) or 1))
    address = environ.get("MASTER_ADDR") or (hosts[0] if hosts else "127.0.0.1" if nodes == 1 else "")
    if not address:
        raise UserError(
            f"srun started {world} tasks on {nodes} nodes, but neither MASTER_ADDR nor SLURM_JOB_NODELIST is "
            "set; set MASTER_ADDR to the first node's name"
        )
    # Every rank must reach the same port without a word exchanged, and two jobs on one node different ones.
    job, step = (_number(environ, name, 0) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return RankEnvironment(
        rank=_number(environ, "SLURM_PROCID"),
        local_rank=_number(environ, "SLURM_LOCALID"),
        world=world,
        local_world=_slurm_local_world(environ, world, nodes),
        master_addr=address,
        master_port=_number(environ, "MASTER_PORT", 15000 + (job * 31 + step) % 15000),
        launcher="slurm",
    )


def _slurm_local_world(environ: Mapping[str, str], world: int, nodes: int) -> int:
    """The number of this step's tasks on this node, from counts such as `8(x2),4`."""
    counts = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE")
    if counts is None:
        return -(-world // nodes)
    if not re.fullmatch(r"\d+(\(x\d+\))?(,\d+(\(x\d+\))?)*", counts):
        raise UserError(f"SLURM_TASKS_PER_NODE = {counts!r} is not a list of counts such as 8(x2),4")
    per_node: list[int] = []
    for count, repeat in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts):
        per_node += [int(count)] * int(repeat or 1)
    node = _number(environ, "SLURM_NODEID", 0)
    if node >= len(per_node):
        raise UserError(
            f"SLURM_NODEID = {node}, but SLURM_TASKS_PER_NODE = {counts!r} counts {len(per_node)} nodes"
        )
    return per_node[node]


def expand_nodelist(nodelist: str) -> list[str]:
    """The host names of a Slurm node list such as `login,node[01-04,7],rack[1-2]n[1-2]`, in its order.

    Raises UserError where the list is malformed.
    """
    entry = r"(?:[^,\[\]\s]|\[[0-9,-]+\])+"
    if not re.fullmatch(rf"{entry}(?:,{entry})*", nodelist):
        raise UserError(
            f"the Slurm node list {nodelist!r} is malformed; expected a form such as node[01-04,7],gpu3"
        )
    return [host for part in re.findall(entry, nodelist) for host in _expand_entry(part, nodelist)]


def _expand_entry(entry: str, nodelist: str) -> list[str]:
    head, bracket, rest = entry.partition("[")
    if not bracket:
        return [entry]
    ranges, _, tail = rest.partition("]")
    tails = _expand_entry(tail, nodelist)
    hosts: list[str] = []
    for part in ranges.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise UserError(
                f"the Slurm node list {nodelist!r} holds {part!r}, which is no number and no rising range"
            )
        for number in range(int(match[1]), int(match[2] or match[1]) + 1):
            hosts += [f"{head}{number:0{len(match[1])}d}{end}" for end in tails]
    return hosts


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name, "")
    if text == "" and default is not None:
        return default
    if not (text.isascii() and text.isdigit()):
        given = f"is {text!r}" if text else "is not set"
        raise UserError(
            f"the environment variable {name} {given}; the launcher must set it to a whole number >= 0"
        )
    return int(text)


def prepare_rank(environ: MutableMapping[str, str]) -> RankEnvironment:
    """Complete the variables of a rank before torch is imported; what the user has set stays.

    RANK and its kin for a launched rank; OMP_NUM_THREADS, so that the ranks of a machine share its cores
    instead of each taking all; DS_ACCELERATOR=cpu where there is no CUDA device. Where DS_ACCELERATOR=cpu was
    asked for, CUDA devices are hidden: DeepSpeed's launcher numbers its ranks in CUDA_VISIBLE_DEVICES even on
    the CPU.
    """
    place = rank_environment(environ)
    if place.launcher != "single":
        environ.update(place.variables())
    # Slurm binds each task to its own cores already when it was told their number.
    bound = place.launcher == "slurm" and "SLURM_CPUS_PER_TASK" in environ
    cores = _number(environ, "SLURM_CPUS_PER_TASK") if bound else usable_cores() // place.local_world
    environ.setdefault("OMP_NUM_THREADS", str(max(1, cores)))
    if visible_devices(environ) == []:
        environ["DS_ACCELERATOR"] = "cpu"
        environ["CUDA_VISIBLE_DEVICES"] = ""
    return place


def usable_cores() -> int:
    """Cores this process may run on (its affinity where the system knows it)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def visible_devices(environ: Mapping[str, str]) -> list[str]:
    """The CUDA devices a run may use, as CUDA_VISIBLE_DEVICES names them; empty for a run on the CPU."""
    if environ.get("DS_ACCELERATOR") == "cpu":
        return []
    import torch

    count = torch.cuda.device_count()
    named = [name.strip() for name in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named[:count] if named else [str(index) for index in range(count)]


def local_port(environ: Mapping[str, str]) -> int:
    """MASTER_PORT where it is set, else a TCP port of this machine that nothing listens on at the moment."""
    if environ.get("MASTER_PORT"):
        return _number(environ, "MASTER_PORT")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def local_command(
    script: str, arguments: Sequence[str], *, ranks: int, devices: Sequence[str], port: int
) -> list[str]:
    """The command that runs `ranks` ranks of `script` on this machine, on the CPU where `devices` is empty.

    It calls the part of DeepSpeed's launcher that stands on one node, not the `deepspeed` command in front of
    it: that one neither passes on SIGTERM, so that killing it leaves the ranks running, nor takes devices
    named by UUID.

    Raises UserError if there are fewer devices than ranks.
    """
    if ranks < 1 or (devices and ranks > len(devices)):
        have = f"between 1 and {len(devices)}, the visible CUDA devices" if devices else "at least 1"
        advice = "; to run on the CPU set DS_ACCELERATOR=cpu" if devices else ""
        raise UserError(f"the number of ranks on this machine must be {have}, not {ranks}{advice}")
    slots: list[int | str] = [int(d) if d.isdigit() else d for d in devices[:ranks]] or list(range(ranks))
    world_info = base64.urlsafe_b64encode(json.dumps({"localhost": slots}).encode()).decode()
    return [
        *(sys.executable, "-u", "-m", "deepspeed.launcher.launch", f"--world_info={world_info}"),
        *("--master_addr=127.0.0.1", f"--master_port={port}", "--log_level=warning"),
        *(script, *arguments),
    ]
