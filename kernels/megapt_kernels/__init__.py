"""Compute kernels for pretraining: one function per operation, several implementations of each.

Every function computes the same numbers whatever implementation runs; `impl` or the environment variable
MEGAPT_KERNELS chooses one, `explain` says which would run and why the others would not. Importing the package imports
nothing but Python's own library; its first operation imports torch, and what else is installed is imported only by the
implementation that needs it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from megapt_kernels.probe import Capability, capabilities

if TYPE_CHECKING:
    from megapt_kernels.adamw import AdamWShard, adamw_step_, squared_norm
    from megapt_kernels.attention_dispatch import AttentionSpec, attention
    from megapt_kernels.cross_entropy import linear_cross_entropy, vocab_parallel_cross_entropy
    from megapt_kernels.glu import geglu, swiglu
    from megapt_kernels.moe import moe_permute, moe_unpermute
    from megapt_kernels.norms import layer_norm, rms_norm
    from megapt_kernels.registry import Explanation, Unsupported, explain, operations, use
    from megapt_kernels.rope import rope_
    from megapt_kernels.wgrad import wgrad_accumulate_

_HOMES = {
    "adamw": ("AdamWShard", "adamw_step_", "squared_norm"),
    "attention_dispatch": ("AttentionSpec", "attention"),
    "cross_entropy": ("linear_cross_entropy", "vocab_parallel_cross_entropy"),
    "glu": ("geglu", "swiglu"),
    "moe": ("moe_permute", "moe_unpermute"),
    "norms": ("layer_norm", "rms_norm"),
    "registry": ("Explanation", "Unsupported", "explain", "operations", "use"),
    "rope": ("rope_",),
    "wgrad": ("wgrad_accumulate_",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "AdamWShard",
    "AttentionSpec",
    "Capability",
    "Explanation",
    "Unsupported",
    "adamw_step_",
    "attention",
    "capabilities",
    "explain",
    "geglu",
    "layer_norm",
    "linear_cross_entropy",
    "moe_permute",
    "moe_unpermute",
    "operations",
    "rms_norm",
    "rope_",
    "squared_norm",
    "swiglu",
    "use",
    "vocab_parallel_cross_entropy",
    "wgrad_accumulate_",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
