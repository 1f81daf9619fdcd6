"""ZeRO: sharding of optimizer state, gradients and parameters over data-parallel ranks, behind one interface."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from megapt.config import KernelsConfig, LossScaleConfig, OptimizerConfig, ZeroConfig
from megapt.mesh import ParallelMesh
from megapt.parallel.gradients import TiedWeights
from megapt.parallel.tensor import TensorParallel
from megapt.parameters import Parameter
from megapt.zero.base import ZeroBackend

KERNELS = KernelsConfig()


def make_backend(
    config: ZeroConfig,
    chunks: nn.ModuleList,
    parameters: Sequence[Parameter],
    mesh: ParallelMesh,
    tp: TensorParallel,
    ties: TiedWeights,
    optimizer: OptimizerConfig,
    loss_scale: LossScaleConfig | None = None,
    seed: int = 0,
    kernels: KernelsConfig = KERNELS,
) -> ZeroBackend:
    """The configured backend over this rank's parameters. Collective over the world.

    loss_scale: for fp16 weights; seed: of the run, for stochastic rounding. kernels: of the native
    backend.
    """
    if config.backend == "native":
        from megapt.zero.native import NativeBackend

        return NativeBackend(parameters, mesh, tp, ties, optimizer, config, loss_scale, seed, kernels)
    from megapt.zero.deepspeed import DeepSpeedBackend

    return DeepSpeedBackend(chunks, parameters, mesh, tp, ties, optimizer, config)
