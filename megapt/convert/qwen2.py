"""Qwen 2 and 2.5 (Qwen2ForCausalLM): Llama with biases on query, key and value."""

from __future__ import annotations

from megapt.convert.keys import COUNT, Activation, Key, Only, optional
from megapt.convert.llama import BUFFERS, EPS, FIXED, ROWS, SIZES
from megapt.convert.mapping import Family
from megapt.convert.positions import Rope
from megapt.convert.windows import QwenWindow

KV_HEADS = Key("num_key_value_heads", "kv_heads", optional(COUNT), 32, of="num_kv_heads")

QWEN2 = Family(
    name="Qwen2",
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    fixed={**FIXED, "bias": "qkv"},
    parts=(*SIZES, KV_HEADS, EPS, Activation(), Only("use_mrope", False, written=False), QwenWindow(), Rope()),
    rows=ROWS,
    prefix="model.",
    buffers=BUFFERS,
)
