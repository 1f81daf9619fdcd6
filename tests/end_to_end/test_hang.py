"""A rank that stops for ever, in a layer or before a send: every rank says which one, where it is and who waits."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from megapt.monitor.watchdog import EXIT_STATUS
from tests.end_to_end import runs
from tests.end_to_end.runs import Ranks

STEP = 2


def sleep_for_ever() -> None:
    time.sleep(10**6)


def _watched() -> Callable[[], int]:
    """Shorter times than a cluster's, and the step that the loop is at."""
    from megapt.monitor.watchdog import Watchdog

    Watchdog.__init__.__kwdefaults__ = {**(Watchdog.__init__.__kwdefaults__ or {}), "interval": 0.5, "timeout": 8.0}
    beat, steps = Watchdog.beat, [0]

    def noting(self: Watchdog, step: int, phase: str) -> None:
        steps[0] = step
        beat(self, step, phase)

    Watchdog.beat = noting  # type: ignore[method-assign]
    return lambda: steps[0]


def _goes_on() -> None:
    _watched()


def _sleeps_in_a_layer() -> None:
    from megapt.operations import OPERATIONS
    from megapt.parallel.tensor import RowParallelLinear

    step, forward = _watched(), RowParallelLinear.forward

    def sleepy(self: RowParallelLinear, *given: Any, **more: Any) -> Any:
        if step() == STEP and OPERATIONS.action.startswith("forward of micro-batch 1,"):
            sleep_for_ever()
        return forward(self, *given, **more)

    RowParallelLinear.forward = sleepy  # type: ignore[method-assign]


def _sleeps_before_a_send() -> None:
    from megapt.operations import OPERATIONS
    from megapt.parallel.pipeline import runtime

    step, send = _watched(), runtime.send

    def sleepy(*given: Any) -> Any:
        if step() == STEP and OPERATIONS.action.startswith("send of the activation of micro-batch 2,"):
            sleep_for_ever()
        return send(*given)

    runtime.send = sleepy  # type: ignore[assignment]


@pytest.fixture(scope="module")
def hangs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ranks]:
    """Both at once: pipeline 2 x tensor 2, so that rank = 2 x stage + tp."""
    folder = tmp_path_factory.mktemp("hangs")
    data = runs.corpus(folder / "corpus")
    started = {}
    for name, rank, break_it in (("layer", 2, _sleeps_in_a_layer), ("send", 0, _sleeps_before_a_send)):
        config = runs.write_config(
            folder / name / "config.yaml",
            data,
            parallel={"pipeline": 2, "tensor": 2},
            run={"stall_timeout": 8.0, "folder": str(folder / name / "run")},
        )
        before = dict.fromkeys(range(4), _goes_on) | {rank: break_it}
        started[name] = Ranks(folder / name, 4, ["--config", config], before)
    for run in started.values():
        assert run.wait() == [EXIT_STATUS] * 4, run.errors()
    return started


def verdict(run: Ranks, rank: int) -> str:
    (line,) = (line for line in run.err(rank).splitlines() if "leaving with status" in line)
    return line


def test_a_rank_that_stops_in_a_layer_is_named_with_what_it_was_at(hangs: dict[str, Ranks]) -> None:
    for rank in range(4):
        line = verdict(hangs["layer"], rank)
        assert line.count("MISSING") == 1
        assert f"the lowest step is {STEP}. MISSING: rank 2 (pp 1, dp 0, tp 0), in forward of micro-batch 1" in line
        # What it would do next, and then what its neighbour in the pipeline waits for.
        assert (
            "It has not issued reduce-scatter of [32, 32] float32 over tp ranks 2, 3, for which rank 3 (pp 1, dp 0, "
            "tp 1) waits in forward of micro-batch 1, chunk 0 (F1.0, action "
        ) in line
        assert "It has not issued send of gradient of micro-batch 1 for stage 0 ([16, 32] float32) to rank 0" in line
        assert "turn: rank 1 (pp 0, dp 0, tp 1) in backward of micro-batch 1" in line
        assert "Look first at the log of rank 2 (pp 1, dp 0, tp 0) [process" in line
    assert "in sleep_for_ever" in hangs["layer"].err(2)


def test_a_rank_that_stops_before_a_send_is_named_with_what_it_was_at(hangs: dict[str, Ranks]) -> None:
    for rank in range(4):
        line = verdict(hangs["send"], rank)
        assert line.count("MISSING") == 1
        assert "MISSING: rank 0 (pp 0, dp 0, tp 0), in send of the activation of micro-batch 2" in line
        assert (
            "It has not issued send of activation of micro-batch 2 for stage 1 ([16, 32] float32) to rank 2, for which "
            "rank 2 (pp 1, dp 0, tp 0) waits in forward of micro-batch 2, chunk 0 (F2.0, action "
        ) in line
        assert (
            "float32 over tp ranks 0, 1, for which rank 1 (pp 0, dp 0, tp 1) waits in backward of micro-batch" in line
        )
    assert "in sleep_for_ever" in hangs["send"].err(0)
