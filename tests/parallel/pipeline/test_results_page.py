"""The schedules' result page says what its script computes."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

PAGE = Path(__file__).parents[3] / "docs" / "results" / "schedules"


def test_the_page_holds_what_is_simulated() -> None:
    spec = importlib.util.spec_from_file_location("schedules_page", PAGE / "simulate.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    rows = script.results()
    assert script.table(rows) in (PAGE / "README.md").read_text()
    assert json.loads((PAGE / "result.json").read_text())["rows"] == json.loads(json.dumps(rows))
    for row in rows:
        assert row["formula"] is None or abs(row["formula"] - row["idle"]) < 1e-6
