"""What every ZeRO backend offers: fp32 gradients to accumulate into, one step, and its state for checkpoints."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megapt.config import OptimizerConfig
from megapt.mesh import ParallelMesh
from megapt.parallel.gradients import TiedWeights
from megapt.parallel.tensor import TensorParallel
from megapt.parameters import Parameter

if TYPE_CHECKING:
    from megapt.parallel.pipeline.runtime import Pipeline


@dataclass(frozen=True)
class StepResult:
    """grad_norm: scalar tensor on the device, the norm of the global gradient before clipping, every parameter
    counted once; skipped: scalar bool tensor, True if the norm was not finite and nothing was updated."""

    grad_norm: Tensor
    skipped: Tensor


@dataclass(frozen=True)
class Fragment:
    """This rank's piece of one parameter's optimizer state.

    The piece is [start, start + numel) of the flattened local shard (`parameter.shard.shape`, padding included).
    tensors: 1-D live views of `numel` elements: `weight` (the master copy), and by its optimizer `exp_avg` and
    `exp_avg_sq` (AdamW) or `momentum` (Muon). Reading them saves, writing them loads (then call `ZeroBackend.loaded`).
    """

    parameter: Parameter
    start: int
    numel: int
    tensors: dict[str, Tensor]


class ZeroBackend(ABC):
    """Owns the optimizer of this rank's parameters. Gradients are SUMMED over data-parallel ranks: the loss is
    already divided by the global number of tokens.

    parameters: all of this rank's, in table order, tied copies included (they accumulate gradients here but are
    optimized by their owner's stage).
    """

    def __init__(
        self,
        parameters: Sequence[Parameter],
        mesh: ParallelMesh,
        tp: TensorParallel,
        ties: TiedWeights,
        optimizer: OptimizerConfig,
    ) -> None:
        self.parameters = list(parameters)
        self.mesh, self.tp, self.ties, self.optimizer = mesh, tp, ties, optimizer

    def attach(self, pipeline: Pipeline) -> None:  # noqa: B027 (nothing need be done)
        """From now on `pipeline` runs the model: a backend may let the forward pass wait for its weights."""

    @property
    def loss_scale(self) -> Tensor | float:
        """What the next step's loss is to be multiplied by; a scalar on the device, or a number."""
        return 1.0

    @abstractmethod
    def zero_grad(self, micro_batches: int | None = None) -> None:
        """Before the first backward of a step. micro_batches: how many gradients each parameter will get, where that
        is known: a backend may then reduce them during the backward pass."""

    @abstractmethod
    def step(self, lr: float) -> StepResult:
        """Complete this rank's gradients (`parallel.gradients`), reduce them over dp, take the global norm, clip,
        update, gather the new weights."""

    @abstractmethod
    def fragments(self) -> Iterator[Fragment]:
        """State of every parameter that this rank keeps a piece of; parameters in table order."""

    @abstractmethod
    def loaded(self, updates: int, scalars: dict[str, float] | None = None) -> None:
        """After fragments were written: take over the masters as weights; `updates` steps count as done, and `scalars`
        are what `scalars()` gave, None where only weights were loaded. Collective."""

    def scalars(self) -> dict[str, float]:
        """State beside the fragments, the same on all ranks, for a checkpoint's meta."""
        return {}

    @property
    @abstractmethod
    def updates(self) -> int:
        """Optimizer updates made so far (skipped steps do not count)."""

    @abstractmethod
    def describe(self) -> str:
        """One line for the summary before training."""


def accumulation_dtype(compute: torch.dtype) -> torch.dtype:
    """Gradients, masters and moments are fp32, or fp64 where the weights are."""
    return torch.float64 if compute == torch.float64 else torch.float32
