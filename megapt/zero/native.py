"""The native backend: ZeRO stages 0, 1 and 2 (arXiv 1910.02054) on flat buckets, in fp32 or fp64 throughout.

Stage 0 all-reduces gradients and updates everything everywhere. Stage 1 reduce-scatters them, updates a shard and
gathers the weights; stage 2 reduce-scatters those of each micro-batch, so that no rank keeps more than its shard.
Reductions run beside the backward pass, gathers beside the next forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from megapt.config import KernelsConfig, LossScaleConfig, OptimizerConfig, ZeroConfig
from megapt.mesh import ParallelMesh, all_reduce
from megapt.operations import OPERATIONS
from megapt.parallel.gradients import TiedWeights, finalize, is_partial
from megapt.parallel.tensor import TensorParallel
from megapt.parameters import Parameter
from megapt.zero.accumulate import fuses_products
from megapt.zero.base import Fragment, StepResult, ZeroBackend, accumulation_dtype
from megapt.zero.buckets import Bucket, make_buckets
from megapt.zero.loss_scale import LossScale
from megapt.zero.muon import Muon
from megapt.zero.optimizers import AdamW, Segment, segments
from megapt.zero.reduction import Overlap, Sharding
from megapt.zero.rounding import StochasticRounding
from megapt_kernels.adamw import squared_norm

if TYPE_CHECKING:
    from megapt.parallel.pipeline.runtime import Pipeline


class NativeBackend(ZeroBackend):
    """See ZeroBackend; `config.stage` is 0, 1, or 2 without a pipeline.

    loss_scale: for fp16 weights, else None. seed: of the run, for stochastic rounding. kernels: what updates shards and
    adds weight gradients.
    """

    def __init__(
        self,
        parameters: Sequence[Parameter],
        mesh: ParallelMesh,
        tp: TensorParallel,
        ties: TiedWeights,
        optimizer: OptimizerConfig,
        config: ZeroConfig,
        loss_scale: LossScaleConfig | None,
        seed: int,
        kernels: KernelsConfig,
    ) -> None:
        super().__init__(parameters, mesh, tp, ties, optimizer)
        self.stage = config.stage
        self.sharded = self.stage > 0 and mesh.dp.size > 1
        shards_gradients = self.stage == 2 and self.sharded
        owned = [p for p in self.parameters if p.owner]
        late = {p for p in owned if is_partial(p, tp) or p.shard.sharers > 1}
        # A copy on another stage, or on another chunk of this one, adds its part of the gradient at its own time.
        late |= {p for p in owned if p.spec.has_copy and not shards_gradients}
        shards = mesh.dp.size if self.sharded else 1
        self.buckets = make_buckets(owned, late, config.bucket, mesh.dp, shards, keep_grads=not shards_gradients)
        for p in self.parameters:
            if not p.owner:
                p.main_grad = torch.zeros_like(p, dtype=accumulation_dtype(p.dtype))
        self._completed = [p for p in self.parameters if p in late or not p.owner]
        accumulator = Sharding if shards_gradients else Overlap
        self.accumulator = accumulator(self.parameters, self.buckets)
        if fuses_products(kernels.wgrad, self.parameters[0].dtype, mesh.device):
            self.accumulator.product = kernels.wgrad
            tp.weight_gradients.add = self.accumulator.add_product
        self._segments = {bucket: segments(bucket, optimizer) for bucket in self.buckets}
        matrices = [s for s in self._all_segments() if s.treatment.kind == "muon"]
        self._norm_kernel = kernels.adamw
        self._rounding = StochasticRounding(seed) if optimizer.stochastic_rounding else None
        self._adamw: dict[Bucket, AdamW] = {}
        for bucket, found in self._segments.items():
            own = [s for s in found if s.treatment.kind == "adamw"]
            copies = [None if self._rounding is not None else self._copy(bucket, s) for s in own]
            self._adamw[bucket] = AdamW(own, copies, optimizer, kernels.adamw)
        self._muon = Muon(self.buckets, matrices, mesh, optimizer) if optimizer.kind == "muon" else None
        self._scaling = LossScale(loss_scale, mesh.device) if loss_scale is not None else None
        self._updates = torch.zeros((), dtype=torch.float32, device=mesh.device)
        self._needed_by: dict[nn.Module, list[Bucket]] = {}
        self._attached = False

    def _all_segments(self) -> Iterator[Segment]:
        return (segment for found in self._segments.values() for segment in found)

    def attach(self, pipeline: Pipeline) -> None:
        bucket_of = {p: b for b in self.buckets for p in b.parameters}

        def before(module: nn.Module) -> None:
            if module not in self._needed_by:
                found = {bucket_of[p]: None for p in module.parameters() if p in bucket_of}  # type: ignore[index]
                self._needed_by[module] = list(found)
            for bucket in self._needed_by[module]:
                bucket.gathered()

        for chunk in pipeline.chunks:
            chunk.before = before  # type: ignore[assignment]
        self._attached = True

    @property
    def loss_scale(self) -> Tensor | float:
        return 1.0 if self._scaling is None else self._scaling.value

    def zero_grad(self, micro_batches: int | None = None) -> None:
        self.accumulator.start(micro_batches)

    def _complete(self) -> None:
        """What the backward pass has left to do: completing gradients, and reducing them. Collective."""
        OPERATIONS.action = "completing gradients (tied and tensor-parallel parts)"
        self.accumulator.end()
        finalize(self._completed, self.tp, self.ties)
        OPERATIONS.action = "reducing gradients over data-parallel ranks"
        self.accumulator.finish()

    @torch.no_grad()
    def step(self, lr: float) -> StepResult:
        self._complete()
        OPERATIONS.action = "gradient norm"
        norm, scale = self._norm()
        OPERATIONS.action = "weight update and gather"
        finite = torch.isfinite(norm)
        self._updates += finite
        if self.buckets[0].dtype == torch.float64:
            for bucket in self.buckets:
                bucket.grad.div_(scale)  # the fused kernel would take the scale in fp32
            scale = torch.ones_like(scale)
        if self._muon is not None:
            self._muon.update(lr, scale, finite)
        skip, divisor = (~finite).float(), scale.float()
        for bucket in self._forward_order():
            self._adamw[bucket].update(lr, self._updates, divisor, skip)
            self._publish(bucket, updated=True)
            bucket.gather()
        if self._scaling is not None:
            self._scaling.update(finite)
        self._share()
        return StepResult(norm, ~finite)

    def _forward_order(self) -> Iterator[Bucket]:
        """Late buckets hold what the first layer needs."""
        return reversed(self.buckets)

    def _norm(self) -> tuple[Tensor, Tensor]:
        """The norm before clipping, and what gradients are to be divided by: for clipping and for the loss scale.

        One collective: squares of what each rank counts, summed over all ranks that hold different parts.
        """
        counted = [bucket.grad[begin:end] for bucket in self.buckets for begin, end in bucket.counted()]
        total = squared_norm(counted, device=self.mesh.device, impl=self._norm_kernel)
        if self.sharded:
            all_reduce(total)
        else:
            self.mesh.model.all_reduce(total)
        norm = total.sqrt() / self.loss_scale
        clip = self.optimizer.clip
        scale = ((norm + 1e-6) / clip).clamp_min(1.0) if clip > 0 else torch.ones_like(norm)
        return norm, scale * self.loss_scale

    def _publish(self, bucket: Bucket, updated: bool = False) -> None:
        """The masters of this rank's shard become weights. updated: AdamW has just written what it updates."""
        weights = bucket.weights[bucket.lo : bucket.lo + bucket.width]
        if self._rounding is not None:
            for piece in bucket.pieces():
                here = slice(piece.begin, piece.end)
                self._rounding.round(weights[here], bucket.master[here], piece.parameter, piece.start, self._updates)
            return
        for segment in self._segments[bucket]:
            copy = self._copy(bucket, segment)
            if copy is not None and not (updated and segment.treatment.kind == "adamw"):
                copy.copy_(segment.master)

    @staticmethod
    def _copy(bucket: Bucket, segment: Segment) -> Tensor | None:
        """The weights of a segment, where they are not its masters themselves."""
        if bucket.weights.dtype == bucket.dtype:
            return None
        return bucket.weights[bucket.lo :][segment.pieces[0].begin : segment.pieces[-1].end]

    def _share(self) -> None:
        """Tied copies follow their owners. Without a pipeline nobody else waits for the weights."""
        for bucket in self.buckets:
            if not self._attached or any(p.spec.has_copy for p in bucket.parameters):
                bucket.gathered()
        self.ties.share()

    def fragments(self) -> Iterator[Fragment]:
        for bucket in self.buckets:
            bucket.gathered()  # masters may be views of the weights
        order = {p: index for index, p in enumerate(self.parameters)}
        found = [fragment for segment in self._all_segments() for fragment in segment.fragments()]
        yield from sorted(found, key=lambda fragment: order[fragment.parameter])

    @torch.no_grad()
    def loaded(self, updates: int, scalars: dict[str, float] | None = None) -> None:
        self._updates.fill_(updates)
        if self._scaling is not None:
            self._scaling.load(scalars or {})
        for bucket in self._forward_order():
            self._publish(bucket)
            bucket.gather()
        self._share()

    def scalars(self) -> dict[str, float]:
        return {} if self._scaling is None else self._scaling.scalars()

    @property
    def updates(self) -> int:
        return int(self._updates)

    def describe(self) -> str:
        parts = ("optimizer state", "gradients")[: self.stage]
        where = f"{' and '.join(parts)} {f'over {self.mesh.dp.size} ranks' if self.sharded else 'replicated'}"
        wide = "fp64" if self.parameters[0].dtype == torch.float64 else "fp32"
        update = "fused AdamW" if self._muon is None else f"Muon ({str(self._muon.dtype)[6:]}) and fused AdamW"
        more = ", stochastic rounding" if self._rounding is not None else ""
        more += ", dynamic loss scale" if self._scaling is not None else ""
        count = "one bucket" if len(self.buckets) == 1 else f"{len(self.buckets)} buckets"
        buckets = f"{wide} reduction in {count} during the backward pass"
        return f"native ZeRO {self.stage}: {where}, {buckets}, {update}{more}"
