"""A checkpoint as a folder that transformers' AutoModelForCausalLM and AutoTokenizer load."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megapt.checkpoint.loading import Reader, open_reader, stored_model
from megapt.checkpoint.tensorfile import DTYPES, Slot, TensorFile
from megapt.config import ModelConfig
from megapt.convert.gpt2 import GPT2
from megapt.convert.llama import LLAMA
from megapt.convert.mapping import Family, Row
from megapt.convert.qwen2 import QWEN2
from megapt.convert.tokenizer import write_tokenizer
from megapt.errors import UserError
from megapt.files import sync_folder, write_whole
from megapt.model.table import parameter_table

FAMILIES = (LLAMA, QWEN2, GPT2)
_DTYPES = {"fp32": ("F32", "float32"), "bf16": ("BF16", "bfloat16"), "fp16": ("F16", "float16")}


def to_hf(
    checkpoint: str | Path,
    output: str | Path,
    tokenizer: str | None = None,
    dtype: str = "fp32",
    shard_bytes: int = 5 * 10**9,
) -> Path:
    """Write a checkpoint's weights as a Hugging Face folder and return its path.

    checkpoint: whatever `checkpoint.resolve` accepts; tokenizer: what `data.tokenizers.load` accepts; dtype:
    fp32, bf16 or fp16; shard_bytes: weights beyond this size are spread over several files. One tensor is in
    memory at a time. The folder appears under its name only when whole. Raises UserError for a model that no
    family can express, naming the fields, and for an output that already holds something.
    """
    output = Path(output)
    if dtype not in _DTYPES:
        raise UserError(f"dtype {dtype!r} is unknown; legal: {', '.join(_DTYPES)}")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} already exists and is not empty; choose another output")
    reader = open_reader(checkpoint)
    model = stored_model(reader.folder, reader.index)
    family = family_of(model)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.partial")
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir()
    try:
        eos = None if tokenizer is None else write_tokenizer(tokenizer, temporary, model)
        _write_weights(temporary, family, model, reader, _DTYPES[dtype][0], shard_bytes)
        _write_configs(temporary, family, model, _DTYPES[dtype][1], eos)
        os.replace(temporary, output)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(output.parent)
    return output


def family_of(model: ModelConfig) -> Family:
    """The family that can express a model; UserError saying for each why it cannot."""
    refusals = {family.name: family.refusals(model) for family in FAMILIES}
    for family in FAMILIES:
        if not refusals[family.name]:
            return family
    reasons = "\n".join(f"{name}: {'; '.join(why)}" for name, why in refusals.items())
    raise UserError(f"no Hugging Face family computes this model:\n{reasons}")


def _write_weights(
    folder: Path, family: Family, model: ModelConfig, reader: Reader, dtype: str, shard_bytes: int
) -> None:
    table = parameter_table(model)
    slots = [(row, Slot(row.theirs, dtype, row.shape(table))) for row in family.expand(model, table)]
    shards = list(_shards(slots, shard_bytes))
    names = [f"model-{n + 1:05d}-of-{len(shards):05d}.safetensors" for n in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    for name, shard in zip(names, shards, strict=True):
        file = TensorFile(folder / name, [slot for _, slot in shard])
        try:
            for row, _ in shard:
                file.write(row.join([reader.whole(own).to(DTYPES[dtype]) for own in row.ours]))
            file.close()
        finally:
            file.abandon()
    if len(shards) > 1:
        _write_json(
            folder / "model.safetensors.index.json",
            {
                "metadata": {"total_size": sum(slot.nbytes for _, slot in slots)},
                "weight_map": {
                    s.key: name for name, shard in zip(names, shards, strict=True) for _, s in shard
                },
            },
        )


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


def _write_configs(folder: Path, family: Family, model: ModelConfig, dtype: str, eos: int | None) -> None:
    # Named even where unknown: transformers' defaults are the ids of other models' tokenizers.
    special = {"bos_token_id": None, "eos_token_id": eos, "pad_token_id": None}
    common = {
        "vocab_size": model.vocabulary,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tied_embeddings,
        "torch_dtype": dtype,
        **special,
    }
    _write_json(folder / "config.json", {**family.config(model), **common})
    _write_json(folder / "generation_config.json", {"_from_model_config": True, **special})


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    write_whole(path, (json.dumps(tree, indent=2) + "\n").encode())
