"""The parts of a run on this rank, assembled from a config: mesh, model chunks, pipeline, ZeRO backend."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from megapt.batch import MicroBatch, StepBatch
from megapt.config import Config
from megapt.mesh import ParallelMesh
from megapt.model.compiled import check_compiler
from megapt.operations import OPERATIONS
from megapt.parallel.gradients import TiedWeights
from megapt.parallel.pipeline.runtime import Pipeline
from megapt.parallel.pipeline.stages import DTYPES, build_chunks
from megapt.parallel.tensor import TensorParallel
from megapt.plan.memory import layer_policies
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
        if config.compile:
            check_compiler(device)
        policies = layer_policies(config, data, cpu=device.type == "cpu")
        self.mesh = ParallelMesh.create(parallel.pipeline, data, parallel.tensor, device)
        OPERATIONS.action = "building the engine"
        self.tp = TensorParallel(self.mesh.tp, parallel.sequence_parallel and parallel.tensor > 1)
        self.chunks: nn.ModuleList
        own = policies[self.mesh.pp.rank]
        self.chunks, self.parameters = build_chunks(config, self.mesh, self.tp, policies=own)
        dtype = DTYPES[config.precision]
        self.pipeline = Pipeline(self.chunks, self.mesh, self.tp, parallel.schedule, config.model.hidden, dtype)
        tied, last = config.model.tied_embeddings, self.pipeline.last_rank
        self.ties = TiedWeights(self.parameters, self.mesh.pp, tied, last)
        self._backend: ZeroBackend | None = None
        if optimize:
            scaling = config.loss_scale if config.precision == "fp16" else None
            self._backend = make_backend(
                config.zero,
                self.chunks,
                self.parameters,
                self.mesh,
                self.tp,
                self.ties,
                config.optimizer,
                scaling,
                config.seed,
                config.kernels,
            )
            self._backend.attach(self.pipeline)
        OPERATIONS.action = "between steps"

    @property
    def backend(self) -> ZeroBackend:
        assert self._backend is not None, "an engine for evaluation has no optimizer"
        return self._backend

    def train_step(self, batch: StepBatch, lr: float, record: bool = False) -> tuple[Tensor, StepResult]:
        """One optimizer step. The loss is this rank's part of the mean over the global batch: see `mean_losses`.

        With `record`, `pipeline.timeline()` says afterwards what was computed when.
        """
        self.backend.zero_grad(len(batch.micro_batches))
        tokens = max(batch.loss_tokens, 1)
        scale = self.backend.loss_scale / tokens
        loss = self.pipeline.train(self._on_device(batch), scale, record)
        OPERATIONS.action = "optimizer step"
        result = self.backend.step(lr)
        OPERATIONS.action = "between steps"
        return loss / tokens, result

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
        OPERATIONS.action = "mean of the losses"
        self.mesh.dp.all_reduce(stacked)
        self.mesh.pp.all_reduce(stacked)  # only the part of the rank where the model ends is not zero
        OPERATIONS.action = "between steps"
        return [float(x) for x in stacked.tolist()]

    def _on_device(self, batch: StepBatch) -> list[MicroBatch]:
        return [micro_batch.to(self.mesh.device) for micro_batch in batch.micro_batches]
