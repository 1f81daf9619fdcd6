"""Finding and loading the compiled kernels: what is refused and in which words, and what bindings check."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megapt_kernels import build, library
from megapt_kernels.library import Library, LibraryError

ELF = bytearray(b"\x7fELF" + bytes(60))
ELF[18] = {"x86_64": 62, "aarch64": 183}[platform.machine()]


def _file(path: Path, kind: str = "cuda", sources: str | None = None, architectures: str = "80,90a") -> Path:
    """A file that describes itself as a library of these sources, by default the installed ones."""
    sources = sources or build.source_hash(kind)
    text = f"megapt_kernels library: kind={kind} sources={sources} architectures={architectures}\0"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(ELF) + text.encode() + bytes(8))
    return path


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Where libraries are looked for, all empty."""
    package, root = tmp_path / "package", tmp_path / "kernels"
    (root / "csrc").mkdir(parents=True)
    (root / "csrc" / "scale.cu").write_text("// a kernel\n")
    monkeypatch.setattr(build, "_PACKAGE", package)
    monkeypatch.setattr(build, "ROOT", root)
    monkeypatch.setenv(build.CACHE, str(tmp_path / "cache"))
    monkeypatch.delenv(library.LIBRARY, raising=False)
    monkeypatch.delenv(build.ONLY, raising=False)
    name = build.LIBRARIES["cuda"]
    cached = tmp_path / "cache" / f"cuda-{build.source_hash('cuda')}-0" / name
    return {"wheel": package / "lib" / name, "carried": root / "build" / name, "cache": cached}


def test_the_first_that_fits_the_sources_is_found(places: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LibraryError, match="are not built: run `megapt kernels build`"):
        library.find()
    for place in ("cache", "carried", "wheel"):
        _file(places[place])
        assert library.find().path == places[place]
    # An old one in the way is passed over; alone, it is the answer's reason.
    _file(places["wheel"], sources="0123456789abcdef")
    assert library.find().path == places["carried"]
    for place in ("carried", "cache"):
        places[place].unlink()
    present = build.source_hash("cuda")
    with pytest.raises(LibraryError, match=f"0123456789abcdef, and those installed are {present}: run .* again"):
        library.find()
    # The one that is named comes before all, and nothing else will do.
    _file(places["carried"])
    named = _file(places["wheel"].with_name("named.so"))
    monkeypatch.setenv(library.LIBRARY, str(named))
    assert library.find().path == named
    named.unlink()
    with pytest.raises(LibraryError, match=f"{library.LIBRARY}: .*named.so: No such file"):
        library.find()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"PK\x03\x04 a wheel", "is not a shared library"),
        (bytes(ELF), "is not a library of megapt_kernels, or is cut off"),
        (bytes(ELF) + b"megapt_kernels library: kind=cuda sou", "is cut off"),
        (bytes(ELF[:18]) + b"\x15\0" + bytes(80), f"is for another processor and this machine is {platform.machine()}"),
    ],
)
def test_files_that_are_no_library(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "libmegapt_kernels.so"
    path.write_bytes(content)
    with pytest.raises(LibraryError, match=words):
        library.inspect(path)


def test_a_library_of_the_other_kind_is_refused(places: dict[str, Path]) -> None:
    _file(places["carried"], kind="emulated")
    with pytest.raises(LibraryError, match="is the emulated library, not the cuda one"):
        library.find()


@pytest.mark.parametrize(
    ("architectures", "runs", "not_on"),
    [
        # PTX of the first plain architecture serves all later GPUs.
        (("80", "90a", "100a"), [(8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)], [(7, 5)]),
        (("90a",), [(9, 0)], [(8, 0), (10, 0)]),
        (("90",), [(9, 0), (10, 0)], [(8, 9)]),
    ],
)
def test_which_gpus_run_which_code(
    architectures: tuple[str, ...], runs: list[tuple[int, int]], not_on: list[tuple[int, int]]
) -> None:
    found = Library(Path("lib.so"), "cuda", "0", architectures)
    assert [found.lacks(capability) for capability in runs] == [None] * len(runs)
    for major, minor in not_on:
        assert f"--arch {10 * major + minor}" in (found.lacks((major, minor)) or "")


def test_where_the_operators_run(device: str) -> None:
    assert library.missing(torch.device(device)) is None
    other = "cuda" if device == "cpu" else "cpu"
    assert library.missing(torch.device(other)) is not None
    assert "not on meta" in (library.missing(torch.device("meta")) or "")
    called: list[bool] = []
    library.on_load(lambda: called.append(True))
    assert called, "the operators are there: at once"
    loaded = library.loaded()
    assert loaded is not None and loaded.sources == build.source_hash(loaded.kind)


# A process of its own, since one has one library: operators of test sources, through the real bindings.
PROCESS = """
import sys
from pathlib import Path
import torch
from megapt_kernels import build, library
build.ROOT = Path(sys.argv[1])

def raises(words, function, *arguments):
    try:
        function(*arguments)
    except RuntimeError as error:
        assert words in str(error), f"{words!r} is not in {error}"
    else:
        raise AssertionError(f"nothing raised: {words}")

def choose(x):
    return torch.ops.megapt_kernels.scale(x, 2.0) if library.missing(x.device) is None else x * 3

ones = torch.ones(8)
assert torch.compile(choose, fullgraph=True, backend="aot_eager")(ones).tolist() == [3.0] * 8
called = []

@library.on_load
def fakes():
    called.append(True)
    torch.library.register_fake("megapt_kernels::scale", lambda x, by: torch.empty_like(x))

assert not called
first = library.load_emulated()
assert called == [True] and library.load_emulated() == first
raises("a process has one library", library.load)
torch._dynamo.reset()
assert torch.compile(choose, fullgraph=True, backend="aot_eager")(ones).tolist() == [2.0] * 8

scale = torch.ops.megapt_kernels.scale
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    y = scale(torch.arange(300, dtype=dtype), 0.5)
    assert y.dtype == dtype and torch.equal(y, torch.arange(300, dtype=dtype) * 0.5)
torch.library.opcheck(scale.default, (torch.ones(3, 4), 2.0))
raises("megapt_kernels::scale: x must be Float, BFloat16 or Half, not Double", scale, ones.double(), 1.0)
raises("scale: x must be contiguous, not strided [1, 4] for shape [4, 3]", scale, torch.ones(3, 4).t(), 1.0)
raises("scale: x must begin at a multiple of 16 bytes", scale, ones[1:], 1.0)
raises("more than 1024 threads", scale, ones, 2048.0)

# Every thread writes to one place: the last of them is seen.
for order, last in ((library.ThreadOrder.forward, 95), (library.ThreadOrder.reversed, 0)):
    library.set_thread_order(order)
    assert torch.ops.megapt_kernels.last_thread(torch.zeros(1)).item() == last
seen = set()
for seed in range(8):
    library.set_thread_order(library.ThreadOrder.shuffled, seed)
    seen.add(torch.ops.megapt_kernels.last_thread(torch.zeros(1)).item())
assert len(seen) > 2, seen

# The library of sources that were edited after it was built.
with (build.ROOT / "csrc" / "scale.cu").open("a") as file:
    file.write("// edited\\n")
raises("run `megapt kernels build` again", library._checked, "emulated", first.path)
"""

SOURCES = {
    "scale.cu": """
        #include "launch.h"
        namespace megapt {
        template <class T>
        __global__ void scale_kernel(const T* x, float by, T* y, int64_t n) {
            const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
            if (i < n) y[i] = from_float<T>(to_float(x[i]) * by);
        }
        __global__ void last_thread_kernel(float* y) { y[0] = threadIdx.x; }
        }
        extern "C" int megapt_scale(const void* x, float by, void* y, int64_t n, int dtype, void* stream) {
            using namespace megapt;
            const int threads = by > 1024 ? static_cast<int>(by) : 128;
            return dispatch(dtype, [&](auto type) {
                using T = typename decltype(type)::type;
                return launch(scale_kernel<T>, dim3((n + threads - 1) / threads), dim3(threads), 0, stream,
                              static_cast<const T*>(x), by, static_cast<T*>(y), n);
            });
        }
        extern "C" int megapt_last_thread(void* y, void* stream) {
            return megapt::launch(megapt::last_thread_kernel, dim3(1), dim3(96), 0, stream, static_cast<float*>(y));
        }
    """,
    "scale_ops.cpp": """
        #include "bindings.h"
        extern "C" int megapt_scale(const void* x, float by, void* y, int64_t n, int dtype, void* stream);
        extern "C" int megapt_last_thread(void* y, void* stream);
        namespace megapt {
        Tensor scale(const Tensor& x, double by) {
            const Operator op("scale");
            op.check_contiguous(x, "x");
            op.check_aligned(x, "x");
            const int dtype = op.dtype_of(x, "x");
            const DeviceGuard guard(x);
            Tensor y = torch::stable::empty_like(x);
            op.check_launch(megapt_scale(x.data_ptr(), by, y.data_ptr(), x.numel(), dtype, current_stream(x)));
            return y;
        }
        Tensor last_thread(const Tensor& x) {
            const DeviceGuard guard(x);
            Tensor y = torch::stable::empty_like(x);
            check_launch(megapt_last_thread(y.data_ptr(), current_stream(x)), "last_thread");
            return y;
        }
        }
        MEGAPT_LIBRARY_FRAGMENT(m) {
            m.def("scale(Tensor x, float by) -> Tensor");
            m.def("last_thread(Tensor x) -> Tensor");
        }
        MEGAPT_LIBRARY_IMPL(m) {
            m.impl("scale", TORCH_BOX(&megapt::scale));
            m.impl("last_thread", TORCH_BOX(&megapt::last_thread));
        }
    """,
}


def test_operators_through_the_bindings(tmp_path: Path, gxx: str) -> None:
    csrc = tmp_path / "kernels" / "csrc"
    csrc.mkdir(parents=True)
    for name in ("common.cuh", "launch.h", "library.h", "library_ops.cpp", "bindings.h"):
        (csrc / name).write_text((build.ROOT / "csrc" / name).read_text())
    for name, text in SOURCES.items():
        (csrc / name).write_text(text)
    (csrc.parent / "emu").symlink_to(build.ROOT / "emu")
    environment = {**os.environ, build.CACHE: str(tmp_path / "cache"), "CXX": gxx}
    environment["PYTHONPATH"] = str(Path(build.__file__).parents[1])
    environment.pop(build.ONLY, None)
    told = subprocess.run(
        [sys.executable, "-c", PROCESS, str(csrc.parent)], env=environment, capture_output=True, text=True, timeout=280
    )
    assert told.returncode == 0, told.stderr[-4000:]
