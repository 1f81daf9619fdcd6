"""A rank that dies, fails or hangs is named by all the others within a minute, and the run ends.

Without it a dead rank shows as a collective that never returns, or as an error in a rank that did nothing
wrong. Every rank runs a daemon thread that writes a heartbeat to a TCPStore over a connection of its own;
rank 0's thread looks at all of them and the others' threads at rank 0's. Whoever finds something publishes
one verdict, the first one counts, and every rank prints it and leaves with status 75 (``EX_TEMPFAIL``:
starting again may help).
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

from megapt.errors import UserError
from megapt.monitor.heartbeat import LOOK_AT_HOST, Heartbeat, Kind, Roster, State, Verdict, last_seen
from megapt.operations import OPERATIONS

if TYPE_CHECKING:
    from torch.distributed import Store

EXIT_STATUS = 75

# Written by an observer in place of a heartbeat that has not come yet: reading an absent key would block.
_NOT_YET = "-"


class Watchdog:
    """One rank's part of the watch: made by every rank after the process group, closed before its end.

    A heartbeat comes from a thread, so a long compute, a long collective or a long save is not silence; only
    a process that died, was stopped, or holds the GIL for ``timeout`` seconds is. Rank 0's ``close`` returns
    once every other rank has closed, because the store usually lives in its process and because it watches to
    the last.

    Use it as a context manager: a body that ends well closes it, an exception goes through
    ``report_failure``.

    Args:
        host, port: address of a TCPStore server all ranks reach, usually ``MASTER_ADDR`` and ``MASTER_PORT``.
            Not used with one rank.
        rank, world: this rank and the number of ranks.
        describe: a rank in words, such as ``"rank 5 (pp 1, dp 0, tp 1)"``; the host and the process id of a
            rank are added from its heartbeat.
        interval: seconds between two heartbeats. Verdicts are looked for every ``min(interval, 1)`` seconds.
        timeout: seconds without a heartbeat after which a rank is missing; at least three intervals. The default
            leaves time to say so before the 30 s are over that torchrun and DeepSpeed's launcher give the others.
        stall_timeout: seconds in which no rank calls ``beat`` after which the run is stuck; ``None`` turns it
            off. Must exceed the longest phase: a first compile, a validation without ``beat``, a save.
        start_timeout: like ``timeout``, for a rank whose first heartbeat has not come, and for the store
            until every rank's has.
        prefix: of all keys in the store; must differ between attempts that share a store (with torchrun, put
            ``TORCHELASTIC_RESTART_COUNT`` in it), or an attempt would read the verdict over the one before.

    Raises:
        UserError: intervals that cannot work together.
        torch.distributed.DistError: the store cannot be reached within ``start_timeout``.
    """

    def __init__(
        self,
        host: str,
        port: int,
        rank: int,
        world: int,
        describe: Callable[[int], str],
        *,
        interval: float = 3.0,
        timeout: float = 20.0,
        stall_timeout: float | None = 1800.0,
        start_timeout: float = 300.0,
        prefix: str = "watchdog",
    ) -> None:
        _check_times(interval, timeout, stall_timeout, start_timeout)
        self._address = (host, port)
        self._rank, self._world = rank, world
        self._describe = describe
        self._interval, self._timeout, self._start_timeout = interval, timeout, start_timeout
        self._slice = min(interval, 1.0)
        self._prefix = prefix
        self._watched = list(range(world)) if rank == 0 else [0]
        self._roster = Roster(
            self._watched,
            describe,
            interval=interval,
            timeout=timeout,
            start_timeout=start_timeout,
            stall_timeout=stall_timeout if rank == 0 else None,
        )
        self._position = (0, 0, "start")  # beats, step, phase; replaced whole, so that no lock is needed
        self._state = State.RUNNING
        self._count = 0
        self._writing = threading.Lock()
        self._leaving = threading.Lock()
        self._answered, self._all_started, self._refused = (threading.Event() for _ in range(3))
        self._stop_watch, self._stop_guard = threading.Event(), threading.Event()
        self._hurry, self._others_done = threading.Event(), threading.Event()
        self._store: Store = self._connect(start_timeout)
        self._write_heartbeat()
        self._threads = [
            threading.Thread(target=self._watch, name="watchdog", daemon=True),
            threading.Thread(target=self._guard, name="watchdog-guard", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def beat(self, step: int, phase: str) -> None:
        """Tell where the main thread is; cheap enough for every step and every change of phase."""
        self._position = (self._position[0] + 1, step, phase)

    def close(self) -> None:
        """Mark this rank as finished, so that no one takes it for dead; rank 0 waits for all others first."""
        if self._stop_guard.is_set():
            return
        if self._rank == 0 and self._world > 1:
            self._state = State.CLOSING
            self._hurry.set()
            self._others_done.wait()
        self._end(State.FINISHED)

    def report_failure(self, error: BaseException) -> None:
        """Publish that this rank failed, so that the others leave at once and name this error, not their own.

        Call it before the exception leaves ``main``. Where ``error`` comes from a collective, the reason is
        usually another rank that died: this then waits for the verdict over that one (``timeout`` and three
        intervals at most) before it blames this rank. Where a verdict stands already, this prints it and does
        not return.
        """
        if self._stop_guard.is_set():
            return
        name = f"{type(error).__name__}: {_first_line(error)}"
        if self._world > 1 and is_communication_error(error):
            patience = self._timeout + 3 * self._interval
            self._print(
                f"a collective failed ({name}); waiting up to {patience:.3g} s to learn "
                f"whether another rank is gone."
            )
            # The watching thread ends this process when the verdict comes.
            time.sleep(patience)
        # Or the thread would read this rank's own verdict and end the process before the traceback is out.
        self._stop_watching()
        _, step, phase = self._position
        place = f"step {step}, phase '{phase}'"
        told = isinstance(error, UserError)  # a message that is whole in itself, and that the command prints
        more = "" if told else ". Its log holds the traceback."
        text = f"{self._describe(self._rank)} failed at {place}: {name}{more}"
        ours = Verdict(Kind.FAILED, (self._rank,), text)
        standing = ours
        # Without a store nobody can be told; the traceback of this rank still can be read.
        with contextlib.suppress(RuntimeError):
            standing = self._publish(ours)
        if standing != ours:
            self._leave(standing)
        if not told:
            self._print(text)
        self._end(State.LEFT)

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        if error is None or (isinstance(error, SystemExit) and not error.code):
            self.close()
        else:
            self.report_failure(error)

    # The watching thread.

    def _watch(self) -> None:
        connected, seeded, due = True, False, 0.0
        while not self._stop_watch.is_set():
            try:
                connected = connected or self._reconnect()
                if connected:
                    if not seeded:
                        self._seed()
                        seeded = True
                    self._look_for_verdict()
                    self._look_for_start()
                    if time.monotonic() >= due or self._hurry.is_set():
                        due = time.monotonic() + self._interval
                        self._write_heartbeat()
                        self._judge()
                    self._answered.set()
            except RuntimeError:  # every error of a store is one
                connected = False
            self._stop_watch.wait(min(self._slice, 0.1) if self._hurry.is_set() else self._slice)

    def _seed(self) -> None:
        for rank in self._watched:
            self._store.compare_set(self._key(rank), "", _NOT_YET)

    def _look_for_verdict(self) -> None:
        if self._store.check(["verdict"]):
            self._leave(Verdict.decode(self._store.get("verdict")))

    def _look_for_start(self) -> None:
        if self._all_started.is_set():
            return
        if self._rank == 0 and self._roster.all_heard():
            self._store.set("started", "")
        if self._store.check(["started"]):
            self._all_started.set()

    def _judge(self) -> None:
        verdict = self._observe()
        if verdict is not None:
            self._leave(self._publish(verdict))
        if self._roster.all_done(besides=(self._rank,)):
            self._others_done.set()

    def _observe(self) -> Verdict | None:
        values = self._store.multi_get([self._key(rank) for rank in self._watched])
        heartbeats = [b"" if value == _NOT_YET.encode() else value for value in values]
        return self._roster.observe(time.monotonic(), heartbeats)

    def _publish(self, verdict: Verdict) -> Verdict:
        """The verdict that stands: this one, or the one that was there before."""
        return Verdict.decode(self._store.compare_set("verdict", "", verdict.encode()))

    def _write_heartbeat(self) -> None:
        # Both the thread and the main thread write; the lock keeps a late "running" from following a
        # "finished".
        with self._writing:
            self._count += 1
            beats, step, phase = self._position
            heartbeat = Heartbeat(
                self._count, beats, self._state, step, phase, socket.gethostname(), os.getpid(), OPERATIONS.place()
            )
            self._store.set(self._key(self._rank), heartbeat.encode())

    def _key(self, rank: int) -> str:
        return f"heartbeat/{rank}"

    def _connect(self, limit: float) -> Store:
        from torch.distributed import HashStore, PrefixStore, TCPStore

        if self._world == 1:
            return HashStore()
        store = TCPStore(
            *self._address, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=limit)
        )
        return PrefixStore(self._prefix, store)

    def _reconnect(self) -> bool:
        # A TCPStore that fails to connect logs pages; a bare socket finds out quietly whether anybody
        # listens.
        try:
            socket.create_connection(self._address, timeout=self._timeout).close()
        except ConnectionRefusedError:
            self._refused.set()
            return False
        except OSError:
            return False
        self._refused.clear()
        self._store = self._connect(self._timeout)
        return True

    # The guarding thread: a call of the store blocks for ever when the host at the other end vanishes.

    def _guard(self) -> None:
        last, silence = time.monotonic(), 0.0
        while not self._stop_guard.wait(self._slice):
            now = time.monotonic()
            # As in the roster: a pause of this very process is not the silence of another.
            silence += min(now - last, 2 * self._slice)
            last = now
            if self._answered.is_set():
                self._answered.clear()
                silence = 0.0
                continue
            # A TCPStore looks up the name of whoever connects, and with a slow name service it answers nobody
            # meanwhile; once all are connected, or once nobody listens any more, there is no such excuse.
            excused = not (self._all_started.is_set() or self._refused.is_set())
            if silence > (self._start_timeout if excused else self._timeout):
                self._leave(self._unreachable(silence))

    def _unreachable(self, silence: float) -> Verdict:
        host, port = self._address
        seen = last_seen(self._roster.latest(0)) if self._rank != 0 else ""
        text = (
            f"{self._describe(0)}{seen} is gone, or cannot be reached: the store at {host}:{port} has not "
            f"answered for {silence:.3g} s. {LOOK_AT_HOST}"
        )
        return Verdict(Kind.UNREACHABLE, (0,), text)

    # Ends.

    def _end(self, state: State) -> None:
        """Stop watching, leave ``state`` as the last word in the store, and let the threads go."""
        self._stop_watching()
        with contextlib.suppress(RuntimeError):
            self._part(state)
        self._stop_guard.set()
        self._threads[1].join()

    def _stop_watching(self) -> None:
        self._stop_watch.set()
        # The guard is still awake: should the store never answer, it ends the process.
        self._threads[0].join()

    def _part(self, state: State, absent: Sequence[int] = ()) -> None:
        self._state = state
        self._write_heartbeat()
        self._answered.set()
        if self._rank != 0 or state is not State.LEFT:
            return
        # The store usually dies with this process: give the others the time to read the verdict.
        deadline = time.monotonic() + 3 * self._slice + 1.0
        while time.monotonic() < deadline:
            self._observe()
            self._answered.set()
            if self._roster.all_done(besides=(0, *absent)):
                return
            time.sleep(0.05)

    def _leave(self, verdict: Verdict) -> None:
        # Never released: whoever comes second waits here for the process to end.
        self._leaving.acquire()
        self._print(f"leaving with status {EXIT_STATUS}: {verdict.text}")
        if verdict.kind is Kind.STALLED:
            faulthandler.dump_traceback(file=sys.__stderr__ or 2, all_threads=True)
        if verdict.kind is not Kind.UNREACHABLE:
            with contextlib.suppress(RuntimeError):
                # Ranks that stall still read the verdict and dump their stacks; missing ones never will.
                self._part(State.LEFT, absent=verdict.ranks if verdict.kind is Kind.MISSING else ())
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(EXIT_STATUS)

    def _print(self, text: str) -> None:
        # One write, so that lines of several ranks in one log do not mix.
        sys.stderr.write(f"[watchdog of {self._describe(self._rank)}] {text}\n")
        sys.stderr.flush()


def is_communication_error(error: BaseException) -> bool:
    """Whether an exception, or one it was raised from, is a collective's: another rank may be its reason."""
    from torch.distributed import DistError

    marks = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "broken pipe")
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, DistError | ConnectionError):
            return True
        if isinstance(link, RuntimeError) and any(mark in str(link).lower() for mark in marks):
            return True
        link = link.__cause__
    return False


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def _check_times(interval: float, timeout: float, stall_timeout: float | None, start_timeout: float) -> None:
    if not interval > 0:
        raise UserError(f"watchdog: the interval must be above 0 seconds; given {interval}.")
    if timeout < 3 * interval:
        raise UserError(
            f"watchdog: the timeout must be at least three intervals, {3 * interval:g} s, or one late "
            f"heartbeat would end the run; given {timeout}."
        )
    if start_timeout < timeout:
        raise UserError(
            f"watchdog: the start timeout must be at least the timeout, {timeout:g} s; given {start_timeout}."
        )
    if stall_timeout is not None and stall_timeout < timeout:
        raise UserError(
            f"watchdog: the stall timeout must be at least the timeout, {timeout:g} s, or None for never; "
            f"given {stall_timeout}."
        )
