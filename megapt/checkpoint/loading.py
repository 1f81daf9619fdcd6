"""Loading: any rectangle of any tensor, out of whatever slices a checkpoint was written in."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from megapt.checkpoint.choice import choose
from megapt.checkpoint.folders import resolve
from megapt.checkpoint.index import Index, Slice, read_index
from megapt.checkpoint.tensorfile import DTYPES, checksum
from megapt.checkpoint.together import Together
from megapt.config import ModelConfig
from megapt.errors import UserError
from megapt.mesh import ParallelMesh
from megapt.model.table import parameter_table
from megapt.parameters import ParameterTable, Shard
from megapt.zero.base import Fragment

_CONVERTIBLE = (torch.float32, torch.float64)
_OPEN_FILES = 32


class Reader:
    """Reads rectangles of global tensors from the memory-mapped files of one checkpoint.

    With `verify`, a slice's checksum is compared the first time it is touched. Raises UserError naming file
    and tensor where something is damaged.
    """

    def __init__(self, folder: Path, index: Index, verify: bool = True) -> None:
        self.folder = folder
        self.index = index
        self.verify = verify
        self._files: OrderedDict[str, Any] = OrderedDict()
        self._verified: set[tuple[str, str]] = set()

    def dtype(self, name: str, kind: str = "weight") -> torch.dtype:
        return DTYPES[self.index.tensors[name].kinds[kind].dtype]

    def fill(self, name: str, kind: str, out: Tensor, offset: Sequence[int]) -> None:
        """Copy the rectangle at `offset` of the shape of `out` from the global tensor."""
        filled = 0
        for part in self.index.tensors[name].kinds[kind].slices:
            spans = part.overlap(tuple(offset), tuple(out.shape))
            if spans is None:
                continue
            there = tuple(slice(a - o, b - o) for (a, b), o in zip(spans, part.offset, strict=True))
            here = tuple(slice(a - o, b - o) for (a, b), o in zip(spans, offset, strict=True))
            piece = self._slice(name, kind, part)[there]
            out[here].copy_(piece)
            filled += piece.numel()
        assert filled == out.numel(), f"{kind} of {name}: {filled} of {out.numel()} elements found"

    def whole(self, name: str, kind: str = "weight") -> Tensor:
        """A global tensor on the CPU, in the stored dtype."""
        shape = self.index.tensors[name].shape
        out = torch.empty(shape, dtype=self.dtype(name, kind))
        self.fill(name, kind, out, [0] * len(shape))
        return out

    def _slice(self, name: str, kind: str, part: Slice) -> Tensor:
        """A slice as a view of the mapped file: only pages that are touched are read."""
        from safetensors import SafetensorError

        try:
            tensor: Tensor = self._open(part.file).get_tensor(part.key)
        except (SafetensorError, OSError) as error:
            raise self._damaged(name, kind, part, str(error)) from None
        if tuple(tensor.shape) != part.shape or tensor.dtype != self.dtype(name, kind):
            raise self._damaged(name, kind, part, f"it holds {tensor.dtype} {list(tensor.shape)}")
        if self.verify and (part.file, part.key) not in self._verified:
            if (found := checksum(tensor)) != part.checksum:
                raise self._damaged(name, kind, part, f"its checksum is {found}, not {part.checksum}")
            self._verified.add((part.file, part.key))
        return tensor

    def _open(self, name: str) -> Any:
        from safetensors import safe_open

        if name not in self._files:
            if len(self._files) >= _OPEN_FILES:
                self._files.popitem(last=False)
            self._files[name] = safe_open(str(self.folder / name), framework="pt")
        self._files.move_to_end(name)
        return self._files[name]

    def _damaged(self, name: str, kind: str, part: Slice, why: str) -> UserError:
        return UserError(f"{self.folder} is damaged: {part.file}, {kind} of {name}: {why}")


def load(
    path: str | Path,
    fragments: Iterable[Fragment],
    mesh: ParallelMesh,
    model: ModelConfig,
    weights_only: bool = False,
    verify: bool = True,
) -> dict[str, Any]:
    """Collective: fill this rank's fragments in place, whatever layout they were saved in; returns the meta.

    path: whatever `resolve` accepts, as rank 0 sees it; model: must be the checkpoint's, in names and shapes and
    in every setting that changes what is computed; weights_only: leave the moments as they are. fp32 and fp64 convert
    into each other (rounding to nearest), other dtypes must agree; padding becomes zero. Raises AgreedError: before
    anything is filled if the model does not agree, while filling if a file turns out to be damaged.
    """
    together = Together(mesh)
    own = list(fragments)
    folder = choose(mesh, lambda: resolve(path))
    assert folder is not None
    reader = together.run(lambda: _checked_reader(folder, own, mesh, model, weights_only, verify))
    together.agree()
    assert reader is not None
    together.run(lambda: _fill_all(reader, own, weights_only))
    together.agree()
    return reader.index.meta


def load_weights(
    path: str | Path, names: Iterable[str] | None = None, verify: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """Global weights one by one, on the CPU in the stored dtype: all in the stored order, or `names`."""
    reader = open_reader(path, verify)
    wanted = list(reader.index.tensors if names is None else names)
    if absent := [name for name in wanted if name not in reader.index.tensors]:
        raise UserError(f"{reader.folder} holds no {', '.join(absent)}")
    for name in wanted:
        yield name, reader.whole(name)


def open_reader(path: str | Path, verify: bool = True) -> Reader:
    """A reader of the one checkpoint that `path` means."""
    folder = resolve(path)
    return Reader(folder, read_index(folder), verify)


def model_config(path: str | Path) -> ModelConfig:
    """The model that a checkpoint was trained as, from the config stored in its meta."""
    folder = resolve(path)
    return stored_model(folder, read_index(folder, files=False))


def stored_model(folder: Path, index: Index) -> ModelConfig:
    try:
        return ModelConfig.model_validate(index.meta["config"]["model"])
    except (KeyError, TypeError):
        raise UserError(f"{folder} does not say which model it holds: its meta has no config.model") from None
    except ValidationError as error:
        raise UserError(f"{folder} holds a model that this version does not know: {error}") from None


def _checked_reader(
    folder: Path,
    fragments: list[Fragment],
    mesh: ParallelMesh,
    model: ModelConfig,
    weights_only: bool,
    verify: bool,
) -> Reader:
    index = read_index(folder, files=mesh.rank == 0)  # the sizes of thousands of files are asked for once
    problems = [*_other_settings(stored_model(folder, index), model), *_differences(index, parameter_table(model))]
    if problems:
        raise UserError(f"{folder} does not hold this model:\n" + "\n".join(problems))
    reader = Reader(folder, index, verify)
    for fragment in fragments:
        name = _stored_name(fragment)
        for kind, view in _targets(fragment, weights_only):
            if kind not in index.tensors[name].kinds:
                held = ", ".join(index.tensors[name].kinds)
                raise UserError(
                    f"{folder} holds no {kind} of {name}, only {held}{_trained(index)}; "
                    "to start from its weights, load weights only"
                )
            stored = reader.dtype(name, kind)
            if stored != view.dtype and not {stored, view.dtype} <= set(_CONVERTIBLE):
                raise UserError(f"{kind} of {name}: stored as {stored}, cannot be loaded as {view.dtype}")
    return reader


def _trained(index: Index) -> str:
    """By which optimizer, where the checkpoint says so: each has state of its own."""
    kind = index.meta["config"].get("optimizer", {}).get("kind")
    return f": it was trained with optimizer.kind = {kind}" if kind else ""


def _other_settings(stored: ModelConfig, model: ModelConfig) -> list[str]:
    """Weights of equal shapes are another model's where, say, the heads or the rotary base differ."""
    theirs, ours = _settings(stored), _settings(model)
    if stored.position == model.position == "rope":
        del theirs["max_sequence"], ours["max_sequence"]  # no weight and no number depends on it
    found = [f"model.{key} (stored {theirs[key]}, given {ours[key]})" for key in ours if theirs[key] != ours[key]]
    return [f"of another setting: {', '.join(found)}"] if found else []


def _settings(model: ModelConfig) -> dict[str, Any]:
    effective = {"kv_heads": model.num_kv_heads, "head_dim": model.head_width}
    return model.model_dump(exclude={"init_std"}) | effective


def _differences(index: Index, table: ParameterTable) -> list[str]:
    wanted = {name: spec.shape for name, spec in table.items() if spec.tied_to is None}
    stored = {name: tensor.shape for name, tensor in index.tensors.items()}
    missing = [name for name in wanted if name not in stored]
    surplus = [name for name in stored if name not in wanted]
    shapes = [
        f"{name} (stored {list(stored[name])}, model {list(shape)})"
        for name, shape in wanted.items()
        if name in stored and stored[name] != shape
    ]
    groups = {"missing in the checkpoint": missing, "not in the model": surplus, "of another shape": shapes}
    return [f"{what}: {', '.join(names)}" for what, names in groups.items() if names]


def _stored_name(fragment: Fragment) -> str:
    """A tied copy is filled from the parameter it is tied to."""
    spec = fragment.parameter.spec
    return spec.tied_to or spec.name


def _targets(fragment: Fragment, weights_only: bool) -> Iterator[tuple[str, Tensor]]:
    return ((kind, view) for kind, view in fragment.tensors.items() if kind == "weight" or not weights_only)


def _fill_all(reader: Reader, fragments: list[Fragment], weights_only: bool) -> None:
    with torch.no_grad():
        for fragment in fragments:
            for kind, view in _targets(fragment, weights_only):
                if fragment.numel:
                    _fill(reader, _stored_name(fragment), kind, fragment, view)


def _fill(reader: Reader, name: str, kind: str, fragment: Fragment, view: Tensor) -> None:
    """Read the block of rows of the local shard in which the fragment lies, and take the fragment out."""
    shard = fragment.parameter.shard
    inner = int(torch.Size(shard.shape[1:]).numel())
    first, last = fragment.start // inner, -(-(fragment.start + fragment.numel) // inner)
    rows = torch.zeros(last - first, *shard.shape[1:], dtype=reader.dtype(name, kind))
    valid, offset = _valid_rows(rows, shard, first)
    if valid.numel():
        reader.fill(name, kind, valid, offset)
    begin = fragment.start - first * inner
    view.copy_(rows.flatten()[begin : begin + fragment.numel])


def _valid_rows(rows: Tensor, shard: Shard, first: int) -> tuple[Tensor, list[int]]:
    """The part of local rows [first, first + len(rows)) that is not padding, and its offset globally."""
    offset = [0] * rows.dim()
    if shard.dim == 0:
        offset[0] = shard.start + first
        return rows[: max(0, shard.length - first)], offset
    offset[0], offset[shard.dim] = first, shard.start
    return rows.narrow(shard.dim, 0, shard.length), offset
