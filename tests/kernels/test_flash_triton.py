"""Our Triton flash attention in Triton's interpreter, against fp64: adversarial lengths, documents, windows, caps.

The interpreter is chosen when triton is imported, so that this file runs itself once as a program, and the tests read
what it measured. It takes fp32 and fp16; bfloat16 is wrong in it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed: its kernels cannot be interpreted")

ROOT = Path(__file__).parents[2]

# name: ((B, S, heads, kv_heads, D), spec)
CASES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "one token": ((1, 1, 1, 1, 16), {}),
    "127": ((1, 127, 2, 1, 32), {}),
    "129, rows in one block": ((2, 129, 1, 1, 16), {}),
    "64 past a block": ((1, 192, 1, 1, 16), {"scale": 0.4}),
    "without order": ((1, 129, 2, 1, 16), {"causal": False}),
    "groups of three": ((1, 33, 6, 2, 16), {}),
    # Blocks are 32 wide in fp32: with these windows, a bound that is off by one misses a block or unmasks one.
    "window of 66": ((1, 130, 1, 1, 16), {"window": 66}),
    "window of 95": ((1, 130, 1, 1, 16), {"window": 95}),
    "window of one": ((1, 70, 1, 1, 16), {"window": 1}),
    "soft cap": ((1, 65, 2, 2, 16), {"softcap": 1.5}),
    "documents": ((2, 100, 2, 1, 16), {"lengths": (1, 62, 37, 1, 1, 98)}),
    "documents without order": ((1, 160, 1, 1, 16), {"causal": False, "lengths": (63, 1, 66, 30)}),
    "everything": ((2, 80, 2, 1, 16), {"window": 9, "softcap": 2.0, "scale": 0.3, "lengths": (80, 1, 20, 59)}),
    "width 80": ((1, 40, 1, 1, 80), {}),
    "width 24, strided": ((1, 50, 2, 1, 24), {"lengths": (20, 30)}),
    "width 256": ((1, 40, 1, 1, 256), {"window": 7}),
    "large scores": ((1, 64, 1, 1, 16), {"scale": 30.0}),
}


HALF = ("127", "documents without order", "everything", "width 80")


def measure() -> dict[str, Any]:
    """In the interpreter: of every case and dtype, the largest errors of our and plain PyTorch's result and gradients
    against fp64, beside the largest value."""
    import torch

    from megapt_kernels.attention_dispatch import AttentionSpec, attention
    from tests.kernels.test_attention import computed, plain, tensors

    measured: dict[str, Any] = {}
    for name, (shape, options) in CASES.items():
        spec, made = AttentionSpec(**options), tensors(shape)
        if "strided" in name:
            made[:3] = torch.cat(made[:3], dim=2).split([t.shape[2] for t in made[:3]], dim=2)
        exact = computed(plain, made, torch.float64, spec)
        for dtype in (torch.float32, torch.float16) if name in HALF else (torch.float32,):
            ours = computed(attention, made, dtype, spec, impl="triton")
            theirs = computed(plain, made, dtype, spec)
            measured[f"{name}, {dtype}"] = [
                [(a - e).abs().max().item(), (b - e).abs().max().item(), e.abs().max().item()]
                for a, b, e in zip(ours, theirs, exact, strict=True)
            ]
    spec, made = AttentionSpec(lengths=(20, 30), window=7), tensors((1, 50, 2, 1, 16))
    run = lambda q, k, v: attention(q, k, v, spec, impl="triton")  # noqa: E731
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    eager, traced = (computed(f, made, torch.float32) for f in (run, compiled))
    measured["one graph"] = all(torch.equal(a, b) for a, b in zip(eager, traced, strict=True))
    again = computed(run, made, torch.float32)
    measured["repeatable"] = all(torch.equal(a, b) for a, b in zip(eager, again, strict=True))
    measured["bf16"] = str(_refusal(lambda: attention(*(t.bfloat16() for t in made[:3]), spec, impl="triton")))
    return measured


def _refusal(call: Any) -> Exception | None:
    try:
        call()
    except ValueError as error:
        return error
    return None


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    program = "import json; from tests.kernels.test_flash_triton import measure; print(json.dumps(measure()))"
    command = [sys.executable, "-W", "ignore", "-c", program]
    ran = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert ran.returncode == 0, ran.stderr
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, "torch.float32") for name in CASES), *((name, "torch.float16") for name in HALF)],
)
def test_errors_stay_near_those_of_plain_pytorch(name: str, dtype: str, measured: dict[str, Any]) -> None:
    epsilon = {"torch.float32": 2**-23, "torch.float16": 2**-10}[dtype]
    for factor, (ours, theirs, largest) in zip((2, 3, 3, 3), measured[f"{name}, {dtype}"], strict=True):
        # Gradients that cancel to nothing are left with the rounding of numbers about as large as the arguments. The
        # backward pass makes probabilities again from the logs of their sums, whose rounding grows with the scores.
        scores = 300.0 if name == "large scores" else 4.0
        assert ours <= factor * theirs + scores * epsilon * max(largest, 1.0)


def test_traces_in_one_graph_and_repeats_its_bits(measured: dict[str, Any]) -> None:
    assert measured["one graph"] and measured["repeatable"]


def test_the_interpreter_is_not_given_bfloat16(measured: dict[str, Any]) -> None:
    assert "triton: Triton is interpreted" in measured["bf16"]
