"""Our Triton kernels compiled ahead of time for the cards that matter: they must fit, and not spill registers.

Needs no GPU; ptxas and cuobjdump come with triton.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed: its kernels cannot be compiled")

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")

# Bytes of shared memory that a block may take, and of tensor memory columns.
SHARED = {(8, 0): 163 << 10, (8, 6): 99 << 10, (9, 0): 227 << 10, (10, 0): 227 << 10}
COLUMNS = 512
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
KERNELS = ("forward", "keys", "queries")
CASES = [(capability, kernel, 128) for capability in SHARED if capability != (8, 6) for kernel in KERNELS]


class Cost(NamedTuple):
    registers: int
    stack: int
    shared: int
    columns: int


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    if hasattr(triton, "knobs"):
        monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    yield


def compiled(kernel: str, width: int, capability: tuple[int, int], folder: Path, **switches: bool) -> Cost:
    """What a bf16 kernel costs, called for aligned tensors of any size."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megapt_kernels import flash_triton

    functions = {
        "forward": flash_triton._forward,
        "keys": flash_triton._backward_keys,
        "queries": flash_triton._backward_queries,
    }
    function, size = functions[kernel], flash_triton.tiles(kernel, width, torch.bfloat16, capability)
    constants: dict[str, Any] = {
        "GROUP": 4, "WIDTH": width, "PADDED": flash_triton.padded(width), "CAUSAL": True, "WINDOW": False,
        "SOFTCAP": False, "PRECISION": "ieee", "QUERIES": size.queries, "KEYS": size.keys,
    } | switches  # fmt: skip
    others = {"LSE": "*fp32", "ALONG": "*fp32", "STARTS": "*i32", "ENDS": "*i32"}
    others |= dict.fromkeys(("scale", "inner", "outer"), "fp32")
    signature, aligned = {}, {}
    for position, name in enumerate(function.arg_names):
        kind = "constexpr" if name in constants else others.get(name, "*bf16" if name.isupper() else "i32")
        signature[name] = kind
        if kind.startswith("*") or name.endswith(("_token", "_head")):
            aligned[(position,)] = [["tt.divisibility", 16]]
    made = triton.compile(
        ASTSource(function, signature, constants, aligned),
        target=GPUTarget("cuda", capability[0] * 10 + capability[1], 32),
        options={"num_warps": size.warps, "num_stages": size.stages},
    )
    binary = folder / "kernel.cubin"
    binary.write_bytes(made.asm["cubin"])
    ran = subprocess.run([CUOBJDUMP, "--dump-resource-usage", binary], capture_output=True, text=True, check=True)
    registers, stack = (int(re.search(rf"{word}:(\d+)", ran.stdout)[1]) for word in ("REG", "STACK"))  # type: ignore[index]
    return Cost(registers, stack, made.metadata.shared, getattr(made.metadata, "tmem_size", None) or 0)


@pytest.mark.parametrize(("capability", "kernel", "width"), CASES)
def test_kernels_fit_without_spills(capability: tuple[int, int], kernel: str, width: int, tmp_path: Path) -> None:
    cost = compiled(kernel, width, capability, tmp_path)
    assert cost.stack == 0 and cost.registers <= 255
    assert cost.shared <= SHARED[capability] and cost.columns <= COLUMNS
    if capability == (8, 0):  # the same code runs on cards with less
        assert cost.shared <= SHARED[8, 6]
