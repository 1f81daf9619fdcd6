"""Checkpoints that hold the model, not the layout: saved under one parallelism, loaded under any."""

from __future__ import annotations

from megapt.checkpoint.choice import choose
from megapt.checkpoint.folders import committed, find_latest, resolve, retain
from megapt.checkpoint.index import Index, read_index
from megapt.checkpoint.loading import load, load_weights, model_config
from megapt.checkpoint.saving import save
from megapt.checkpoint.together import AgreedError

__all__ = [
    "AgreedError",
    "Index",
    "choose",
    "committed",
    "find_latest",
    "load",
    "load_weights",
    "model_config",
    "read_index",
    "resolve",
    "retain",
    "save",
]
