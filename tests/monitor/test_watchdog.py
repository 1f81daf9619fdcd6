from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import megapt
from megapt.errors import UserError
from megapt.monitor.watchdog import EXIT_STATUS, Watchdog, is_communication_error

KILLED = -9
UNWATCHED = 20.0


class Ends:
    """How every rank of every scenario ended."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        root = str(Path(megapt.__file__).parents[1])
        # RES_OPTIONS: c10d looks up the names of its peers, which must not take seconds where no name service
        # is.
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": root,
            "RES_OPTIONS": "timeout:1 attempts:1",
        }
        script = Path(__file__).with_name("watchdog_ranks.py")
        command = [sys.executable, str(script), str(folder)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, result.stderr
        self.ends = json.loads(result.stdout)

    def status(self, scenario: str) -> list[int | None]:
        return [self.ends.get(f"{scenario}.{rank}", {}).get("status") for rank in range(3)]

    def line(self, scenario: str, rank: int) -> str:
        """The one line the watchdog of this rank left with, in due time."""
        assert self.ends[f"{scenario}.{rank}"]["seconds"] < UNWATCHED - 2
        lines = [line for line in self.text(scenario, rank).splitlines() if "leaving with status" in line]
        assert len(lines) == 1, self.text(scenario, rank)
        return lines[0]

    def text(self, scenario: str, rank: int) -> str:
        return (self.folder / f"{scenario}.{rank}.err").read_text()


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> Ends:
    return Ends(tmp_path_factory.mktemp("ranks"))


def test_a_killed_rank_is_named_with_its_step_and_phase(ends: Ends) -> None:
    assert ends.status("killed") == [EXIT_STATUS, EXIT_STATUS, KILLED]
    for rank in (0, 1):
        line = ends.line("killed", rank)
        assert line.startswith(f"[watchdog of rank {rank} (pp {rank}, dp 0, tp 0)]")
        assert "rank 2 (pp 2, dp 0, tp 0)" in line
        assert "last at step 7, phase 'backward'" in line
        assert "no heartbeat" in line and "dmesg" in line


def test_a_stopped_process_is_named(ends: Ends) -> None:
    assert ends.status("stopped") == [EXIT_STATUS, None, EXIT_STATUS]
    assert "rank 1 (pp 1, dp 0, tp 0)" in ends.line("stopped", 0)
    assert "last at step 4, phase 'data'" in ends.line("stopped", 2)


def test_an_exception_is_named_by_the_others(ends: Ends) -> None:
    assert ends.status("raised") == [EXIT_STATUS, 1, EXIT_STATUS]
    for rank in (0, 2):
        line = ends.line("raised", rank)
        assert (
            "rank 1 (pp 1, dp 0, tp 0) failed at step 9, phase 'optimizer': ValueError: the batch is empty."
            in line
        )
        assert "second line" not in line
    assert "Traceback" in ends.text("raised", 1)


def test_an_exception_on_rank_0_reaches_the_others_though_the_store_is_in_its_process(ends: Ends) -> None:
    assert ends.status("zero_raised") == [1, EXIT_STATUS, EXIT_STATUS]
    for rank in (1, 2):
        assert "rank 0 (pp 0, dp 0, tp 0) failed" in ends.line("zero_raised", rank)
        assert "ValueError: the disk is full" in ends.line("zero_raised", rank)


@pytest.mark.parametrize("scenario", ["zero_killed", "zero_killed_early", "zero_killed_beside_the_store"])
def test_a_killed_rank_0_is_named(ends: Ends, scenario: str) -> None:
    assert ends.status(scenario) == [KILLED, EXIT_STATUS, EXIT_STATUS]
    for rank in (1, 2):
        line = ends.line(scenario, rank)
        assert "leaving with status 75: rank 0 (pp 0, dp 0, tp 0)" in line
        assert "last at step 3, phase 'forward'" in line


def test_a_store_that_hangs_for_ever_does_not_hang_the_watchdog(ends: Ends) -> None:
    assert ends.status("zero_stopped") == [None, EXIT_STATUS, EXIT_STATUS]
    for rank in (1, 2):
        assert "rank 0 (pp 0, dp 0, tp 0)" in ends.line("zero_stopped", rank)
        assert "has not answered" in ends.line("zero_stopped", rank)


@pytest.mark.parametrize("scenario", ["finished", "finished_beside_the_store"])
def test_ranks_that_finish_far_apart_are_not_taken_for_dead(ends: Ends, scenario: str) -> None:
    assert ends.status(scenario) == [0, 0, 0]
    assert not any("[watchdog" in ends.text(scenario, rank) for rank in range(3))


def test_rank_0_watches_on_after_it_closed(ends: Ends) -> None:
    assert ends.status("left_without_closing") == [EXIT_STATUS, 0, 0]
    assert "rank 1 (pp 1, dp 0, tp 0)" in ends.line("left_without_closing", 0)


def test_a_stall_names_the_lowest_step_and_dumps_every_stack(ends: Ends) -> None:
    assert ends.status("stalled") == [EXIT_STATUS] * 3
    for rank in range(3):
        line = ends.line("stalled", rank)
        assert "the lowest step is 11, in phase 'forward': rank 1 (pp 1, dp 0, tp 0)." in line
        assert "in wait_for_a_message_that_never_comes" in ends.text("stalled", rank)


def test_an_error_of_a_collective_gives_way_to_the_rank_that_died(ends: Ends) -> None:
    assert ends.status("collective") == [EXIT_STATUS, EXIT_STATUS, KILLED]
    for rank in (0, 1):
        assert "leaving with status 75: rank 2 (pp 2, dp 0, tp 0)" in ends.line("collective", rank)
    # gloo tells at least one survivor at once that its peer is gone.
    assert any("a collective failed" in ends.text("collective", rank) for rank in (0, 1))


def test_one_rank_needs_no_store() -> None:
    with Watchdog(
        "nowhere.invalid", 1, 0, 1, str, interval=0.02, timeout=0.2, stall_timeout=None
    ) as watchdog:
        watchdog.beat(1, "forward")
        time.sleep(0.3)
    watchdog.close()


def test_an_exception_of_a_single_rank_is_printed_and_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    with (
        pytest.raises(KeyError),
        Watchdog("", 1, 0, 1, lambda rank: f"rank {rank}", interval=0.02, timeout=0.2) as dog,
    ):
        dog.beat(3, "data")
        raise KeyError("missing")
    assert "rank 0 failed at step 3, phase 'data': KeyError: 'missing'" in capsys.readouterr().err


def test_errors_of_collectives_are_told_from_errors_of_the_rank() -> None:
    assert is_communication_error(RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer"))
    assert is_communication_error(ConnectionResetError())
    wrapped = ValueError("step failed")
    wrapped.__cause__ = RuntimeError("NCCL error in: ProcessGroupNCCL.cpp")
    assert is_communication_error(wrapped)
    assert not is_communication_error(RuntimeError("CUDA out of memory"))
    assert not is_communication_error(ValueError("gloo is a backend"))


@pytest.mark.parametrize(
    ("times", "words"),
    [
        ({"interval": 0.0}, "above 0"),
        ({"interval": 5.0, "timeout": 10.0}, "15 s"),
        ({"timeout": 40.0, "stall_timeout": 30.0}, "40 s"),
        ({"timeout": 400.0}, "start timeout"),
    ],
)
def test_times_that_cannot_work_are_refused(times: dict[str, float], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Watchdog("", 1, 0, 1, str, **times)
