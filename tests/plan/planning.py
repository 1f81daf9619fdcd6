"""Small models and clusters that the planner's tests share."""

from __future__ import annotations

from typing import Any

from megapt.config import Config, Loaded, from_tree
from megapt.plan import hardware
from megapt.plan.hardware import Hardware

MODEL: dict[str, Any] = {
    "layers": 8,
    "hidden": 1024,
    "heads": 16,
    "kv_heads": 4,
    "ffn": 4096,
    "vocabulary": 32000,
    "max_sequence": 2048,
}


def loaded(model: dict[str, Any] | None = None, **sections: Any) -> Loaded:
    tree: dict[str, Any] = {
        "model": MODEL | (model or {}),
        "data": {"train": "data/none"},
        "batch": {"sequence": 2048, "samples": 64},
        "train": {"steps": 10},
    }
    return from_tree(tree | sections)


def config(model: dict[str, Any] | None = None, **sections: Any) -> Config:
    return loaded(model, **sections).config


def gpu(gib: float = 80.0) -> Hardware:
    """An H100 with other memory."""
    return hardware.load("h100").what_if([f"memory={gib}GiB"])
