"""Loading the compiled kernels (build.py): one library per process, found, checked and then loaded.

Searched in this order: the file that MEGAPT_KERNELS_LIBRARY names; lib/ of the package, from a wheel that was built
with MEGAPT_BUILD_KERNELS=1; kernels/build, where `megapt kernels build --out kernels/build` puts one to carry along
with the sources; the cache of `megapt kernels build`. A library of other sources than those installed is never loaded.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import torch

from megapt_kernels import build
from megapt_kernels.tracing import constant

LIBRARY = "MEGAPT_KERNELS_LIBRARY"
_HOW = "run `megapt kernels build`"
_MACHINES = {62: "x86_64", 183: "aarch64"}  # ELF's numbers


class LibraryError(RuntimeError):
    """A library that cannot be used, or none where one was asked for; the message says why and what helps."""


@dataclass(frozen=True)
class Library:
    """A library file as it describes itself: `cuda` or `emulated`, the hash of its sources, its architectures."""

    path: Path
    kind: str
    sources: str
    architectures: tuple[str, ...]

    def lacks(self, capability: tuple[int, int]) -> str | None:
        """None if a GPU of that compute capability can run it, else the reason."""
        major, minor = capability
        for name in self.architectures:
            number = int(name.rstrip("af"))
            if name.endswith("a"):
                fits = number == 10 * major + minor
            else:  # also later ones: PTX of the first such architecture is in it
                fits = number <= 10 * major + minor
            if fits:
                return None
        return (
            f"{self.path} has code for {', '.join(self.architectures)}, none of which a GPU of compute capability "
            f"{major}.{minor} runs: {_HOW} --arch {10 * major + minor}"
        )


_loaded: Library | None = None
_loading = threading.RLock()
_waiting: list[Callable[[], None]] = []
_reasons: dict[tuple[str, int | None], str | None] = {}


def inspect(path: str | Path) -> Library:
    """What a file says of itself, without loading it; LibraryError if it is no library of ours for this machine."""
    path = Path(path)
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data[:4] != b"\x7fELF":
                raise LibraryError(f"{path} is not a shared library: {_HOW}")
            machine = _MACHINES.get(int.from_bytes(data[18:20], "little"), "another processor")
            text = re.search(rb"megapt_kernels library: kind=(\w+) sources=(\w+) architectures=([\w,]+)\0", data)
            found = [group.decode() for group in text.groups()] if text else None
    except OSError as error:
        raise LibraryError(f"{path}: {error.strerror}: {_HOW}") from None
    except ValueError:
        raise LibraryError(f"{path} is empty: {_HOW}") from None
    if machine != platform.machine():
        raise LibraryError(f"{path} is for {machine} and this machine is {platform.machine()}: {_HOW} here")
    if found is None:
        raise LibraryError(f"{path} is not a library of megapt_kernels, or is cut off: {_HOW}")
    kind, sources, architectures = found
    return Library(path, kind, sources, tuple(architectures.split(",")))


def load(path: str | Path | None = None) -> Library:
    """Load the CUDA library: `path`, or the first found. LibraryError if there is none that fits the sources."""
    return _load("cuda", path)


def load_emulated(path: str | Path | None = None) -> Library:
    """Load the library for CPU tensors: `path`, or what build("emulated") makes."""
    return _load("emulated", path)


def find(kind: str = "cuda") -> Library:
    """The library that `load` would take; LibraryError saying why there is none."""
    return _found(kind)


def on_load(function: Callable[[], None]) -> None:
    """Call `function` once the operators exist: now, or right after loading."""
    if _loaded is not None:
        function()
    else:
        _waiting.append(function)


def loaded() -> Library | None:
    return _loaded


class ThreadOrder(StrEnum):
    """In which order the emulated library runs the threads of a block: results that depend on it are races."""

    forward = "forward"
    reversed = "reversed"
    shuffled = "shuffled"


def set_thread_order(order: ThreadOrder, seed: int = 0) -> None:
    """For launches from now on; needs the emulated library. seed: of the shuffled order."""
    assert _loaded is not None and _loaded.kind == "emulated"
    ctypes.CDLL(str(_loaded.path)).megapt_emulator_order(list(ThreadOrder).index(order), ctypes.c_uint64(seed))


def missing(device: torch.device) -> str | None:
    """None if our CUDA operators run on tensors of that device in this process, else the reason.

    The first question about a GPU loads the library. An error if MEGAPT_KERNELS_LIBRARY names one that cannot be used.
    """
    return _missing(device.type, device.index)


# Traced functions ask too: the answer is a constant of the process.
@constant
def _missing(device: str, index: int | None) -> str | None:
    key = (device, index)
    if key not in _reasons:
        _reasons[key] = _ask(device, index)
    return _reasons[key]


def _ask(device: str, index: int | None) -> str | None:
    if device == "cpu":
        emulated = _loaded is not None and _loaded.kind == "emulated"
        return None if emulated else "CUDA kernels run on CUDA devices, not on cpu"
    if device != "cuda":
        return f"CUDA kernels run on CUDA devices, not on {device}"
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "this process has no CUDA device"
    try:
        library = load()
    except LibraryError as error:
        if os.environ.get(LIBRARY):
            raise
        return str(error)
    return library.lacks(torch.cuda.get_device_capability(index))


def _load(kind: str, path: str | Path | None) -> Library:
    with _loading:
        return _load_once(kind, path)


def _load_once(kind: str, path: str | Path | None) -> Library:
    global _loaded
    if _loaded is not None:
        if _loaded.kind != kind or (path is not None and Path(path).resolve() != _loaded.path.resolve()):
            raise LibraryError(
                f"{_loaded.path} is loaded ({_loaded.kind}), and a process has one library of kernels: "
                f"no {kind} one beside it"
            )
        return _loaded
    library = _checked(kind, path) if path is not None else _found(kind)
    try:
        torch.ops.load_library(str(library.path))
    except OSError as error:
        raise LibraryError(f"{library.path} does not load into torch {torch.__version__}: {error}; {_HOW}") from None
    while _waiting:
        _waiting.pop(0)()
    _loaded = library  # last: another thread may use the operators from here on
    _reasons.clear()
    return library


def _found(kind: str) -> Library:
    if kind == "emulated":
        return _checked(kind, build.build(kind))
    if named := os.environ.get(LIBRARY):
        try:
            return _checked(kind, named)
        except LibraryError as error:
            raise LibraryError(f"{LIBRARY}: {error}") from None
    refused = []
    for path in build.candidates(kind):
        try:
            return _checked(kind, path)
        except LibraryError as error:
            refused.append(str(error))
    raise LibraryError("; ".join(refused) or f"the CUDA kernels are not built: {_HOW}")


def _checked(kind: str, path: str | Path) -> Library:
    library = inspect(path)
    if library.kind != kind:
        raise LibraryError(f"{path} is the {library.kind} library, not the {kind} one")
    present = build.source_hash(kind)
    if library.sources != present:
        raise LibraryError(
            f"{path} was built of sources {library.sources}, and those installed are {present}: {_HOW} again"
        )
    return library
