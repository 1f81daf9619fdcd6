"""How long a step takes, and where the time goes: kernels, collectives, bubble, optimizer, checkpoints.

The runtime's own order of events: what `parallel/tensor.py` and `zero/native.py` run beside each other overlaps here,
what they wait for does not; the pipeline is the schedule's own lists against a clock.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from megapt.config import Config, ModelConfig
from megapt.model.recompute import Policy
from megapt.parallel.pipeline.actions import Placement
from megapt.parallel.pipeline.simulate import Costs
from megapt.parallel.pipeline.stages import split_layers, stage_placement
from megapt.plan import communication, update
from megapt.plan.clock import Pass, pipeline_pass
from megapt.plan.communication import group
from megapt.plan.cost import (
    MEGAPT,
    WIDTH,
    Cost,
    Shape,
    Software,
    embedding_cost,
    head_cost,
    layer_cost,
)
from megapt.plan.flops import model_flops_per_token
from megapt.plan.hardware import Hardware
from megapt.plan.update import Around
from megapt.rules import check_world

Policies = Sequence[Sequence[Sequence[Policy]]]
"""Per pipeline rank and chunk, what each layer computes again: `plan.memory.layer_policies`."""


@dataclass(frozen=True)
class ChunkTime:
    """One virtual stage: seconds of one micro-batch. recompute and exposed (collectives of tensor parallelism that are
    waited for) are part of the three passes."""

    rank: int
    chunk: int
    layers: int
    forward: float
    backward_input: float
    backward_weight: float
    recompute: float
    exposed: float


@dataclass(frozen=True)
class StepTime:
    """A step's seconds and their parts, which add up to `seconds`, on the pipeline rank that computes longest.

    items: products, attention, elementwise, recompute, tensor collectives, bubble (waiting for other stages, transfers
    included), gradient reduction, weight gather (both as far as not overlapped), gradient norm, tied embedding,
    optimizer, checkpoint. chunks: virtual stages in the model's order. flops: model FLOPs per token. peak: FLOP/s of
    one device. transfer: seconds of one hop of the pipeline. hidden: seconds of data-parallel collectives beside which
    something is computed. busy: the items of every pipeline rank's own passes, without waiting.
    """

    seconds: float
    items: dict[str, float]
    chunks: list[ChunkTime]
    tokens: int
    world: int
    flops: float
    peak: float
    transfer: float
    hidden: dict[str, float]
    busy: list[dict[str, float]]

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def mfu(self) -> float:
        """Model FLOPs (as the literature counts them) over the peak of all devices."""
        return self.flops * self.tokens / self.seconds / (self.peak * self.world)

    @property
    def tflops(self) -> float:
        """Model TFLOP/s of one device."""
        return self.mfu * self.peak / 1e12

    @property
    def communication_share(self) -> float:
        """Of the step, waiting for collectives; for the pipeline's transfers see `bubble_share`."""
        names = ("tensor collectives", "gradient reduction", "weight gather", "gradient norm", "tied embedding")
        return sum(self.items[name] for name in names) / self.seconds

    @property
    def bubble_share(self) -> float:
        return self.items["bubble"] / self.seconds


def step_time(
    config: Config,
    data: int,
    hardware: Hardware,
    software: Software = MEGAPT,
    policies: Policies | None = None,
) -> StepTime:
    """Of a run of tensor x pipeline x `data` ranks on this hardware.

    policies: as `plan.memory.layer_policies` gives them, where they are known already. Raises UserError where the batch
    does not fit `data`, the hardware states no peak for the precision, or `recompute.budget` is too small.
    """
    parallel, batch = config.parallel, config.batch
    world = parallel.tensor * parallel.pipeline * data
    check_world(config, world)
    micro_batches = batch.global_samples // (batch.micro * data)
    stages = _Stages(config, data, hardware, software, policies)
    made = stages.costs()
    transfer = _transfer(config, data, hardware, software)
    done = _pass(config, micro_batches, stages, transfer, software)
    busy = [_busy(stages, rank, micro_batches) for rank in range(parallel.pipeline)]
    longest = max(range(parallel.pipeline), key=lambda rank: sum(busy[rank].values()))
    items = dict(busy[longest])
    items["bubble"] = max(0.0, done.seconds - sum(items.values()))
    around = [stages.around(done, rank, micro_batches) for rank in range(parallel.pipeline)]
    after, hidden = _after(config, data, hardware, software, stages, around)
    items |= after
    return StepTime(
        seconds=sum(items.values()),
        items=items,
        chunks=made,
        tokens=batch.global_samples * batch.sequence,
        world=world,
        flops=model_flops_per_token(config.model, batch.sequence),
        peak=hardware.peak_flops(config.precision),
        transfer=transfer,
        hidden=hidden,
        busy=busy,
    )


def _after(
    config: Config, data: int, hardware: Hardware, software: Software, stages: _Stages, around: Sequence[Around]
) -> tuple[dict[str, float], dict[str, float]]:
    """What comes beside and behind the passes of the pipeline's slowest rank, and what is hidden of it."""
    states = update.states(config, data, hardware, software, stages.layers, stages.where)
    pairs = list(zip(states, around, strict=True))
    reductions = [update.reduction(config, hardware, software, state, of) for state, of in pairs]
    gathers = [update.gather(config, hardware, software, state, of) for state, of in pairs]
    world = data * config.parallel.tensor * config.parallel.pipeline
    items = {
        "gradient reduction": max(waits for waits, _ in reductions),
        "weight gather": max(waits for waits, _ in gathers),
        "gradient norm": update.gradient_norm(config, data, hardware),
        "tied embedding": update.tied_embedding(config, data, hardware, states, stages.where),
        "optimizer": max(update.optimizer(config, data, hardware, state) for state in states),
        "checkpoint": update.checkpoint_stall(config, world, hardware),
    }
    hidden = {
        "gradient reduction": max(hidden for _, hidden in reductions),
        "weight gather": max(hidden for _, hidden in gathers),
    }
    return items, hidden


@dataclass(frozen=True)
class _Cut:
    """What decides how the model is cut; the config itself only has it ready."""

    model: ModelConfig
    sequence: int
    schedule: str
    pipeline: int
    chunks: int
    layers_per_stage: str | None
    layer_costs: tuple[float, ...]
    config: Config = field(compare=False)


@lru_cache(maxsize=1024)
def _cut(by: _Cut) -> tuple[list[range], Placement]:
    """Layers of the virtual stages, and where these lie."""
    return split_layers(by.config), stage_placement(by.config)


def _split(config: Config) -> tuple[list[range], Placement]:
    """As `_cut`, worked out once for all configs that are cut alike."""
    p = config.parallel
    costs = tuple(p.layer_costs or ())
    sequence = config.batch.sequence
    return _cut(_Cut(config.model, sequence, p.schedule, p.pipeline, p.chunks, p.layers_per_stage, costs, config))


class _Stages:
    """The cost of every virtual stage for one micro-batch."""

    def __init__(
        self, config: Config, data: int, hardware: Hardware, software: Software, policies: Policies | None
    ) -> None:
        self.config, self.hardware, self.software = config, hardware, software
        parallel, batch = config.parallel, config.batch
        self.layers, self.where = _split(config)
        fused = config.compile if software.fused is None else software.fused
        self.shape = Shape(
            parallel.tensor, parallel.sequence_parallel, batch.micro, batch.sequence, config.precision, fused
        )
        self.divided = parallel.schedule in ("zb-h1", "zb-v")
        given = policies or self._policies(data)
        self.parts = [self._cost(virtual, given) for virtual in range(self.where.virtual_stages)]

    def _policies(self, data: int) -> Policies:
        recompute = self.config.recompute
        if recompute.policy == "budget":
            from megapt.plan.memory import layer_policies

            return layer_policies(self.config, data)
        some = recompute.layers
        made: list[list[list[Policy]]] = [[] for _ in range(self.where.stages)]
        for virtual, layers in enumerate(self.layers):
            count = len(layers) if some is None else min(some, len(layers))
            rest: list[Policy] = ["none"] * (len(layers) - count)
            stated: list[Policy] = [recompute.policy] * count
            made[self.where.rank(virtual)].append(stated + rest)
        return made

    def _cost(self, virtual: int, policies: Policies) -> Cost:
        model, rank, chunk = self.config.model, self.where.rank(virtual), self.where.chunk(virtual)
        kinds = Counter(
            (model.window_of(layer), policy)
            for layer, policy in zip(self.layers[virtual], policies[rank][chunk], strict=True)
        )
        parts = [
            (layer_cost(model, window, policy, self.shape, self.hardware, self.software), count)
            for (window, policy), count in kinds.items()
        ]
        rows = vocabulary_rows(self.config)
        if virtual == 0:
            parts.append((embedding_cost(model, self.shape, rows, self.hardware, self.software), 1))
        if virtual == self.where.virtual_stages - 1:
            parts.append((head_cost(model, self.shape, rows, self.hardware, self.software), 1))
        return Cost.sum(tuple(parts))

    def passes(self, virtual: int) -> tuple[float, float, float]:
        """Forward, backward of inputs and of weights. Of an undivided backward only the sum of the last two counts."""
        cost = self.parts[virtual]
        again = cost.again + cost.again_waits
        waits = cost.apart_waits if self.divided else (cost.joined_waits, 0.0)
        return cost.forward + cost.forward_waits, cost.input + again + waits[0], cost.weight + waits[1]

    def exposed(self, virtual: int) -> float:
        cost = self.parts[virtual]
        back = sum(cost.apart_waits) if self.divided else cost.joined_waits
        return cost.forward_waits + back + cost.again_waits

    def around(self, done: Pass, rank: int, micro_batches: int) -> Around:
        virtual = [self.where.virtual(rank, chunk) for chunk in range(self.where.chunks)]
        passes = [self.passes(v) for v in virtual]
        return Around(
            done=done,
            rank=rank,
            micro_batches=micro_batches,
            forward=[p[0] for p in passes],
            backward=[p[1] + p[2] for p in passes],
            layers=[len(self.layers[v]) for v in virtual],
        )

    def costs(self) -> list[ChunkTime]:
        made = []
        for virtual in range(self.where.virtual_stages):
            cost, passes = self.parts[virtual], self.passes(virtual)
            made.append(
                ChunkTime(
                    self.where.rank(virtual),
                    self.where.chunk(virtual),
                    len(self.layers[virtual]),
                    *passes,
                    cost.again,
                    self.exposed(virtual),
                )
            )
        return made


def vocabulary_rows(config: Config) -> int:
    """Of a tensor rank, padding included."""
    multiple = config.parallel.vocabulary_multiple
    each = math.ceil(config.model.vocabulary / config.parallel.tensor)
    return math.ceil(each / multiple) * multiple


def _transfer(config: Config, data: int, hardware: Hardware, software: Software) -> float:
    """Seconds of one hop of the pipeline."""
    parallel, batch = config.parallel, config.batch
    if parallel.pipeline == 1:
        return 0.0
    tensor = parallel.tensor
    size = batch.micro * batch.sequence * config.model.hidden * WIDTH[config.precision]
    if parallel.sequence_parallel:
        return communication.send(hardware, data * tensor, size / tensor)
    if software.scatters_sends and tensor > 1:
        gathered = communication.all_gather(hardware, group(hardware, tensor, 1), size)
        return communication.send(hardware, data * tensor, size / tensor) + gathered
    return communication.send(hardware, data * tensor, size)


def _pass(
    config: Config, micro_batches: int, stages: _Stages, transfer: float, software: Software
) -> Pass:
    parallel = config.parallel
    passes = [stages.passes(virtual) for virtual in range(stages.where.virtual_stages)]
    if not software.overlaps_sends and parallel.pipeline > 1:
        # Ranks wait for their transfers: one behind each forward and one behind each backward.
        passes = [(f + transfer, i + transfer, w) for f, i, w in passes]
        transfer = 0.0
    forward, backward, weight = zip(*passes, strict=True)
    costs = Costs(forward, backward, weight, transfer)
    return pipeline_pass(parallel.schedule, parallel.pipeline, parallel.chunks, micro_batches, costs)


def _busy(stages: _Stages, rank: int, micro_batches: int) -> dict[str, float]:
    """What a rank computes and waits for within its stages, in one step."""
    parts = [stages.parts[v] for v in range(stages.where.virtual_stages) if stages.where.rank(v) == rank]
    waits = [stages.exposed(v) for v in range(stages.where.virtual_stages) if stages.where.rank(v) == rank]
    whole = sum(part.forward + part.input + part.weight for part in parts)
    attention = sum(part.attention for part in parts)
    products = sum(part.products for part in parts)
    return {
        "products": products * micro_batches,
        "attention": attention * micro_batches,
        # What the host takes longer to start than the device to do counts here.
        "elementwise": max(0.0, whole - products - attention) * micro_batches,
        "recompute": sum(part.again for part in parts) * micro_batches,
        "tensor collectives": sum(waits) * micro_batches,
    }
