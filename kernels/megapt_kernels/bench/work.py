"""The least that an operation must read and write, and its arithmetic: one formula each.

i: bytes of an element of activations. T: tokens, H: hidden, F: ffn, V: vocabulary, N: heads turned, D: their width,
B x S: tokens by sequence, A: query heads, G: key-value heads, P: parameters, O x K: a weight, k: experts of a token.
Every tensor of activations is read or written once; tensors that are smaller by a factor of the tokens (weights of
norms, tables of angles, statistics of rows) are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Shape = Mapping[str, int]
Formula = Callable[[Shape, int], float]


def _copy(itemsize: int) -> int:
    """Bytes per parameter of the copy of the weights that training computes with: none where it would be fp32 too."""
    return itemsize if itemsize < 4 else 0


# (operation, case) -> (forward, backward); None: the operation has no such pass of its own.
BYTES: dict[tuple[str, str], tuple[Formula | None, Formula | None]] = {
    ("rms_norm", ""): (lambda s, i: 2 * i * s["T"] * s["H"], lambda s, i: 3 * i * s["T"] * s["H"]),
    ("rms_norm", "residual"): (lambda s, i: 4 * i * s["T"] * s["H"], lambda s, i: 4 * i * s["T"] * s["H"]),
    ("layer_norm", ""): (lambda s, i: 2 * i * s["T"] * s["H"], lambda s, i: 3 * i * s["T"] * s["H"]),
    ("layer_norm", "residual"): (lambda s, i: 4 * i * s["T"] * s["H"], lambda s, i: 4 * i * s["T"] * s["H"]),
    ("rope_", ""): (
        lambda s, i: 2 * i * s["T"] * s["N"] * s["D"],
        lambda s, i: 2 * i * s["T"] * s["N"] * s["D"],
    ),
    ("swiglu", ""): (lambda s, i: 3 * i * s["T"] * s["F"], lambda s, i: 5 * i * s["T"] * s["F"]),
    ("geglu", ""): (lambda s, i: 3 * i * s["T"] * s["F"], lambda s, i: 5 * i * s["T"] * s["F"]),
    ("vocab_parallel_cross_entropy", ""): (
        lambda s, i: i * s["T"] * s["V"],
        lambda s, i: 2 * i * s["T"] * s["V"],
    ),
    # Hidden states and weight are read, dh is written, dW is written in fp32; the logits need never exist.
    ("linear_cross_entropy", ""): (
        lambda s, i: i * (s["T"] + s["V"]) * s["H"],
        lambda s, i: (i * s["T"] + 4 * s["V"]) * s["H"],
    ),
    # q, k, v in, out out; back: those and the gradient in, three gradients out.
    ("attention", ""): (
        lambda s, i: 2 * i * s["B"] * s["S"] * (s["A"] + s["G"]) * s["D"],
        lambda s, i: 4 * i * s["B"] * s["S"] * (s["A"] + s["G"]) * s["D"],
    ),
    # g read, with the norm twice; m, v and master read and written; a copy written if weights are of 16 bits.
    ("adamw_step_", ""): (lambda s, i: (28 + _copy(i)) * s["P"], None),
    ("squared_norm", ""): (lambda s, i: 4 * s["P"], None),
    ("adamw_step_", "norm"): (lambda s, i: (32 + _copy(i)) * s["P"], None),
    ("wgrad_accumulate_", ""): (lambda s, i: 8 * s["O"] * s["K"] + i * s["T"] * (s["O"] + s["K"]), None),
    ("moe_permute", ""): (
        lambda s, i: i * s["T"] * s["H"] * (1 + s["k"]),
        lambda s, i: i * s["T"] * s["H"] * (1 + s["k"]),
    ),
    # Back: the gradient and, for the weights' own gradients, the rows are read.
    ("moe_unpermute", ""): (
        lambda s, i: i * s["T"] * s["H"] * (1 + s["k"]),
        lambda s, i: i * s["T"] * s["H"] * (1 + 2 * s["k"]),
    ),
}

# Matrix products alone: they run on the units whose speed the GEMM ceiling tells.
FLOPS: dict[str, tuple[Callable[[Shape], float] | None, Callable[[Shape], float] | None]] = {
    # Two products, of which the causal half counts; back, five of that size (arXiv 2307.08691).
    "attention": (
        lambda s: 2.0 * s["B"] * s["A"] * s["S"] ** 2 * s["D"],
        lambda s: 5.0 * s["B"] * s["A"] * s["S"] ** 2 * s["D"],
    ),
    "linear_cross_entropy": (lambda s: 2.0 * s["T"] * s["V"] * s["H"], lambda s: 4.0 * s["T"] * s["V"] * s["H"]),
    "wgrad_accumulate_": (lambda s: 2.0 * s["T"] * s["O"] * s["K"], None),
}


def least_bytes(op: str, case: str, which: str, shape: Shape, itemsize: int) -> int:
    """Bytes of a pass: "fwd", "bwd" or "fwd+bwd"."""
    forward, backward = BYTES[op, case]
    return int(sum(f(shape, itemsize) for f in _of(which, forward, backward)))


def matrix_flops(op: str, which: str, shape: Shape) -> int:
    """FLOPs of a pass's matrix products; 0 for operations without any."""
    forward, backward = FLOPS.get(op, (None, None))
    return int(sum(f(shape) for f in _of(which, forward, backward)))


def _of(which: str, forward: Any, backward: Any) -> list[Any]:
    chosen = {"fwd": (forward,), "bwd": (backward,), "fwd+bwd": (forward, backward)}[which]
    return [formula for formula in chosen if formula is not None]


# (operation, case, pass) -> (column, what an H200 or H100 should reach): percent of the measured copy or matrix product
# of the same machine, or TFLOP/s. Derived from the least bytes at those machines' rates; the best published figures
# are in docs/kernels-bench.md.
TARGETS: dict[tuple[str, str, str], tuple[str, float]] = {
    ("rms_norm", "", "fwd"): ("percent_of_copy", 97),
    ("rms_norm", "", "bwd"): ("percent_of_copy", 90),
    ("rms_norm", "residual", "fwd"): ("percent_of_copy", 95),
    ("rms_norm", "residual", "bwd"): ("percent_of_copy", 90),
    ("rope_", "", "fwd"): ("percent_of_copy", 92),
    ("swiglu", "", "fwd"): ("percent_of_copy", 95),
    ("swiglu", "", "bwd"): ("percent_of_copy", 92),
    ("vocab_parallel_cross_entropy", "", "fwd+bwd"): ("percent_of_copy", 92),
    ("linear_cross_entropy", "", "fwd+bwd"): ("percent_of_gemm", 88),
    ("adamw_step_", "norm", "fwd"): ("percent_of_copy", 93),
    ("wgrad_accumulate_", "", "fwd"): ("percent_of_gemm", 97),
    ("moe_permute", "", "fwd"): ("percent_of_copy", 90),
    ("attention", "", "fwd"): ("tflops", 650),
    ("attention", "", "bwd"): ("tflops", 560),
}
