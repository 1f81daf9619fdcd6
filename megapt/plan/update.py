"""What a step does beside and behind its backward passes: reductions, norm, optimizer, gathers, checkpoints.

`zero/native.py` reduces a bucket as soon as the backward pass has filled it, one after the other, and gathers updated
weights while the next step's first forward runs; DeepSpeed's stages 0 to 2 do neither. What outlasts the computing
beside it is waited for.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from megapt.config import Config, ModelConfig
from megapt.model.table import parameter_table
from megapt.parallel.pipeline.actions import Placement
from megapt.parameters import ParameterSpec, Partial
from megapt.plan import communication
from megapt.plan.clock import Pass
from megapt.plan.communication import Group, group
from megapt.plan.cost import WIDTH, Rates, Software, rates
from megapt.plan.hardware import Hardware

# Bytes per parameter of AdamW: the norm reads the gradient; the update reads it and two moments and the weight, and
# writes the last three.
_ADAMW, _MUON = 34, 26
_PUBLISH = 6  # an fp32 weight is read and written in 16 bits


@dataclass(frozen=True)
class Elements:
    """Parameters of one tensor rank, of a layer or of a part at the model's ends. late: whose gradients are complete
    only behind the last backward (`zero/native.py`). matrices: that Muon orthogonalises, and the FLOPs of one iteration
    over them, whole."""

    early: int = 0
    late: int = 0
    matrices: int = 0
    muon_flops: float = 0.0

    def __add__(self, other: Elements) -> Elements:
        return Elements(
            self.early + other.early,
            self.late + other.late,
            self.matrices + other.matrices,
            self.muon_flops + other.muon_flops,
        )

    def __mul__(self, times: int) -> Elements:
        return Elements(self.early * times, self.late * times, self.matrices * times, self.muon_flops * times)

    @property
    def all(self) -> int:
        return self.early + self.late


@lru_cache(maxsize=1024)
def _elements(model: ModelConfig, tensor: int, sequence_parallel: bool, multiple: int) -> dict[str, Elements]:
    """Of `layer`, and of `embedding`, `positions`, `norm` and `head`."""
    found: dict[str, Elements] = {name: Elements() for name in ("layer", "embedding", "positions", "norm", "head")}
    for spec in parameter_table(model).values():
        if spec.layer in (None, 0):
            name = "layer" if spec.layer == 0 else spec.name.partition(".")[0]
            found[name] += _of(spec, tensor, sequence_parallel, multiple)
    return found


def _of(spec: ParameterSpec, tensor: int, sequence_parallel: bool, multiple: int) -> Elements:
    shard = spec.shard(0, tensor, multiple)
    numel = math.prod(shard.shape)
    summed = spec.partial is Partial.ALWAYS or (spec.partial is Partial.SEQUENCE and sequence_parallel)
    late = tensor > 1 and summed or shard.sharers > 1 or spec.has_copy
    if spec.role != "matrix":
        return Elements(0, numel) if late else Elements(numel)
    short, long = sorted(spec.shape)
    # Newton-Schulz: X X^T, its square, and their product with X.
    work = 4.0 * short * short * long + 2.0 * short**3
    return Elements(0, numel, numel, work) if late else Elements(numel, 0, numel, work)


@dataclass(frozen=True)
class State:
    """What one pipeline rank trains. tied: elements of the tied embedding that another stage has or copies, else 0."""

    layers: int
    elements: Elements
    tied: int
    among: Group
    gradient_width: int
    weight_width: int
    bucket: int

    @property
    def buckets(self) -> int:
        return max(1, math.ceil(self.elements.early / self.bucket))

    def reduction(self, hardware: Hardware, elements: float, whole: bool) -> float:
        """Seconds of reducing so many gradients in one collective. whole: every rank gets all of them."""
        if not elements:
            return 0.0
        how = communication.all_reduce if whole else communication.reduce_scatter
        return how(hardware, self.among, elements * self.gradient_width)


def states(
    config: Config, data: int, hardware: Hardware, software: Software, layers: Sequence[range], where: Placement
) -> list[State]:
    """Of every pipeline rank."""
    model, parallel = config.model, config.parallel
    parts = _elements(model, parallel.tensor, parallel.sequence_parallel, parallel.vocabulary_multiple)
    counts: Counter[int] = Counter()
    for virtual, held in enumerate(layers):
        counts[where.rank(virtual)] += len(held)
    first, last = where.rank(0), where.rank(where.virtual_stages - 1)
    width = WIDTH[config.precision]
    among = group(hardware, data, parallel.tensor)
    made = []
    for rank in range(where.stages):
        elements = parts["layer"] * counts[rank]
        if rank == first:
            elements += parts["embedding"] + parts["positions"]
        if rank == last:
            elements += parts["norm"] + (Elements() if model.tied_embeddings else parts["head"])
        tied = parts["embedding"].all if model.tied_embeddings and first != last and rank in (first, last) else 0
        made.append(
            State(
                layers=counts[rank],
                elements=elements,
                tied=tied,
                among=among,
                gradient_width=software.gradient_width or max(4, width),
                weight_width=width,
                bucket=config.zero.bucket,
            )
        )
    return made


@dataclass(frozen=True)
class Around:
    """A rank's computing of the step: its pass through the pipeline; per chunk, layers, and seconds of one
    micro-batch's forward and backward."""

    done: Pass
    rank: int
    micro_batches: int
    forward: Sequence[float]
    backward: Sequence[float]
    layers: Sequence[int]


def reduction(
    config: Config, hardware: Hardware, software: Software, state: State, around: Around
) -> tuple[float, float]:
    """Seconds by which reducing a rank's gradients lengthens the step, and those that run beside computing."""
    if state.among.size == 1:
        return 0.0, 0.0
    stage, deepspeed = config.zero.stage, config.zero.backend == "deepspeed"
    whole = stage == 0 or (deepspeed and stage < 3)
    late = state.reduction(hardware, state.elements.late, whole)
    total = state.buckets * state.reduction(hardware, state.elements.early / state.buckets, whole)
    if stage >= 2:
        return _every_micro_batch(config, hardware, state, around, total, late)
    done = around.done
    end = done.last[around.rank]
    if software.overlaps_gradients and not deepspeed:
        end = max(end, _last_reduction(state, around, total)) + late
    else:
        end += total + late
    waits = max(0.0, end - done.seconds)
    return waits, max(0.0, total + late - waits)


def _last_reduction(state: State, around: Around, total: float) -> float:
    """When the last early bucket is reduced: each begins once the last micro-batch's backward has filled it."""
    spans = sorted(zip(around.done.final[around.rank], around.layers, strict=True), key=lambda item: item[0][1])
    free = 0.0
    for (start, end), count in spans:
        share = count / max(1, sum(around.layers))
        number = max(1, round(state.buckets * share))
        part = total * share
        # The first of them is full after its part of the backward, the last with its end.
        free = max(max(free, start + (end - start) / number) + part, end + part / number)
    return free


def _every_micro_batch(
    config: Config, hardware: Hardware, state: State, around: Around, total: float, late: float
) -> tuple[float, float]:
    """Stages 2 and 3, which have no pipeline: gradients travel with every micro-batch; stage 3's backward gathers
    weights over the same links."""
    forward, backward = sum(around.forward), sum(around.backward)
    times = around.micro_batches
    if config.zero.backend == "deepspeed" and config.zero.stage == 2:
        return times * total + late, 0.0
    if config.zero.stage == 3:
        layers = max(1, state.layers)
        moved = total + _layer_gathers(hardware, state)
        shown = times * max(total / layers, moved - backward * (1 - 1 / layers))
        return shown + late, max(0.0, times * total - shown)
    each = total / state.buckets
    shown = (times - 1) * max(0.0, total - forward - backward)
    shown += max(each, total - backward * (1 - 1 / state.buckets))
    return shown + late, max(0.0, times * total - shown)


def gather(
    config: Config, hardware: Hardware, software: Software, state: State, around: Around
) -> tuple[float, float]:
    """Seconds by which gathering updated weights lengthens the step, and those that run beside computing."""
    stage, chunks = config.zero.stage, len(around.layers)
    if state.among.size == 1 or stage == 0:
        return 0.0, 0.0
    if stage == 3:
        layers = max(1, state.layers)
        total = _layer_gathers(hardware, state)
        shown = max(total / layers, total - sum(around.forward) * (1 - 1 / layers))
        return around.micro_batches * shown, around.micro_batches * (total - shown)
    count = max(1, math.ceil(state.elements.all / state.bucket))
    size = state.elements.all * state.weight_width
    each = communication.all_gather(hardware, state.among, size / count)
    total = count * each
    if not software.overlaps_gradients or config.zero.backend == "deepspeed":
        return total, 0.0
    # Layer by layer: the first bucket at once, the first chunk's last one by the end of its forward; later stages have
    # until the first micro-batch reaches them.
    part = max(each, total / chunks)
    shown = max(each, part - around.forward[0] * (1 - each / part)) - around.done.first[around.rank]
    return max(0.0, shown), total - max(0.0, shown)


def _layer_gathers(hardware: Hardware, state: State) -> float:
    """Seconds of gathering all weights of a rank once, layer by layer."""
    layers = max(1, state.layers)
    size = state.elements.all * state.weight_width / layers
    return layers * communication.all_gather(hardware, state.among, size)


def optimizer(config: Config, data: int, hardware: Hardware, state: State) -> float:
    """Seconds of one update."""
    device = rates(hardware, config.precision)
    shards = data if config.zero.stage >= 1 else 1
    owned = state.elements.all / shards
    publish = _PUBLISH if device.width < 4 else 0
    if config.zero.offload:
        # Gradients go to the host, weights come back; the update runs at the host's memory, about as fast as the link.
        return owned * (4 + device.width + _ADAMW) / (hardware.host * 1e9)
    seconds = owned * (_ADAMW + publish) / device.bytes + state.buckets * 3 * device.launch
    if config.optimizer.kind == "muon":
        seconds -= state.elements.matrices / shards * (_ADAMW - _MUON) / device.bytes
        seconds += _orthogonalisation(config, data, hardware, device, state)
    return seconds


def _orthogonalisation(config: Config, data: int, hardware: Hardware, device: Rates, state: State) -> float:
    """Seconds of Muon's iteration: each matrix whole on one of the data x tensor ranks, to which its momentum travels
    and from which the result comes back, over two axes (`zero/muon.py`)."""
    ranks = data * config.parallel.tensor
    work = config.optimizer.muon.iterations * state.elements.muon_flops / ranks / device.flops
    if ranks == 1:
        return work
    sent = 4.0 * state.elements.matrices * config.parallel.tensor / ranks * device.width
    slowest = min(
        communication.bandwidth(hardware, among)
        for among in (state.among, group(hardware, config.parallel.tensor, 1))
        if among.size > 1
    )
    return work + sent / slowest


def gradient_norm(config: Config, data: int, hardware: Hardware) -> float:
    """Seconds of summing one number over all ranks that hold different parts."""
    model = config.parallel.tensor * config.parallel.pipeline
    return communication.all_reduce(hardware, group(hardware, model * (data if config.zero.stage else 1), 1), 8.0)


def tied_embedding(config: Config, data: int, hardware: Hardware, made: Sequence[State], where: Placement) -> float:
    """Seconds of sending the copy's gradient to the owner and the new value back."""
    tied = max(state.tied for state in made)
    if not tied:
        return 0.0
    away = data * config.parallel.tensor * abs(where.rank(where.virtual_stages - 1) - where.rank(0))
    sizes = (tied * made[0].gradient_width, tied * made[0].weight_width)
    return sum(communication.send(hardware, away, size) for size in sizes)


@lru_cache(maxsize=64)
def _count(model: ModelConfig) -> int:
    return parameter_table(model).count()


def checkpoint_stall(config: Config, world: int, hardware: Hardware) -> float:
    """Seconds per step of saving masters and moments, while training stands still (`checkpoint/saving.py`)."""
    if not config.checkpoint.every:
        return 0.0
    nodes = math.ceil(world / hardware.node.devices)
    rate = min(nodes * hardware.storage, hardware.storage_total) * 1e9
    moments = 1 if config.optimizer.kind == "muon" else 2
    size = _count(config.model) * max(4, WIDTH[config.precision]) * (1 + moments)
    return (size / rate + size / world / (hardware.host * 1e9)) / config.checkpoint.every
