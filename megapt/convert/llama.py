"""Llama 1 to 3 and models of its shape (LlamaForCausalLM).

Rotary positions need no permutation: both sides rotate the pairs (i, i + width / 2).
"""

from __future__ import annotations

from typing import Any

from megapt.config import ModelConfig
from megapt.convert.mapping import ACTIVATIONS, Family, Row, linear


def legal(model: ModelConfig) -> dict[str, tuple[Any, ...]]:
    return {"norm": ("rms_norm",), "position": ("rope",), "gated": (True,), "bias": ("none", "all")}


def config(model: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": model.bias == "all",
        "mlp_bias": model.bias == "all",
        "head_dim": model.head_width,
        **common(model),
    }


def common(model: ModelConfig) -> dict[str, Any]:
    """What Llama and the families after it say in the same words."""
    return {
        "hidden_size": model.hidden,
        "intermediate_size": model.ffn,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.num_kv_heads,
        "hidden_act": ACTIVATIONS[model.activation],
        "max_position_embeddings": model.max_sequence,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "rope_scaling": _rope_scaling(model),
        "attention_dropout": 0.0,
    }


def _rope_scaling(model: ModelConfig) -> dict[str, Any] | None:
    scaling = model.rope_scaling
    if scaling is None:
        return None
    if scaling.kind == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_frequency_factor,
        "high_freq_factor": scaling.high_frequency_factor,
        "original_max_position_embeddings": scaling.original_sequence,
    }


ROWS = (
    Row("model.embed_tokens.weight", ("embedding.weight",)),
    Row("model.layers.{layer}.input_layernorm.weight", ("layers.{layer}.attention_norm.weight",)),
    *linear("model.layers.{layer}.self_attn.q_proj", "layers.{layer}.attention.q"),
    *linear("model.layers.{layer}.self_attn.k_proj", "layers.{layer}.attention.k"),
    *linear("model.layers.{layer}.self_attn.v_proj", "layers.{layer}.attention.v"),
    *linear("model.layers.{layer}.self_attn.o_proj", "layers.{layer}.attention.out"),
    Row("model.layers.{layer}.post_attention_layernorm.weight", ("layers.{layer}.mlp_norm.weight",)),
    *linear("model.layers.{layer}.mlp.gate_proj", "layers.{layer}.mlp.gate"),
    *linear("model.layers.{layer}.mlp.up_proj", "layers.{layer}.mlp.up"),
    *linear("model.layers.{layer}.mlp.down_proj", "layers.{layer}.mlp.down"),
    Row("model.norm.weight", ("norm.weight",)),
    Row("lm_head.weight", ("head.weight",)),
)

LLAMA = Family("Llama", legal, ROWS, config)
