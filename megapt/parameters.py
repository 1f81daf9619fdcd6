"""A parameter knows itself: the table from which every other room reads names, shapes, shards, decay and ties.

`ParameterSpec` says what a parameter is in the whole model; `Shard` says which part of it a tensor rank holds.
Initialisation draws every element from (seed, parameter's name, element's global index) alone, so the initial
weights are the same bit for bit in any layout and on any device, and no rank draws more than its own shard.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from typing import Literal

import torch
from torch import Tensor, nn

from megapt.errors import UserError


class Partial(Enum):
    """When the gradients that tensor ranks compute for a parameter they all hold are parts of a sum."""

    NEVER = "never"  # each rank computes the whole gradient
    SEQUENCE = "sequence"  # under sequence parallelism each rank sees its own tokens only
    ALWAYS = "always"  # each rank computes with its own heads only


Role = Literal["embedding", "head", "matrix", "vector"]


@dataclass(frozen=True)
class Split:
    """How a parameter is cut over tensor ranks: along `dim`, in indivisible units of `unit` elements.

    With fewer units than ranks (key/value heads), consecutive ranks share a unit. With `padded`, the last ranks
    hold rows beyond the end, which are zero, receive no gradient and are in no checkpoint.
    """

    dim: int
    unit: int = 1
    padded: bool = False


@dataclass(frozen=True)
class ParameterSpec:
    """One row of the table.

    name: global name, e.g. `layers.17.attention.q.weight`; shape: global shape; split: None if every tensor rank
    holds all of it; std: standard deviation of the normal initialisation, or None for the constant `fill`;
    decay: whether weight decay applies; layer: index of its decoder layer, None outside the layers;
    tied_to: name of the parameter whose values it shares; has_copy: whether another one is tied to it (set by the
    table); partial: see `Partial`; lookup: whether rows are looked up rather than multiplied with; end: outside the
    layers, which end of the model it belongs to.
    """

    name: str
    shape: tuple[int, ...]
    split: Split | None = None
    std: float | None = None
    fill: float = 0.0
    decay: bool = True
    layer: int | None = None
    tied_to: str | None = None
    has_copy: bool = False
    partial: Partial = Partial.NEVER
    lookup: bool = False
    end: Literal["first", "last"] | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def role(self) -> Role:
        """What optimizers tell apart: rows looked up, the output projection, other matrices, the rest."""
        if len(self.shape) < 2:
            return "vector"
        if self.lookup:
            return "embedding"
        return "head" if self.end == "last" else "matrix"

    def shard(self, rank: int, size: int, padding: int = 1) -> Shard:
        """The part held by tensor rank `rank` of `size`; padded parameters are cut in multiples of `padding` rows."""
        if self.split is None or size == 1 and not self.split.padded:
            return Shard(self.shape, 0, 0, self.shape[0], primary=rank == 0)
        dim, unit, extent = self.split.dim, self.split.unit, self.shape[self.split.dim]
        if self.split.padded:
            width = math.ceil(extent / (size * padding)) * padding
            start = min(rank * width, extent)
            shape = (*self.shape[:dim], width, *self.shape[dim + 1 :])
            return Shard(shape, dim, start, min(width, extent - start), primary=True)
        units = extent // unit
        if units % size and size % units:
            raise UserError(f"{self.name}: {units} units of {unit} cannot be cut over {size} tensor ranks")
        sharers = max(1, size // units)
        width = max(1, units // size) * unit
        shape = (*self.shape[:dim], width, *self.shape[dim + 1 :])
        return Shard(shape, dim, rank // sharers * width, width, primary=rank % sharers == 0, sharers=sharers)


@dataclass(frozen=True)
class Shard:
    """A tensor rank's part of a parameter: rows [start, start + length) along `dim` of the global tensor.

    shape: local shape (its extent along `dim` may exceed `length`: padding); primary: whether this rank is the one
    that counts the part in norms and writes it to checkpoints; sharers: ranks that hold the same part.
    """

    shape: tuple[int, ...]
    dim: int
    start: int
    length: int
    primary: bool = True
    sharers: int = 1

    def slices(self) -> tuple[slice, ...]:
        """Index of the valid part within the global tensor."""
        return tuple(
            slice(self.start, self.start + self.length) if d == self.dim else slice(0, n)
            for d, n in enumerate(self.shape)
        )

    def valid(self, local: Tensor) -> Tensor:
        """The part of a local tensor that is not padding (a view)."""
        return local.narrow(self.dim, 0, self.length)


class Parameter(nn.Parameter):
    """A rank's shard of a parameter, which knows its row of the table and its place in the global tensor.

    owner: False on the copy of a tied parameter that another stage owns, which norms and checkpoints leave out.
    main_grad: where its gradient accumulates in full precision; handed out by the ZeRO backend.
    """

    spec: ParameterSpec
    shard: Shard
    owner: bool
    main_grad: Tensor


class ParameterTable(dict[str, ParameterSpec]):
    """All parameters of a model by global name, in the order of the forward pass."""

    def __init__(self, specs: Iterable[ParameterSpec]) -> None:
        rows = list(specs)
        owners = {spec.tied_to for spec in rows}
        super().__init__((spec.name, replace(spec, has_copy=spec.name in owners)) for spec in rows)

    def count(self) -> int:
        """Number of distinct parameters (tied ones once)."""
        return sum(spec.numel for spec in self.values() if spec.tied_to is None)


# Elements drawn at a time: on a CPU the working set stays in cache; elsewhere few large kernels count.
_DRAW_CPU = 1 << 15
_DRAW_GPU = 1 << 24


def initialise_(local: Tensor, spec: ParameterSpec, shard: Shard, seed: int) -> None:
    """Fill a rank's shard in place. Deterministic per element; padding becomes zero."""
    with torch.no_grad():
        local.zero_()
        valid = shard.valid(local)
        if spec.std is None:
            valid.fill_(spec.fill)
            return
        key = derive_key(seed, spec.tied_to or spec.name)
        inner = math.prod(spec.shape[shard.dim + 1 :])
        outer = math.prod(spec.shape[: shard.dim])
        # In the global tensor, each of `outer` rows of the shard is a run of consecutive elements.
        run, stride, begin = shard.length * inner, spec.shape[shard.dim] * inner, shard.start * inner
        out = local.view(outer, -1)[:, :run]
        draw = _DRAW_CPU if local.device.type == "cpu" else _DRAW_GPU
        for rows, columns in _blocks(outer, run, draw):
            start = begin + rows.start * stride + columns.start
            drawn = normal_rows(key, start, len(columns), len(rows), stride, local.device).mul_(spec.std)
            # Rounding goes through fp32 in every precision, so that a bf16 run starts from the fp32 run's weights.
            out[rows.start : rows.stop, columns.start : columns.stop] = drawn.float()


def _blocks(rows: int, columns: int, size: int) -> Iterator[tuple[range, range]]:
    """Cut a matrix into blocks of about `size` elements: of many whole rows, or of a part of one."""
    width = max(1, min(size, columns))
    height = max(1, size // width)
    for row in range(0, rows, height):
        for column in range(0, columns, width):
            yield range(row, min(row + height, rows)), range(column, min(column + width, columns))


def derive_key(seed: int, name: str) -> tuple[int, int]:
    """Two 32-bit words that depend on the seed and the name alone."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def philox(counter: Tensor, key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al., SC11) of 64-bit counters: four int64 tensors holding 32-bit words.

    Built from 64-bit integer operations only, whose results are the same on every device.
    """
    mask = 0xFFFFFFFF
    c0, c1 = counter & mask, (counter >> 32) & mask
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # 32 x 32 bits: exact modulo 2^64
        c0, c1, c2, c3 = (
            ((p1 >> 32) & mask) ^ c1 ^ k0,
            p1 & mask,
            ((p0 >> 32) & mask) ^ c3 ^ k1,
            p0 & mask,
        )
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return c0, c1, c2, c3


def normal_rows(
    key: tuple[int, int], start: int, count: int, rows: int, stride: int, device: torch.device | str
) -> Tensor:
    """Elements [start + i x stride, start + i x stride + count) of the sequence for i < rows: fp64 [rows, count].

    The inverse of the normal distribution function (Wichura's AS 241) by separate IEEE operations, which round
    identically on CPUs and GPUs, unlike library logarithms and cosines. Nothing waits for a GPU.
    """
    # A counter gives four neighbours, so a row is drawn in whole groups of four and cut to size.
    same = rows == 1 or stride % 4 == 0  # all rows begin at the same place of their first group
    groups = ((start % 4 if same else 3) + count + 3) // 4
    starts = torch.arange(rows, device=device).mul_(stride).add_(start).unsqueeze(1)
    counters = (starts >> 2) + torch.arange(groups, device=device)
    words = torch.stack(philox(counters, key), dim=2).flatten(1)
    if same:
        words = words[:, start % 4 : start % 4 + count]
    else:
        words = words.gather(1, (starts & 3) + torch.arange(count, device=device))
    return _inverse((words.flatten().double() + 0.5) * 2.0**-32 - 0.5).view(rows, count)


def _inverse(q: Tensor) -> Tensor:
    """The normal quantile at 0.5 + q: fp64 [n] -> fp64 [n]."""
    value = _centre(q)
    in_tail = q.abs() > 0.425
    if q.device.type != "cpu":  # the size of a selection is known to the host only after a wait
        return torch.where(in_tail, _tail(q), value)
    at = in_tail.nonzero(as_tuple=True)[0]
    value[at] = _tail(q[at])
    return value


def _centre(q: Tensor) -> Tensor:
    r = 0.180625 - q * q
    return q * (_horner(_A, r) / _horner(_B, r))


def _tail(q: Tensor) -> Tensor:
    s = (-_log(0.5 - q.abs())).sqrt()  # the tails end at 2^-33, so s < 5 and one branch suffices
    return torch.sign(q) * (_horner(_C, s - 1.6) / _horner(_D, s - 1.6))


def _horner(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    total = torch.full_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        total = total.mul_(x).add_(c)
    return total


def _log(x: Tensor) -> Tensor:
    """Natural logarithm of positive fp64 numbers by exact scaling and an odd series: the same bits everywhere."""
    mantissa, exponent = torch.frexp(x)
    low = mantissa < 0.7071067811865476
    mantissa = torch.where(low, mantissa * 2, mantissa)
    exponent = exponent.double() - low.double()
    z = (mantissa - 1) / (mantissa + 1)  # |z| < 0.172
    series = _horner(tuple(1.0 / (2 * k + 1) for k in range(11)), z * z)
    return series * z * 2 + exponent * 0.6931471805599453


# Coefficients of AS 241 (PPND16): numerators and denominators of the centre (A, B) and of the tails (C, D).
_A = (
    3.3871328727963666080, 133.14166789178437745, 1971.5909503065514427, 13731.693765509461125,
    45921.953931549871457, 67265.770927008700853, 33430.575583588128105, 2509.0809287301226727,
)  # fmt: skip
_B = (
    1.0, 42.313330701600911252, 687.18700749205790830, 5394.1960214247511077,
    21213.794301586595867, 39307.895800092710610, 28729.085735721942674, 5226.4952788528545610,
)  # fmt: skip
_C = (
    1.42343711074968357734, 4.63033784615654529590, 5.76949722146069140550, 3.64784832476320460504,
    1.27045825245236838258, 0.241780725177450611770, 0.0227238449892691845833, 0.000774545014278341407640,
)  # fmt: skip
_D = (
    1.0, 2.05319162663775882187, 1.67638483018380384940, 0.689767334985100004550,
    0.148103976427480074590, 0.0151986665636164571966, 0.000547593808499534494600, 1.05075007164441684324e-9,
)  # fmt: skip
