"""GPT-2 (GPT2LMHeadModel), whose projections are stored [in, out], query, key and value as one."""

from __future__ import annotations

from typing import Any

from megapt.config import ModelConfig
from megapt.convert.mapping import ACTIVATIONS, Family, Row, linear


def legal(model: ModelConfig) -> dict[str, tuple[Any, ...]]:
    return {
        "norm": ("layer_norm",),
        "position": ("learned",),
        "gated": (False,),
        "bias": ("all",),
        "kv_heads": (None, model.heads),
        "head_dim": (None, model.hidden // model.heads),
    }


def config(model: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_embd": model.hidden,
        "n_inner": model.ffn,
        "n_layer": model.layers,
        "n_head": model.heads,
        "n_positions": model.max_sequence,
        "activation_function": (ACTIVATIONS | {"gelu_tanh": "gelu_new"})[model.activation],
        "layer_norm_epsilon": model.norm_eps,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }


_AT, _OURS = "transformer.h.{layer}", "layers.{layer}"
_QKV = (f"{_OURS}.attention.q", f"{_OURS}.attention.k", f"{_OURS}.attention.v")

ROWS = (
    Row("transformer.wte.weight", ("embedding.weight",)),
    Row("transformer.wpe.weight", ("positions.weight",)),
    *linear(f"{_AT}.ln_1", f"{_OURS}.attention_norm"),
    *linear(f"{_AT}.attn.c_attn", *_QKV, transposed=True),
    *linear(f"{_AT}.attn.c_proj", f"{_OURS}.attention.out", transposed=True),
    *linear(f"{_AT}.ln_2", f"{_OURS}.mlp_norm"),
    *linear(f"{_AT}.mlp.c_fc", f"{_OURS}.mlp.up", transposed=True),
    *linear(f"{_AT}.mlp.c_proj", f"{_OURS}.mlp.down", transposed=True),
    *linear("transformer.ln_f", "norm"),
    Row("lm_head.weight", ("head.weight",)),
)

GPT2 = Family("GPT-2", legal, ROWS, config)
