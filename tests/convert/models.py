"""Small random models of every family, built by transformers."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LAYERS, VOCABULARY, LONGEST = 4, 67, 64
_SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": LONGEST,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
}  # fmt: skip
_GPT2 = {
    "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": LONGEST,
    "bos_token_id": 1, "eos_token_id": 2, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
}  # fmt: skip
_NEOX = {name: value for name, value in _SIZES.items() if name != "num_key_value_heads"}
_LLAMA3 = {
    "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16, "rope_theta": 500.0,
}  # fmt: skip
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 300.0}
_LONG = {
    "rope_type": "longrope", "rope_theta": 200.0, "short_factor": [1.0, 1.5], "long_factor": [1.25, 4.5],
}  # fmt: skip

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _SIZES | {"num_key_value_heads": None}),
    "llama, llama3 positions, tied": ("llama", _SIZES | {"rope_parameters": _LLAMA3, "tie_word_embeddings": True}),
    "llama, linear, biases": (
        "llama",
        _SIZES
        | {"attention_bias": True, "mlp_bias": True, "head_dim": 12, "hidden_act": "gelu_new"}
        | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1000.0}},
    ),
    "mistral": ("mistral", _SIZES | {"sliding_window": 7, "head_dim": 6}),
    "mistral, no window": ("mistral", _SIZES | {"sliding_window": None}),
    "qwen2, yarn": ("qwen2", _SIZES | {"rope_parameters": _YARN}),
    "qwen2, window, tied": (
        "qwen2",
        _SIZES | {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0, "tie_word_embeddings": True},
    ),
    "qwen3": (
        "qwen3",
        _SIZES | {"head_dim": 12, "rope_parameters": _YARN | {"beta_fast": 4.0, "attention_factor": 1.5}},
    ),
    "gpt2": ("gpt2", _GPT2),
    "gpt2, untied": ("gpt2", _GPT2 | {"n_inner": 80, "tie_word_embeddings": False, "activation_function": "gelu"}),
    "gpt_neox": ("gpt_neox", _NEOX),
    "gpt_neox, sequential, tied": (
        "gpt_neox",
        _NEOX
        | {"use_parallel_residual": False, "tie_word_embeddings": True, "hidden_act": "gelu_fast"}
        | {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1.0, "rope_theta": 700.0}},
    ),
    "gemma2": ("gemma2", _SIZES | {"head_dim": 12, "sliding_window": 7, "query_pre_attn_scalar": 20}),
    "gemma2, all layers alike": (
        "gemma2",
        _SIZES
        | {
            "head_dim": 8,
            "sliding_window": 9,
            "query_pre_attn_scalar": 8,
            "layer_types": ["sliding_attention"] * LAYERS,
        }
        | {"attn_logit_softcapping": None, "final_logit_softcapping": None, "tie_word_embeddings": False},
    ),
    "phi3": ("phi3", _SIZES | {"sliding_window": 7}),
    "phi3, longrope, tied": (
        "phi3",
        _SIZES
        | {"rope_parameters": _LONG | {"partial_rotary_factor": 0.5}, "tie_word_embeddings": True}
        | {"original_max_position_embeddings": 16},
    ),
    "olmo2": ("olmo2", _SIZES),
}


@cache
def build(name: str) -> Any:
    """transformers' model in fp32, every parameter random (norms and biases too)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, fields = CASES[name]
    config = AutoConfig.for_model(kind, **json.loads(json.dumps(fields)))  # transformers writes into what it is given
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.15, generator=generator)
            if parameter.dim() == 1 and key.endswith("weight") and kind != "gemma2":
                parameter += 1
    return model


def save(name: str, folder: Path, **options: Any) -> Path:
    """The model as transformers writes it."""
    build(name).save_pretrained(folder, **options)
    return folder


def tokens() -> Tensor:
    return torch.randint(0, VOCABULARY, (2, 48), generator=torch.Generator().manual_seed(1))


@cache
def logits(name: str) -> Tensor:
    """transformers' own, [2, 48, vocabulary]."""
    with torch.no_grad():
        return build(name)(tokens(), use_cache=False).logits


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Relative to the largest logit."""
    assert theirs.abs().max() > 1
    return float((ours - theirs).abs().max() / theirs.abs().max())
