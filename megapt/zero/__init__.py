"""ZeRO: sharding of optimizer state, gradients and parameters over data-parallel ranks, behind one interface."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from megapt.config import OptimizerConfig, ZeroConfig
from megapt.mesh import ParallelMesh
from megapt.parallel.gradients import TiedWeights
from megapt.parallel.tensor import TensorParallel
from megapt.parameters import Parameter
from megapt.zero.base import ZeroBackend


def make_backend(
    config: ZeroConfig,
    chunks: nn.ModuleList,
    parameters: Sequence[Parameter],
    mesh: ParallelMesh,
    tp: TensorParallel,
    ties: TiedWeights,
    optimizer: OptimizerConfig,
) -> ZeroBackend:
    """The configured backend over this rank's parameters."""
    if config.backend == "native":
        from megapt.zero.native import NativeBackend

        return NativeBackend(parameters, mesh, tp, ties, optimizer, config.stage)
    from megapt.zero.deepspeed import DeepSpeedBackend

    return DeepSpeedBackend(chunks, parameters, mesh, tp, ties, optimizer, config.stage)
