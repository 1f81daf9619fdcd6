"""The weights of a checkpoint as plain safetensors files, under their global names: for tools that know no layouts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megapt.checkpoint.loading import open_reader, stored_model
from megapt.checkpoint.outputs import whole_folder, write_tensors
from megapt.checkpoint.tensorfile import DTYPES, Slot
from megapt.errors import UserError
from megapt.files import write_whole

WRITTEN = {"fp32": "F32", "bf16": "BF16", "fp16": "F16", "fp64": "F64"}


def export_weights(
    path: str | Path,
    output: str | Path,
    dtype: str | None = None,
    shard_bytes: int = 5 * 10**9,
    progress: Callable[[int], None] = lambda count: None,
) -> Path:
    """Write `model.safetensors`, or `model-0000n-of-0000m.safetensors` with `model.safetensors.index.json`, and the
    model section of the config as `config.json`; returns the folder.

    dtype: fp32, bf16, fp16 or fp64; None for as stored. One tensor is in memory at a time, and the folder appears only
    when whole. A parameter tied to another is not written again. UserError for an output that exists, and for a
    checkpoint that is damaged or whose tensors are not its model's.
    """
    output = Path(output)
    if dtype is not None and dtype not in WRITTEN:
        raise UserError(f"dtype {dtype!r} is unknown; legal: {', '.join(WRITTEN)}")
    reader = open_reader(path)
    model = stored_model(reader.folder, reader.index)
    slots = []
    for name, tensor in reader.index.tensors.items():
        slots.append(Slot(name, WRITTEN[dtype] if dtype else tensor.kinds["weight"].dtype, tensor.shape))
    places: dict[str, str] = {}
    with whole_folder(output) as folder:
        rows = write_tensors(
            folder, slots, _file_name, lambda slot: reader.whole(slot.key).to(DTYPES[slot.dtype]), shard_bytes
        )
        for slot, file, _ in rows:
            places[slot.key] = file
            progress(reader.index.nbytes(slot.key, "weight"))
        if len(set(places.values())) > 1:
            total = sum(slot.nbytes for slot in slots)
            _write(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})
        source = {"step": reader.index.step, "tied": model.tied_embeddings}
        _write(folder / "config.json", {"format": "megapt-weights", **source, "model": model.model_dump()})
    return output


def _file_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _write(path: Path, tree: dict[str, Any]) -> None:
    write_whole(path, (json.dumps(tree, indent=2) + "\n").encode())
