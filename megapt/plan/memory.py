"""An estimate of the memory of each pipeline stage's ranks, from the parameter table and the layout."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megapt.config import Config
from megapt.model.table import parameter_table
from megapt.parallel.pipeline.actions import Placement
from megapt.parallel.pipeline.check import check
from megapt.parallel.pipeline.schedules import schedule
from megapt.parallel.pipeline.stages import DTYPES, split_layers, stage_parameters


@dataclass(frozen=True)
class StageMemory:
    """What one rank of a pipeline stage holds: parameters in elements, the rest in bytes."""

    layers: list[range]
    parameters: int
    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


def stage_memory(config: Config, data: int, cpu: bool = False) -> list[StageMemory]:
    """One entry per pipeline rank, of a run with `data` data-parallel ranks on GPUs, or on CPUs if `cpu`.

    Gradients accumulate in full precision; masters count where weights are narrower. Activations are what the forward
    of a chunk keeps for its backward, times the forwards that the schedule holds at its peak; buffers of collectives,
    the allocator's waste and the libraries' own memory are left out.
    """
    model, parallel, zero = config.model, config.parallel, config.zero
    layers = split_layers(model, parallel)
    placement = Placement(parallel.pipeline, parallel.chunks)
    width = DTYPES[config.precision].itemsize
    wide = max(width, 4)
    shards = data if zero.stage >= 1 else 1
    activations = _activations(config, layers, data, cpu)
    stages = []
    for rank in range(parallel.pipeline):
        virtual = [placement.virtual(rank, chunk) for chunk in range(parallel.chunks)]
        count = sum(_local_elements(config, layers[v], v == 0, v == len(layers) - 1) for v in virtual)
        masters = 0 if width == wide else wide
        stages.append(
            StageMemory(
                layers=[layers[v] for v in virtual],
                parameters=count,
                weights=count * width // (data if zero.stage == 3 else 1),
                gradients=count * wide // (data if zero.stage >= 2 else 1),
                optimizer=count * (2 * wide + masters) // shards,
                activations=activations[rank],
            )
        )
    return stages


def _local_elements(config: Config, layers: range, first: bool, last: bool) -> int:
    table, parallel = parameter_table(config.model), config.parallel
    total = 0
    for name in stage_parameters(config.model, layers, first, last):
        spec = table[name]
        if spec.tied_to and first and last:
            continue  # the same tensor as its owner
        shape = spec.shard(0, parallel.tensor, parallel.vocabulary_multiple).shape
        total += math.prod(shape)
    return total


def _activations(config: Config, layers: list[range], data: int, cpu: bool) -> list[int]:
    """Bytes per pipeline rank, given the layers of each virtual stage."""
    model, parallel, batch = config.model, config.parallel, config.batch
    placement = Placement(parallel.pipeline, parallel.chunks)
    # The pipeline is full long before this many micro-batches; more change no peak.
    steps = min(batch.global_samples // (batch.micro * data), 4 * parallel.pipeline)
    peaks = check(schedule(parallel.schedule, parallel.pipeline, parallel.chunks, steps)).peak_live
    width = DTYPES[config.precision].itemsize
    stream = batch.micro * batch.sequence * model.hidden * width
    if parallel.sequence_parallel:
        stream //= parallel.tensor
    per_layer = layer_activations(config, cpu)
    totals = []
    for rank, peak in enumerate(peaks):
        virtual = [placement.virtual(rank, chunk) for chunk in range(parallel.chunks)]
        # A chunk's output waits for its gradient; the last one's is the input of the head's norm.
        average = sum(per_layer * len(layers[v]) + stream for v in virtual) / len(virtual)
        totals.append(int(peak * average))
    # The head keeps the gradients of its input and of its weight; its backward follows at once, so they exist once.
    head = parameter_table(model)["head.weight"].shard(0, parallel.tensor, parallel.vocabulary_multiple)
    totals[-1] += stream + math.prod(head.shape) * max(width, 4)
    return totals


def layer_activations(config: Config, cpu: bool) -> int:
    """Bytes that a tensor rank keeps of one layer's forward for its backward, for one micro-batch.

    That is, by what makes it: the residual stream and its normalised copy, for both norms; queries, keys and values
    as attention takes them, its result and one sum of exponentials per head; the MLP's first projection and the input
    of its second. On a GPU turned queries and keys live beside the projection that the values are a view of.
    """
    model, parallel, tensor = config.model, config.parallel, config.parallel.tensor
    tokens = config.batch.micro * config.batch.sequence
    width = DTYPES[config.precision].itemsize
    wide = max(width, 4)
    heads = model.heads // tensor
    kv_heads = max(1, model.num_kv_heads // tensor)  # ranks beyond the key/value heads share them
    turned = 0 if cpu or model.position != "rope" else heads + kv_heads
    attention = (2 * heads + 2 * kv_heads + turned) * model.head_width * width + heads * wide
    mlp = (3 if model.gated else 2) * model.ffn // tensor * width
    statistics = (2 if model.norm == "layer_norm" else 1) * wide
    stream = 2 * (2 * model.hidden * width + statistics)
    between = tensor if parallel.sequence_parallel else 1
    return tokens * (attention + mlp) + tokens // between * stream
