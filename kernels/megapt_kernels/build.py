"""Compiling the kernels: nvcc and g++, no build system, and nothing compiled twice.

One library holds every operator for several GPU architectures. It uses torch's stable ABI of 2.10 only, so that it
belongs to the sources and not to an installed torch: build it once, load it into any torch since. The `emulated`
library is built of the same files by g++ alone, for CPU tensors (emu/simt.h).

Objects and libraries are kept in the folder that MEGAPT_KERNELS_CACHE names (~/.cache/megapt_kernels), by what they are
made of: sources with all that they include, flags, compilers, architectures. MEGAPT_KERNELS_ONLY=norms,rope builds a
library of those sources alone, to work on a few kernels.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from megapt_kernels import probe

LIBRARIES = {"cuda": "libmegapt_kernels.so", "emulated": "libmegapt_kernels_emulated.so"}
ARCHITECTURES = ("80", "90a", "100a")
CACHE = "MEGAPT_KERNELS_CACHE"
ONLY = "MEGAPT_KERNELS_ONLY"

_PACKAGE = Path(__file__).parent
# A wheel carries the sources inside the package.
ROOT = _PACKAGE if (_PACKAGE / "csrc").is_dir() else _PACKAGE.parent
_CXX = ("-std=c++17", "-fPIC", "-Wall", "-Wno-unknown-pragmas")
# Everything but our C functions stays private, the CUDA runtime's symbols among it: torch has a runtime of its own. The
# emulator names kernels in its messages by what is exported.
_EXPORTS = {"cuda": "{ global: megapt_*; local: *; };\n", "emulated": "{ global: megapt_*; _ZN6megapt*; local: *; };\n"}


class BuildError(RuntimeError):
    """The library cannot be built here; the message says what failed and what would help."""


class ToolMissing(BuildError):
    """A compiler, or headers, that the build needs are not on this machine."""


class _Edited(Exception):
    """A source changed while it was compiled: the object is not what its name would say."""


@dataclass(frozen=True)
class Resources:
    """What ptxas gave a kernel for one architecture: registers per thread, bytes of stack and spills, of shared memory
    known at compile time."""

    source: str
    kernel: str
    architecture: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int


@dataclass(frozen=True)
class Tools:
    """Compilers and where their headers and libraries are; `versions`: what of them changes an object."""

    gxx: str
    nvcc: str | None
    cuda: Path
    torch: Path
    versions: dict[str, str]


@dataclass(frozen=True)
class _Unit:
    """A file to compile. flags: what the object depends on; places: where the headers are, which it does not."""

    source: Path
    compiler: str
    flags: tuple[str, ...]
    places: tuple[str, ...]
    version: str
    kind: str

    def key(self) -> str:
        return _digest(self.version, *self.flags, *_contents(self.kind, [self.source]))

    def command(self, out: Path) -> list[str]:
        return [self.compiler, *self.flags, *self.places, "-c", str(self.source), "-o", str(out)]


def build(
    kind: str = "cuda",
    architectures: Sequence[str] = ARCHITECTURES,
    out: str | Path | None = None,
    jobs: int | None = None,
    verbose: bool = False,
) -> Path:
    """Build the library, or find it built, and return its path.

    kind: "cuda", or "emulated" for CPU tensors. architectures: compute capabilities as nvcc writes them ("90a": 9.0
    with all it has). out: a folder that gets a copy, whose path is returned. jobs: compilers at once, by default one
    per core. verbose: a line on stderr for each file. BuildError says what is missing or failed.
    """
    if kind not in LIBRARIES:
        raise BuildError(f"kind is one of {', '.join(LIBRARIES)}, not {kind!r}")
    architectures = tuple(architectures) if kind == "cuda" else ()
    if kind == "cuda" and (not architectures or any(not re.fullmatch(r"\d{2,3}[af]?", a) for a in architectures)):
        given = ", ".join(architectures)
        raise BuildError(f"architectures are compute capabilities such as 80, 90a, 100a, not {given!r}")
    found = tools(kind)
    cache = _writable(cache_folder())
    jobs = jobs or len(os.sched_getaffinity(0))
    while True:
        hashed = source_hash(kind)
        description = f"kind={kind} sources={hashed} architectures={','.join(architectures) or 'none'}"
        units = _units(kind, architectures, found, description, jobs)
        made = _digest(description, found.versions["all"], *(flag for unit in units for flag in unit.flags))
        final = cache / f"{kind}-{hashed}-{made}" / LIBRARIES[kind]
        try:
            with _lock(cache / f"{kind}.lock", verbose):
                if not final.is_file():
                    _make(final, units, found, jobs, verbose, hashed)
        except _Edited:
            _say(verbose, "a source was edited: once more")
        else:
            return final if out is None else _copied(final, Path(out))


def resources(library: str | Path) -> list[Resources]:
    """Registers and spills of every kernel of a CUDA library, from the file that its build left beside it."""
    table = Path(library).with_suffix(".json")
    try:
        return [Resources(**row) for row in json.loads(table.read_text(encoding="utf-8"))]
    except FileNotFoundError:
        raise BuildError(f"{table} is missing: `megapt kernels build` writes it beside the library") from None


def markdown(rows: Sequence[Resources]) -> str:
    """The rows as a table: a line for each kernel, registers by architecture, and the most of the rest."""
    architectures = list(dict.fromkeys(row.architecture for row in rows))
    names = (*(f"registers sm_{a}" for a in architectures), "shared bytes", "stack bytes", "spilled bytes")
    lines = [f"| source | kernel | {' | '.join(names)} |", "|---|---|" + "---:|" * len(names)]
    by_kernel: dict[tuple[str, str], list[Resources]] = {}
    for row in rows:
        by_kernel.setdefault((row.source, row.kernel), []).append(row)
    for (source, kernel), found in sorted(by_kernel.items()):
        registers = {row.architecture: str(row.registers) for row in found}
        cells = [registers.get(a, "-") for a in architectures]
        cells += [str(max(row.shared for row in found)), str(max(row.stack for row in found))]
        cells.append(str(max(row.spill_stores + row.spill_loads for row in found)))
        lines.append(f"| {source} | `{kernel}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def cache_folder() -> Path:
    return Path(os.environ.get(CACHE) or Path.home() / ".cache" / "megapt_kernels")


def candidates(kind: str) -> Iterator[Path]:
    """Libraries where they are looked for: of the wheel, carried along with the checkout, in the cache."""
    name = LIBRARIES[kind]
    yield from (path for path in (_PACKAGE / "lib" / name, ROOT / "build" / name) if path.exists())
    # Of several architectures, the newest.
    cached = cache_folder().glob(f"{kind}-{source_hash(kind)}-*/{name}")
    yield from sorted(cached, key=lambda path: path.stat().st_mtime, reverse=True)


def source_hash(kind: str) -> str:
    """Of all that the library is compiled from, without flags and compilers."""
    return _digest(*_contents(kind, _sources()))


def _sources() -> list[Path]:
    """NAME.cu and NAME_ops.cpp, the largest first, which take longest."""
    folder = ROOT / "csrc"
    found = [*folder.glob("*.cu"), *folder.glob("*_ops.cpp")]
    names = {path.stem.removesuffix("_ops") for path in found}
    if wanted := os.environ.get(ONLY):
        chosen = {name.strip() for name in wanted.split(",")}
        if unknown := chosen - names:
            raise BuildError(f"{ONLY} names {', '.join(sorted(unknown))}; there are {', '.join(sorted(names))}")
        found = [path for path in found if path.stem.removesuffix("_ops") in chosen | {"library"}]
    if not found:
        raise BuildError(f"no sources in {folder}: megapt_kernels is not installed whole")
    return sorted(found, key=lambda path: (path.suffix != ".cu", -_size(path), path.name))


def _size(source: Path) -> int:
    kernels = source.with_suffix(".cuh")
    return source.stat().st_size + (kernels.stat().st_size if kernels.is_file() else 0)


def _contents(kind: str, sources: Sequence[Path]) -> Iterator[str]:
    """Name and text of the files and of all of ours that they include, each once."""
    folders = [ROOT / "csrc", *([ROOT / "emu"] if kind == "emulated" else [])]
    seen, left = set(), sorted(sources)
    while left:
        path = left.pop()
        if path in seen:
            continue
        seen.add(path)
        text = path.read_text(encoding="utf-8")
        yield from (path.name, text)
        for name in re.findall(r'^\s*#\s*include\s*"([^"]+)"', text, re.MULTILINE):
            left += [folder / name for folder in folders if (folder / name).is_file()][:1]


def _digest(*parts: str) -> str:
    sha = hashlib.sha256()
    for part in parts:
        sha.update(f"{len(part)}:{part}".encode())
    return sha.hexdigest()[:16]


def _units(kind: str, architectures: Sequence[str], tools: Tools, description: str, jobs: int) -> list[_Unit]:
    sources = _sources()
    csrc, emu = f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'emu'}"
    torch = ("-isystem", str(tools.torch / "include"))
    bindings = (*_CXX, "-O1", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020a000000000000")
    # Also PTX for the oldest, which a driver compiles for GPUs that no binary here fits.
    codes = [f"arch=compute_{a},code=sm_{a}" for a in architectures]
    plain = [a for a in architectures if a.isdigit()]
    codes += [f"arch=compute_{a},code=compute_{a}" for a in plain[:1]]
    # Architectures of a file at once where cores abound: the longest file is then not what all wait for.
    threads = max(1, min(len(codes), jobs // 2))
    units: list[_Unit] = []
    flags: tuple[str, ...]
    places: tuple[str, ...]
    for path in sources:
        if path.suffix == ".cu" and kind == "cuda":
            assert tools.nvcc is not None
            flags = ("-O3", "-std=c++17", "-Xcompiler", "-fPIC,-Wall", *(f for c in codes for f in ("-gencode", c)))
            places = (csrc, "-Xptxas", "-v", "--threads", str(threads), "-ccbin", tools.gxx)
            units.append(_Unit(path, tools.nvcc, flags, places, tools.versions["nvcc"], kind))
        elif path.suffix == ".cu":
            flags = (*_CXX, "-O1", "-DMEGAPT_EMULATED", "-fno-strict-aliasing", "-fno-gnu-unique", "-x", "c++")
            places = (emu, csrc, "-isystem", str(tools.cuda / "include"))
            units.append(_Unit(path, tools.gxx, flags, places, tools.versions["emulated"], kind))
        else:
            flags = bindings if kind == "cuda" else (*bindings, "-DMEGAPT_EMULATED")
            if path.stem == "library_ops":
                flags = (*flags, f'-DMEGAPT_DESCRIPTION="{description}"')
            units.append(_Unit(path, tools.gxx, flags, (csrc, *torch), tools.versions["g++"], kind))
    return units


def _make(final: Path, units: Sequence[_Unit], tools: Tools, jobs: int, verbose: bool, hashed: str) -> None:
    """Compile what the cache lacks, link, and give the library its name; the lock is held."""
    cache, kind = final.parent.parent, units[0].kind
    objects = cache / "objects"
    objects.mkdir(exist_ok=True)
    for left in cache.glob(f"building-{kind}-*"):  # of builds that were killed
        shutil.rmtree(left, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f"building-{kind}-", dir=cache))
    try:
        made = [objects / f"{unit.source.stem}-{unit.key()}.o" for unit in units]
        todo = [(u, o) for u, o in zip(units, made, strict=True) if not (o.is_file() and _table(o).is_file())]
        _say(verbose, f"{final.name}: {len(units)} files, {len(units) - len(todo)} of them in {objects}")
        _compile_all(todo, work, jobs, verbose)
        _say(verbose, f"linking {final.name}")
        _link(work, made, tools, kind)
        rows = [row for path in made for row in json.loads(_table(path).read_text(encoding="utf-8"))]
        (work / "table").write_text(json.dumps(rows), encoding="utf-8")
        if source_hash(kind) != hashed:
            raise _Edited
        final.parent.mkdir(exist_ok=True)
        # The library last: where it is, everything is.
        _publish(work / "table", final.with_suffix(".json"))
        _publish(work / "library", final)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _compile_all(todo: Sequence[tuple[_Unit, Path]], work: Path, jobs: int, verbose: bool) -> None:
    pool = ThreadPoolExecutor(max_workers=jobs)
    futures = [pool.submit(_compile, unit, path, work, verbose) for unit, path in todo]
    try:
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _compile(unit: _Unit, final: Path, work: Path, verbose: bool) -> None:
    begin = time.monotonic()
    out = work / final.name
    told = _run(unit.command(out), f"{unit.source.name} does not compile", work)
    if unit.key() not in final.name:
        raise _Edited
    _table(out).write_text(json.dumps([asdict(r) for r in _resources(told, unit.source.stem)]), encoding="utf-8")
    _publish(_table(out), _table(final))
    _publish(out, final)
    _say(verbose, f"{unit.source.name} {time.monotonic() - begin:.1f} s")
    warnings = [line for line in told.splitlines() if "warning" in line]
    for line in warnings:
        _say(verbose, line)


def _link(work: Path, objects: Sequence[Path], tools: Tools, kind: str) -> None:
    (work / "exports").write_text(_EXPORTS[kind], encoding="ascii")
    command = [tools.gxx, "-shared", "-o", str(work / "library"), *map(str, objects)]
    command += [f"-Wl,--version-script={work / 'exports'}", "-Wl,--no-undefined", "-Wl,--as-needed", "-Wl,-Bsymbolic"]
    command += [f"-L{tools.torch / 'lib'}", "-ltorch_cpu"]
    if kind == "cuda":
        command += [f"-L{_runtime(tools.cuda)}", "-lcudart_static", "-lrt"]
    _run([*command, "-lpthread", "-ldl"], "the library does not link", work)


def _run(command: Sequence[str], what: str, work: Path | None = None) -> str:
    """What the command said; BuildError with its message if it fails."""
    try:
        ran = subprocess.run(
            command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL, cwd=work,
            env={**os.environ, "LC_ALL": "C", **({"TMPDIR": str(work)} if work else {})},
        )  # fmt: skip
    except OSError as error:
        raise BuildError(f"{what}: {command[0]}: {error.strerror}") from None
    said = ran.stdout + ran.stderr
    if ran.returncode:
        lines = said.strip().splitlines()
        errors = [n for n, line in enumerate(lines) if "error" in line] or [max(0, len(lines) - 20)]
        shown = "\n".join(lines[max(0, errors[0] - 2) : errors[0] + 20])
        raise BuildError(f"{what} (exit status {ran.returncode}):\n{shown}\nThe command was: {shlex.join(command)}")
    return said


def tools(kind: str) -> Tools:
    """The compilers, or ToolMissing naming what is not here and how to get it."""
    gxx = shutil.which(os.environ.get("CXX") or "g++")
    if gxx is None:
        raise ToolMissing("a C++17 compiler is needed and there is no g++ on the PATH: install g++, or name one in CXX")
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        raise ToolMissing("torch's headers are needed and torch is not installed in this Python")
    torch_folder = Path(torch.origin).parent
    if not (torch_folder / "include/torch/csrc/stable/library.h").is_file():
        raise ToolMissing(f"torch 2.10 or later is needed: {torch_folder / 'include'} has no headers of its stable ABI")
    nvcc = probe.find_nvcc()
    if nvcc is None and kind == "cuda":
        raise ToolMissing(
            "nvcc is needed and was found neither on the PATH, nor under CUDA_HOME or /usr/local/cuda, nor as a "
            "package: install the CUDA toolkit, or pip install nvidia-cuda-nvcc nvidia-cuda-crt nvidia-cuda-runtime "
            "nvidia-nvvm of torch's CUDA version"
        )
    cuda = probe.cuda_headers(nvcc)
    if cuda is None:
        raise ToolMissing(
            "CUDA's headers (cuda_bf16.h) are needed and were found neither with nvcc, nor under CUDA_HOME or "
            "/usr/local/cuda, nor as a package: install the CUDA toolkit, or pip install nvidia-cuda-runtime "
            "nvidia-cuda-crt"
        )
    number = re.search(r"#define CUDA_VERSION (\d+)", (cuda / "include/cuda.h").read_text(errors="replace"))
    cxx = f"{platform.machine()} {_run([gxx, '--version'], 'g++ does not run').splitlines()[0]}"
    versions = {"g++": cxx, "emulated": f"{cxx} CUDA {number[1] if number else 0}"}
    if nvcc is not None and kind == "cuda":
        versions["nvcc"] = f"{cxx} {_run([nvcc, '--version'], 'nvcc does not run')}"
    versions["all"] = " ".join(versions.values())
    return Tools(gxx, nvcc, cuda, torch_folder, versions)


def _runtime(cuda: Path) -> Path:
    """Where the CUDA runtime is that is linked in: with it no libcudart of any version is needed beside."""
    for folder in (cuda / "lib64", cuda / "lib", cuda / f"targets/{platform.machine()}-linux/lib"):
        if (folder / "libcudart_static.a").is_file():
            return folder
    raise ToolMissing(f"libcudart_static.a is needed and {cuda} has none: install the CUDA toolkit's development files")


_ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\w+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


def _resources(told: str, source: str) -> list[Resources]:
    """The rows of one file from what `nvcc -Xptxas -v` printed."""
    rows: list[Resources] = []
    entry, stack = None, (0, 0, 0)
    for line in told.splitlines():
        if found := _ENTRY.search(line):
            entry, stack = (found[1], found[2]), (0, 0, 0)
        elif found := _STACK.search(line):
            stack = int(found[1]), int(found[2]), int(found[3])
        elif entry and (found := _USED.search(line)):
            rows.append(Resources(source, *entry, int(found[1]), *stack, int(found[2] or 0)))
            entry = None
    names = _readable([row.kernel for row in rows])
    return [replace(row, kernel=name) for row, name in zip(rows, names, strict=True)]


def _readable(symbols: Sequence[str]) -> list[str]:
    """`void megapt::scale_kernel<float>(float const*, long)` as `scale_kernel<float>`; as it is without c++filt."""
    program = shutil.which("c++filt")
    if program is None or not symbols:
        return list(symbols)
    names = []
    for name in _run([program, *symbols], "c++filt does not run").split("\n")[: len(symbols)]:
        depth, end = 0, len(name)
        while name.endswith(")") and end > 0:
            end -= 1
            depth += {")": 1, "(": -1}.get(name[end], 0)
            if depth == 0:
                break
        names.append(name[:end].removeprefix("void ").removeprefix("megapt::"))
    return names


def _table(object_: Path) -> Path:
    return object_.with_suffix(".json")


def _publish(made: Path, final: Path) -> None:
    with made.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(made, final)


def _copied(library: Path, folder: Path) -> Path:
    """The library and its table in `folder` too, each under its name only when whole."""
    _writable(folder)
    for path in (library.with_suffix(".json"), library):
        handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=folder)
        os.close(handle)
        try:
            shutil.copyfile(path, name)
            os.chmod(name, 0o644)
            _publish(Path(name), folder / path.name)
        finally:
            Path(name).unlink(missing_ok=True)
    return folder / library.name


def _writable(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise BuildError(
            f"{folder}: {error.strerror}. Kernels are built in the folder that {CACHE} names: set it to one that you "
            "may write to"
        ) from None
    return folder


@contextmanager
def _lock(path: Path, verbose: bool) -> Iterator[None]:
    """Held by one process at a time; the system frees it when its holder dies."""
    import fcntl

    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(verbose, "another process is building: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _say(verbose: bool, line: str) -> None:
    if verbose:
        print(line, file=sys.stderr, flush=True)
