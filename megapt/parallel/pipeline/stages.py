"""Cutting the model into virtual stages and building the chunks that live on this rank."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import nn

from megapt.config import Config, ModelConfig
from megapt.mesh import ParallelMesh
from megapt.model.decoder import DecoderChunk
from megapt.model.kernels import Kernels
from megapt.model.recompute import Policy
from megapt.model.table import parameter_table
from megapt.parallel.loss import LossSettings
from megapt.parallel.pipeline.actions import Placement
from megapt.parallel.pipeline.schedules import placement
from megapt.parallel.pipeline.split import balance
from megapt.parallel.tensor import ParameterFactory, TensorParallel
from megapt.parameters import Parameter
from megapt.rules import parse_layout

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


def stage_placement(config: Config) -> Placement:
    """Where the schedule lays the virtual stages."""
    parallel = config.parallel
    return placement(parallel.schedule, parallel.pipeline, parallel.chunks)


def split_layers(config: Config) -> list[range]:
    """Layers of each virtual stage, in the model's order.

    As `layers_per_stage` says, else balanced by cost: a layer's FLOPs (times `layer_costs`, where given), and on the
    last stage those of the output projection beside its layers. The embedding looks rows up, which costs next to
    nothing.
    """
    model, parallel = config.model, config.parallel
    stages, given = parallel.virtual_stages, parallel.layers_per_stage
    if given is not None:
        counts = parse_layout(given, model.layers, stages)
    else:
        layer, head = _flops_per_token(model, config.batch.sequence)
        costs = tuple(parallel.layer_costs or [1.0] * model.layers)
        counts = _balanced(costs, stages, head / layer, stage_placement(config))
    starts = [sum(counts[:stage]) for stage in range(stages)]
    return [range(start, start + count) for start, count in zip(starts, counts, strict=True)]


@lru_cache(maxsize=256)
def _balanced(costs: tuple[float, ...], stages: int, head: float, where: Placement) -> list[int]:
    return balance(costs, stages, last_cost=head, placement=where)


def _flops_per_token(model: ModelConfig, sequence: int) -> tuple[float, float]:
    """Of the forward of one layer and of the output projection: twice their matrices' elements, and in a layer the
    attention over half of the sequence on average. The backward of both takes twice as much."""
    table = parameter_table(model).values()
    layer = sum(spec.numel for spec in table if spec.layer == 0 and spec.role == "matrix")
    attended = sequence / 2 if model.attention == "causal" else sequence
    attention = 4.0 * model.heads * model.head_width * attended
    return 2.0 * layer + attention, 2.0 * model.vocabulary * model.hidden


def build_chunks(
    config: Config,
    mesh: ParallelMesh,
    tp: TensorParallel,
    device: torch.device | None = None,
    policies: Sequence[Sequence[Policy]] | None = None,
) -> tuple[nn.ModuleList, list[Parameter]]:
    """This rank's model chunks with initial weights, and their parameters in table order.

    policies: what each layer of each chunk computes again in the backward pass; default: nothing.
    """
    table = parameter_table(config.model)
    parallel = config.parallel
    factory = ParameterFactory(
        table, tp, config.seed, DTYPES[config.precision], device or mesh.device, parallel.vocabulary_multiple
    )
    where, layers = stage_placement(config), split_layers(config)
    settings = LossSettings(config.model.logit_softcap, config.train.z_loss)
    chunks = nn.ModuleList()
    for chunk in range(parallel.chunks):
        stage = where.virtual(mesh.pp.rank, chunk)
        first, last = stage == 0, stage == where.virtual_stages - 1
        recompute = policies[chunk] if policies is not None else None
        chunks.append(
            DecoderChunk(config.model, factory, layers[stage], first, last, settings, recompute, Kernels.of(config))
        )
    order = {name: index for index, name in enumerate(table)}
    return chunks, sorted(factory.made.values(), key=lambda p: order[p.spec.name])
