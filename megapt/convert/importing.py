"""A Hugging Face folder as a checkpoint that every layout loads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from megapt.checkpoint.commit import Commit
from megapt.checkpoint.loading import open_reader
from megapt.checkpoint.space import bytes_needed, check_space
from megapt.checkpoint.tensorfile import raw_bytes
from megapt.checkpoint.written import RankFiles, Rectangle
from megapt.config import Config, ModelConfig, from_tree
from megapt.convert.compare import Request, compare, layers_that_fit
from megapt.convert.families import family_of_config
from megapt.convert.mapping import Family, Row
from megapt.convert.report import Report, check_output, whole_folder
from megapt.convert.source import Source
from megapt.convert.tokenizer import GENERATION, SPECIAL, copy_tokenizer
from megapt.errors import UserError
from megapt.files import write_whole
from megapt.model.table import parameter_table

_DTYPES = ("F32", "BF16", "F16")
_SEQUENCE = 2048  # of the config to go on with, at most


def from_hf(
    folder: str | Path,
    output: str | Path,
    ignore_auto_map: bool = False,
    request: Request | None = Request(),  # noqa: B008 (frozen)
) -> Report:
    """Write a Hugging Face folder's weights as a checkpoint of step 0, and compare what both compute.

    folder: on this machine, with safetensors of fp32, bf16 or fp16; output: a new folder, which gets `checkpoints`,
    the tokenizer's files and `config.yaml`, ready to go on training from; ignore_auto_map: whether a model that names
    code of its own is computed by transformers' class all the same; request: how to compare, None for not at all. One
    tensor is in memory at a time, until both models are compared. The output appears under its name only when whole.
    Raises UserError naming every key of config.json and every tensor that is not as it must be, and where the logits
    differ.
    """
    output = Path(output)
    check_output(output)
    source = Source(folder)
    family = family_of_config(source.config, str(source.folder / "config.json"), ignore_auto_map)
    fields, notes = family.read(source.config, str(source.folder / "config.json"))
    model = _config(fields).model
    mapping = _match(source, family, model)
    layers = layers_that_fit(model) if request is not None else 0
    with whole_folder(output) as temporary:
        tokenizer = copy_tokenizer(source.folder, temporary)
        special = _special_tokens(source, temporary)
        named = None if tokenizer is None else str(output.absolute() / tokenizer.name)
        meta = {
            "config": _config(fields, named).model_dump(),
            "hugging_face": {"family": family.model_type, "special_tokens": special},
        }
        _write(temporary / "checkpoints", source, mapping, model, meta)
        text = _yaml(fields, named, output)
        write_whole(temporary / "config.yaml", text.encode())
        comparison = None
        if request is not None:
            reader = open_reader(temporary)
            comparison = compare(reader, source, model, mapping.rows, torch.float32, request, layers)
    if tokenizer is None:
        notes.append(f"{source.folder} holds no tokenizer")
    return Report(output, family.name, comparison, tuple(notes), text)


@dataclass(frozen=True)
class Mapping:
    """rows: by the names in the folder; head: the name of a tied output projection that is stored all the same."""

    rows: list[Row]
    embedding: str
    head: str | None


def _match(source: Source, family: Family, model: ModelConfig) -> Mapping:
    """Which tensor of the folder is which of the model; UserError listing all that are missing, surplus, of another
    shape, or of a dtype that is not read."""
    table = parameter_table(model)
    rows = family.expand(model, table)
    # A file of the model without its head leaves its prefix out.
    bare = not any(name.startswith(family.prefix) for name in source.tensors)
    if bare:
        rows = [Row(**{**vars(row), "theirs": row.theirs.removeprefix(family.prefix)}) for row in rows]
    wanted = {row.theirs: row.shape for row in rows}
    embedding = next(row.theirs for row in rows if row.ours == ("embedding.weight",))
    head = next(row.theirs for row in family.rows if row.ours == ("head.weight",))
    held = {name for name in source.tensors if not family.is_buffer(f"{family.prefix}{name}" if bare else name)}
    tied = model.tied_embeddings and head in held
    if tied:
        wanted[head] = wanted[embedding]
    shapes = [
        f"{name} (stored {list(source.tensors[name].shape)}, by config.json {list(shape)})"
        for name, shape in wanted.items()
        if name in held and source.tensors[name].shape != shape
    ]
    dtypes = [
        f"{name} ({source.tensors[name].dtype})"
        for name in wanted
        if name in held and source.tensors[name].dtype not in _DTYPES
    ]
    groups = {
        "missing": [name for name in wanted if name not in held],
        f"not of a {family.name} model of this config.json": sorted(held - wanted.keys()),
        "of another shape": shapes,
        f"of a dtype that is not read (legal: {', '.join(_DTYPES)})": dtypes,
    }
    if problems := [f"{what}: {', '.join(names)}" for what, names in groups.items() if names]:
        raise UserError(f"the tensors of {source.folder} are not those of its config.json:\n" + "\n".join(problems))
    return Mapping(rows, embedding, head if tied else None)


def _write(folder: Path, source: Source, mapping: Mapping, model: ModelConfig, meta: dict[str, Any]) -> None:
    """Commit the checkpoint of step 0, one tensor in memory at a time."""
    table = parameter_table(model)
    names = [name for name, spec in table.items() if spec.tied_to is None]
    rectangles = {
        name: Rectangle(name, "weight", "F32", shape, (0,) * len(shape), shape, f"weight/{name}")
        for row in mapping.rows
        for name, shape in zip(row.ours, row.shapes, strict=True)
    }
    _check_tie(source, mapping)
    check_space(folder.parent, bytes_needed(rectangles.values()))
    commit = Commit(folder, 0, meta, 1, names)
    commit.prepare()
    files = RankFiles(commit.partial, 0, list(rectangles.values()))
    try:
        for row in mapping.rows:
            _write_row(files, [rectangles[name] for name in row.ours], source, row)
        files.close()
    finally:
        files.abandon()
    commit.complete()


def _write_row(files: RankFiles, rectangles: list[Rectangle], source: Source, row: Row) -> None:
    """A function of its own: no tensor outlives its row."""
    tensor = source.read(row.theirs)
    if not torch.stack(tensor.aminmax()).isfinite().all():
        raise UserError(f"{source.folder}: {row.theirs} holds values that are not finite")
    for rectangle, part in zip(rectangles, row.split(tensor.float()), strict=True):
        files.add(rectangle, raw_bytes(part))


def _check_tie(source: Source, mapping: Mapping) -> None:
    if mapping.head is not None and not torch.equal(source.read(mapping.head), source.read(mapping.embedding)):
        raise UserError(
            f"{source.folder}: config.json ties {mapping.head} to {mapping.embedding}, but they differ; legal: equal "
            "tensors, or tie_word_embeddings = false"
        )


def _special_tokens(source: Source, folder: Path) -> dict[str, Any]:
    """The ids that config.json names, which also go beside the tokenizer where no generation config did."""
    special = {name: source.config[name] for name in SPECIAL if source.config.get(name) is not None}
    if (folder / GENERATION).exists():
        source.json(GENERATION)  # it was copied: a broken one is refused here rather than at the way back
    elif special:
        tree = {"_from_model_config": True, **special}
        write_whole(folder / GENERATION, (json.dumps(tree, indent=2) + "\n").encode())
    return special


def _tree(fields: dict[str, Any], tokenizer: str | None) -> dict[str, Any]:
    """A training configuration of this model: what every run needs, and nothing else."""
    data = {"train": "data/train", **({} if tokenizer is None else {"tokenizer": tokenizer})}
    sequence = min(fields["max_sequence"], _SEQUENCE)
    return {
        "model": {name: value for name, value in fields.items() if value is not None},
        "data": data,
        "batch": {"sequence": sequence, "samples": 64},
        "optimizer": {"lr": 1e-5, "warmup_steps": 100},
        "train": {"steps": 1000},
    }


def _config(fields: dict[str, Any], tokenizer: str | None = None) -> Config:
    return from_tree(_tree(fields, tokenizer)).config


class _Dumper(yaml.SafeDumper):
    pass


_Dumper.add_representer(list, lambda d, data: d.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True))


def _yaml(fields: dict[str, Any], tokenizer: str | None, output: Path) -> str:
    """A configuration that goes on training from the output."""
    start = {"checkpoint": {"load": str(output.absolute())}, "run": {"folder": "runs/continued"}}
    tree = _tree(fields, tokenizer) | start
    text = yaml.dump(tree, Dumper=_Dumper, sort_keys=False, width=10**6)
    return "# Goes on training from the converted weights; data, batch, optimizer and train are yours to set.\n" + text
