"""Predictions for published runs: what is committed is what the code gives, and as near as it is said to be."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megapt.model.table import parameter_table
from megapt.plan import hardware, published
from megapt.plan.published import FITTED_ON, fit, mean_error, rows, write
from megapt.plan.published_runs import HIDDEN, TABLES, Run, runs

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "planner"


@pytest.fixture(scope="module")
def every() -> list[Run]:
    return runs()


def _committed() -> dict[tuple[str, str], dict[str, Any]]:
    tables = json.loads((RESULTS / "published.json").read_text(encoding="utf-8"))["tables"]
    titles = {table.title: table.key for table in TABLES}
    return {(titles[table["table"]], row["run"]): row for table in tables for row in table["rows"]}


def test_the_committed_predictions_are_these(every: list[Run]) -> None:
    """All but the deepest pipelines, whose schedules take seconds."""
    committed = _committed()
    assert {(run.table, run.name) for run in every} == set(committed)
    shallow = [run for run in every if run.config.parallel.virtual_stages <= 48]
    assert len(shallow) > 30
    for row in rows(shallow):
        found = committed[row.run.table, row.run.name]
        assert found["published"] == row.run.published
        assert row.predicted == pytest.approx(found["predicted"], rel=1e-9), row.run.name
        assert row.error == pytest.approx(found["error"], abs=1e-9)
        assert sum(row.items.values()) == pytest.approx(1)


def test_what_was_not_fitted_on_is_predicted(every: list[Run]) -> None:
    committed = _committed()
    tested = [row for (table, _), row in committed.items() if table != FITTED_ON]
    errors = [abs(row["error"]) for row in tested]
    assert len(errors) == 30
    assert sum(errors) / len(errors) < 0.08 and max(errors) < 0.17


def test_the_constants_are_the_fitted_ones() -> None:
    """Neighbours on the grid fit worse, and every GPU has the same."""
    in_step = hardware.load("h100").in_step
    assert {hardware.load(name).in_step for name in hardware.names() if name != "cpu"} == {in_step}
    found = fit([in_step - 0.01, in_step, in_step + 0.01], [HIDDEN - 0.05, HIDDEN, HIDDEN + 0.05])
    assert found == (in_step, HIDDEN)


@pytest.mark.parametrize(
    "table, billions",
    [
        ("megatron-core", [1.7, 7.1, 16, 32, 70, 119, 177, 314, 462]),
        ("sc21", [1.7, 3.6, 7.5, 18.4, 39.1, 76.1, 145.6, 310.1, 529.6, 1008.0]),
        ("sequence-parallel", [22, 175, 530, 1000]),
        ("olmo-core", [1.48, 7.3, 7.6, 13.7]),
    ],
)
def test_shapes_have_the_published_sizes(every: list[Run], table: str, billions: list[float]) -> None:
    models = [run.config.model for run in every if run.table == table]
    for model, stated in zip(models, billions, strict=True):
        assert parameter_table(model).count() / 1e9 == pytest.approx(stated, rel=0.04)


def test_units(every: list[Run]) -> None:
    """The FLOPs that a source counts lie behind its figures: published ones stay below the devices' peaks."""
    for run in every:
        share = run.tflops(run.published) * 1e12 / run.hardware.peak_flops(run.config.precision)
        assert 0.3 < share < 0.65, (run.table, run.name)
    core = next(run for run in every if run.name == "177B 8/6")
    strong = next(run for run in every if run.table == "megatron-core-strong")
    assert core.tflops(core.published) == pytest.approx(432.8)
    assert strong.tflops(47.0) == pytest.approx(0.47 * 989.4)
    # Equation 3 of arXiv 2104.04473 for GPT-3: 4.32e11 times the batch's 1.5 M tokens.
    gpt3 = next(run for run in every if run.name == "145B 8/8")
    model = gpt3.config.model
    ends = 1 + 2048 / (6 * model.hidden) + 51200 / (16 * model.layers * model.hidden)
    assert gpt3.tflops(148.0) == pytest.approx(148.0)
    assert gpt3._flops_per_token() == pytest.approx(96 * model.layers * model.hidden**2 * ends)


def test_the_command_writes_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: list[Run], capsys: pytest.CaptureFixture[str]
) -> None:
    shallow = [run for run in every if run.config.parallel.pipeline == 1 or run.table == "megatron-core-strong"]
    monkeypatch.setattr(published, "runs", lambda: shallow)
    published.main(["--out", str(tmp_path / "new")])
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "published.json",
        "published.md",
        "published.png",
    ]
    text = (tmp_path / "new" / "published.md").read_text(encoding="utf-8")
    assert f"`in_step`, the same on every GPU), and Megatron-Core hides {HIDDEN}" in text
    assert all(table.title in text and table.assumed in text for table in TABLES)
    assert (tmp_path / "new" / "published.png").stat().st_size > 10_000
    assert capsys.readouterr().out.count("% mean absolute error") == len(TABLES)
    assert mean_error(write(tmp_path / "new")) < 0.1 and math.isfinite(mean_error(rows(shallow[:2])))
