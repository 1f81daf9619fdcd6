"""Stopping a run in good order: signals and a time limit become a question asked once per step."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from megapt.errors import UserError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Turns signals into a question asked once per step, so that a run can save a checkpoint and leave.

    It takes SIGTERM (a scheduler's stop), SIGINT (Ctrl-C) and SIGUSR1 (as Slurm's ``--signal`` can send).

    A second SIGINT raises ``KeyboardInterrupt`` at once. Must be made in the main thread; ``close`` (or the
    end of a ``with`` block) puts the earlier handlers back.

    Args:
        time_limit: seconds from now after which ``reason`` asks for a stop; ``None`` for no limit.
        clock: seconds that never run backwards; the tests give their own.

    Raises:
        UserError: a time limit of 0 or less.
    """

    def __init__(self, time_limit: float | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        if time_limit is not None and not time_limit > 0:
            raise UserError(f"time limit: must be above 0 seconds, or left out for none; given {time_limit}.")
        self._time_limit = time_limit
        self._clock = clock
        self._start = clock()
        self._received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)

    def reason(self) -> str | None:
        """Why this rank should stop after the current step, or ``None``; the ranks must still agree on it."""
        if self._received is not None:
            again = " (a second one interrupts at once)" if self._received == signal.SIGINT else ""
            return f"received {self._received.name}{again}"
        if self._time_limit is not None and self._clock() - self._start >= self._time_limit:
            return f"reached the time limit of {self._time_limit:g} s"
        return None

    def close(self) -> None:
        """Put back the handlers that were installed before; a second call does nothing."""
        for number, handler in self._previous.items():
            # None stands for a handler that Python did not install and cannot put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}

    def __enter__(self) -> StopRequest:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._received == signal.SIGINT:
            raise KeyboardInterrupt
        # A Ctrl-C after another signal still counts as the first SIGINT.
        if self._received is None or number == signal.SIGINT:
            self._received = signal.Signals(number)
