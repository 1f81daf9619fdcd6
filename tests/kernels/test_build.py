"""Compiling: what is made again, two builds at once, one that is killed, errors, and the real CUDA build."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from megapt_kernels import build, library

REGISTERS = 255  # of a thread, on every architecture; beyond them a kernel spills

SCALE = {
    "scale.cuh": """
        #include "common.cuh"
        namespace megapt {
        template <class T>
        __global__ void scale_kernel(const T* x, float by, T* y, int64_t n) {
            const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
            if (i < n) y[i] = from_float<T>(to_float(x[i]) * by);
        }
        }
    """,
    "scale.cu": """
        #include "scale.cuh"
        #include "launch.h"
        extern "C" int megapt_scale(const void* x, float by, void* y, int64_t n, int dtype, void* stream) {
            using namespace megapt;
            return dispatch(dtype, [&](auto type) {
                using T = typename decltype(type)::type;
                return launch(scale_kernel<T>, dim3((n + 127) / 128), dim3(128), 0, stream, static_cast<const T*>(x),
                              by, static_cast<T*>(y), n);
            });
        }
    """,
}


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small set of sources of its own with an empty cache: one kernel, without operators."""
    csrc = tmp_path / "kernels" / "csrc"
    csrc.mkdir(parents=True)
    for name in ("common.cuh", "launch.h", "library.h", "library_ops.cpp"):
        shutil.copy(build.ROOT / "csrc" / name, csrc)
    for name, text in SCALE.items():
        (csrc / name).write_text(text)
    (csrc.parent / "emu").symlink_to(build.ROOT / "emu")
    monkeypatch.setattr(build, "ROOT", csrc.parent)
    monkeypatch.setenv(build.CACHE, str(tmp_path / "cache"))
    monkeypatch.delenv(build.ONLY, raising=False)
    return csrc


def _compiled(lines: str) -> list[str]:
    return sorted(line.split()[0] for line in lines.splitlines() if line.endswith(" s"))


def test_only_what_changed_is_compiled(sources: Path, gxx: str, capfd: pytest.CaptureFixture[str]) -> None:
    def made() -> tuple[Path, list[str]]:
        path = build.build("emulated", verbose=True)
        return path, _compiled(capfd.readouterr().err)

    first, files = made()
    assert files == ["library_ops.cpp", "scale.cu"]
    assert made() == (first, [])
    # A header that one file includes, and a comment in it: the others' objects stay.
    with (sources / "scale.cuh").open("a") as file:
        file.write("// changed\n")
    second, files = made()
    assert second != first and files == ["library_ops.cpp", "scale.cu"], "library_ops.cpp holds the sources' hash"
    with (sources / "library.h").open("a") as file:
        file.write("// changed\n")
    assert made()[1] == ["library_ops.cpp"]
    # The earlier library is still what it says it is, and is taken again for its sources.
    for name in ("scale.cuh", "library.h"):
        path = sources / name
        path.write_text(path.read_text().removesuffix("// changed\n"))
    assert made() == (first, [])
    assert library.inspect(first).sources == build.source_hash("emulated")
    assert next(build.candidates("emulated")) == first


def test_a_copy_for_another_place(sources: Path, gxx: str, tmp_path: Path) -> None:
    out = build.build("emulated", out=tmp_path / "out")
    assert out == tmp_path / "out" / "libmegapt_kernels_emulated.so"
    assert sorted(p.name for p in out.parent.iterdir()) == [out.with_suffix(".json").name, out.name]
    assert library.inspect(out).sources == build.source_hash("emulated")


def test_an_error_in_a_source_shows_the_compilers_words(sources: Path, gxx: str) -> None:
    (sources / "scale.cu").write_text("int f() { return unheard_of; }\n")
    words = r"(?s)scale.cu does not compile.*unheard_of.*The command was: "
    with pytest.raises(build.BuildError, match=words) as raised:
        build.build("emulated")
    assert not isinstance(raised.value, build.ToolMissing)
    assert list(build.candidates("emulated")) == []


def test_a_launcher_that_is_missing_is_found_by_linking(sources: Path, gxx: str) -> None:
    (sources / "scale_ops.cpp").write_text('extern "C" int megapt_gone(); int call() { return megapt_gone(); }\n')
    with pytest.raises(build.BuildError, match=r"(?s)does not link.*megapt_gone"):
        build.build("emulated")


def test_some_sources_alone(sources: Path, gxx: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (sources / "broken.cu").write_text("#error broken\n")
    monkeypatch.setenv(build.ONLY, "scale")
    assert build.build("emulated").is_file()
    monkeypatch.setenv(build.ONLY, "scale,scales")
    with pytest.raises(build.BuildError, match="names scales; there are broken, library, scale"):
        build.build("emulated")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"kind": "metal"}, "kind is one of cuda, emulated, not 'metal'"),
        ({"architectures": ("sm_90",)}, "such as 80, 90a, 100a, not 'sm_90'"),
        ({"architectures": ()}, "such as 80, 90a, 100a, not ''"),
    ],
)
def test_wrong_arguments(arguments: dict, words: str) -> None:
    with pytest.raises(build.BuildError, match=words):
        build.build(**arguments)


def test_missing_compilers_are_named(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.probe, "find_nvcc", lambda: None)
    with pytest.raises(build.ToolMissing, match="nvcc is needed .* install the CUDA toolkit"):
        build.build("cuda")
    monkeypatch.setattr(build.probe, "_cuda_folders", lambda: [])
    with pytest.raises(build.ToolMissing, match="cuda_bf16.h"):
        build.build("emulated")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(build.ToolMissing, match=r"no g\+\+ on the PATH: install g\+\+"):
        build.build("emulated")


def test_a_cache_that_cannot_be_written(
    sources: Path, gxx: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(build.CACHE, str(tmp_path / "file" / "cache"))
    with pytest.raises(build.BuildError, match=f"Not a directory.*{build.CACHE} names"):
        build.build("emulated")


# Builds the sources of argv[1] in a process of its own; a second argument is a g++ to use.
BUILDER = """
import sys
from dataclasses import asdict
from pathlib import Path
from megapt_kernels import build
build.ROOT = Path(sys.argv[1])
print(build.build("emulated", verbose=True))
"""


def _start(sources: Path, gxx: str) -> subprocess.Popen[str]:
    paths = os.pathsep.join([str(Path(build.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-c", BUILDER, str(sources.parent)],
        env={**os.environ, "CXX": gxx, "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_of_two_at_once_one_builds(sources: Path, gxx: str) -> None:
    ran = [_start(sources, gxx) for _ in range(2)]
    said = [process.communicate(timeout=200) for process in ran]
    assert [process.returncode for process in ran] == [0, 0], said
    assert said[0][0] == said[1][0]
    assert _compiled(said[0][1] + said[1][1]) == ["library_ops.cpp", "scale.cu"]


def test_a_build_that_is_killed_leaves_nothing_half_made(
    sources: Path, gxx: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A g++ that tells when it has written half of the library, and then takes its time.
    slow, reached = tmp_path / "slow-g++", tmp_path / "linking"
    slow.write_text(
        f'#!/bin/sh\n[ "$1" != -shared ] && exec {gxx} "$@"\nprintf "\\177ELF half" > "$3"\n'
        f"touch {reached}\nexec sleep 100\n"
    )
    slow.chmod(0o755)
    process = _start(sources, str(slow))
    try:
        deadline = time.monotonic() + 200
        while not reached.exists():
            assert process.poll() is None and time.monotonic() < deadline, process.communicate(timeout=5)
            time.sleep(0.05)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=10)
    cache = build.cache_folder()
    assert list(build.candidates("emulated")) == [] and list(cache.glob("building-*/library"))
    made = build.build("emulated")
    assert library.inspect(made).kind == "emulated"
    assert not list(cache.glob("building-*"))


def test_resources_are_read_from_what_ptxas_prints() -> None:
    told = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN6megapt12scale_kernelIfEEvPKT_fPS1_l' for 'sm_90a'
ptxas info    : Function properties for _ZN6megapt12scale_kernelIfEEvPKT_fPS1_l
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 16 bytes cumulative stack size, 128 bytes smem, 380 bytes cmem[0]
ptxas info    : Compile time = 5.766 ms
ptxas info    : Compiling entry function 'plain' for 'sm_80'
ptxas info    : Used 10 registers, used 0 barriers
"""
    rows = build._resources(told, "scale")
    name = "scale_kernel<float>" if shutil.which("c++filt") else "_ZN6megapt12scale_kernelIfEEvPKT_fPS1_l"
    assert rows == [
        build.Resources("scale", name, "90a", 40, 16, 8, 12, 128),
        build.Resources("scale", "plain", "80", 10, 0, 0, 0, 0),
    ]
    assert f"| scale | `{name}` | 40 | - | 128 | 16 | 20 |" in build.markdown(rows)


@pytest.fixture(scope="module")
def cuda_library() -> Path:
    """All CUDA sources for all architectures; from the cache if they were built before."""
    try:
        return build.build("cuda", verbose=True)
    except build.ToolMissing as missing:
        pytest.skip(f"CUDA sources are not compiled here: {missing}")


@pytest.mark.timeout(1200)
def test_no_kernel_spills_on_any_architecture(cuda_library: Path) -> None:
    rows = build.resources(cuda_library)
    kernels = {(row.source, row.kernel): set[str]() for row in rows}
    for row in rows:
        kernels[row.source, row.kernel].add(row.architecture)
    sources = {path.stem for path in (build.ROOT / "csrc").glob("*.cu")}
    assert {source for source, _ in kernels} == sources, "every source has kernels in the table"
    assert all(found == set(build.ARCHITECTURES) for found in kernels.values())
    spilled = [row for row in rows if row.spill_stores or row.spill_loads]
    assert not spilled, build.markdown(spilled)
    assert max(row.registers for row in rows) <= REGISTERS


LOADER = """
import ctypes, json, sys
import torch
from megapt_kernels import library
found = library.load(sys.argv[1])
names = [s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("megapt_kernels::")]
text = ctypes.CDLL(sys.argv[1]).megapt_kernels_description
text.restype = ctypes.c_char_p
try:
    library.load_emulated()
except library.LibraryError as error:
    refused = str(error)
print(json.dumps([found.sources, names, text().decode(), refused, library.missing(torch.device("cuda"))]))
"""


def test_the_cuda_library_loads_where_there_is_no_gpu(cuda_library: Path) -> None:
    """In a process of its own: one has one library."""
    told = subprocess.run(
        [sys.executable, "-c", LOADER, str(cuda_library)],
        env={**os.environ, "PYTHONPATH": str(Path(build.__file__).parents[1])},
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert told.returncode == 0, told.stderr
    sources, names, text, refused, missing = json.loads(told.stdout)
    assert sources == build.source_hash("cuda") and f"sources={sources} " in text
    assert len(names) >= len(list((build.ROOT / "csrc").glob("*.cu")))
    assert "a process has one library" in refused
    import torch

    assert missing == (None if torch.cuda.is_available() else "this process has no CUDA device")


def test_the_library_needs_no_newer_torch_and_no_cuda_beside_it(cuda_library: Path) -> None:
    """Undefined symbols are torch's stable ones and the system's; nothing of C++ torch, of libcudart or libcuda."""
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm of binutils is not here")

    def symbols(which: str) -> set[str]:
        told = subprocess.run([nm, "-D", which, str(cuda_library)], capture_output=True, text=True, check=True).stdout
        return {line.split()[-1].split("@")[0] for line in told.splitlines()}

    undefined, defined = symbols("--undefined-only"), symbols("--defined-only")
    torch_symbols = {s for s in undefined if "torch" in s or "c10" in s or s.startswith("_ZN2at")}
    assert torch_symbols and all(s.startswith(("aoti_torch_", "torch_")) for s in torch_symbols), torch_symbols
    assert not {s for s in undefined if s.startswith(("cuda", "cu", "__cuda"))}
    assert "megapt_kernels_description" in defined and all(s.startswith("megapt_") for s in defined)


def test_commands(
    sources: Path, gxx: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from megapt import cli

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["megapt", "kernels", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    out = tmp_path / "out"
    status, told, _ = run("build", "--emulated", "--out", str(out), "--jobs", "1")
    path = out / build.LIBRARIES["emulated"]
    assert (status, told.strip()) == (0, str(path)) and path.is_file()
    row = build.Resources("scale", "scale_kernel<float>", "90a", 40, 0, 0, 0, 128)
    path.with_suffix(".json").write_text(json.dumps([asdict(row)]))
    status, told, _ = run("resources", str(path))
    assert status == 0 and "| scale | `scale_kernel<float>` | 40 | 128 | 0 | 0 |" in told
    status, _, error = run("resources")
    assert status == 2 and "megapt kernels build" in error
    status, _, error = run("build", "--arch", "sm_90")
    assert status == 2 and "not 'sm_90'" in error
    status, told, _ = run("list")
    from megapt_kernels import operations

    assert status == 0 and all(name in told for name in operations())
    status, told, _ = run("explain", "swiglu", "--device", "cpu", "--impl", "reference")
    assert status == 0 and told.startswith("swiglu: reference\n")
    status, _, error = run("explain", "swishglu")
    assert status == 2 and "there is no operation 'swishglu'" in error
