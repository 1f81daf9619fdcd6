"""An estimate of the memory of each pipeline stage's ranks, from the parameter table and the layout."""

from __future__ import annotations

from dataclasses import dataclass

from megapt.config import Config
from megapt.model.table import parameter_table
from megapt.parallel.pipeline.actions import Placement
from megapt.parallel.pipeline.stages import split_layers, stage_parameters

_BYTES = {"bf16": 2, "fp32": 4, "fp64": 8}


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


def stage_memory(config: Config, data: int) -> list[StageMemory]:
    """One entry per pipeline rank. Gradients accumulate in full precision; masters count where weights are narrower.

    Activations are what one forward keeps for its backward, times the micro-batches in flight in 1F1B; buffers of
    collectives, the allocator's waste and the libraries' own memory are left out.
    """
    model, parallel, zero = config.model, config.parallel, config.zero
    layers = split_layers(model, parallel)
    placement = Placement(parallel.pipeline, parallel.chunks)
    width = _BYTES[config.precision]
    wide = max(width, 4)
    shards = data if zero.stage >= 1 else 1
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
                activations=_activations(config, rank, [layers[v] for v in virtual]),
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
        size = 1
        for extent in shape:
            size *= extent
        total += size
    return total


def _activations(config: Config, rank: int, chunks: list[range]) -> int:
    model, parallel, batch = config.model, config.parallel, config.batch
    tokens, tensor = batch.micro * batch.sequence, parallel.tensor
    between = tensor if parallel.sequence_parallel else 1
    heads, kv = model.heads * model.head_width, model.num_kv_heads * model.head_width
    # Saved per layer: both norms' inputs and outputs; q, k, v; attention's result and the projection's input (one
    # tensor); the MLP's projections, activation and product.
    per_token = 4 * model.hidden / between + (2 * heads + 2 * kv + (4 if model.gated else 2) * model.ffn) / tensor
    per_layer = int(tokens * per_token * _BYTES[config.precision])
    in_flight = min(parallel.pipeline - rank, max(1, batch.global_samples // batch.micro))
    if parallel.chunks > 1:
        in_flight = parallel.pipeline - rank + parallel.pipeline * (parallel.chunks - 1) / parallel.chunks  # type: ignore[assignment]
    return int(per_layer * sum(len(c) for c in chunks) * in_flight)
