"""Muon on sharded state: momentum orthogonalised matrix by matrix, each whole matrix by one rank.

Momentum is updated where its shard lies. Each matrix of a stage has an owner among the data x tensor ranks; two
exchanges (over dp, then over tp) bring it there, the owner orthogonalises it, and two bring the result back. A matrix
element thus travels at most twice each way, in the precision of the iteration: of n elements of a tensor rank's
matrices, a rank sends about 4 n / dp numbers per step, where reducing the gradients sends n. So no rank ever holds more
than its share of whole matrices, and every layout computes the same as one process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megapt.config import OptimizerConfig
from megapt.mesh import Axis, ParallelMesh, all_to_all
from megapt.parameters import Parameter, Shard
from megapt.zero.buckets import Bucket, Piece
from megapt.zero.optimizers import Segment, treatment

# Keller Jordan's quintic: it lifts small singular values fast, and brings all of them near one rather than to it.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_EPS = 1e-7


def orthogonalise(matrix: Tensor, iterations: int) -> Tensor:
    """Singular values of [m, n] brought near one by Newton-Schulz iterations, in the matrix' own precision."""
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.t() if tall else matrix
    x = x / x.norm().clamp_min(_EPS)
    for _ in range(iterations):
        gram = x @ x.t()
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.t() if tall else x


def _cost(shape: Sequence[int]) -> int:
    """Multiplications of one iteration."""
    small, large = min(shape), max(shape)
    return small * small * (2 * large + small)


@dataclass(frozen=True)
class _Matrix:
    """A matrix of this stage: who orthogonalises it, and which part of its flattened local shard each data-parallel
    rank keeps. shards: by tensor rank."""

    parameter: Parameter
    intervals: list[tuple[int, int]]
    shards: list[Shard]
    owner: tuple[int, int]  # (dp, tp)

    @property
    def numel(self) -> int:
        return self.parameter.numel()


class Muon:
    """Update of the segments of matrices: their mean square is `rms` squared whatever the shape (arXiv 2502.16982),
    with decoupled weight decay.

    Collective over dp and tp.
    """

    def __init__(
        self, buckets: Sequence[Bucket], members: Sequence[Segment], mesh: ParallelMesh, optimizer: OptimizerConfig
    ) -> None:
        self.dp, self.tp = mesh.dp, mesh.tp
        self.optimizer, self.config, self.device = optimizer, optimizer.muon, mesh.device
        self.members = list(members)
        for segment in self.members:
            segment.state = {"momentum": torch.zeros_like(segment.master)}
        self.matrices = self._assign(buckets)
        self.sharded = any(b.shards > 1 for b in buckets)
        wide = buckets[0].dtype
        on_gpu = mesh.device.type == "cuda" and wide == torch.float32
        self.dtype = torch.bfloat16 if on_gpu else wide

    def _assign(self, buckets: Sequence[Bucket]) -> list[_Matrix]:
        """Matrices in one order on all ranks, the costliest ones first given to the rank with the least to do."""
        found = [(p, b) for b in buckets for p in b.parameters if treatment(p, self.optimizer).kind == "muon"]
        load = {(d, t): 0 for d in range(self.dp.size) for t in range(self.tp.size)}
        owners: dict[Parameter, tuple[int, int]] = {}
        for p, _ in sorted(found, key=lambda pair: -_cost(pair[0].spec.shape)):
            owners[p] = min(load, key=lambda rank: load[rank])
            load[owners[p]] += _cost(p.spec.shape)
        matrices = []
        for p, bucket in found:
            assert len(p.spec.shape) == 2 and p.shard.length == p.shard.shape[p.shard.dim]
            shards = [p.spec.shard(t, self.tp.size) for t in range(self.tp.size)]
            intervals = [bucket.interval(p, d) for d in range(self.dp.size)]
            matrices.append(_Matrix(p, intervals, shards, owners[p]))
        return matrices

    @torch.no_grad()
    def update(self, lr: float, scale: Tensor, finite: Tensor) -> None:
        """One update with gradients divided by `scale`, or none unless `finite`: scalars on the device."""
        pieces = self._momenta(scale, finite)
        directions = self._directions({p: u.to(self.dtype) for p, (_, _, u) in pieces.items()})
        for p, (segment, piece, u) in pieces.items():
            step = lr * segment.treatment.factor
            size = step * self.config.rms * math.sqrt(max(p.spec.shape))
            master = segment.view(segment.master, piece)
            factor = finite.to(master.dtype)
            master.mul_(1 - factor * (step * segment.treatment.decay))
            master.addcmul_(directions[p].to(u.dtype), factor, value=-size)

    def _momenta(self, scale: Tensor, finite: Tensor) -> dict[Parameter, tuple[Segment, Piece, Tensor]]:
        """Each piece's momentum brought up to date, and what is to be orthogonalised."""
        found = {}
        for segment in self.members:
            momentum = segment.state["momentum"]
            # A gradient that is not finite must not even be multiplied by zero.
            grad = torch.where(finite, segment.grad / scale.to(segment.grad.dtype), 0.0)
            momentum.lerp_(grad, (1 - self.config.momentum) * finite.to(grad.dtype))
            update = grad.lerp_(momentum, self.config.momentum) if self.config.nesterov else momentum
            for piece in segment.pieces:
                found[piece.parameter] = (segment, piece, segment.view(update, piece))
        return found

    def _directions(self, pieces: dict[Parameter, Tensor]) -> dict[Parameter, Tensor]:
        """The orthogonalised matrices, of each the piece that this rank keeps: 1-D."""
        shards = self._collect_shards(pieces)
        results = self._orthogonalised(shards)
        return self._return_pieces(results)

    def _collect_shards(self, pieces: dict[Parameter, Tensor]) -> dict[Parameter, Tensor]:
        """Flattened local shards of the matrices whose owner has this rank's place on dp."""
        here = self.dp.rank
        if not self.sharded:
            return {m.parameter: pieces[m.parameter] for m in self.matrices if m.owner[0] == here}
        none = self._empty()
        sent = _by_rank(self.dp, self.matrices, lambda m, d: m.owner[0] == d)
        parts = [[pieces.get(m.parameter, none) for m in matrices] for matrices in sent]
        mine = sent[here]
        sizes = [[m.intervals[d][1] - m.intervals[d][0] for m in mine] for d in range(self.dp.size)]
        received = self._exchange(self.dp, parts, sizes)
        return {
            m.parameter: torch.cat([received[d][index] for d in range(self.dp.size)]) for index, m in enumerate(mine)
        }

    def _orthogonalised(self, shards: dict[Parameter, Tensor]) -> dict[Parameter, Tensor]:
        """The local shards of the orthogonalised matrices, for each local shard given."""
        here = self.tp.rank
        present = [m for m in self.matrices if m.parameter in shards]
        sent = _by_rank(self.tp, present, lambda m, t: m.owner[1] == t)
        # Of ranks that hold the same rows, the first one sends.
        parts = [[shards[m.parameter] for m in ms if m.shards[here].primary] for ms in sent]
        mine = sent[here]
        sizes = [[m.numel for m in mine if m.shards[t].primary] for t in range(self.tp.size)]
        received = [iter(parts) for parts in self._exchange(self.tp, parts, sizes)]
        whole = []
        for m in mine:
            matrix = torch.empty(m.parameter.spec.shape, dtype=self.dtype, device=m.parameter.device)
            for t, shard in enumerate(m.shards):
                if shard.primary:
                    matrix[shard.slices()] = next(received[t]).view(shard.shape)
            whole.append(orthogonalise(matrix, self.config.iterations))
        back = [
            [x[m.shards[t].slices()].flatten() for m, x in zip(mine, whole, strict=True)] for t in range(self.tp.size)
        ]
        results = self._exchange(self.tp, back, [[m.numel for m in matrices] for matrices in sent])
        return {m.parameter: x for ms, xs in zip(sent, results, strict=True) for m, x in zip(ms, xs, strict=True)}

    def _return_pieces(self, results: dict[Parameter, Tensor]) -> dict[Parameter, Tensor]:
        here = self.dp.rank
        mine = [m for m in self.matrices if m.owner[0] == here]
        parts = [[results[m.parameter][slice(*m.intervals[d])] for m in mine] for d in range(self.dp.size)]
        owned = _by_rank(self.dp, self.matrices, lambda m, d: m.owner[0] == d)
        sizes = [[m.intervals[here][1] - m.intervals[here][0] for m in matrices] for matrices in owned]
        received = self._exchange(self.dp, parts, sizes)
        return {m.parameter: x for ms, xs in zip(owned, received, strict=True) for m, x in zip(ms, xs, strict=True)}

    def _exchange(self, axis: Axis, parts: list[list[Tensor]], sizes: list[list[int]]) -> list[list[Tensor]]:
        """parts[r] go to rank r; what comes from rank r are tensors of sizes[r]."""
        if axis.size == 1:
            return parts
        outgoing = torch.cat([self._empty(), *(t for ts in parts for t in ts)])
        incoming = self._empty(sum(sum(s) for s in sizes))
        received, sent = [sum(s) for s in sizes], [sum(t.numel() for t in ts) for ts in parts]
        all_to_all(incoming, outgoing, received, sent, axis.group)
        flat = iter(incoming.split([n for s in sizes for n in s]))
        return [[next(flat) for _ in s] for s in sizes]

    def _empty(self, numel: int = 0) -> Tensor:
        return torch.empty(numel, dtype=self.dtype, device=self.device)


def _by_rank(axis: Axis, matrices: Sequence[_Matrix], belongs: Callable[[_Matrix, int], bool]) -> list[list[_Matrix]]:
    return [[m for m in matrices if belongs(m, rank)] for rank in range(axis.size)]
