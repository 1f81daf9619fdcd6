"""What is updated alike within a shard, and AdamW on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megapt.config import OptimizerConfig
from megapt.parameters import Parameter
from megapt.zero.base import Fragment
from megapt.zero.buckets import Bucket, Piece
from megapt_kernels.adamw import AdamWShard, adamw_step_


@dataclass(frozen=True)
class Treatment:
    """kind: which optimizer; decay: its weight decay; factor: on the learning rate."""

    kind: str
    decay: float
    factor: float


def treatment(parameter: Parameter, optimizer: OptimizerConfig) -> Treatment:
    spec = parameter.spec
    muon = optimizer.kind == "muon" and spec.role == "matrix"
    decay = optimizer.weight_decay if spec.decay else 0.0
    return Treatment("muon" if muon else "adamw", decay, getattr(optimizer.lr_scale, spec.role))


@dataclass
class Segment:
    """A run of a bucket's shard under one treatment.

    master, grad: views of the bucket's, 1-D. state: further tensors of the same size, by their names in checkpoints.
    """

    treatment: Treatment
    pieces: list[Piece]
    master: Tensor
    grad: Tensor
    state: dict[str, Tensor] = field(default_factory=dict)

    def view(self, tensor: Tensor, piece: Piece) -> Tensor:
        """A piece's part of one of this segment's tensors."""
        first = self.pieces[0].begin
        return tensor[piece.begin - first : piece.end - first]

    def fragments(self) -> Iterator[Fragment]:
        tensors = {"weight": self.master, **self.state}
        for piece in self.pieces:
            views = {name: self.view(tensor, piece) for name, tensor in tensors.items()}
            yield Fragment(piece.parameter, piece.start, piece.end - piece.begin, views)


def segments(bucket: Bucket, optimizer: OptimizerConfig) -> list[Segment]:
    """The bucket's shard, cut where the treatment changes."""
    runs: list[tuple[Treatment, list[Piece]]] = []
    for piece in bucket.pieces():
        how = treatment(piece.parameter, optimizer)
        if runs and runs[-1][0] == how:
            runs[-1][1].append(piece)
        else:
            runs.append((how, [piece]))
    out = []
    for how, pieces in runs:
        here = slice(pieces[0].begin, pieces[-1].end)
        out.append(Segment(how, pieces, bucket.master[here], bucket.grad[here]))
    return out


class AdamW:
    """Decoupled weight decay (arXiv 1711.05101); nothing waits for the device.

    weights: of each segment the 16-bit copy that its update writes, None where there is none to write. kernel: the kind
    of implementation.
    """

    def __init__(
        self, members: Sequence[Segment], weights: Sequence[Tensor | None], optimizer: OptimizerConfig, kernel: str
    ) -> None:
        self.optimizer, self.kernel = optimizer, kernel
        self._shards = []
        for segment, copy in zip(members, weights, strict=True):
            first, second, how = *(torch.zeros_like(segment.master) for _ in range(2)), segment.treatment
            segment.state = {"exp_avg": first, "exp_avg_sq": second}
            self._shards.append(
                AdamWShard(segment.master, segment.grad, first, second, copy, how.decay, how.factor)
            )

    def update(self, lr: float, updates: Tensor, scale: Tensor, skip: Tensor) -> None:
        """One update with gradients divided by `scale`, or none if `skip` is 1. updates: how many are made with this
        one. All three are scalars on the device in fp32."""
        beta1, beta2 = self.optimizer.betas
        adamw_step_(
            self._shards,
            lr=lr,
            betas=(beta1, beta2),
            eps=self.optimizer.eps,
            step=updates,
            scale=scale,
            skip=skip,
            impl=self.kernel,
        )
