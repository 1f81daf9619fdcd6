"""What a checkpoint says of itself, for people and for scripts."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from megapt.checkpoint.folders import MARKER, resolve
from megapt.checkpoint.index import Index, read_index
from megapt.checkpoint.loading import stored_model
from megapt.errors import UserError


def describe(path: str | Path, tensors: bool = False) -> dict[str, Any]:
    """Facts of a checkpoint in values of JSON; None for what it does not say. No tensor is read.

    parameters: elements of all weights; kinds: tensors and bytes of each; ranks: how many wrote it; age_seconds: since
    it was committed; tensors: shape, and per kind dtype, slices and bytes, if asked for. UserError where index or files
    are damaged.
    """
    folder = resolve(path)
    index = read_index(folder)
    meta = index.meta
    found: dict[str, Any] = {
        "path": str(folder),
        "step": index.step,
        "model": _model(folder, index),
        "parameters": sum(t.numel for t in index.tensors.values() if "weight" in t.kinds),
        "kinds": _kinds(index),
        "files": len(index.files),
        "bytes": sum(index.files.values()),
        "ranks": len({name.rpartition("-")[0] for name in index.files}),
        "layout": _layout(meta),
        "versions": _at(meta, "versions"),
        "updates": _at(meta, "updates"),
        "skipped": _at(meta, "skipped"),
        "samples": _at(meta, "receipt", "samples"),
        "loss": _at(meta, "loss"),
        "validation": _at(meta, "validation"),
        "averaged": _at(meta, "averaged"),
        "age_seconds": max(0.0, time.time() - (folder / MARKER).stat().st_mtime),
    }
    if tensors:
        found["tensors"] = {name: _tensor(index, name) for name in index.tensors}
    return found


def _model(folder: Path, index: Index) -> dict[str, Any] | None:
    if _at(index.meta, "config", "model") is None:
        return None
    try:
        return stored_model(folder, index).model_dump()
    except UserError as error:
        return {"problem": str(error)}


def _kinds(index: Index) -> dict[str, dict[str, Any]]:
    kinds: dict[str, dict[str, Any]] = {}
    for name, kind, entry in index.entries():
        row = kinds.setdefault(kind, {"dtypes": [], "tensors": 0, "slices": 0, "bytes": 0})
        row["dtypes"] = sorted({*row["dtypes"], entry.dtype})
        row["tensors"] += 1
        row["slices"] += len(entry.slices)
        row["bytes"] += index.nbytes(name, kind)
    return kinds


def _tensor(index: Index, name: str) -> dict[str, Any]:
    tensor = index.tensors[name]
    kinds = {
        kind: {"dtype": entry.dtype, "slices": len(entry.slices), "bytes": index.nbytes(name, kind)}
        for kind, entry in tensor.kinds.items()
    }
    return {"shape": list(tensor.shape), "kinds": kinds}


def _layout(meta: dict[str, Any]) -> dict[str, Any] | None:
    """As the job recorded it; else what its config says."""
    if (recorded := _at(meta, "layout")) is not None:
        return recorded if isinstance(recorded, dict) else None
    found = {key: _at(meta, "config", "parallel", key) for key in ("tensor", "pipeline", "data")}
    zero = [_at(meta, "config", "zero", key) for key in ("backend", "stage")]
    if None not in zero:
        found["zero"] = f"{zero[0]}-{zero[1]}"
    return {key: value for key, value in found.items() if value is not None} or None


def _at(tree: Any, *keys: str) -> Any:
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree
