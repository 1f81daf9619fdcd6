"""`megapt schedule show`, through the command line's own parser."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from megapt.commands.schedule import app
from megapt.errors import UserError
from megapt.parallel.pipeline.schedules import schedule
from megapt.parallel.pipeline.simulate import Costs, simulate

parent = typer.Typer()
parent.add_typer(app, name="schedule")


def show(*arguments: str, columns: int = 120) -> str:
    result = CliRunner().invoke(
        parent, ["schedule", "show", *arguments], env={"COLUMNS": str(columns)}, catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    return result.output


def test_figures_and_text() -> None:
    printed = show("1f1b", "--stages", "4", "--micro-batches", "8")
    assert "33 s" in printed and "37.5%" in printed
    assert "rank 0 F0-F1-F2-F3-..................B0----F4-" in printed
    assert "--out timeline.png draws it" in show("1f1b", "--stages", "4", "--micro-batches", "80")


def test_costs_and_chunks() -> None:
    common = ("--stages", "4", "--micro-batches", "8", "--backward-input", "1.5", "--backward-weight", "0.5")
    assert "27 s" in show("zb-h1", "--stages", "4", "--micro-batches", "8")
    assert "30 s" in show("zb-h1", *common)
    assert "zb-v, 4 ranks x 2 chunks" in show("zb-v", *common)
    assert "34.5 s" in show("gpipe", *common, "--transfer", "0.25")
    with pytest.raises(UserError, match="set chunks to 2"):
        show("zb-v", "--chunks", "3", *common)


def test_picture_and_trace(tmp_path: Path) -> None:
    out, trace = tmp_path / "s.png", tmp_path / "t.json"
    printed = show("zb-v", "--stages", "2", "--micro-batches", "3", "--out", str(out), "--trace", str(trace))
    assert out.read_bytes().startswith(b"\x89PNG") and "rank 0 F0" not in printed
    assert len([e for e in json.loads(trace.read_text())["traceEvents"] if e["ph"] == "X"]) == 2 * 2 * 3 * 3 - 3


def test_measured_beside_simulated(tmp_path: Path) -> None:
    file = tmp_path / "measured.json"
    # Measured with hops that the simulation does not know of.
    made = schedule("zb-h1", 4, 1, 8)
    file.write_text(simulate(made, Costs.even(4, 1, 0.01, 0.01, 0.01, transfer=0.005)).timeline.to_json())
    printed = show("zb-h1", "--stages", "4", "--micro-batches", "8", "--measured", str(file))
    simulated, measured = next(line for line in printed.splitlines() if "step time" in line).split("│")[2:4]
    assert simulated.strip() == "0.27 s" and float(measured.split()[0]) > 0.27
    assert "5.4 s" not in printed and "0.54 s" in show(
        "zb-h1", "--stages", "4", "--micro-batches", "8", "--measured", str(file), "--forward", "0.02",
        "--backward-input", "0.02", "--backward-weight", "0.02",
    )  # fmt: skip


def test_what_is_no_timeline_is_named(tmp_path: Path) -> None:
    file = tmp_path / "some.json"
    file.write_bytes(b"\xb5\x00\xff")
    with pytest.raises(UserError, match=r"some\.json: a timeline is JSON"):
        show("1f1b", "--stages", "2", "--micro-batches", "2", "--measured", str(file))


@pytest.mark.parametrize("seconds", ["inf", "nan", "1e300", "-1"])
def test_times_are_finite(seconds: str) -> None:
    arguments = ["schedule", "show", "1f1b", "--stages", "2", "--micro-batches", "2", "--forward", seconds]
    result = CliRunner().invoke(parent, arguments, catch_exceptions=False)
    assert result.exit_code == 2 and "--forward" in result.output


def test_a_timeline_too_wide_for_any_number_is_not_printed() -> None:
    assert "draws it" in show("1f1b", "--stages", "2", "--micro-batches", "2", "--forward", "5e-324")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("zb-h1", "--stages", "3", "--micro-batches", "8"), "holds 4 ranks, the schedule has 3; set --stages"),
        (("zb-h1", "--stages", "4", "--micro-batches", "9"), "rank 0 ran"),
        (("1f1b", "--stages", "4", "--micro-batches", "8"), "rank 1 ran I0.0 as action 3, where the schedule has B0.0"),
    ],
)
def test_a_timeline_of_another_schedule_is_refused(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    file = tmp_path / "measured.json"
    file.write_text(simulate(schedule("zb-h1", 4, 1, 8), Costs.even(4, 1)).timeline.to_json())
    with pytest.raises(UserError) as caught:
        show(*arguments, "--measured", str(file))
    assert message in str(caught.value)
