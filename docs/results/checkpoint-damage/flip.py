"""Flip bytes of a checkpoint: python docs/results/checkpoint-damage/flip.py --output result.json

A small model is trained for two steps by two tensor-parallel ranks, which save. Then, one at a time, bytes at random
places are changed at random; `verify` and `load` must each name the tensor, or the file where the byte belongs to a
file's header, the index or the marker.
"""

from __future__ import annotations

import argparse
import json
import random
import struct
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
SHARES = {"tensor": 0.6, "header": 0.2, "index": 0.14, "marker": 0.06}  # of the flips; by bytes all would be in tensors


@dataclass(frozen=True)
class Place:
    """A byte of a file, and what a message about it must say."""

    where: str
    file: str
    at: int
    words: str


def places(folder: Path, count: int, chooser: random.Random) -> list[Place]:
    """Random bytes of tensors, headers, index and marker."""
    files = sorted(folder.glob("*.safetensors"))
    tables = {file: _tensors(file) for file in files}
    found = []
    for where, share in SHARES.items():
        for _ in range(round(count * share)):
            file = chooser.choices(files, [f.stat().st_size for f in files])[0]
            base, tensors = tables[file]
            if where == "tensor":
                at = chooser.randrange(base, file.stat().st_size)
                key = next(key for key, begin, end in tensors if begin <= at < end)
                kind, _, name = key.partition("/")
                found.append(Place(where, file.name, at, f"{file.name}, {kind} of {name}: its checksum is"))
            elif where == "header":
                found.append(Place(where, file.name, chooser.randrange(base), file.name))
            else:
                name = {"index": "index.json", "marker": "COMMITTED"}[where]
                found.append(Place(where, name, chooser.randrange((folder / name).stat().st_size), name))
    chooser.shuffle(found)
    return found


def _tensors(file: Path) -> tuple[int, list[tuple[str, int, int]]]:
    data = file.read_bytes()
    base = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:base])
    del header["__metadata__"]
    return base, [(key, *(base + at for at in entry["data_offsets"])) for key, entry in header.items()]


def flip(folder: Path, place: Place, chooser: random.Random) -> list[str]:
    """What is wrong with how one changed byte was met; nothing if all is well. The file is as before afterwards."""
    from megapt.checkpoint.verify import verify
    from megapt.errors import UserError

    path = folder / place.file
    before = path.read_bytes()
    changed = bytearray(before)
    changed[place.at] ^= chooser.randrange(1, 256)
    path.write_bytes(changed)
    wrong = []
    try:
        problems = verify(folder).problems
        if not problems or not all(place.words in problem for problem in problems):
            wrong.append(f"verify: {problems}")
        if place.where == "tensor" and len(problems) != 1:
            wrong.append(f"verify named {len(problems)} tensors")
        try:
            load(folder)
            wrong.append("load: nothing was said")
        except UserError as error:
            if place.words not in str(error):
                wrong.append(f"load: {error}")
    finally:
        path.write_bytes(before)
    return wrong


def load(folder: Path) -> None:
    """All weights and moments, into one process."""
    import torch

    from megapt import checkpoint
    from megapt.mesh import ParallelMesh
    from megapt.model.table import parameter_table
    from megapt.parameters import Parameter
    from megapt.zero.base import Fragment

    mesh = ParallelMesh.create(1, 1, 1, torch.device("cpu"))
    model, kinds = checkpoint.model_config(folder), ("weight", "exp_avg", "exp_avg_sq")
    fragments = []
    for spec in parameter_table(model).values():
        if spec.tied_to is None:
            parameter = Parameter(torch.empty(spec.shape))
            parameter.spec, parameter.shard, parameter.owner = spec, spec.shard(0, 1), True
            tensors = {kind: torch.empty(spec.numel) for kind in kinds}
            fragments.append(Fragment(parameter, 0, spec.numel, tensors))
    checkpoint.load(folder, fragments, mesh, model)


def train(rank: int, world: int, folder: str) -> None:
    """Two steps of a small Llama on two tensor-parallel ranks, and a checkpoint."""
    from megapt.prove.layout import Layout
    from megapt.prove.small import built_in
    from megapt.prove.trainer import Trainer

    trainer = Trainer(Layout(tp=world).config(built_in()[0], "fp32"), world)
    for step in range(2):
        trainer.step(step)
    trainer.save(folder)


def run(folder: Path, count: int, seed: int) -> dict[str, Any]:
    """Flip `count` bytes of the checkpoint in `folder`, and count how they were met."""
    chooser = random.Random(seed)
    load(folder)
    met: Counter[str] = Counter()
    failures = []
    for place in places(folder, count, chooser):
        wrong = flip(folder, place, chooser)
        met[place.where] += not wrong
        failures += [f"{place}: {text}" for text in wrong]
    load(folder)
    return {"flips": count, "seed": seed, "named_by_verify_and_load": dict(met), "failures": failures}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flips", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    from megapt import checkpoint
    from megapt.prove.ranks import run_ranks

    started = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        run_ranks(2, train, temporary)
        folder = checkpoint.resolve(temporary)
        result = run(folder, options.flips, options.seed)
        files = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    result |= {"files": files, "seconds": round(time.monotonic() - started, 1)}
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
