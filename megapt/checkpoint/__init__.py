"""Checkpoints that hold the model, not the layout: saved under one parallelism, loaded under any.

Names are imported when they are first used: the background writer needs none that imports torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megapt.checkpoint.choice import choose
    from megapt.checkpoint.folders import committed, find_latest, resolve
    from megapt.checkpoint.index import Index, read_index
    from megapt.checkpoint.loading import load, load_weights, model_config
    from megapt.checkpoint.retention import Keep, retain
    from megapt.checkpoint.saving import Saved, Saver, save
    from megapt.checkpoint.together import AgreedError

_HOMES = {
    "choice": ("choose",),
    "folders": ("committed", "find_latest", "resolve"),
    "index": ("Index", "read_index"),
    "loading": ("load", "load_weights", "model_config"),
    "retention": ("Keep", "retain"),
    "saving": ("Saved", "Saver", "save"),
    "together": ("AgreedError",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AgreedError",
    "Index",
    "Keep",
    "Saved",
    "Saver",
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


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
