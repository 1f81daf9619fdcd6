"""FLOPs and memory against figures worked out by hand, and against what the engine really allocates."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megapt.config import ModelConfig, check_world, from_tree, load
from megapt.engine import Engine
from megapt.model.table import parameter_table
from megapt.plan.flops import model_flops_per_token
from megapt.plan.memory import stage_memory
from tests.distributed.layouts import GPT2, LLAMA, tree

CONFIGS = Path(__file__).parents[2] / "configs"


def test_flops_follow_the_published_formula() -> None:
    """Megatron's count, 72 B S L h^2 (1 + S / 6h + V / 12hL) without recomputation, for a GPT with ffn = 4h."""
    layers, hidden, sequence, vocabulary = 96, 12288, 2048, 51200
    gpt = ModelConfig(
        layers=layers, hidden=hidden, heads=96, ffn=4 * hidden, vocabulary=vocabulary, gated=False, tied_embeddings=True
    )
    per_token = 72 * layers * hidden**2 * (1 + sequence / (6 * hidden) + vocabulary / (12 * hidden * layers))
    assert model_flops_per_token(gpt, sequence) == pytest.approx(per_token, rel=1e-12)


@pytest.mark.parametrize("preset,world", [("llama-8b", 32), ("llama-70b", 256), ("llama-405b", 1024)])
def test_presets_fit_their_hardware(preset: str, world: int) -> None:
    config = load(CONFIGS / f"{preset}.yaml", ["parallel.vocabulary_multiple=1"]).config
    stages = stage_memory(config, check_world(config, world))
    assert max(stage.total for stage in stages) < 70 * 2**30
    # Norms are held whole by every tensor rank, the rest is cut evenly: stages add up to the model.
    table, tensor = parameter_table(config.model), config.parallel.tensor
    norms = sum(spec.numel for spec in table.values() if spec.split is None)
    assert sum(stage.parameters for stage in stages) == (table.count() - norms) // tensor + norms


@pytest.mark.parametrize("model", [LLAMA, GPT2])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
def test_state_is_what_the_native_backend_allocates(model: dict, precision: str) -> None:
    config = from_tree(tree(model, precision=precision)).config
    engine = Engine(config, 1, torch.device("cpu"))
    (stage,) = stage_memory(config, 1)
    assert stage.parameters == sum(p.numel() for p in engine.parameters)
    assert stage.weights == sum(p.numel() * p.element_size() for p in engine.parameters)
    assert stage.gradients == sum(p.main_grad.numel() * p.main_grad.element_size() for p in engine.parameters)
    masters = precision == "bf16"
    state = 0
    for fragment in engine.backend.fragments():
        for name, tensor in fragment.tensors.items():
            state += tensor.numel() * tensor.element_size() if masters or name != "weight" else 0
    assert stage.optimizer == state
