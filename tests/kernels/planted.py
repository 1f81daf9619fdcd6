"""Kernels with a planted bug: a changed copy of the CUDA sources, compiled for the emulator into its own library.

A test that a real kernel passes proves little until a broken copy of that kernel fails it:

    whole = planted(tmp_path / "whole", "norms")
    broken = planted(tmp_path / "broken", "norms", ("norms.cuh", "turn_ ^= 1;", ""))
    for order in ORDERS:
        broken.order(order)
        code = broken.call("megapt_norm", x, x.stride(0), None, 0, weight, ...)   # the launcher of norms.h
        wrong |= code != 0 or not close(y, expected)

Pointers are given as tensors, as ctypes arrays or as None; `error()` tells in words what a non-zero code means. A copy
takes a second or two of CPU to compile: plant several bugs that do not meet in one copy.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch

from megapt_kernels import build, probe

FLAGS = ("-std=c++17", "-O1", "-fPIC", "-fno-strict-aliasing", "-fno-gnu-unique", "-DMEGAPT_EMULATED")
_RACES = (
    "-DMEGAPT_EMULATOR_RACES", "-g1", "-fsanitize=thread", "--param", "tsan-distinguish-volatile=1",
    "-fsanitize=alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero",
)  # fmt: skip


class Order(IntEnum):
    """In which order the emulator takes blocks, warps and lanes."""

    forward = 0
    reversed = 1
    shuffled = 2


ORDERS = tuple(Order)

_TYPES = {
    "int": ctypes.c_int,
    "int32_t": ctypes.c_int32,
    "unsigned": ctypes.c_uint,
    "int64_t": ctypes.c_int64,
    "uint64_t": ctypes.c_uint64,
    "size_t": ctypes.c_size_t,
    "bool": ctypes.c_bool,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
}


class Emulated:
    """A library of launchers for the CPU: plain C functions, called by name."""

    def __init__(self, path: Path, declarations: str) -> None:
        self.path = path
        self._library = ctypes.CDLL(str(path))
        self._library.megapt_emulator_error.restype = ctypes.c_char_p
        self._types = _signatures(declarations)

    def call(self, launcher: str, *arguments: Any) -> int:
        """The launcher's result: 0, or the cudaError_t of the first launch that failed."""
        result, types = self._types[launcher]
        if len(arguments) != len(types):
            raise TypeError(f"{launcher} takes {len(types)} arguments, not {len(arguments)}")
        function = getattr(self._library, launcher)
        function.restype, function.argtypes = result, types
        return int(function(*(ctypes.c_void_p(a.data_ptr()) if torch.is_tensor(a) else a for a in arguments)))

    def error(self) -> str:
        """What the latest launch did wrong: kernel, block, thread, place. Empty after a launch that went well."""
        error: str = self._library.megapt_emulator_error().decode()
        return re.sub(r"code \+(0x[0-9a-f]+)", lambda found: self._line(found[1]), error)

    def _line(self, code: str) -> str:
        """The line of the kernel's source that an address in the library belongs to; its number without binutils."""
        try:
            command = ["addr2line", "-i", "-e", str(self.path), code]
            lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
        except OSError:
            lines = []
        ours = [line.split()[0] for line in lines if not line.startswith("?") and "/emu/simt" not in line]
        return ours[0] if ours else f"code +{code}"

    def order(self, order: Order, seed: int = 0) -> None:
        self._library.megapt_emulator_order(int(order), ctypes.c_uint64(seed))


def planted(
    folder: Path, name: str, *changes: tuple[str, str, str], flags: Sequence[str] = (), races: bool = False
) -> Emulated:
    """csrc/NAME.cu compiled from a copy of csrc in `folder`, each (file, old, new) replaced in it.

    `old` must occur exactly once in the file, so that a bug cannot miss its place when the source changes. flags: more
    for the compiler, such as -DNAME. races: see `compiled`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    csrc = build.ROOT / "csrc"
    for source in [*csrc.glob("*.cuh"), *csrc.glob("*.h"), csrc / f"{name}.cu"]:
        shutil.copyfile(source, folder / source.name)
    for file, old, new in changes:
        text = (folder / file).read_text(encoding="utf-8")
        if text.count(old) != 1:
            raise ValueError(f"{file} holds {text.count(old)} times what is to be replaced, not once: {old!r}")
        (folder / file).write_text(text.replace(old, new), encoding="utf-8")
    return compiled(folder / f"{name}.cu", folder / f"{name}.so", flags, races)


def compiled(source: Path, library: Path, flags: Sequence[str] = (), races: bool = False) -> Emulated:
    """A source of launchers in extern "C" as an emulated library. ToolMissing without g++ or the CUDA headers.

    races: a launch also fails where two threads access the same bytes, one of them writing, and nothing orders them,
    whatever the numbers; and where a vector is misaligned, an array's index is outside of it, a signed number
    overflows. Takes twice as long to compile, and many times as long to run.
    """
    gxx, cuda = shutil.which(os.environ.get("CXX") or "g++"), probe.cuda_headers(probe.find_nvcc())
    if gxx is None or cuda is None:
        raise build.ToolMissing("emulated kernels need g++ and CUDA's headers")
    emu = build.ROOT / "emu"
    include = ["-I", str(emu), "-I", str(build.ROOT / "csrc"), "-isystem", str(cuda / "include")]
    command = [gxx, *FLAGS, *flags]
    objects = [library.with_suffix(".o")]
    _run([*command, *(_RACES if races else ()), *include, "-x", "c++", "-c", str(source), "-o", str(objects[0])])
    if races:  # the detector itself is not watched
        objects.append(library.with_suffix(".races.o"))
        _run([*command, _RACES[0], "-c", str(emu / "simt_races.cpp"), "-o", str(objects[1])])
    _run([gxx, "-shared", "-Wl,-Bsymbolic", "-Wl,--no-undefined", *map(str, objects), "-o", str(library), "-ldl"])
    header = source.with_suffix(".h")
    return Emulated(library, (header if header.is_file() else source).read_text(encoding="utf-8"))


def _run(command: list[str]) -> None:
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        raise build.BuildError(f"{' '.join(command)}\n{ran.stderr}")


def _signatures(text: str) -> dict[str, tuple[type, list[type]]]:
    """Of each C function in the text that returns a number: the types of its result and arguments."""
    text = re.sub(r"//[^\n]*", "", text)
    found: dict[str, tuple[type, list[type]]] = {}
    for result, name, arguments in re.findall(r"^(int|int64_t) (\w+)\(([^)]*)\)\s*[;{]", text, re.MULTILINE):
        words = [a.replace("const ", "").split() for a in arguments.split(",") if a.strip()]
        found[name] = _TYPES[result], [ctypes.c_void_p if "*" in " ".join(w) else _TYPES[w[0]] for w in words]
    return found
