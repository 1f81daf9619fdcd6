"""A checkpoint as a folder that transformers' AutoModelForCausalLM and AutoTokenizer load."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megapt.checkpoint.loading import Reader, open_reader, stored_model
from megapt.checkpoint.space import check_space
from megapt.checkpoint.tensorfile import DTYPES, Slot, TensorFile
from megapt.config import ModelConfig
from megapt.convert.compare import Request, compare, layers_that_fit
from megapt.convert.families import family_named, family_of
from megapt.convert.mapping import Family, Row
from megapt.convert.report import Report, check_output, whole_folder
from megapt.convert.source import INDEX, SINGLE, Source, read_object
from megapt.convert.tokenizer import GENERATION, SPECIAL, find_tokenizer, write_tokenizer
from megapt.errors import UserError
from megapt.files import write_whole
from megapt.model.table import parameter_table

__all__ = ["family_of", "to_hf"]

_DTYPES = {"fp32": ("F32", "float32"), "bf16": ("BF16", "bfloat16"), "fp16": ("F16", "float16")}


def to_hf(
    checkpoint: str | Path,
    output: str | Path,
    tokenizer: str | None = None,
    dtype: str = "fp32",
    shard_bytes: int = 5 * 10**9,
    family: str | None = None,
    request: Request | None = Request(),  # noqa: B008 (frozen)
) -> Report:
    """Write a checkpoint's weights as a Hugging Face folder, and compare what both compute.

    checkpoint: whatever `checkpoint.resolve` accepts; tokenizer: what `data.tokenizers.load` accepts, by default the
    one the checkpoint's config names, if it is there; dtype: fp32, bf16 or fp16; shard_bytes: weights beyond this size
    are spread over several files; family: a model_type, by default the one it was converted from, else the first that
    can express the model; request: how to compare, None for not at all. One tensor is in memory at a time, until both
    models are compared. The folder appears under its name only when whole. Raises UserError for a model that the
    family cannot express, naming the fields, for an output that already holds something, and where the logits differ.
    """
    output = Path(output)
    if dtype not in _DTYPES:
        raise UserError(f"dtype {dtype!r} is unknown; legal: {', '.join(_DTYPES)}")
    if shard_bytes < 1:
        raise UserError(f"shards of {shard_bytes} bytes hold nothing; legal: 1 or more")
    check_output(output)
    reader = open_reader(checkpoint)
    model = stored_model(reader.folder, reader.index)
    origin = reader.index.meta.get("hugging_face", {})
    named = family or origin.get("family")
    chosen = family_of(model) if named is None else family_named(named, model)
    layers = layers_that_fit(model) if request is not None else 0
    tokenizer = tokenizer or _own_tokenizer(reader)
    notes = [] if tokenizer else ["no tokenizer is written: the checkpoint's config names none that is there"]
    stored, torch_name = _DTYPES[dtype]
    rows = chosen.expand(model, parameter_table(model))
    with whole_folder(output) as folder:
        eos = write_tokenizer(tokenizer, folder, model) if tokenizer else None
        _write_weights(folder, rows, reader, stored, shard_bytes)
        _write_configs(folder, chosen, model, torch_name, _special_tokens(folder, eos, origin))
        comparison = None
        if request is not None:
            comparison = compare(reader, Source(folder), model, rows, DTYPES[stored], request, layers)
    return Report(output, chosen.name, comparison, tuple(notes))


def _own_tokenizer(reader: Reader) -> str | None:
    """The tokenizer that the checkpoint's config names, or one that lies in its run's folder."""
    named = reader.index.meta["config"].get("data", {}).get("tokenizer")
    if named is not None and (named == "bytes" or Path(named).exists()):
        return str(named)
    beside = find_tokenizer(reader.folder.parent.parent)
    return None if beside is None else str(beside)


def _special_tokens(folder: Path, eos: int | None, origin: dict[str, Any]) -> dict[str, Any]:
    """Ids that begin, end and pad a text: as the generation config that came with the tokenizer says, else the
    tokenizer, else the model it was converted from. Named even where unknown: transformers' defaults are the ids of
    other models' tokenizers."""
    if (folder / GENERATION).is_file():
        said = read_object(folder / GENERATION)
    else:
        said = origin.get("special_tokens", {}) if eos is None else {"eos_token_id": eos}
    return {name: said.get(name) for name in SPECIAL}


def _write_weights(folder: Path, rows: list[Row], reader: Reader, dtype: str, shard_bytes: int) -> None:
    slots = [(row, Slot(row.theirs, dtype, row.shape)) for row in rows]
    total = sum(slot.nbytes for _, slot in slots)
    check_space(folder, total)
    shards = list(_shards(slots, shard_bytes))
    names = [f"model-{n + 1:05d}-of-{len(shards):05d}.safetensors" for n in range(len(shards))]
    if len(shards) == 1:
        names = [SINGLE]
    for name, shard in zip(names, shards, strict=True):
        file = TensorFile(folder / name, [slot for _, slot in shard])
        try:
            for row, _ in shard:
                file.write(row.join([reader.whole(own).to(DTYPES[dtype]) for own in row.ours]))
            file.close()
        finally:
            file.abandon()
    if len(shards) > 1:
        places = {s.key: name for name, shard in zip(names, shards, strict=True) for _, s in shard}
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})


def _shards(slots: list[tuple[Row, Slot]], limit: int) -> Iterator[list[tuple[Row, Slot]]]:
    shard: list[tuple[Row, Slot]] = []
    size = 0
    for row, slot in slots:
        if shard and size + slot.nbytes > limit:
            yield shard
            shard, size = [], 0
        shard.append((row, slot))
        size += slot.nbytes
    yield shard


def _write_configs(folder: Path, family: Family, model: ModelConfig, dtype: str, special: dict[str, Any]) -> None:
    _write_json(folder / "config.json", {**family.write(model), "torch_dtype": dtype, **special})
    if not (folder / GENERATION).exists():
        _write_json(folder / GENERATION, {"_from_model_config": True, **special})


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    write_whole(path, (json.dumps(tree, indent=2) + "\n").encode())
