"""The one way in which tests start ranks: real processes over gloo, a time-out on each that dumps its stacks."""

from __future__ import annotations

import faulthandler
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.multiprocessing as mp


def run_ranks(world: int, function: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
    """Run `function(rank, world, *args)` in `world` processes and return what each returned, by rank.

    `function` must be importable (module-level). The first failing rank's traceback is raised here; past `timeout`
    seconds every rank prints its stacks to stderr and all are killed.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        context = mp.get_context("spawn")
        processes = [
            context.Process(target=_rank, args=(rank, world, folder, timeout, function, args), daemon=True)
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + timeout + 10
        while any(p.is_alive() for p in processes):
            failed = [p for p in processes if p.exitcode not in (None, 0)]
            if failed or time.monotonic() > deadline:
                time.sleep(0.5)  # let the other ranks write down why they failed too
                for process in processes:
                    process.kill()
                break
            time.sleep(0.02)
        for process in processes:
            process.join()
        problems = sorted(Path(folder).glob("error-*"), key=lambda path: path.stat().st_mtime_ns)
        if problems or any(p.exitcode for p in processes):
            codes = {rank: p.exitcode for rank, p in enumerate(processes)}
            first = problems[0].read_text() if problems else f"no traceback; exit codes {codes}"
            raise RuntimeError(f"a rank failed (exit codes {codes}):\n{first}")
        return [pickle.loads((Path(folder) / f"result-{rank}").read_bytes()) for rank in range(world)]


def _rank(
    rank: int, world: int, folder: str, timeout: float, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    faulthandler.dump_traceback_later(timeout, exit=True)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), OMP_NUM_THREADS="1")
    try:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        if world > 1:
            store = dist.FileStore(f"{folder}/store", world)
            limit = timedelta(seconds=timeout)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=limit)
        result = function(rank, world, *args)
        if world > 1:
            dist.barrier()  # no rank leaves while others still talk to it
            dist.destroy_process_group()
        Path(folder, f"result-{rank}").write_bytes(pickle.dumps(result))
    except BaseException:
        Path(folder, f"error-{rank}").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        sys.stderr.flush()
        os._exit(1)  # no tear-down of process groups, which may wait for the others
    faulthandler.cancel_dump_traceback_later()
