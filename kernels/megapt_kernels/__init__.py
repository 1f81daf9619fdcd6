"""Compute kernels of megapt, and what this machine offers for running or building faster ones.

Importing this package imports no torch, no CUDA, no Triton, and compiles nothing.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

_ATTENTION = "torch scaled_dot_product_attention"
_PYTORCH = "PyTorch's own operators"


@dataclass(frozen=True)
class Capability:
    """An optional part: whether it is on this machine, and what megapt computes with where it is not in use.

    `used` says whether megapt takes the part when it is found; a part that is found and not used changes
    nothing.
    """

    name: str
    found: bool
    version: str | None
    where: str | None
    used: bool
    instead: str


def capabilities() -> tuple[Capability, ...]:
    """Probe every optional part without importing any of them; a part that is broken is not found."""
    return (
        _module("flash-attn 2", "flash_attn", "flash-attn", _ATTENTION, member="flash_attn_interface.py"),
        _module("flash-attn 3", "flash_attn_interface", "flash-attn-3", _ATTENTION),
        _module("flash-attn 4", "flash_attn", "flash-attn-4", _ATTENTION, member="cute"),
        # Not `apex`: the package of that name in the public index is another project.
        _module("NVIDIA apex", "amp_C", "apex", "norms and AdamW of PyTorch"),
        _module(
            "Transformer Engine",
            "transformer_engine",
            "transformer-engine",
            "bf16 or fp32 matrix products of PyTorch",
        ),
        _module("triton", "triton", "triton", _PYTORCH),
        _program("nvcc", f"{_PYTORCH}; there are no CUDA sources to build"),
        _program("g++", f"{_PYTORCH}; there are no C++ sources to build"),
        _program("ninja", f"{_PYTORCH}; there are no C++ sources to build"),
    )


def _module(name: str, module: str, distribution: str, instead: str, member: str | None = None) -> Capability:
    """A top-level module, or one `member` of it: looking up a submodule would import its package."""
    where = None
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError, AttributeError):
        spec = None
    if spec is not None:
        folders = list(spec.submodule_search_locations or [])
        if member is not None:
            where = next((str(Path(f, member)) for f in folders if Path(f, member).exists()), None)
        else:
            where = spec.origin or next(iter(folders), None)
    version = None
    if where is not None:
        try:
            version = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            pass
    return Capability(name, where is not None, version, where, False, instead)


def _program(name: str, instead: str) -> Capability:
    """A program on the PATH, or nvcc where CUDA_HOME says."""
    where = shutil.which(name)
    if where is None and name == "nvcc" and os.environ.get("CUDA_HOME"):
        where = shutil.which(str(Path(os.environ["CUDA_HOME"], "bin", name)))
    if where is None:
        return Capability(name, False, None, None, False, instead)
    try:
        ran = subprocess.run(
            [where, "--version"], capture_output=True, text=True, errors="replace", timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return Capability(name, False, None, where, False, instead)
    # nvcc names the year of its copyright before its release, but without a dot.
    number = re.search(r"\b(\d+\.\d+(?:\.\d+)*)", ran.stdout)
    return Capability(name, True, number[1] if number else None, where, False, instead)
