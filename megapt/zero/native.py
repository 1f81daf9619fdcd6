"""The native backend: ZeRO stages 0 and 1 (arXiv 1910.02054) on flat buffers, in fp32 or fp64 throughout.

Parameters are views of one flat buffer per decay group, cut evenly over data-parallel ranks. Stage 0 all-reduces
gradients and updates everything everywhere; stage 1 reduce-scatters them, updates a shard and gathers the weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megapt.config import OptimizerConfig
from megapt.mesh import ParallelMesh, all_gather, reduce_scatter
from megapt.parallel.gradients import TiedWeights, finalize
from megapt.parallel.tensor import TensorParallel
from megapt.parameters import Parameter
from megapt.zero.accumulate import Accumulator
from megapt.zero.base import Fragment, StepResult, ZeroBackend, accumulation_dtype

_ALIGN = 64  # elements; keeps every shard on a cache line


class _Group:
    """Parameters with the same weight decay: flat weights and gradients, and this rank's shard of the state."""

    def __init__(self, parameters: Sequence[Parameter], decay: float, shards: int, rank: int) -> None:
        self.parameters, self.decay = list(parameters), decay
        first = self.parameters[0]
        self.offsets = [0]
        for p in self.parameters:
            self.offsets.append(self.offsets[-1] + p.numel())
        width = -(-self.offsets[-1] // (shards * _ALIGN)) * _ALIGN
        self.lo, self.hi = rank * width, (rank + 1) * width
        wide = accumulation_dtype(first.dtype)
        self.weights = torch.zeros(width * shards, dtype=first.dtype, device=first.device)
        self.grads = torch.zeros(width * shards, dtype=wide, device=first.device)
        for p, at in zip(self.parameters, self.offsets, strict=False):
            flat = self.weights[at : at + p.numel()]
            flat.copy_(p.data.flatten())
            p.data = flat.view(p.shape)
            p.main_grad = self.grads[at : at + p.numel()].view(p.shape)
        shard = self.weights[self.lo : self.hi]
        self.master = shard if first.dtype == wide else shard.to(wide)
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(self.master), torch.zeros_like(self.master)
        # Its own memory where it is a part: collectives must not write where they read.
        self.grad = self.grads if shards == 1 else torch.empty_like(self.master)
        self.counted = self._counted_ranges()

    def _counted_ranges(self) -> list[tuple[int, int]]:
        """Ranges of the shard that this rank counts in the norm, neighbours joined."""
        ranges: list[tuple[int, int]] = []
        for p, at in zip(self.parameters, self.offsets, strict=False):
            begin, end = max(at, self.lo) - self.lo, min(at + p.numel(), self.hi) - self.lo
            if begin >= end or not p.shard.primary:
                continue
            if ranges and ranges[-1][1] == begin:
                ranges[-1] = (ranges[-1][0], end)
            else:
                ranges.append((begin, end))
        return ranges

    def fragments(self) -> Iterator[Fragment]:
        for p, at in zip(self.parameters, self.offsets, strict=False):
            begin, end = max(at, self.lo), min(at + p.numel(), self.hi)
            if begin < end:
                here = slice(begin - self.lo, end - self.lo)
                tensors = {"weight": self.master, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
                yield Fragment(p, begin - at, end - begin, {name: t[here] for name, t in tensors.items()})


class NativeBackend(ZeroBackend):
    """See ZeroBackend; `stage` is 0 or 1."""

    def __init__(
        self,
        parameters: Sequence[Parameter],
        mesh: ParallelMesh,
        tp: TensorParallel,
        ties: TiedWeights,
        optimizer: OptimizerConfig,
        stage: int,
    ) -> None:
        super().__init__(parameters, mesh, tp, ties, optimizer)
        self.stage = stage
        self.sharded = stage == 1 and mesh.dp.size > 1
        shards, rank = (mesh.dp.size, mesh.dp.rank) if self.sharded else (1, 0)
        owned = [p for p in parameters if p.owner]
        kinds = ([p for p in owned if p.spec.decay], optimizer.weight_decay), (
            [p for p in owned if not p.spec.decay],
            0.0,
        )
        self.groups = [_Group(ps, decay, shards, rank) for ps, decay in kinds if ps]
        for p in parameters:
            if not p.owner:
                p.main_grad = torch.zeros_like(p, dtype=accumulation_dtype(p.dtype))
        self.accumulator = Accumulator(parameters)
        self._updates = torch.zeros((), dtype=torch.float32, device=mesh.device)

    def zero_grad(self) -> None:
        self.accumulator.begin()

    def step(self, lr: float) -> StepResult:
        self.accumulator.end()
        finalize(self.parameters, self.tp, self.ties)
        self._reduce()
        norm = self._norm()
        finite = torch.isfinite(norm)
        clip = self.optimizer.clip
        scale = ((norm + 1e-6) / clip).clamp_min(1.0) if clip > 0 else torch.ones_like(norm)
        self._updates += finite
        for group in self.groups:
            self._adamw(group, lr, scale, (~finite).float())
            if group.master.dtype != group.weights.dtype:
                group.weights[group.lo : group.hi].copy_(group.master)
            if self.sharded:
                shard = group.weights[group.lo : group.hi].clone()
                all_gather(group.weights, shard, group=self.mesh.dp.group)
        self.ties.share()
        return StepResult(norm, ~finite)

    def _reduce(self) -> None:
        for group in self.groups:
            if self.sharded:
                reduce_scatter(group.grad, group.grads, group=self.mesh.dp.group)
            else:
                self.mesh.dp.all_reduce(group.grads)

    def _norm(self) -> Tensor:
        """One collective: squares of what each rank counts, summed over all ranks that hold different parts."""
        total = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        for group in self.groups:
            for begin, end in group.counted:
                total += torch.linalg.vector_norm(group.grad[begin:end]).double().square()
        if self.sharded:
            dist.all_reduce(total)
        else:
            self.mesh.model.all_reduce(total)
        return total.sqrt()

    def _adamw(self, group: _Group, lr: float, scale: Tensor, skip: Tensor) -> None:
        grad = group.grad
        if grad.dtype == torch.float64:
            grad.div_(scale)  # the fused kernel would take the scale in fp32
            scale = torch.ones_like(scale)
        beta1, beta2 = self.optimizer.betas
        torch._fused_adamw_(
            [group.master],
            [grad],
            [group.exp_avg],
            [group.exp_avg_sq],
            [],
            [self._updates.clone()],
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            weight_decay=group.decay,
            eps=self.optimizer.eps,
            amsgrad=False,
            maximize=False,
            grad_scale=scale.float(),
            found_inf=skip,
        )

    def fragments(self) -> Iterator[Fragment]:
        for group in self.groups:
            yield from group.fragments()

    def loaded(self, updates: int) -> None:
        self._updates.fill_(updates)
        for group in self.groups:
            shard = group.master.to(group.weights.dtype)
            if self.sharded:
                all_gather(group.weights, shard, group=self.mesh.dp.group)
            else:
                group.weights.copy_(shard)
        self.ties.share()

    @property
    def updates(self) -> int:
        return int(self._updates)

    def describe(self) -> str:
        where = f"over {self.mesh.dp.size} ranks" if self.sharded else "replicated"
        wide = "fp64" if self.parameters[0].dtype == torch.float64 else "fp32"
        return f"native ZeRO {self.stage}: optimizer state {where}, {wide} reduction, fused AdamW"
