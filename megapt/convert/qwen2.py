"""Qwen 2 and 2.5 (Qwen2ForCausalLM): Llama with biases on query, key and value."""

from __future__ import annotations

from typing import Any

from megapt.config import ModelConfig
from megapt.convert import llama
from megapt.convert.mapping import Family


def legal(model: ModelConfig) -> dict[str, tuple[Any, ...]]:
    return {**llama.legal(model), "bias": ("qkv",), "head_dim": (None, model.hidden // model.heads)}


def config(model: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "use_sliding_window": False,
        **llama.common(model),
    }


QWEN2 = Family("Qwen2", legal, llama.ROWS, config)
