"""Starting ranks on this machine: real processes that talk over gloo, on the CPU.

They are started once and then run one function after another, since importing torch costs more than most of them. A
rank that fails or stalls ends them all: what it left in the process groups would poison what comes after.
"""

from __future__ import annotations

import faulthandler
import multiprocessing as mp
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, Self


class Ranks:
    """`world` processes, joined in a gloo group (in none if there is one only) until the `with` block ends.

    timeout: seconds that one call, and the start, may take; past it every rank prints its stacks to stderr and all are
    killed.
    """

    def __init__(self, world: int, timeout: float = 120.0) -> None:
        self.world, self.timeout = world, timeout
        self.alive = True
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        context = mp.get_context("spawn")
        self._processes: list[Any] = []
        self._connections: list[Connection] = []
        for rank in range(world):
            here, there = context.Pipe()
            arguments = (rank, world, self._folder.name, timeout, there)
            self._processes.append(context.Process(target=_serve, args=arguments, daemon=True))
            self._processes[-1].start()
            there.close()
            self._connections.append(here)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What `function(rank, world, *args)` returns on each rank, by rank.

        `function` must be importable (module-level), arguments and results picklable. RuntimeError with the traceback
        of the rank that failed first; then the ranks are gone.
        """
        assert self.alive, "these ranks were ended by an earlier failure"
        call = pickle.dumps((function, args))
        for connection in self._connections:
            connection.send_bytes(call)
        answers: dict[int, Any] = {}
        errors: list[tuple[int, str]] = []
        deadline = time.monotonic() + self.timeout + 10
        while len(answers) + len(errors) < self.world:
            waiting = [c for rank, c in enumerate(self._connections) if rank not in answers]
            ready = wait(waiting, max(0.0, deadline - time.monotonic()))
            lost = False
            for rank in (rank for rank, c in enumerate(self._connections) if c in ready):
                try:
                    when, error, result = pickle.loads(self._connections[rank].recv_bytes())
                except EOFError:
                    lost = True  # it ended without a word: killed, or out of time
                    continue
                if error is None:
                    answers[rank] = result
                else:
                    errors.append((when, error))
            if errors or lost or not ready:
                self._fail(errors)
        return [answers[rank] for rank in range(self.world)]

    def close(self) -> None:
        """End the ranks; nothing to do where a failure has ended them."""
        if not self.alive:
            return
        self.alive = False
        for connection in self._connections:
            connection.close()  # its end is what they wait for
        for process in self._processes:
            process.join(self.timeout)
            process.kill()
            process.join()
        self._folder.cleanup()

    def _fail(self, errors: list[tuple[int, str]]) -> None:
        self.alive = False
        for connection in wait(self._connections, 0.5):  # the other ranks may say why they failed too
            try:
                when, error, _ = pickle.loads(connection.recv_bytes())  # type: ignore[union-attr]
            except (EOFError, OSError):
                continue
            if error is not None:
                errors.append((when, error))
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._folder.cleanup()
        codes = {rank: process.exitcode for rank, process in enumerate(self._processes)}
        first = min(errors)[1] if errors else "no traceback; a rank was killed, or took longer than it may"
        raise RuntimeError(f"a rank failed (exit codes {codes}):\n{first}")


def run_ranks(world: int, function: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
    """What `function(rank, world, *args)` returns on each rank of a world started for it; see `Ranks.run`."""
    with Ranks(world, timeout) as ranks:
        return ranks.run(function, *args)


def _serve(rank: int, world: int, folder: str, timeout: float, connection: Connection) -> None:
    faulthandler.dump_traceback_later(timeout, exit=True)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), OMP_NUM_THREADS="1")
    os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed's word for the device, whatever else this machine has
    try:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        if world > 1:
            store = dist.FileStore(f"{folder}/store", world)
            limit = timedelta(seconds=timeout)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=limit)
        while (call := _next(connection)) is not None:
            function, args = pickle.loads(call)
            faulthandler.dump_traceback_later(timeout, exit=True)
            result = function(rank, world, *args)
            if world > 1:
                dist.barrier()  # no rank goes on while others still talk to it
            faulthandler.cancel_dump_traceback_later()
            connection.send_bytes(pickle.dumps((0, None, result)))
        if world > 1:
            dist.destroy_process_group()
    except BaseException:
        report = time.monotonic_ns(), f"rank {rank}:\n{traceback.format_exc()}", None
        connection.send_bytes(pickle.dumps(report))
        sys.stderr.flush()
        os._exit(1)  # no tear-down of process groups, which may wait for the others


def _next(connection: Connection) -> bytes | None:
    faulthandler.cancel_dump_traceback_later()
    try:
        return connection.recv_bytes()
    except EOFError:
        return None
