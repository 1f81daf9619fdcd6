"""One flipped byte, anywhere: verify and load name it. The script of docs/results/checkpoint-damage, in small."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from tests.checkpoint.fakes import KINDS, meta_of, true_value
from tests.checkpoint.handmade import SMALL, write

SCRIPT = Path(__file__).parents[2] / "docs/results/checkpoint-damage/flip.py"


def test_every_flipped_byte_is_named(tmp_path: Path) -> None:
    from megapt.model.table import parameter_table

    spec = importlib.util.spec_from_file_location("flip", SCRIPT)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    sys.modules["flip"] = script  # dataclasses look their module up
    spec.loader.exec_module(script)
    shapes = {name: row.shape for name, row in parameter_table(SMALL).items()}
    tensors = {(name, kind): true_value(name, kind, shape) for name, shape in shapes.items() for kind in KINDS}
    result = script.run(write(tmp_path / "c", tensors, meta_of(SMALL), parts=2), 60, seed=4)
    assert result["failures"] == []
    assert result["named_by_verify_and_load"] == {"tensor": 36, "header": 12, "index": 8, "marker": 4}
