"""Configs of tiny models, as plain trees."""

from __future__ import annotations

from typing import Any

LLAMA: dict[str, Any] = {
    "layers": 4, "hidden": 32, "heads": 4, "kv_heads": 2, "ffn": 48, "vocabulary": 61, "max_sequence": 32,
    "rope_scaling": {"kind": "llama3", "factor": 4.0, "original_sequence": 16},
}  # fmt: skip
GPT2: dict[str, Any] = {
    "layers": 4, "hidden": 32, "heads": 4, "ffn": 48, "vocabulary": 61, "max_sequence": 32, "norm": "layer_norm",
    "activation": "gelu_tanh", "gated": False, "position": "learned", "bias": "all", "tied_embeddings": True,
}  # fmt: skip

BATCH, SEQUENCE = 8, 16


def tree(
    model: dict[str, Any],
    tp: int = 1,
    pp: int = 1,
    precision: str = "fp64",
    zero: tuple[str, int] = ("native", 0),
    micro: int = 2,
    **parallel: Any,
) -> dict[str, Any]:
    """A config as a plain tree; `parallel` holds further keys of that section."""
    return {
        "precision": precision,
        "model": model,
        "parallel": {"tensor": tp, "pipeline": pp, "vocabulary_multiple": 1, **parallel},
        "zero": {"backend": zero[0], "stage": zero[1]},
        "data": {"train": "unused"},
        "batch": {"sequence": SEQUENCE, "samples": BATCH, "micro": micro},
        "optimizer": {"clip": 0.5, "weight_decay": 0.1, "lr": 1e-2, "eps": 1e-6},
        "train": {"steps": 5},
    }
