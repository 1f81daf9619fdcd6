"""What decides between back ends: the machine and the call, as plain records that a test can write down."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megapt_kernels.attention_backends.documents import documents_of, longest_of, remembered
from megapt_kernels.tracing import constant

if TYPE_CHECKING:
    from megapt_kernels.attention_dispatch import AttentionSpec

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Library:
    """An installed library: its version, why it cannot be used (None if it can), and the options that its attention
    function knows."""

    version: tuple[int, ...] = ()
    problem: str | None = None
    options: frozenset[str] = frozenset()


_MISSING = Library(problem="is not installed")


@dataclass(frozen=True)
class Machine:
    """A device and what is installed to compute on it.

    capability: the compute capability of a CUDA device, (0, 0) of others. cudnn: its version as torch gives it, such as
    92000; 0 without one. interpreted: Triton kernels run in Python, on any device.
    """

    device: str
    capability: tuple[int, int] = (0, 0)
    torch: tuple[int, ...] = (2, 11)
    cudnn: int = 0
    flash_attn_2: Library = _MISSING
    flash_attn_3: Library = _MISSING
    flash_attn_4: Library = _MISSING
    varlen: Library = _MISSING
    triton: Library = _MISSING
    interpreted: bool = False


@dataclass(frozen=True)
class Case:
    """A call of `attention`, as far as back ends differ in what they take.

    count, length: documents and tokens of each where all are equally long (without documents: rows); `varied` says that
    they are not, and then `length` is the longest one. grad: a backward pass will follow. repeatable: gradients must be
    the same bit for bit on every run. strict: torch is set to refuse kernels that are not deterministic.
    """

    machine: Machine
    dtype: torch.dtype
    count: int
    length: int
    varied: bool
    heads: int
    kv_heads: int
    width: int
    grad: bool
    causal: bool
    windowed: bool
    softcap: bool
    repeatable: bool
    strict: bool

    @property
    def half(self) -> bool:
        return self.dtype in HALF


Supports = Callable[[Case], str | None]


def case_of(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Case:
    """The case of a call whose arguments have been checked."""
    lengths = documents_of(spec.lengths, q.shape[0], q.shape[1])
    longest, varied = longest_of(lengths)
    return Case(
        machine=machine(q.device),
        dtype=q.dtype,
        count=len(lengths),
        length=longest,
        varied=varied,
        heads=q.shape[2],
        kv_heads=k.shape[2],
        width=q.shape[3],
        grad=torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad),
        causal=spec.causal,
        # A compiler that traces any length compares symbols: the case wants one answer, which it then guards.
        windowed=True if spec.window is not None and spec.window < longest else False,
        softcap=spec.softcap is not None,
        repeatable=spec.deterministic,
        strict=torch.are_deterministic_algorithms_enabled(),
    )


_machines: dict[torch.device, Machine] = {}


@constant
def machine(device: torch.device) -> Machine:
    """What is known of a device; at its first use, installed libraries are imported where they could run."""
    if device not in _machines:
        _machines[device] = _probe(device)
    return _machines[device]


def _probe(device: torch.device) -> Machine:
    version = _numbers(torch.__version__)
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    triton = _library("triton", "triton", None)
    if device.type != "cuda":
        return Machine(device.type, torch=version, triton=triton, interpreted=interpreted)
    capability = torch.cuda.get_device_capability(device)
    return Machine(
        device="cuda",
        capability=capability,
        torch=version,
        cudnn=torch.backends.cudnn.version() or 0,
        flash_attn_2=_library("flash-attn", "flash_attn.flash_attn_interface", "flash_attn_varlen_func"),
        flash_attn_3=_flash_attn_3() if capability[0] == 9 else _MISSING,
        flash_attn_4=_flash_attn_4() if capability[0] >= 9 else _MISSING,
        varlen=_library("torch", "torch.nn.attention.varlen", "varlen_attn"),
        triton=triton,
        interpreted=interpreted,
    )


def _library(distribution: str, module: str, function: str | None) -> Library:
    """A library that is imported to see that it can be: one built for another torch fails at that."""
    if not _found(module):
        return _MISSING
    try:
        loaded = importlib.import_module(module)
        options = frozenset(inspect.signature(getattr(loaded, function)).parameters) if function else frozenset()
    except Exception as error:  # a broken installation fails in any way: OSError, ImportError, RuntimeError...
        return Library(problem=f"does not load: {type(error).__name__}: {str(error).splitlines()[0]}")
    try:
        version = _numbers(importlib.metadata.version(distribution))
    except importlib.metadata.PackageNotFoundError:
        version = _numbers(str(getattr(loaded, "__version__", "")))
    return Library(version, None, options)


@constant
@remembered
def flash_attn_3_module() -> str:
    """Where FlashAttention-3 keeps its functions: inside of a package in newer builds."""
    inside = "flash_attn_3.flash_attn_interface"
    return inside if _found(inside) else "flash_attn_interface"


def _flash_attn_3() -> Library:
    # A distribution of that name in the public index holds nothing, so only the module counts.
    return _library("flash-attn-3", flash_attn_3_module(), "flash_attn_varlen_func")


def _flash_attn_4() -> Library:
    found = _library("flash-attn-4", "flash_attn.cute.interface", "flash_attn_varlen_func")
    if found.problem is not None:
        return found
    # Early releases took a window in the forward pass alone.
    backward = inspect.signature(importlib.import_module("flash_attn.cute.interface")._flash_attn_bwd).parameters
    options = found.options | ({"backward window"} if "window_size_left" in backward else set())
    return Library(found.version, None, options)


def _found(module: str) -> bool:
    """Whether a module's file exists; looking up a submodule the usual way would import its package."""
    package, _, inner = module.partition(".")
    try:
        spec: Any = importlib.util.find_spec(package)
    except (ImportError, ValueError, AttributeError):
        return False
    if spec is None or not inner:
        return spec is not None
    path = inner.replace(".", "/")
    places = [Path(folder, path) for folder in spec.submodule_search_locations or []]
    return any(place.with_suffix(".py").exists() or place.is_dir() for place in places)


def _numbers(version: str) -> tuple[int, ...]:
    """The numbers of a release: (2, 13, 0) of 2.13.0+cu130, (4, 0, 0) of 4.0.0b11."""
    release = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, release[0].split("."))) if release else ()
