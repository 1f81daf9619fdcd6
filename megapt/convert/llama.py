"""Llama 1 to 3 and models of its shape (LlamaForCausalLM).

Rotary positions need no permutation: both sides rotate the pairs (i, i + width / 2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megapt.config import ModelConfig
from megapt.convert.keys import COUNT, FLAG, NUMBER, Activation, Dropout, Key, Part, Reading, optional
from megapt.convert.mapping import Family, Row, linear
from megapt.convert.positions import Rope

FIXED: dict[str, Any] = {"norm": "rms_norm", "position": "rope", "gated": True}

# What Llama and the families after it say in the same words.
SIZES: tuple[Part, ...] = (
    Key("hidden_size", "hidden", COUNT),
    Key("intermediate_size", "ffn", COUNT),
    Key("num_hidden_layers", "layers", COUNT),
    Key("num_attention_heads", "heads", COUNT),
    Key("max_position_embeddings", "max_sequence", COUNT),
    Dropout(("attention_dropout",)),
)
KV_HEADS = Key("num_key_value_heads", "kv_heads", optional(COUNT), None, of="num_kv_heads")
HEAD_DIM = Key("head_dim", "head_dim", optional(COUNT), None, of="head_width")
EPS = Key("rms_norm_eps", "norm_eps", NUMBER, 1e-6)


@dataclass(frozen=True)
class _Biases:
    """Of attention and of the MLP: here both have them or none."""

    def read(self, reading: Reading) -> dict[str, Any]:
        attention = reading.take("attention_bias", FLAG, False)
        mlp = reading.take("mlp_bias", FLAG, False)
        if attention != mlp:
            reading.refuse("mlp_bias", mlp, f"what attention_bias says, {attention!r}")
        return {"bias": "all" if attention else "none"}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        return {"attention_bias": model.bias == "all", "mlp_bias": model.bias == "all"}


_AT, _OURS = "model.layers.{layer}", "layers.{layer}"

ENDS = (
    Row("model.embed_tokens.weight", ("embedding.weight",)),
    Row("model.norm.weight", ("norm.weight",)),
    Row("lm_head.weight", ("head.weight",)),
)
NORMS = (
    *linear(f"{_AT}.input_layernorm", f"{_OURS}.attention_norm"),
    *linear(f"{_AT}.post_attention_layernorm", f"{_OURS}.mlp_norm"),
)
ATTENTION = (
    *linear(f"{_AT}.self_attn.q_proj", f"{_OURS}.attention.q"),
    *linear(f"{_AT}.self_attn.k_proj", f"{_OURS}.attention.k"),
    *linear(f"{_AT}.self_attn.v_proj", f"{_OURS}.attention.v"),
    *linear(f"{_AT}.self_attn.o_proj", f"{_OURS}.attention.out"),
)
QK_NORMS = (
    Row(f"{_AT}.self_attn.q_norm.weight", (f"{_OURS}.attention.q_norm.weight",)),
    Row(f"{_AT}.self_attn.k_norm.weight", (f"{_OURS}.attention.k_norm.weight",)),
)
MLP = (
    *linear(f"{_AT}.mlp.gate_proj", f"{_OURS}.mlp.gate"),
    *linear(f"{_AT}.mlp.up_proj", f"{_OURS}.mlp.up"),
    *linear(f"{_AT}.mlp.down_proj", f"{_OURS}.mlp.down"),
)
ROWS = (*ENDS, *NORMS, *ATTENTION, *MLP)

# Angles, kept by older versions.
BUFFERS = (f"{_AT}.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")

LLAMA = Family(
    name="Llama",
    model_type="llama",
    architecture="LlamaForCausalLM",
    fixed=FIXED,
    parts=(*SIZES, KV_HEADS, HEAD_DIM, EPS, Activation(), _Biases(), Rope()),
    rows=ROWS,
    prefix="model.",
    silent=frozenset({"pretraining_tp"}),  # the products in slices: the same sums
    buffers=BUFFERS,
    whole_heads=True,
)
