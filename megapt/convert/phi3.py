"""Phi 3, 3.5 and 4 without experts (Phi3ForCausalLM): Llama with query, key and value as one, and gate and up too."""

from __future__ import annotations

from megapt.convert.keys import NUMBER, Activation, Dropout, Key, Only
from megapt.convert.llama import BUFFERS, ENDS, FIXED, KV_HEADS, NORMS, SIZES
from megapt.convert.mapping import Family, Row
from megapt.convert.positions import LongRope
from megapt.convert.windows import uniform

_AT, _OURS = "model.layers.{layer}", "layers.{layer}"
_QKV = tuple(f"{_OURS}.attention.{name}.weight" for name in "qkv")

PHI3 = Family(
    name="Phi 3",
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    fixed={**FIXED, "bias": "none"},
    parts=(
        *SIZES,
        Dropout(("resid_pdrop", "embd_pdrop")),
        KV_HEADS,
        Key("rms_norm_eps", "norm_eps", NUMBER, 1e-5),
        Activation(),
        Only("attention_bias", False, written=False),
        Only("mlp_bias", False, written=False),
        Only("lm_head_bias", False, written=False),
        Only("full_attn_mod", 1, written=False),
        Only("interpolate_factor", 1, written=False),
        uniform(None),
        LongRope(share=("partial_rotary_factor",)),
    ),
    rows=(
        *ENDS,
        *NORMS,
        Row(f"{_AT}.self_attn.qkv_proj.weight", _QKV),
        Row(f"{_AT}.self_attn.o_proj.weight", (f"{_OURS}.attention.out.weight",)),
        Row(f"{_AT}.mlp.gate_up_proj.weight", (f"{_OURS}.mlp.gate.weight", f"{_OURS}.mlp.up.weight")),
        Row(f"{_AT}.mlp.down_proj.weight", (f"{_OURS}.mlp.down.weight",)),
    ),
    prefix="model.",
    buffers=BUFFERS,
)
