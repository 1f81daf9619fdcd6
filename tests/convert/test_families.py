"""Every family both ways: the same bits, the same config, the same logits, in one process and cut over four ranks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megapt.convert import from_hf, to_hf
from megapt.convert.keys import SILENT
from megapt.convert.report import Report
from megapt.prove.ranks import run_ranks
from tests.convert import models

# Cut over ranks like others of their family.
ALIKE = ("llama", "mistral, no window", "qwen2, yarn", "gpt2, untied", "gemma2, all layers alike", "phi3")
Converted = dict[str, tuple[Path, Report, Report]]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    """Of each case: the folder with `theirs`, `ours` and `back`, and what both conversions said."""
    found = {}
    for number, name in enumerate(models.CASES):
        folder = tmp_path_factory.mktemp(f"case-{number}")
        there = from_hf(models.save(name, folder / "theirs"), folder / "ours")
        back = to_hf(folder / "ours", folder / "back")
        found[name] = folder, there, back
    return found


def test_both_ways_give_the_logits_of_the_origin(converted: Converted) -> None:
    from transformers import AutoModelForCausalLM

    for name, (folder, there, back) in converted.items():
        assert there.comparison and back.comparison
        for comparison in (there.comparison, back.comparison):
            assert comparison.relative <= 1e-5 and comparison.layers == comparison.of == models.LAYERS, name
            assert comparison.unreached == () and comparison.largest > 1, name
        again = AutoModelForCausalLM.from_pretrained(folder / "back", attn_implementation="eager")
        with torch.no_grad():
            logits = again(models.tokens(), use_cache=False).logits
        assert models.difference(logits, models.logits(name)) <= 1e-6, name


def test_the_way_there_and_back_keeps_every_bit(converted: Converted) -> None:
    for name, (folder, _, _) in converted.items():
        before, after = (load_file(folder / side / "model.safetensors") for side in ("theirs", "back"))
        assert before.keys() == after.keys(), name
        for key, value in before.items():
            assert value.dtype == after[key].dtype and torch.equal(value, after[key]), (name, key)


def test_the_way_there_and_back_keeps_the_config(converted: Converted) -> None:
    from transformers import AutoConfig

    for name, (folder, _, _) in converted.items():
        before, after = (computing(AutoConfig.from_pretrained(folder / side)) for side in ("theirs", "back"))
        assert before == after, name


def computing(config: Any) -> dict[str, Any]:
    """What a config of transformers says of what is computed, in one of the ways in which it can be said."""
    fields = {key: value for key, value in config.to_dict().items() if key not in SILENT}
    same = {"gelu_new": "gelu_pytorch_tanh", "gelu_fast": "gelu_pytorch_tanh"}
    fields["hidden_act"] = same.get(fields.get("hidden_act", ""), fields.get("hidden_act"))
    if config.model_type == "gpt2":
        fields["n_inner"] = config.n_inner or 4 * config.n_embd
    rope = fields.get("rope_parameters") or {}
    rope.pop("type", None)
    if rope.get("rope_type") == "yarn":
        fields["rope_parameters"] = {"beta_fast": 32.0, "beta_slow": 1.0, **rope}
    if rope.get("rope_type") != "longrope":
        fields.pop("original_max_position_embeddings", None)
    fields.pop("partial_rotary_factor", None)  # stands in rope_parameters
    if not fields.get("use_sliding_window", True):
        del fields["max_window_layers"]
    return {**fields, "special": [config.bos_token_id, config.eos_token_id, config.pad_token_id]}


def test_every_layout_computes_the_logits_of_the_origin(converted: Converted, tmp_path: Path) -> None:
    names = [name for name in converted if name not in ALIKE]
    folders = [str(converted[name][0] / "ours") for name in names]
    found = run_ranks(4, _logits_over_ranks, folders, models.tokens(), timeout=240)
    for name, logits in zip(names, next(filter(None, found)), strict=True):
        assert models.difference(logits, models.logits(name)) <= 1e-5, name


def _logits_over_ranks(rank: int, world: int, folders: list[str], tokens: Tensor) -> list[Tensor]:
    """Two tensor by two pipeline ranks; on the ranks where the model ends, the logits of every case."""
    from megapt.generate import inference_config, load_engine

    found = []
    for folder in folders:
        config = inference_config(folder, world, {"tensor": 2, "pipeline": 2})
        engine = load_engine(folder, config, world, torch.device("cpu"))
        with torch.no_grad():
            logits = engine.pipeline.logits(tokens)
        if logits is not None:
            found.append(logits)
    return found


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    yield
