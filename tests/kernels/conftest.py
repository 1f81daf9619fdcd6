"""Where the kernels' tests run: the CUDA library on a GPU, else the emulated one on the CPU, by the same tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from megapt_kernels import build, library
from megapt_kernels.library import ThreadOrder


def _library() -> library.Library:
    """The library of this process, built if need be; only one of several processes builds, and the others wait."""
    found = library.loaded()
    if found is not None:
        return found
    try:
        if not torch.cuda.is_available():
            return library.load_emulated(build.build("emulated"))
        try:
            return library.load()
        except library.LibraryError:
            return library.load(build.build("cuda"))
    except build.ToolMissing as missing:
        pytest.skip(f"kernels cannot be compiled here: {missing}")


@pytest.fixture
def device() -> str:
    """The device type whose tensors the CUDA operators take in this process; with `cpu` they are emulated."""
    _library()
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=ThreadOrder, ids=str)
def thread_order(request: pytest.FixtureRequest, device: str) -> Iterator[ThreadOrder]:
    """Runs the test in each order in which the emulator can take a block's threads; a GPU has its own, once."""
    order = request.param
    if device == "cuda" and order is not ThreadOrder.forward:
        pytest.skip("a GPU orders threads itself")
    if device == "cpu":
        library.set_thread_order(order)
    yield order
    if device == "cpu":
        library.set_thread_order(ThreadOrder.forward)


@pytest.fixture
def gxx() -> str:
    """A g++ and CUDA headers, enough for the emulated library; without them the test is skipped."""
    try:
        return build.tools("emulated").gxx
    except build.ToolMissing as missing:
        pytest.skip(str(missing))


@pytest.fixture
def nvcc() -> str:
    """nvcc's path; without it the test is skipped."""
    try:
        found = build.tools("cuda").nvcc
    except build.ToolMissing as missing:
        pytest.skip(f"CUDA sources are not compiled here: {missing}")
    assert found is not None
    return found
