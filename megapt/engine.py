"""The parts of a run on this rank, assembled from a config: mesh, model chunks, pipeline, ZeRO backend."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from megapt.batch import MicroBatch, StepBatch
from megapt.config import Config
from megapt.mesh import ParallelMesh
from megapt.parallel.gradients import TiedWeights
from megapt.parallel.pipeline.runtime import Pipeline
from megapt.parallel.pipeline.stages import DTYPES, build_chunks
from megapt.parallel.tensor import TensorParallel
from megapt.rules import check_world
from megapt.zero import make_backend
from megapt.zero.base import StepResult, ZeroBackend


class Engine:
    """The model of this rank and what computes with it.

    Collective over the world. With `optimize = False` there is no optimizer: for evaluation and generation.
    """

    def __init__(self, config: Config, world: int, device: torch.device, optimize: bool = True) -> None:
        self.config = config
        parallel = config.parallel
        data = check_world(config, world)
        self.mesh = ParallelMesh.create(parallel.pipeline, data, parallel.tensor, device)
        self.tp = TensorParallel(self.mesh.tp, parallel.sequence_parallel and parallel.tensor > 1)
        self.chunks: nn.ModuleList
        self.chunks, self.parameters = build_chunks(config, self.mesh, self.tp)
        self.ties = TiedWeights(self.parameters, self.mesh.pp, config.model.tied_embeddings)
        dtype = DTYPES[config.precision]
        self.pipeline = Pipeline(self.chunks, self.mesh, self.tp, parallel.schedule, config.model.hidden, dtype)
        self._backend: ZeroBackend | None = None
        if optimize:
            self._backend = make_backend(
                config.zero, self.chunks, self.parameters, self.mesh, self.tp, self.ties, config.optimizer
            )

    @property
    def backend(self) -> ZeroBackend:
        assert self._backend is not None, "an engine for evaluation has no optimizer"
        return self._backend

    def train_step(self, batch: StepBatch, lr: float) -> tuple[Tensor, StepResult]:
        """One optimizer step. The loss is this rank's part of the mean over the global batch: see `mean_losses`."""
        self.backend.zero_grad()
        loss = self.pipeline.train(self._on_device(batch), 1.0 / max(batch.loss_tokens, 1))
        return loss / max(batch.loss_tokens, 1), self.backend.step(lr)

    def evaluate(self, batches: Iterable[StepBatch]) -> float:
        """Mean loss per token with loss, the same on every rank. Collective."""
        total, tokens = torch.zeros((), dtype=torch.float64, device=self.mesh.device), 0
        for batch in batches:
            total += self.pipeline.evaluate(self._on_device(batch))
            tokens += batch.loss_tokens
        return self.mean_losses([total / max(tokens, 1)])[0]

    def mean_losses(self, parts: list[Tensor]) -> list[float]:
        """Global losses from every rank's parts: the one place where they leave the device. Collective."""
        stacked = torch.stack(parts)
        self.mesh.dp.all_reduce(stacked)
        self.mesh.pp.all_reduce(stacked)  # only the last stage's part is not zero
        return [float(x) for x in stacked.tolist()]

    def _on_device(self, batch: StepBatch) -> list[MicroBatch]:
        return [micro_batch.to(self.mesh.device) for micro_batch in batch.micro_batches]
