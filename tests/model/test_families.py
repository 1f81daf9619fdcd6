"""What families of models do differently, against transformers with the same random weights, mapped by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megapt.batch import MicroBatch
from megapt.config import ModelConfig, from_tree
from megapt.mesh import ParallelMesh
from megapt.model.decoder import DecoderChunk
from megapt.parallel.pipeline.stages import build_chunks
from megapt.parallel.tensor import TensorParallel
from tests.model.accuracy import distance, random

ONE = ParallelMesh.create(1, 1, 1, torch.device("cpu"))
BATCH, SEQUENCE = 2, 24
SIZES: dict[str, Any] = {"layers": 4, "hidden": 32, "heads": 4, "kv_heads": 2, "ffn": 48, "vocabulary": 61}
THEIRS = {"num_hidden_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
THEIRS |= {"vocab_size": 61}
GROUPED = THEIRS | {"num_key_value_heads": 2}
FACTORS = {"short_factors": [1.0, 1.1, 1.3, 1.7], "long_factors": [1.5, 2.0, 4.0, 8.0]}

LONGROPE = {
    "rope_type": "longrope",
    "short_factor": FACTORS["short_factors"],
    "long_factor": FACTORS["long_factors"],
    "rope_theta": 10000.0,
}

# Name: our model's fields, transformers' model type and its fields.
FAMILIES: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "mistral": (SIZES | {"window": 7}, "mistral", GROUPED | {"sliding_window": 7, "rms_norm_eps": 1e-5}),
    "qwen3": (
        SIZES | {"qk_norm": "head", "head_dim": 16, "norm_eps": 1e-6},
        "qwen3",
        GROUPED | {"head_dim": 16, "rms_norm_eps": 1e-6},
    ),
    "neox": (
        SIZES
        | {"kv_heads": None, "norm": "layer_norm", "gated": False, "activation": "gelu", "bias": "all"}
        | {"parallel_residual": True, "rotary_dim": 2},
        "gpt_neox",
        THEIRS | {"rotary_pct": 0.25, "layer_norm_eps": 1e-5, "use_parallel_residual": True},
    ),
    "gemma2": (
        SIZES
        | {"norm_placement": "both", "norm_offset": True, "activation": "gelu_tanh", "tied_embeddings": True}
        | {"window": 7, "window_pattern": 2, "attention_scale": 0.5, "attention_softcap": 1.5, "logit_softcap": 3.0}
        | {"embedding_scale": 32**0.5, "norm_eps": 1e-6},
        "gemma2",
        GROUPED
        | {"head_dim": 8, "sliding_window": 7, "query_pre_attn_scalar": 4, "attn_logit_softcapping": 1.5}
        | {"final_logit_softcapping": 3.0, "rms_norm_eps": 1e-6, "hidden_activation": "gelu_pytorch_tanh"},
    ),
    "phi3 beyond the original sequence": (
        SIZES | {"rope_scaling": {"kind": "longrope", "factor": 4.0, "original_sequence": 16} | FACTORS, "window": 11},
        "phi3",
        GROUPED
        | {"max_position_embeddings": 64, "original_max_position_embeddings": 16}
        | {"rope_scaling": LONGROPE, "rms_norm_eps": 1e-5, "sliding_window": 11},
    ),
    "phi3 within it": (
        SIZES | {"rope_scaling": {"kind": "longrope", "factor": 2.0, "original_sequence": 32} | FACTORS},
        "phi3",
        GROUPED
        | {"max_position_embeddings": 64, "original_max_position_embeddings": 32}
        | {"rope_scaling": LONGROPE, "rms_norm_eps": 1e-5},
    ),
    "olmo2": (
        SIZES | {"norm_placement": "after", "qk_norm": "whole", "norm_eps": 1e-6},
        "olmo2",
        GROUPED | {"rms_norm_eps": 1e-6},
    ),
    "llama, yarn": (
        SIZES | {"rope_scaling": {"kind": "yarn", "factor": 4.0, "original_sequence": 16, "beta_fast": 2.0}},
        "llama",
        GROUPED
        | {"rms_norm_eps": 1e-5, "max_position_embeddings": 64}
        | {
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "beta_fast": 2.0,
            }
        },
    ),
}

_Q, _K, _V, _OUT = (f"attention.{name}" for name in ("q", "k", "v", "out"))
# Of a layer: their name, and ours whose rows are joined in it.
LAYER: dict[str, list[str]] = {
    "self_attn.q_proj": [_Q], "self_attn.k_proj": [_K], "self_attn.v_proj": [_V], "self_attn.o_proj": [_OUT],
    "self_attn.qkv_proj": [_Q, _K, _V], "mlp.gate_up_proj": ["mlp.gate", "mlp.up"],
    "self_attn.q_norm": ["attention.q_norm"], "self_attn.k_norm": ["attention.k_norm"],
    "attention.query_key_value": [_Q, _K, _V], "attention.dense": [_OUT],
    "mlp.gate_proj": ["mlp.gate"], "mlp.up_proj": ["mlp.up"], "mlp.down_proj": ["mlp.down"],
    "mlp.dense_h_to_4h": ["mlp.up"], "mlp.dense_4h_to_h": ["mlp.down"],
    "input_layernorm": ["attention_norm"], "post_attention_layernorm": ["mlp_norm"],
    "pre_feedforward_layernorm": ["mlp_norm"], "post_feedforward_layernorm": ["mlp_norm_after"],
}  # fmt: skip
OUTSIDE = {"embed_tokens": "embedding", "embed_in": "embedding", "lm_head": "head", "embed_out": "head"}
OUTSIDE |= {"norm": "norm", "final_layer_norm": "norm"}


def ours_of(name: str, model: ModelConfig) -> list[str]:
    """Our parameters that make theirs."""
    name, _, kind = name.removeprefix("model.").removeprefix("gpt_neox.").rpartition(".")
    if not name.startswith("layers."):
        return [f"{OUTSIDE[name]}.{kind}"]
    _, index, part = name.split(".", 2)
    parts = LAYER[part]
    if part == "post_attention_layernorm" and model.norm_placement != "before":
        parts = ["attention_norm_after"]
    return [f"layers.{index}.{ours}.{kind}" for ours in parts]


def joined(name: str, parts: list[Tensor], model: ModelConfig) -> Tensor:
    """Theirs of ours: rows one after the other, or in GPT-NeoX query, key and value of each head in turn."""
    if "query_key_value" not in name:
        return torch.cat(parts)
    return torch.stack([p.unflatten(0, (model.heads, -1)) for p in parts], dim=1).flatten(0, 2)


def both(name: str) -> tuple[DecoderChunk, torch.nn.Module, Callable[[str, bool], Tensor]]:
    """Our chunk, transformers' model with the same random weights, and ours (or their gradients) under their names.

    In fp32, as are transformers' rotary tables and softmax whatever the model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    fields, kind, theirs_fields = FAMILIES[name]
    tree = {"precision": "fp32", "model": fields, "data": {"train": "x"}, "train": {"steps": 1}}
    config = from_tree(tree | {"batch": {"sequence": SEQUENCE, "samples": 1}}).config
    (chunk,), parameters = build_chunks(config, ONE, TensorParallel(ONE.tp))
    for index, p in enumerate(parameters):
        p.shard.valid(p.data).copy_(random(*p.spec.shape, seed=index, scale=0.15) + p.spec.fill)
    ours = {p.spec.name: p for p in parameters}
    # A padding token's embedding has no gradient there.
    common = {"tie_word_embeddings": config.model.tied_embeddings, "attn_implementation": "eager", "pad_token_id": None}
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **theirs_fields, **common))
    theirs = theirs.float().eval()

    def under(their: str, gradient: bool) -> Tensor:
        parts = [ours[n] for n in ours_of(their, config.model)]
        return joined(their, [p.shard.valid(p.grad if gradient else p.data) for p in parts], config.model)

    used: set[str] = set()
    with torch.no_grad():
        for their, value in theirs.named_parameters():
            value.copy_(under(their, False))
            used |= set(ours_of(their, config.model))
    assert used == set(ours), "every parameter of ours is one of theirs"
    return chunk, theirs, under


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_loss_and_gradients_are_those_of_transformers(name: str) -> None:
    chunk, theirs, under = both(name)
    generator = torch.Generator().manual_seed(1)
    tokens, labels = (torch.randint(0, 61, (BATCH, SEQUENCE), generator=generator) for _ in range(2))
    close = 1e-5
    logits = theirs(tokens).logits
    with torch.no_grad():
        mine = chunk(None, MicroBatch(tokens, None))
    assert logits.abs().max() > 1
    assert distance(mine, logits.detach().flatten(0, 1)) < close
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    loss.backward()
    own = chunk(None, MicroBatch(tokens, labels))
    own.backward()
    assert float(own.detach()) == pytest.approx(float(loss.detach()), rel=close)
    for their, value in theirs.named_parameters():
        assert value.grad is not None
        if value.grad.norm() > 1e-6 * loss.detach().abs():  # a key's bias has none but rounding
            assert distance(under(their, True), value.grad) < 10 * close, their
