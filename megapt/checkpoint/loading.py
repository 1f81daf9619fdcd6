"""Loading: any rectangle of any tensor, out of whatever slices a checkpoint was written in."""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor

from megapt.checkpoint.choice import choose
from megapt.checkpoint.folders import resolve
from megapt.checkpoint.index import Index, Slice, read_index
from megapt.checkpoint.rectangles import Numbers, targets, valid_end
from megapt.checkpoint.stored import Damaged, StoredFile
from megapt.checkpoint.tensorfile import DTYPES, raw_bytes
from megapt.checkpoint.together import Together
from megapt.config import ModelConfig
from megapt.errors import UserError
from megapt.mesh import Axis, ParallelMesh
from megapt.model.table import parameter_table
from megapt.parameters import ParameterTable
from megapt.zero.base import Fragment

_CONVERTIBLE = (torch.float32, torch.float64)
_OPEN_FILES = 128
_BLOCK = 4 << 20  # bytes read at a time where they cannot go straight to their place
THREADS = 4  # reading, checksums and copies all let other threads run

Wanted = tuple[Tensor, tuple[slice, ...]]  # where to, and which part of a slice


class Reader:
    """Reads rectangles of global tensors from the files of one checkpoint. Threads may share it.

    With `verify`, a slice's checksum is compared the first time it is touched. Raises UserError naming file
    and tensor where something is damaged.
    """

    def __init__(self, folder: Path, index: Index, verify: bool = True) -> None:
        self.folder = folder
        self.index = index
        self.verify = verify
        self._files: OrderedDict[str, StoredFile] = OrderedDict()
        self._lock = threading.Lock()
        self._bounds: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]] = {}
        self._verified: set[tuple[str, str]] = set()

    def dtype(self, name: str, kind: str = "weight") -> torch.dtype:
        return DTYPES[self.index.tensors[name].kinds[kind].dtype]

    def fill(self, name: str, kind: str, out: Tensor, offset: Sequence[int]) -> None:
        """Copy the rectangle at `offset` of the shape of `out` from the global tensor."""
        self.fill_parts(name, kind, [(out, tuple(offset))])

    def fill_parts(self, name: str, kind: str, parts: Sequence[tuple[Tensor, Numbers]]) -> int:
        """Copy several rectangles, each with its offset; every slice is read once. Returns the elements copied."""
        slices = self.index.tensors[name].kinds[kind].slices
        wanted: dict[int, list[Wanted]] = {}
        filled = 0
        for out, offset in parts:
            begin, end = np.array(offset, np.int64), np.add(offset, out.shape, dtype=np.int64)
            starts, stops = self._corners(name, kind)
            for number in np.flatnonzero(((starts < end) & (stops > begin)).all(1)).tolist():
                low, high = np.maximum(starts[number], begin), np.minimum(stops[number], end)
                here = out[_spans(low - begin, high - begin)]
                wanted.setdefault(number, []).append((here, _spans(low - starts[number], high - starts[number])))
                filled += here.numel()
        assert filled == sum(out.numel() for out, _ in parts), f"{kind} of {name}: only {filled} elements found"
        for number in sorted(wanted):
            self._take(name, kind, slices[number], wanted[number])
        return filled

    def whole(self, name: str, kind: str = "weight") -> Tensor:
        """A global tensor on the CPU, in the stored dtype."""
        shape = self.index.tensors[name].shape
        out = torch.empty(shape, dtype=self.dtype(name, kind))
        self.fill(name, kind, out, [0] * len(shape))
        return out

    def check(self, name: str, kind: str, part: Slice) -> None:
        """Compare the checksum of a slice; UserError naming file and tensor if it is damaged."""
        self._take(name, kind, part, [], check=True)

    def _corners(self, name: str, kind: str) -> tuple[np.ndarray, np.ndarray]:
        """Begins and ends of all slices, int64 [slices, dimensions]: a tensor may be in thousands."""
        if (name, kind) not in self._bounds:
            tensor = self.index.tensors[name]
            shape = (len(tensor.kinds[kind].slices), len(tensor.shape))
            starts = np.array([s.offset for s in tensor.kinds[kind].slices], np.int64).reshape(shape)
            sizes = np.array([s.shape for s in tensor.kinds[kind].slices], np.int64).reshape(shape)
            self._bounds[name, kind] = starts, starts + sizes
        return self._bounds[name, kind]

    def _take(self, name: str, kind: str, part: Slice, wanted: list[Wanted], check: bool = False) -> None:
        """Copy parts of a slice; all of it is read where its checksum is still to be compared."""
        check = check or self.verify and (part.file, part.key) not in self._verified
        try:
            file = self._open(part.file)
            if part.key not in file.tensors:
                raise Damaged(f"it holds no {part.key}")
            stored, dtype = file.tensors[part.key], self.index.tensors[name].kinds[kind].dtype
            if (stored.dtype, stored.shape) != (dtype, part.shape):
                raise Damaged(f"it holds {stored.dtype} {list(stored.shape)}, not {dtype} {list(part.shape)}")
            if len(wanted) == 1 and _straight(wanted[0][0], part.shape, DTYPES[dtype]):
                crc = file.read(raw_bytes(wanted[0][0]), stored.begin)
            else:
                crc = _read_blocks(file, stored.begin, part.shape, DTYPES[dtype], wanted, everything=check)
            if check and (found := f"crc32:{crc:08x}") != part.checksum:
                raise Damaged(f"its checksum is {found}, not {part.checksum}")
        except Damaged as error:
            raise UserError(f"{self.folder} is damaged: {part.file}, {kind} of {name}: {error}") from None
        if check:
            self._verified.add((part.file, part.key))

    def _open(self, name: str) -> StoredFile:
        with self._lock:
            if name not in self._files:
                if len(self._files) >= _OPEN_FILES:
                    self._files.popitem(last=False)  # closed once no thread reads it any more
                self._files[name] = StoredFile(self.folder, name, self.index.files[name])
            self._files.move_to_end(name)
            return self._files[name]


def _spans(begins: np.ndarray, ends: np.ndarray) -> tuple[slice, ...]:
    return tuple(slice(a, b) for a, b in zip(begins.tolist(), ends.tolist(), strict=True))


def _straight(out: Tensor, shape: Numbers, dtype: torch.dtype) -> bool:
    """Whether a slice's bytes can be read right into a tensor."""
    return out.shape == shape and out.dtype == dtype and out.device.type == "cpu" and out.is_contiguous()


def _read_blocks(
    file: StoredFile, begin: int, shape: Numbers, dtype: torch.dtype, wanted: list[Wanted], everything: bool
) -> int:
    """Read a slice in blocks of rows and copy what is wanted of each; returns the CRC-32 of what was read.

    Without `everything` only the rows from the first to the last one wanted are read.
    """
    if not shape:
        shape, wanted = (1,), [(out.view(1), (slice(0, 1),)) for out, _ in wanted]
    width = int(torch.Size(shape[1:]).numel()) * dtype.itemsize
    low, high = 0, shape[0]
    if not everything:
        low, high = min(there[0].start for _, there in wanted), max(there[0].stop for _, there in wanted)
    step = max(1, min(_BLOCK // max(width, 1), high - low))
    buffer = torch.empty(step * width, dtype=torch.uint8)
    data, crc = raw_bytes(buffer), 0
    for row in range(low, high, step):
        stop = min(row + step, high)
        crc = file.read(data[: (stop - row) * width], begin + row * width, crc)
        block = buffer[: (stop - row) * width].view(dtype).view(stop - row, *shape[1:])
        for out, there in wanted:
            first, last = max(there[0].start, row), min(there[0].stop, stop)
            if first < last:
                rows = block[first - row : last - row]
                out[first - there[0].start : last - there[0].start].copy_(rows[(slice(None), *there[1:])])
    return crc


def load(
    path: str | Path,
    fragments: Iterable[Fragment],
    mesh: ParallelMesh,
    model: ModelConfig,
    weights_only: bool = False,
    verify: bool = True,
    complete: bool = True,
) -> dict[str, Any]:
    """Collective: fill this rank's fragments in place, whatever layout they were saved in; returns the meta.

    path: whatever `resolve` accepts, as rank 0 sees it; model: must be the checkpoint's, in names and shapes and
    in every setting that changes what is computed; weights_only: leave the moments as they are; complete: the fragments
    of all ranks must hold every element of the model, which is counted after the filling. fp32 and fp64 convert into
    each other (rounding to nearest), other dtypes must agree; padding becomes zero. Raises AgreedError: before anything
    is filled if the model does not agree, while filling if a file turns out to be damaged, afterwards if a parameter
    was not filled.
    """
    together = Together(mesh)
    own = list(fragments)
    folder = choose(mesh, lambda: resolve(path))
    assert folder is not None
    reader = together.run(lambda: _checked_reader(folder, own, mesh, model, weights_only, verify))
    together.agree()
    assert reader is not None
    filled = together.run(lambda: _fill_all(reader, own, weights_only))
    together.agree()
    if complete:
        spans = _gather(mesh.dp, filled or [])
        names = _gather(mesh.pp, [name for _, name, *_ in spans])
        together.run(lambda: _check_complete(folder, spans, set(names), model))
        together.agree()
    return reader.index.meta


def load_weights(
    path: str | Path, names: Iterable[str] | None = None, verify: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """Global weights one by one, on the CPU in the stored dtype: all in the stored order, or `names`."""
    reader = open_reader(path, verify)
    wanted = list(reader.index.tensors if names is None else names)
    held = {name for name, kind, _ in reader.index.entries() if kind == "weight"}
    if absent := [name for name in wanted if name not in held]:
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
    """The model in a checkpoint's meta; UserError where there is none, or where the tensors are another model's."""
    model = _model_in(folder, index)
    if problems := _differences(index, parameter_table(model)):
        raise UserError(f"the tensors of {folder} are not those of its config.model:\n" + "\n".join(problems))
    return model


def _model_in(folder: Path, index: Index) -> ModelConfig:
    try:
        return ModelConfig.model_validate(index.meta["config"]["model"])
    except (KeyError, TypeError):
        raise UserError(f"{folder} does not say which model it holds: its meta has no config.model") from None
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_url=False))
        raise UserError(f"{folder} holds a model that this version does not know: {wrong}") from None


def _checked_reader(
    folder: Path,
    fragments: list[Fragment],
    mesh: ParallelMesh,
    model: ModelConfig,
    weights_only: bool,
    verify: bool,
) -> Reader:
    index = read_index(folder, files=mesh.rank == 0)  # the sizes of thousands of files are asked for once
    problems = _differences(index, parameter_table(model))
    if other := different_settings(_model_in(folder, index), model):
        problems.insert(0, f"of another setting: {', '.join(other)}")
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
    section = index.meta["config"].get("optimizer")
    kind = section.get("kind") if isinstance(section, dict) else None
    return f": it was trained with optimizer.kind = {kind}" if isinstance(kind, str) else ""


def different_settings(stored: ModelConfig, model: ModelConfig) -> list[str]:
    """Weights of equal shapes are another model's where, say, the heads or the rotary base differ."""
    theirs, ours = _settings(stored), _settings(model)
    if stored.position == model.position == "rope":
        del theirs["max_sequence"], ours["max_sequence"]  # no weight and no number depends on it
    return [f"model.{key} (stored {theirs[key]}, given {ours[key]})" for key in ours if theirs[key] != ours[key]]


def _settings(model: ModelConfig) -> dict[str, Any]:
    effective = {"kv_heads": model.num_kv_heads, "head_dim": model.head_width}
    return model.model_dump(exclude={"init_std"}) | effective


def _differences(index: Index, table: ParameterTable) -> list[str]:
    wanted = {name: spec.shape for name, spec in table.items() if spec.tied_to is None}
    stored = {name: tensor.shape for name, tensor in index.tensors.items() if "weight" in tensor.kinds}
    missing = [name for name in wanted if name not in stored]
    surplus = [name for name in index.tensors if name not in wanted]
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


Filled = tuple[str, str, int, int, int]  # kind, name, start, stop, end of what counts of the flattened shard


def _fill_all(reader: Reader, fragments: list[Fragment], weights_only: bool) -> list[Filled]:
    """What was filled, once it is."""
    work = [
        functools.partial(_fill, reader, kind, fragment, view)
        for fragment in fragments
        for kind, view in _targets(fragment, weights_only)
        if fragment.numel
    ]
    with ThreadPoolExecutor(THREADS, "checkpoint-load") as pool:
        return list(pool.map(lambda job: job(), work))


@torch.no_grad()  # which every thread has for itself
def _fill(reader: Reader, kind: str, fragment: Fragment, view: Tensor) -> Filled:
    shard = fragment.parameter.shard
    parts = targets(view, shard, fragment.start)
    filled = reader.fill_parts(_stored_name(fragment), kind, parts)
    assert filled == sum(part.numel() for part, _ in parts)
    return kind, fragment.parameter.spec.name, fragment.start, fragment.start + fragment.numel, valid_end(shard)


def _gather(axis: Axis, own: list[Any]) -> list[Any]:
    """Collective over an axis: everything that its ranks have."""
    if axis.size == 1:
        return own
    everything: list[Any] = [None] * axis.size
    dist.all_gather_object(everything, own, group=axis.group)
    return [one for part in everything for one in part]


def _check_complete(folder: Path, spans: list[Filled], names: set[str], model: ModelConfig) -> None:
    """Every parameter of the model is on some stage; of those of this stage, every element was filled on some rank."""
    table = parameter_table(model)
    problems = [name for name, spec in table.items() if spec.tied_to is None and name not in names]
    reached: dict[tuple[str, str], int] = {}
    ends: dict[tuple[str, str], int] = {}
    for kind, name, start, stop, end in sorted(spans, key=lambda span: span[2]):
        ends[kind, name] = end
        if start <= reached.get((kind, name), 0):
            reached[kind, name] = max(reached.get((kind, name), 0), stop)
    problems += [
        f"{kind} of {name} from element {reached.get((kind, name), 0)} on"
        for (kind, name), end in ends.items()
        if reached.get((kind, name), 0) < end
    ]
    if problems:
        raise UserError(f"loading {folder} left parts of the model as they were: {', '.join(problems)}")
