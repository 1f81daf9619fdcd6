"""Mistral (MistralForCausalLM): Llama without biases, with a sliding window in every layer or in none."""

from __future__ import annotations

from megapt.convert.keys import COUNT, Activation, Key
from megapt.convert.llama import BUFFERS, EPS, FIXED, HEAD_DIM, ROWS, SIZES
from megapt.convert.mapping import Family
from megapt.convert.positions import Rope
from megapt.convert.windows import uniform

_KV_HEADS = Key("num_key_value_heads", "kv_heads", COUNT, 8, of="num_kv_heads")

MISTRAL = Family(
    name="Mistral",
    model_type="mistral",
    architecture="MistralForCausalLM",
    fixed={**FIXED, "bias": "none"},
    parts=(*SIZES, _KV_HEADS, HEAD_DIM, EPS, Activation(), uniform(4096), Rope()),
    rows=ROWS,
    prefix="model.",
    buffers=BUFFERS,
)
