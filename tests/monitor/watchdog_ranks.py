"""Runs every watchdog scenario at once with real processes: python watchdog_ranks.py FOLDER.

Each rank's stderr goes to FOLDER/<scenario>.<rank>.err. Prints, as JSON, how every rank ended and after how
many seconds. One process imports torch and forks the ranks, so thirty ranks cost one import.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from megapt.monitor.heartbeat import Roster
from megapt.monitor.watchdog import Watchdog

WORLD = 3
TIMEOUT = 2.0
UNWATCHED = 20.0  # how long a rank would hang on without a watchdog


def describe(rank: int) -> str:
    return f"rank {rank} (pp {rank}, dp 0, tp 0)"


def hang_on() -> None:
    time.sleep(UNWATCHED)


def killed(rank: int, watchdog: Watchdog) -> None:
    watchdog.beat(7, "backward" if rank == 2 else "forward")
    time.sleep(1.0)
    if rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    hang_on()


def stopped(rank: int, watchdog: Watchdog) -> None:
    watchdog.beat(4, "data")
    time.sleep(1.0)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    hang_on()


def raised(rank: int, watchdog: Watchdog) -> None:
    watchdog.beat(9, "optimizer")
    if rank == 1:
        raise ValueError("the batch is empty\nand a second line")
    hang_on()


def zero_raised(rank: int, watchdog: Watchdog) -> None:
    if rank == 0:
        raise ValueError("the disk is full")
    hang_on()


def zero_killed(rank: int, watchdog: Watchdog) -> None:
    watchdog.beat(3, "forward")
    time.sleep(1.0)
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    hang_on()


def zero_stopped(rank: int, watchdog: Watchdog) -> None:
    time.sleep(1.0)
    if rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    hang_on()


def finished(rank: int, watchdog: Watchdog) -> None:
    # The gaps exceed the timeout, and rank 0, which hosts the store, is done first.
    time.sleep(rank * 1.25 * TIMEOUT)


def left_without_closing(rank: int, watchdog: Watchdog) -> None:
    if rank == 1:
        os._exit(0)


def wait_for_a_message_that_never_comes() -> None:
    hang_on()


def stalled(rank: int, watchdog: Watchdog) -> None:
    watchdog.beat(11, "forward")
    if rank != 1:
        watchdog.beat(12, "backward")
    wait_for_a_message_that_never_comes()


def collective(rank: int, watchdog: Watchdog) -> None:
    watchdog.beat(5, "all-reduce")
    if rank == 2:
        time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(1))


SCENARIOS: dict[str, Callable[[int, Watchdog], None]] = {
    function.__name__: function
    for function in (
        killed, stopped, raised, zero_raised, zero_killed, zero_stopped, finished, left_without_closing,
        stalled, collective,
    )
}  # fmt: skip
# The store in a process of its own, as torchrun keeps it in its agent.
SCENARIOS["zero_killed_beside_the_store"] = zero_killed
SCENARIOS["finished_beside_the_store"] = finished
# With the store in its process, before it has said that all ranks have started.
SCENARIOS["zero_killed_early"] = zero_killed


def serve_store(port_file: Path) -> dist.TCPStore:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    temporary = port_file.with_suffix(".tmp")
    temporary.write_text(str(store.port))
    temporary.rename(port_file)
    return store


def run_rank(name: str, rank: int, folder: Path) -> None:
    port_file = folder / f"{name}.port"
    beside = name.endswith("beside_the_store")
    store = serve_store(port_file) if rank == 0 and not beside else None
    while not port_file.exists():
        time.sleep(0.02)
    port = int(port_file.read_text())
    if name == "collective":
        client = store or dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
        limit = timedelta(seconds=UNWATCHED)
        dist.init_process_group("gloo", store=client, rank=rank, world_size=WORLD, timeout=limit)
    if name == "zero_killed_early":
        Roster.all_heard = lambda self: False  # type: ignore[method-assign]
    watchdog = Watchdog(
        "127.0.0.1",
        port,
        rank,
        WORLD,
        describe,
        interval=0.2,
        timeout=TIMEOUT,
        start_timeout=15.0,
        stall_timeout=TIMEOUT if name == "stalled" else None,
    )
    with watchdog:
        # A slow name service can hold up a connection for seconds; the scenario starts when all are here.
        (folder / f"{name}.{rank}.here").touch()
        while not all((folder / f"{name}.{other}.here").exists() for other in range(WORLD)):
            time.sleep(0.02)
        SCENARIOS[name](rank, watchdog)


def fork(body: Callable[[], None], stderr: Path) -> int:
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        body()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def main(folder: Path) -> None:
    start = time.monotonic()
    servers, ranks = [], {}
    for name in SCENARIOS:
        if name.endswith("beside_the_store"):
            port_file = folder / f"{name}.port"

            def serve(port_file: Path = port_file) -> None:
                _store = serve_store(port_file)
                hang_on()

            servers.append(fork(serve, folder / f"{name}.server.err"))
        for rank in range(WORLD):
            body = lambda name=name, rank=rank: run_rank(name, rank, folder)  # noqa: E731
            ranks[fork(body, folder / f"{name}.{rank}.err")] = (name, rank)
    # A stopped rank never ends by itself.
    waiting = {p for p, key in ranks.items() if key not in {("stopped", 1), ("zero_stopped", 0)}}
    others = [*servers, *(set(ranks) - waiting)]
    ends: dict[str, dict[str, float]] = {}
    while waiting:
        process, status = os.wait()
        if process in waiting:
            waiting.remove(process)
            name, rank = ranks[process]
            seconds = time.monotonic() - start
            ends[f"{name}.{rank}"] = {"status": os.waitstatus_to_exitcode(status), "seconds": seconds}
    for process in others:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    print(json.dumps(ends))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
