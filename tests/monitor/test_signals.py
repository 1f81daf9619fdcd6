from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from megapt.errors import UserError
from megapt.monitor.signals import SIGNALS, StopRequest


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    assert {number: signal.getsignal(number) for number in SIGNALS} == before


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_asks_for_a_stop_and_names_itself(number: signal.Signals) -> None:
    with StopRequest() as stop:
        assert stop.reason() is None
        send(number)
        reason = stop.reason()
    assert reason is not None and number.name in reason


def test_a_second_ctrl_c_interrupts() -> None:
    with StopRequest() as stop:
        send(signal.SIGINT)
        assert stop.reason() == "received SIGINT (a second one interrupts at once)"
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_a_ctrl_c_after_another_signal_is_the_first() -> None:
    with StopRequest():
        send(signal.SIGTERM)
        send(signal.SIGINT)
        send(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_time_limit_counts_from_the_start() -> None:
    now = 50.0
    with StopRequest(time_limit=10, clock=lambda: now) as stop:
        now = 59.9
        assert stop.reason() is None
        now = 60.0
        assert stop.reason() == "reached the time limit of 10 s"


def test_close_twice_keeps_handlers_installed_since() -> None:
    stop = StopRequest()
    stop.close()
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    stop.close()
    assert signal.signal(signal.SIGUSR1, before) == signal.SIG_IGN


@pytest.mark.parametrize("limit", [0, -1.0, float("nan")])
def test_a_time_limit_of_nothing_is_refused(limit: float) -> None:
    with pytest.raises(UserError, match="above 0"):
        StopRequest(time_limit=limit)
