"""What this machine offers for running or building kernels, found without importing any of it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

_ATTENTION = "attention of megapt's Triton kernels or PyTorch"
_KERNELS = "kernels of megapt or PyTorch"
_PYTORCH = "PyTorch's own operators"


@dataclass(frozen=True)
class Capability:
    """An optional part: whether it is on this machine, and what megapt computes with where it is not in use.

    `used` says whether megapt takes the part, on a CUDA device and for the shapes it supports; a part that is found and
    not used changes nothing. `megapt kernels list` tells more.
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
        _module("NVIDIA apex", "amp_C", "apex", _KERNELS),
        _module("Liger", "liger_kernel", "liger-kernel", _KERNELS),
        _module("QuACK", "quack", "quack-kernels", _KERNELS),
        _module(
            "Transformer Engine",
            "transformer_engine",
            "transformer-engine",
            "bf16 or fp32 matrix products of PyTorch",
            used=False,
        ),
        _module("triton", "triton", "triton", _PYTORCH),
        _compiled(),
        _program("nvcc", "CUDA kernels that were built elsewhere"),
        _program("g++", "CUDA kernels that were built elsewhere"),
    )


def _compiled() -> Capability:
    """The library that would be loaded, by the hash of the present sources in it."""
    from megapt_kernels import build

    sources = build.source_hash("cuda")
    found = next((path for path in build.candidates("cuda") if sources.encode() in path.read_bytes()), None)
    name, is_found, where = "CUDA kernels", found is not None, None if found is None else str(found)
    return Capability(name, is_found, sources if is_found else None, where, is_found, _PYTORCH)


def _module(
    name: str, module: str, distribution: str, instead: str, member: str | None = None, used: bool = True
) -> Capability:
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
    return Capability(name, where is not None, version, where, used and where is not None, instead)


def find_nvcc() -> str | None:
    """nvcc on the PATH, under CUDA_HOME or /usr/local/cuda, or as the nvidia packages install it."""
    places = (shutil.which("nvcc"), *(shutil.which(str(folder / "bin/nvcc")) for folder in _cuda_folders()))
    return next((place for place in places if place), None)


def cuda_headers(nvcc: str | None) -> Path | None:
    """The folder whose include/ has CUDA's headers: that of nvcc, if it is given, before others."""
    folders = [*([_toolkit(nvcc)] if nvcc else []), *_cuda_folders()]
    return next((f for f in folders if (f / "include/cuda_bf16.h").is_file()), None)


def _toolkit(nvcc: str) -> Path:
    """Where nvcc's own files are, which may be a script somewhere else that starts it."""
    told = _said([nvcc, "--dryrun", "-x", "cu", "-E", os.devnull]) or ""
    top = re.search(r"^#\$ TOP=(.+)$", told, re.MULTILINE)
    return Path(top[1].strip()).resolve() if top else Path(nvcc).resolve().parent.parent


def _cuda_folders() -> list[Path]:
    folders = [Path(os.environ["CUDA_HOME"])] if os.environ.get("CUDA_HOME") else []
    folders.append(Path("/usr/local/cuda"))
    spec = importlib.util.find_spec("nvidia")
    for packages in (spec.submodule_search_locations if spec else None) or []:
        folders += [Path(packages, name) for name in ("cu13", "cuda_nvcc", "cuda_runtime")]
    return folders


def _said(command: list[str]) -> str | None:
    """What a program prints, None if it does not run."""
    try:
        told = subprocess.check_output(command, stderr=subprocess.STDOUT, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return told.decode(errors="replace")


def _program(name: str, instead: str) -> Capability:
    """A program on the PATH, or nvcc where it may be instead."""
    where = find_nvcc() if name == "nvcc" else shutil.which(name)
    told = _said([where, "--version"]) if where else None
    # nvcc names the year of its copyright before its release, but without a dot.
    number = re.search(r"\b(\d+\.\d+(?:\.\d+)*)", told or "")
    return Capability(name, told is not None, number[1] if number else None, where, told is not None, instead)
