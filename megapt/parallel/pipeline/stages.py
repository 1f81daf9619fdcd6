"""Cutting the model into virtual stages and building the chunks that live on this rank."""

from __future__ import annotations

import torch
from torch import nn

from megapt.config import Config, ModelConfig, ParallelConfig
from megapt.mesh import ParallelMesh
from megapt.model.decoder import DecoderChunk
from megapt.model.table import parameter_table
from megapt.parallel.pipeline.actions import Placement
from megapt.parallel.tensor import ParameterFactory, TensorParallel
from megapt.parameters import Parameter

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


def split_layers(model: ModelConfig, parallel: ParallelConfig) -> list[range]:
    """Layers of each virtual stage, in order.

    As given by `layers_per_stage`, else even; a remainder goes to the middle stages first and to the last one last,
    because the first also computes the embedding and the last the output projection and the loss.
    """
    stages = parallel.virtual_stages
    counts = parallel.layers_per_stage
    if counts is None:
        even, extra = divmod(model.layers, stages)
        favoured = [*range(1, stages - 1), 0, stages - 1][:extra]
        counts = [even + (stage in favoured) for stage in range(stages)]
    starts = [sum(counts[:stage]) for stage in range(stages)]
    return [range(start, start + count) for start, count in zip(starts, counts, strict=True)]


def stage_parameters(model: ModelConfig, layers: range, first: bool, last: bool) -> list[str]:
    """Global names of what a virtual stage holds, tied copies included, from the table."""
    ends = {"first": first, "last": last}
    return [
        spec.name
        for spec in parameter_table(model).values()
        if (ends[spec.end] if spec.end is not None else spec.layer in layers)
    ]


def build_chunks(
    config: Config, mesh: ParallelMesh, tp: TensorParallel, device: torch.device | None = None
) -> tuple[nn.ModuleList, list[Parameter]]:
    """This rank's model chunks with initial weights, and their parameters in table order."""
    table = parameter_table(config.model)
    parallel = config.parallel
    factory = ParameterFactory(
        table, tp, config.seed, DTYPES[config.precision], device or mesh.device, parallel.vocabulary_multiple
    )
    placement = Placement(parallel.pipeline, parallel.chunks)
    layers = split_layers(config.model, parallel)
    chunks = nn.ModuleList()
    for chunk in range(parallel.chunks):
        stage = placement.virtual(mesh.pp.rank, chunk)
        first, last = stage == 0, stage == placement.virtual_stages - 1
        chunks.append(DecoderChunk(config.model, factory, layers[stage], first, last))
    order = {name: index for index, name in enumerate(table)}
    return chunks, sorted(factory.made.values(), key=lambda p: order[p.spec.name])
