"""A folder of Hugging Face weights: config.json and safetensors files, one or several with an index."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from megapt.errors import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_OTHERS = ("*.gguf", "*.h5", "*.msgpack", "*.onnx")


class Stored(NamedTuple):
    """Where a tensor lies, and what its file says of it; dtype in safetensors' words: `F32`."""

    file: str
    shape: tuple[int, ...]
    dtype: str


def read_object(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds; UserError if it holds anything else."""
    try:
        tree = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold an object, not {type(tree).__name__}")
    return tree


class Source:
    """config: what config.json says; tensors: every tensor of every file, by name. No tensor is read yet.

    Raises UserError naming what is missing, damaged or of a kind that is not read.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError(
                f"{folder} is not a folder here; nothing is fetched from the network: download the model first, and "
                "give the folder that holds its config.json"
            )
        self.config = self.json("config.json")
        if (self.folder / "adapter_config.json").exists():
            raise UserError(f"{folder} holds an adapter (adapter_config.json): merge it into its model first")
        self.tensors = dict(self._tensors())

    def json(self, name: str) -> dict[str, Any]:
        """An object from one of the folder's JSON files."""
        try:
            return read_object(self.folder / name)
        except FileNotFoundError:
            raise UserError(f"{self.folder} holds no {name}: it is not a model of Hugging Face transformers") from None

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU. Its file is closed again: pages of a mapped file count as memory of this process."""
        stored = self.tensors[name]
        with self._open(stored.file) as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def _tensors(self) -> Iterator[tuple[str, Stored]]:
        for file, wanted in self._files().items():
            with self._open(file) as content:
                held = {name: content.get_slice(name) for name in content.keys()}
                for name, part in held.items():
                    yield name, Stored(file, tuple(part.get_shape()), str(part.get_dtype()))
            if wanted is not None and (absent := sorted(wanted - held.keys())):
                raise UserError(f"{self.folder / file} lacks what {INDEX} says it holds: {', '.join(absent)}")
            if wanted is not None and (surplus := sorted(held.keys() - wanted)):
                raise UserError(f"{self.folder / file} holds what {INDEX} does not place there: {', '.join(surplus)}")

    def _files(self) -> dict[str, set[str] | None]:
        """The files that hold the weights, and the names that the index, if there is one, places in each."""
        index, single = self.folder / INDEX, self.folder / SINGLE
        if index.exists() and single.exists():
            raise UserError(f"{self.folder} holds both {SINGLE} and {INDEX}; move away the one that is not the model's")
        if single.exists():
            return {SINGLE: None}
        if not index.exists():
            raise UserError(f"{self.folder} holds neither {SINGLE} nor {INDEX}{self._instead()}")
        places = self.json(INDEX).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise UserError(f"{index} has no weight_map")
        files: dict[str, set[str]] = {}
        for name, file in places.items():
            if not isinstance(file, str) or Path(file).name != file or file in ("", ".."):
                raise UserError(f"{index} places {name} in {file!r}; legal: the name of a file beside it")
            files.setdefault(file, set()).add(name)
        if missing := sorted(file for file in files if not (self.folder / file).exists()):
            raise UserError(f"{self.folder} lacks {len(missing)} of {len(files)} shards: {', '.join(missing)}")
        return {**files}

    def _instead(self) -> str:
        """What lies there in their place, and what to do about it."""
        pickles = sorted(path.name for pattern in _PICKLES for path in self.folder.glob(pattern))
        if pickles:
            return (
                f"; {', '.join(pickles)} would be read by pickle, which can run any code: where you trust it, load it "
                "in transformers and save it again with save_pretrained, which writes safetensors"
            )
        links = sorted(path.name for path in self.folder.glob("*.safetensors") if not path.exists())
        if links:
            return f"; {', '.join(links)} are links to files that are not there: finish the download"
        found = sorted(p.name for pattern in ("*.safetensors", *_OTHERS) for p in self.folder.glob(pattern))
        return f", only {', '.join(found)}" if found else ""

    def _open(self, file: str) -> Any:
        from safetensors import SafetensorError, safe_open

        try:
            return safe_open(str(self.folder / file), framework="pt")
        except (SafetensorError, OSError) as error:
            if self._is_pointer(file):
                raise UserError(f"{self.folder / file} only points to its content: run `git lfs pull` there") from None
            raise UserError(f"{self.folder / file} is damaged: {error}") from None

    def _is_pointer(self, file: str) -> bool:
        """Whether git wrote a note in place of a large file, as it does without its extension LFS."""
        path = self.folder / file
        if not path.is_file():
            return False
        with path.open("rb") as opened:
            return opened.read(32).startswith(b"version https://git-lfs.")
