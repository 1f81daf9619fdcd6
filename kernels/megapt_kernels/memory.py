"""What a loss needs beside its inputs, counted without a GPU: `python -m megapt_kernels.memory`.

The operations run on tensors without data, of the real sizes, and every block of memory that an operator makes is
counted while it lives. What a kernel takes for itself while it runs, and what an allocator wastes, is not seen.
"""

from __future__ import annotations

import argparse
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megapt_kernels import library
from megapt_kernels.cross_entropy import _LinearCrossEntropy, _VocabParallelCrossEntropy
from megapt_kernels.cross_entropy_blocks import CudaSoftmax, PlainSoftmax, Rules


class Peak(TorchDispatchMode):
    """Within it: the most bytes that tensors made since held at a time, and the largest of them."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.live = self.peak = self.largest = 0
        self._seen = {t.untyped_storage()._cdata for t in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.live += size
        self.peak, self.largest = max(self.peak, self.live), max(self.largest, size)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


@dataclass(frozen=True)
class Need:
    """Bytes beside h, weight and target: the most at a time, the largest tensor, and what is left (the gradients)."""

    name: str
    peak: int
    largest: int
    left: int


def needs(tokens: int, hidden: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> list[Need]:
    """Of forward and backward of the projection and its loss, each way to compute them."""

    def plain(h: Tensor, weight: Tensor, target: Tensor) -> Any:
        F.cross_entropy(F.linear(h, weight), target, reduction="sum").backward()
        return h.grad, weight.grad

    def widened(h: Tensor, weight: Tensor, target: Tensor) -> Any:
        F.cross_entropy(F.linear(h, weight).float(), target, reduction="sum").backward()
        return h.grad, weight.grad

    def by_columns(softmax_type: Any) -> Callable[..., Any]:
        def run(h: Tensor, weight: Tensor, target: Tensor) -> Any:
            logits = F.linear(h, weight)
            _VocabParallelCrossEntropy.apply(logits, target, None, softmax_type, rules).sum().backward()
            return h.grad, weight.grad

        return run

    def by_blocks(softmax_type: Any) -> Callable[..., Any]:
        def run(h: Tensor, weight: Tensor, target: Tensor) -> Any:
            _LinearCrossEntropy.apply(h, weight, target, None, softmax_type, rules, True).backward()
            return h.grad, weight.grad

        return run

    rules = Rules(0, columns, -100, None, 0.0)
    ways = {
        "F.linear, F.cross_entropy": plain,
        "the same, of logits in fp32": widened,
        "vocab_parallel_cross_entropy, reference": by_columns(PlainSoftmax),
        "vocab_parallel_cross_entropy, cuda": by_columns(CudaSoftmax),
        "linear_cross_entropy, reference": by_blocks(PlainSoftmax),
        "linear_cross_entropy, cuda": by_blocks(CudaSoftmax),
    }
    if library.loaded() is None:
        ways = {name: way for name, way in ways.items() if not name.endswith("cuda")}
    return [_need(name, way, tokens, hidden, columns, dtype) for name, way in ways.items()]


def _need(name: str, way: Callable[..., Any], tokens: int, hidden: int, columns: int, dtype: torch.dtype) -> Need:
    h, weight = (torch.empty(n, hidden, dtype=dtype, device="meta", requires_grad=True) for n in (tokens, columns))
    target = torch.empty(tokens, dtype=torch.int64, device="meta")
    with Peak(h, weight, target) as peak:
        left = way(h, weight, target)
        kept = peak.live
    del left
    return Need(name, peak.peak, peak.largest, kept)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m megapt_kernels.memory", description=__doc__)
    for name, default, meaning in (
        ("tokens", 8192, "tokens of a micro-batch"),
        ("hidden", 4096, "width of the model"),
        ("columns", 128256, "rows of the vocabulary on this rank"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{meaning} (default: {default})")
    arguments = parser.parse_args()
    try:  # only for the operators' shapes: nothing runs
        library.load_emulated()
    except Exception as error:
        print(f"Without the rows of the CUDA kernels, which cannot be built here: {error}\n")
    print("| bf16 | peak, GiB | largest tensor, GiB | left, GiB |\n|---|---|---|---|")
    for need in needs(arguments.tokens, arguments.hidden, arguments.columns):
        sizes = " | ".join(f"{size / 2**30:.2f}" for size in (need.peak, need.largest, need.left))
        print(f"| {need.name} | {sizes} |")


if __name__ == "__main__":
    main()
