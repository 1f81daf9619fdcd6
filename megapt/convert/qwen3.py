"""Qwen 3 without experts (Qwen3ForCausalLM): Llama with a norm over each head's query and key."""

from __future__ import annotations

from megapt.convert.keys import COUNT, Activation, Key, Only
from megapt.convert.llama import BUFFERS, EPS, FIXED, QK_NORMS, ROWS, SIZES
from megapt.convert.mapping import Family
from megapt.convert.positions import Rope
from megapt.convert.qwen2 import KV_HEADS
from megapt.convert.windows import QwenWindow

_HEAD_DIM = Key("head_dim", "head_dim", COUNT, 128, of="head_width")

QWEN3 = Family(
    name="Qwen3",
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    fixed={**FIXED, "bias": "none", "qk_norm": "head"},
    parts=(*SIZES, KV_HEADS, _HEAD_DIM, EPS, Activation(), Only("attention_bias", False), QwenWindow(), Rope()),
    rows=(*ROWS, *QK_NORMS),
    prefix="model.",
    buffers=BUFFERS,
)
