"""GPT-NeoX and Pythia (GPTNeoXForCausalLM): query, key and value interleaved by head, a parallel residual."""

from __future__ import annotations

from megapt.convert.keys import COUNT, FLAG, NUMBER, Activation, Dropout, Key, Only
from megapt.convert.mapping import Family, Row, linear
from megapt.convert.positions import Rope

_AT, _OURS = "gpt_neox.layers.{layer}", "layers.{layer}"
_QKV = tuple(f"{_OURS}.attention.{name}" for name in "qkv")

NEOX = Family(
    name="GPT-NeoX",
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    fixed={"norm": "layer_norm", "position": "rope", "gated": False, "bias": "all"},
    parts=(
        Key("hidden_size", "hidden", COUNT),
        Key("intermediate_size", "ffn", COUNT),
        Key("num_hidden_layers", "layers", COUNT),
        Key("num_attention_heads", "heads", COUNT),
        Key("max_position_embeddings", "max_sequence", COUNT),
        Key("layer_norm_eps", "norm_eps", NUMBER, 1e-5),
        Key("use_parallel_residual", "parallel_residual", FLAG, True),
        Activation(default="gelu"),
        Only("attention_bias", True),
        Dropout(("attention_dropout", "hidden_dropout")),
        Rope(("rotary_emb_base", "rope_theta"), ("rotary_pct", "partial_rotary_factor"), 0.25),
    ),
    rows=(
        Row("gpt_neox.embed_in.weight", ("embedding.weight",)),
        *linear(f"{_AT}.input_layernorm", f"{_OURS}.attention_norm"),
        *linear(f"{_AT}.attention.query_key_value", *_QKV, interleaved=True),
        *linear(f"{_AT}.attention.dense", f"{_OURS}.attention.out"),
        *linear(f"{_AT}.post_attention_layernorm", f"{_OURS}.mlp_norm"),
        *linear(f"{_AT}.mlp.dense_h_to_4h", f"{_OURS}.mlp.up"),
        *linear(f"{_AT}.mlp.dense_4h_to_h", f"{_OURS}.mlp.down"),
        *linear("gpt_neox.final_layer_norm", "norm"),
        Row("embed_out.weight", ("head.weight",)),
    ),
    prefix="gpt_neox.",
    # Masks and angles, kept by older versions.
    buffers=tuple(f"{_AT}.attention.{name}" for name in ("bias", "masked_bias", "rotary_emb.inv_freq")),
)
