"""slurm.sbatch as Slurm would run it, with an srun and an scontrol that only write down their calls."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

JOB = Path(__file__).parents[2] / "launch" / "slurm.sbatch"

SRUN = """#!/bin/bash
trap 'echo USR1 >>"$CALLS"; sleep 0.2; echo saved >>"$CALLS"; exit "$ENDS_WITH"' USR1
echo "srun $*" >>"$CALLS"
[ "$UNTIL_SIGNAL" = 1 ] || exit "$ENDS_WITH"
while :; do sleep 0.05; done
"""
SCONTROL = """#!/bin/sh
echo "scontrol $*" >>"$CALLS"
"""


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    for name, body in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(body)
        (tmp_path / name).chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "CALLS": str(tmp_path / "calls"),
        "SLURM_CPUS_PER_TASK": "12",
        "SLURM_JOB_ID": "77",
        "UNTIL_SIGNAL": "0",
        "ENDS_WITH": "0",
    }


def _calls(environ: dict[str, str]) -> list[str]:
    file = Path(environ["CALLS"])
    return file.read_text().splitlines() if file.exists() else []


@pytest.mark.parametrize("status", ["0", "3"])
def test_a_run_that_ends_by_itself_ends_the_job_with_its_status(environ: dict[str, str], status: str) -> None:
    ran = subprocess.run(
        ["bash", str(JOB), "--config", "c.yaml", "a=b c"], env={**environ, "ENDS_WITH": status}, timeout=30
    )
    assert ran.returncode == int(status)
    command = "srun --cpus-per-task=12 --kill-on-bad-exit=1 launch/pretrain.sh --config c.yaml a=b c"
    assert _calls(environ) == [command]


@pytest.mark.parametrize("status", ["0", "1"])
def test_near_the_time_limit_the_ranks_save_and_the_job_is_requeued(
    environ: dict[str, str], status: str
) -> None:
    job = subprocess.Popen(["bash", str(JOB)], env={**environ, "UNTIL_SIGNAL": "1", "ENDS_WITH": status})
    deadline = time.monotonic() + 20
    while not _calls(environ) and time.monotonic() < deadline:
        time.sleep(0.02)
    # As Slurm does with --signal=B:USR1, only the batch script itself is told.
    job.send_signal(signal.SIGUSR1)
    assert job.wait(20) == 0
    assert _calls(environ)[1:] == ["USR1", "saved", "scontrol requeue 77"]
