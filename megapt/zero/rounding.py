"""Stochastic rounding of fp32 masters to bf16 weights (arXiv 2010.06192), the same in every layout.

An element's draw depends on (seed, parameter's name, update number, element's index in the global tensor) alone, so
that all ranks that hold a weight round it alike, whatever part of it each of them keeps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megapt.parameters import Parameter, derive_key, philox

# Elements drawn at a time: each takes eight bytes several times over while it is drawn.
_BLOCK_CPU = 1 << 15
_BLOCK_GPU = 1 << 24

_UPDATE_SHIFT = 37  # counters are (update, element / 8): 2^40 elements and 2^26 updates


class StochasticRounding:
    """Rounds up with the probability that keeps the expected value, so that updates below half a bf16 step count."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._keys: dict[str, tuple[int, int]] = {}

    def round(self, out: Tensor, master: Tensor, parameter: Parameter, start: int, updates: Tensor) -> None:
        """out (bf16), master (fp32) [n]: elements [start, start + n) of the parameter's flattened local shard.
        updates: scalar on the device, the number of updates that the masters have seen."""
        spec = parameter.spec
        if spec.name not in self._keys:
            self._keys[spec.name] = derive_key(self.seed, f"{spec.name}/rounding")
        key, high = self._keys[spec.name], updates.long() << _UPDATE_SHIFT
        size = _BLOCK_CPU if out.device.type == "cpu" else _BLOCK_GPU
        for block in _blocks(parameter, start, start + out.numel(), size):
            here = slice(block.begin - start, block.begin - start + block.rows * block.count)
            out[here] = _round(master[here], _draw(key, high, block).flatten())


@dataclass(frozen=True)
class _Block:
    """rows x count neighbours of the flattened local shard, from `begin` on; row i lies from at + i x stride on in the
    global tensor."""

    begin: int
    rows: int
    count: int
    at: int
    stride: int


def _blocks(parameter: Parameter, start: int, stop: int, size: int) -> Iterator[_Block]:
    """[start, stop) of the flattened local shard in blocks of about `size`: of many whole rows, or a part of one."""
    spec, shard = parameter.spec, parameter.shard
    inner = math.prod(spec.shape[shard.dim + 1 :])
    run, stride, offset = shard.shape[shard.dim] * inner, spec.shape[shard.dim] * inner, shard.start * inner
    begin = start
    while begin < stop:
        row, column = divmod(begin, run)
        rows, count = 1, min(stop - begin, run - column, size)
        if count == run:
            rows = min((stop - begin) // run, max(1, size // run))
        yield _Block(begin, rows, count, row * stride + offset + column, stride)
        begin += rows * count


def _draw(key: tuple[int, int], high: Tensor, block: _Block) -> Tensor:
    """16 random bits for each element of a block: int32 [rows, count]. A counter gives eight neighbours theirs."""
    at, count, device = block.at, block.count, high.device
    same = block.rows == 1 or block.stride % 8 == 0  # all rows begin at the same place of their first eight
    groups = ((at % 8 if same else 7) + count + 7) // 8
    starts = torch.arange(block.rows, device=device).mul_(block.stride).add_(at).unsqueeze(1)
    counters = (starts >> 3) + torch.arange(groups, device=device) + high
    words = torch.stack(philox(counters, key), dim=2)
    bits = torch.stack([words & 0xFFFF, words >> 16], dim=3).flatten(1)
    if same:
        return bits[:, at % 8 : at % 8 + count].int()
    return bits.gather(1, (starts & 7) + torch.arange(count, device=device)).int()


def _round(master: Tensor, bits: Tensor) -> Tensor:
    """fp32 [n] -> fp32 numbers that bf16 holds exactly. What is not finite stays so: it has no bits to round."""
    whole = (master.view(torch.int32) + bits) & -0x10000
    return torch.where(master.isfinite(), whole.view(torch.float32), master)
