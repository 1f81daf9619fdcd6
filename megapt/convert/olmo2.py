"""OLMo 2 (Olmo2ForCausalLM): norms behind attention and MLP, and over all queries and all keys as one vector each."""

from __future__ import annotations

from megapt.convert.keys import NUMBER, Activation, Key, Only
from megapt.convert.llama import ATTENTION, BUFFERS, ENDS, FIXED, KV_HEADS, MLP, QK_NORMS, SIZES
from megapt.convert.mapping import Family, Row
from megapt.convert.positions import Rope

_AT, _OURS = "model.layers.{layer}", "layers.{layer}"

OLMO2 = Family(
    name="OLMo 2",
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    fixed={**FIXED, "bias": "none", "norm_placement": "after", "qk_norm": "whole"},
    parts=(
        *SIZES,
        KV_HEADS,
        Key("rms_norm_eps", "norm_eps", NUMBER, 1e-5),
        Activation(),
        Only("attention_bias", False),
        Rope(),
    ),
    rows=(
        *ENDS,
        Row(f"{_AT}.post_attention_layernorm.weight", (f"{_OURS}.attention_norm_after.weight",)),
        Row(f"{_AT}.post_feedforward_layernorm.weight", (f"{_OURS}.mlp_norm_after.weight",)),
        *ATTENTION,
        *QK_NORMS,
        *MLP,
    ),
    prefix="model.",
    buffers=BUFFERS,
)
