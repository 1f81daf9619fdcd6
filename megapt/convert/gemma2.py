"""Gemma 2 (Gemma2ForCausalLM): norms before and behind, soft-caps, scaled embeddings, windows in every second layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megapt.config import ModelConfig
from megapt.convert.keys import COUNT, NUMBER, Activation, Key, Only, Reading, optional
from megapt.convert.llama import ATTENTION, BUFFERS, ENDS, EPS, FIXED, MLP, SIZES
from megapt.convert.mapping import Family, Row
from megapt.convert.positions import Rope
from megapt.convert.windows import AlternatingWindow


@dataclass(frozen=True)
class _Scales:
    """Scores are divided by the root of `query_pre_attn_scalar`; embeddings multiplied by that of the hidden size."""

    def read(self, reading: Reading) -> dict[str, Any]:
        scalar, hidden = reading.take("query_pre_attn_scalar", COUNT, 256), reading.tree.get("hidden_size")
        if reading.problems or not isinstance(hidden, int):
            return {}
        return {"attention_scale": scalar**-0.5, "embedding_scale": hidden**0.5}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        scale = model.attention_scale or model.head_width**-0.5
        return {"query_pre_attn_scalar": max(1, round(scale**-2))}


_AT, _OURS = "model.layers.{layer}", "layers.{layer}"

GEMMA2 = Family(
    name="Gemma 2",
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    fixed={**FIXED, "bias": "none", "norm_placement": "both", "norm_offset": True},
    parts=(
        *SIZES,
        Key("num_key_value_heads", "kv_heads", COUNT, 4, of="num_kv_heads"),
        Key("head_dim", "head_dim", COUNT, 256, of="head_width"),
        EPS,
        Activation("hidden_activation", "gelu_pytorch_tanh"),
        Only("attention_bias", False),
        Only("use_bidirectional_attention", None, (False,)),
        _Scales(),
        Key("attn_logit_softcapping", "attention_softcap", optional(NUMBER), 50.0),
        Key("final_logit_softcapping", "logit_softcap", optional(NUMBER), 30.0),
        AlternatingWindow(),
        Rope(),
    ),
    rows=(
        *ENDS,
        Row(f"{_AT}.input_layernorm.weight", (f"{_OURS}.attention_norm.weight",)),
        Row(f"{_AT}.post_attention_layernorm.weight", (f"{_OURS}.attention_norm_after.weight",)),
        Row(f"{_AT}.pre_feedforward_layernorm.weight", (f"{_OURS}.mlp_norm.weight",)),
        Row(f"{_AT}.post_feedforward_layernorm.weight", (f"{_OURS}.mlp_norm_after.weight",)),
        *ATTENTION,
        *MLP,
    ),
    prefix="model.",
    # hidden_act is of the first Gemma; transformers does not read it.
    silent=frozenset({"hidden_act", "cache_implementation"}),
    buffers=BUFFERS,
    tied=True,
    whole_heads=True,
)
