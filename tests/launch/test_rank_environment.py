"""The table of launchers: what each sets, and what is read from it."""

from __future__ import annotations

import pytest

from megapt.errors import UserError
from megapt.launcher import RankEnvironment, expand_nodelist, rank_environment

TORCHRUN = {
    "RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "node-0",
    "MASTER_PORT": "4321", "TORCHELASTIC_RUN_ID": "none",
}  # fmt: skip
DEEPSPEED = {
    "RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_SIZE": "4",
    "CROSS_RANK": "1", "CROSS_SIZE": "2", "MASTER_ADDR": "node-0", "MASTER_PORT": "4321",
}  # fmt: skip
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "MASTER_ADDR": "node-0", "MASTER_PORT": "4321",
}  # fmt: skip
SLURM = {
    "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_NTASKS": "8",
    "SLURM_NNODES": "2", "SLURM_TASKS_PER_NODE": "4(x2)", "SLURM_JOB_NODELIST": "node-[0-1]",
    "SLURM_JOB_ID": "77", "MASTER_PORT": "4321",
}  # fmt: skip


@pytest.mark.parametrize(
    ("environ", "launcher"),
    [
        (TORCHRUN, "torchrun"),
        (DEEPSPEED, "deepspeed"),
        ({k: v for k, v in TORCHRUN.items() if k != "TORCHELASTIC_RUN_ID"}, "variables"),
        (OPEN_MPI, "open mpi"),
        (SLURM, "slurm"),
        # The innermost launcher is believed: torchrun within srun, and mpirun, whose daemons srun starts.
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0", **TORCHRUN}, "torchrun"),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0", **OPEN_MPI}, "open mpi"),
    ],
)
def test_every_launcher_is_read_alike(environ: dict[str, str], launcher: str) -> None:
    place = rank_environment(environ)
    assert place == RankEnvironment(5, 1, 8, 4, "node-0", 4321, launcher)
    # What is handed on reads back as the same place.
    again = rank_environment(place.variables())
    assert again == RankEnvironment(5, 1, 8, 4, "node-0", 4321, "variables")


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0"},
        {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
        # An interactive step of one task within an allocation of eight.
        {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"},
        # The body of a batch script.
        {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8", "ENVIRONMENT": "BATCH"},
        # An allocation's shell on the login node.
        {"SLURM_NTASKS": "8", "SLURM_JOB_ID": "5", "SLURM_JOB_NODELIST": "a,b"},
    ],
)
def test_no_launcher_is_a_world_of_one(environ: dict[str, str]) -> None:
    assert rank_environment(environ) == RankEnvironment(0, 0, 1, 1, "127.0.0.1", 0, "single")


def test_a_step_of_a_batch_script_is_slurm() -> None:
    assert rank_environment({**SLURM, "ENVIRONMENT": "BATCH", "SLURM_STEP_ID": "0"}).launcher == "slurm"


def test_slurm_ranks_agree_on_a_port_and_jobs_differ() -> None:
    job = {k: v for k, v in SLURM.items() if k != "MASTER_PORT"}
    ports = {
        rank_environment({**job, "SLURM_PROCID": str(r), "SLURM_LOCALID": "0"}).master_port for r in range(8)
    }
    assert len(ports) == 1 and 1024 < ports.pop() < 32768
    neighbours = [{**job, "SLURM_JOB_ID": str(j), "SLURM_STEP_ID": str(s)} for j in (77, 78) for s in (0, 1)]
    assert len({rank_environment(environ).master_port for environ in neighbours}) == 4


def test_slurm_addresses() -> None:
    assert rank_environment({**SLURM, "MASTER_ADDR": "10.0.0.9"}).master_addr == "10.0.0.9"
    assert rank_environment({**SLURM, "SLURM_STEP_NODELIST": "gpu[07-08]"}).master_addr == "gpu07"
    alone = {"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NTASKS": "2"}
    assert rank_environment(alone) == RankEnvironment(1, 1, 2, 2, "127.0.0.1", 15000, "slurm")
    with pytest.raises(UserError, match="MASTER_ADDR"):
        rank_environment({**alone, "SLURM_NNODES": "2", "SLURM_LOCALID": "0"})


@pytest.mark.parametrize(("node", "local_world"), [("0", 8), ("1", 8), ("2", 4)])
def test_slurm_counts_the_tasks_of_this_node(node: str, local_world: int) -> None:
    uneven = {
        "SLURM_NTASKS": "20",
        "SLURM_NNODES": "3",
        "SLURM_TASKS_PER_NODE": "8(x2),4",
        "SLURM_NODEID": node,
    }
    assert rank_environment({**SLURM, **uneven}).local_world == local_world


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"RANK": "0"}, "WORLD_SIZE is not set"),
        ({**TORCHRUN, "WORLD_SIZE": "many"}, "WORLD_SIZE is 'many'"),
        ({**TORCHRUN, "RANK": "-1"}, "RANK is '-1'"),
        ({**TORCHRUN, "RANK": "8"}, "rank 8 of 8"),
        ({**TORCHRUN, "LOCAL_RANK": "4"}, "local rank 4 of 4"),
        ({**TORCHRUN, "MASTER_PORT": "70000"}, "70000 is not a port"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "LOCAL_RANK and MASTER_ADDR and MASTER_PORT are not"),
        ({k: v for k, v in OPEN_MPI.items() if k != "MASTER_ADDR"}, "mpirun -x MASTER_ADDR"),
        ({k: v for k, v in SLURM.items() if k != "SLURM_LOCALID"}, "SLURM_LOCALID is not set"),
        ({**SLURM, "SLURM_TASKS_PER_NODE": "4(x"}, "list of counts"),
        ({**SLURM, "SLURM_NODEID": "2"}, "counts 2 nodes"),
        ({**SLURM, "SLURM_JOB_NODELIST": "node[1-"}, "malformed"),
    ],
)
def test_contradictions_are_named(environ: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        rank_environment(environ)


@pytest.mark.parametrize(
    ("nodelist", "hosts"),
    [
        ("localhost", ["localhost"]),
        ("a,b", ["a", "b"]),
        ("node[01-04,7]", ["node01", "node02", "node03", "node04", "node7"]),
        ("login-1,gpu[9-11],tail", ["login-1", "gpu9", "gpu10", "gpu11", "tail"]),
        ("rack[1-2]n[08-10].x", [f"rack{r}n{n}.x" for r in (1, 2) for n in ("08", "09", "10")]),
        ("n[099-101]", ["n099", "n100", "n101"]),
    ],
)
def test_nodelist(nodelist: str, hosts: list[str]) -> None:
    assert expand_nodelist(nodelist) == hosts


@pytest.mark.parametrize(
    "nodelist", ["", "a,,b", "node[1-3", "node]1[", "node[3-1]", "node[1-2-3]", "node[]", "a b", "[[1]]"]
)
def test_malformed_nodelist(nodelist: str) -> None:
    with pytest.raises(UserError, match="node list"):
        expand_nodelist(nodelist)
