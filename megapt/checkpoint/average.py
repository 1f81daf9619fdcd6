"""The average of several checkpoints' weights as a checkpoint of its own (arXiv 1803.05407, 2203.05482)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megapt.checkpoint.folders import INDEX, MARKER
from megapt.checkpoint.index import Entry, Index, Slice, TensorIndex, marker_of
from megapt.checkpoint.loading import Reader, different_settings, open_reader, stored_model
from megapt.checkpoint.outputs import whole_folder, write_tensors
from megapt.checkpoint.tensorfile import DTYPES, Slot
from megapt.checkpoint.written import FILE_BYTES
from megapt.errors import UserError
from megapt.files import write_whole


def average(
    output: str | Path,
    paths: Sequence[str | Path],
    weights: Sequence[float] | None = None,
    progress: Callable[[int], None] = lambda count: None,
) -> Path:
    """Write the committed checkpoint `output` of the weighted mean of checkpoints' weights; returns its folder.

    weights: one number per path, which need not add up to one; None for equal ones. The mean is taken in fp64 and
    rounded once to the stored dtype. It has no moments: it can be evaluated, exported, or trained on with
    `checkpoint.load`. Its step is the highest of theirs, its config the last one's, and `meta.averaged` says of what it
    is made. UserError for different models or dtypes, and for an output that exists.
    """
    output = Path(output)
    readers = [open_reader(path) for path in paths]
    shares = _shares(weights, len(readers))
    _check_alike(readers)
    newest = readers[-1]
    slots = [
        Slot(f"weight/{name}", tensor.kinds["weight"].dtype, tensor.shape)
        for name, tensor in newest.index.tensors.items()
    ]
    tensors: dict[str, TensorIndex] = {}
    with whole_folder(output) as folder:
        rows = write_tensors(folder, slots, _file_name, lambda slot: _mean(slot, readers, shares), FILE_BYTES)
        for slot, file, crc in rows:
            part = Slice((0,) * len(slot.shape), slot.shape, file, slot.key, crc)
            tensors[_name(slot)] = TensorIndex(slot.shape, {"weight": Entry(slot.dtype, (part,))})
            progress(slot.nbytes * len(readers))
        files = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
        index = Index(max(r.index.step for r in readers), _meta(readers, shares), tensors, files)
        index.check()
        data = index.encode()
        write_whole(folder / INDEX, data, make_folder=False)
        # The folder is renamed when all is in it, the marker too: it exists from then on.
        write_whole(folder / MARKER, marker_of(data), make_folder=False)
    return output


def _shares(weights: Sequence[float] | None, count: int) -> list[float]:
    if count < 2:
        raise UserError(f"an average is of two checkpoints at least, not of {count}")
    given = [1.0] * count if weights is None else list(weights)
    if len(given) != count:
        raise UserError(f"{len(given)} weights were given for {count} checkpoints; give one for each")
    if not all(math.isfinite(w) and w >= 0 for w in given) or not 0 < sum(given) < math.inf:
        raise UserError(f"weights are numbers from 0 on, of which one at least is above 0, not {given}")
    return [w / sum(given) for w in given]


def _check_alike(readers: list[Reader]) -> None:
    first, *others = readers
    model = stored_model(first.folder, first.index)
    dtypes = {name: first.dtype(name) for name in first.index.tensors}
    for reader in others:
        problems = different_settings(model, stored_model(reader.folder, reader.index))
        for name in reader.index.tensors:
            if not problems and reader.dtype(name) != dtypes[name]:
                problems = [f"{name} is {dtypes[name]} and {reader.dtype(name)}"]
        if problems:
            raise UserError(f"{first.folder} and {reader.folder} are not of one model: {'; '.join(problems)}")


def _mean(slot: Slot, readers: list[Reader], shares: list[float]) -> Tensor:
    name = _name(slot)
    total = torch.zeros(slot.shape, dtype=torch.float64)
    for reader, share in zip(readers, shares, strict=True):
        if share:
            total.add_(reader.whole(name).double(), alpha=share)
    return total.to(DTYPES[slot.dtype])


def _meta(readers: list[Reader], shares: list[float]) -> dict[str, Any]:
    made_of = [
        {"path": str(reader.folder), "step": reader.index.step, "share": share}
        for reader, share in zip(readers, shares, strict=True)
    ]
    return {"averaged": made_of, "config": readers[-1].index.meta["config"]}


def _name(slot: Slot) -> str:
    return slot.key.removeprefix("weight/")


def _file_name(number: int, count: int) -> str:
    return f"rank-00000-{number:03d}.safetensors"
