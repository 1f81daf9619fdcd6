"""A reader of megapt checkpoints in one file, for numpy and nothing else: copy it to wherever you need it.

    from plain import Checkpoint

    checkpoint = Checkpoint("runs/my-run/checkpoints/step-00000300")
    print(checkpoint.step, checkpoint.meta["config"]["model"])
    for name in checkpoint.names("weight"):
        array = checkpoint.read(name)

It follows docs/checkpoint-format.md and shares no code with the rest of the project. Nothing of a checkpoint is ever
executed. BF16 comes as float32, which holds every BF16 number exactly: numpy has no type for it. (The upper 16 bits of
a float32 are the BF16 number, so `(array.view("u4") >> 16).astype("u2")` gives the stored bits back.)
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np

DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,254}")


class Damaged(ValueError):
    """What is wrong, with the file and the tensor where it is about one."""


class Checkpoint:
    """A committed checkpoint, by its own folder (`step-...`). Damaged if marker and index are not as they should be."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        index = self._file("index.json").read_bytes()
        marker = self._file("COMMITTED").read_bytes()
        if marker != f"{hashlib.sha256(index).hexdigest()}  index.json\n".encode():
            raise Damaged(f"{self.folder}: the hash of index.json is not the one in COMMITTED")
        tree = _json(index, f"{self.folder}: index.json")
        found = tree.get("format"), tree.get("version")
        if found != ("megapt-checkpoint", 1):
            raise Damaged(f"{self.folder}: format and version are {found!r}; this reads megapt-checkpoint, 1")
        try:
            self.step: int = tree["step"]
            self.meta: dict[str, Any] = tree["meta"]
            self._kinds: dict[str, list[str]] = {name: list(t["kinds"]) for name, t in tree["tensors"].items()}
            self._tensors: dict[str, Any] = tree["tensors"]
        except (KeyError, TypeError, AttributeError) as error:
            raise Damaged(f"{self.folder}: index.json lacks {error}") from None

    def names(self, kind: str) -> list[str]:
        """The tensors stored as a kind: `weight`, or an optimizer's `exp_avg`, `exp_avg_sq`, `momentum`."""
        return [name for name, kinds in self._kinds.items() if kind in kinds]

    def read(self, name: str, kind: str = "weight") -> np.ndarray:
        """A whole tensor of its global shape, every checksum compared. Damaged names file and tensor."""
        what = f"{kind} of {name}"
        try:
            tensor = self._tensors[name]
            shape, entry = _numbers(tensor["shape"]), tensor["kinds"][kind]
            dtype = np.dtype(DTYPES[entry["dtype"]])
            parts = [(_numbers(s["offset"]), _numbers(s["shape"]), s) for s in entry["slices"]]
            if math.prod(shape) > sum(self._file(s["file"]).stat().st_size for *_, s in parts):
                raise Damaged(f"{what}: its files are too small for the shape {shape}")
            out, seen = np.zeros(shape, dtype), np.zeros(shape, bool)
            for offset, extent, part in parts:
                if not len(offset) == len(extent) == len(shape):
                    raise Damaged(f"{what}: a slice has other dimensions than {shape}")
                if f"{part['key']}/".find(f"{kind}/{name}/") != 0:
                    raise Damaged(f"{what}: the key {part['key']!r} is another tensor's")
                place = tuple(slice(at, at + n) for at, n in zip(offset, extent, strict=True))
                if out[place].shape != extent or seen[place].any():
                    raise Damaged(f"{what}: the slice at {offset} of shape {extent} lies outside or upon another")
                out[place] = self._slice(what, entry["dtype"], extent, part)
                seen[place] = True
        except (KeyError, TypeError, AttributeError) as error:
            raise Damaged(f"{what}: the index lacks or has wrongly {error}") from None
        if not seen.all():
            raise Damaged(f"{what}: its slices do not cover the shape {shape}")
        return (out.astype("<u4") << 16).view("<f4") if entry["dtype"] == "BF16" else out

    def _slice(self, what: str, dtype: str, shape: tuple[int, ...], part: dict[str, Any]) -> np.ndarray:
        """A slice out of its file: eight bytes of length, a JSON header, and the tensors (safetensors)."""
        path = self._file(part["file"])
        where, size = f"{self.folder}: {part['file']}, {what}", path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > size - 8:
                raise Damaged(f"{where}: a header of {length} bytes in a file of {size}")
            header = _json(file.read(length), where)
            stored = header[part["key"]]
            begin, end = _numbers(stored["data_offsets"])
            nbytes = math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
            if (stored["dtype"], _numbers(stored["shape"]), end - begin) != (dtype, shape, nbytes):
                raise Damaged(f"{where}: the file holds another tensor, {stored}")
            if 8 + length + end > size:
                raise Damaged(f"{where}: the file ends too early")
            file.seek(8 + length + begin)
            data = file.read(nbytes)
        if (found := f"crc32:{zlib.crc32(data):08x}") != part["checksum"]:
            raise Damaged(f"{where}: its checksum is {found}, not {part['checksum']}")
        return np.frombuffer(data, DTYPES[dtype]).reshape(shape)

    def _file(self, name: str) -> Path:
        """A file right inside the folder: no path of the index leads elsewhere."""
        path = self.folder / str(name)
        if not _NAME.fullmatch(str(name)) or path.resolve().parent != self.folder.resolve() or not path.is_file():
            raise Damaged(f"{self.folder}: {name!r} is not a file in it")
        return path


def _json(data: bytes, where: str) -> dict[str, Any]:
    try:
        tree = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{where}: not JSON: {error}") from None
    if not isinstance(tree, dict):
        raise Damaged(f"{where}: not an object")
    return tree


def _numbers(values: Any) -> tuple[int, ...]:
    if not all(type(value) is int and 0 <= value < 2**63 for value in values):
        raise TypeError(f"{values!r} as a list of whole numbers")
    return tuple(values)
