"""What a layout takes at least, in seconds and bytes, in microseconds of work: what the search leaves out by.

Never more than `plan.time.step_time` and `plan.memory.stage_memory` say: the kernels' costs are theirs, but of the
pipeline only the way through it counts, and of memory only the first rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from megapt.config import Config
from megapt.model.recompute import Policy
from megapt.model.table import parameter_table
from megapt.parallel.pipeline.stages import DTYPES, split_layers, stage_placement
from megapt.plan.candidates import POLICIES, Layout
from megapt.plan.cost import MEGAPT, Cost, Shape, embedding_cost, head_cost, layer_cost
from megapt.plan.hardware import Hardware
from megapt.plan.memory import layer_activations

DIVIDED = ("zb-h1", "zb-v")
"""Schedules that run the two halves of a backward apart."""


@dataclass(frozen=True)
class _Rank:
    """A pipeline rank: layers of each of its chunks; layers in front of its first; whether it has the model's ends."""

    chunks: tuple[int, ...]
    before: int
    first: bool
    last: bool

    def recomputed(self, most: int | None) -> int:
        """Layers that a policy for the first `most` of each chunk applies to."""
        return sum(self.chunks) if most is None else sum(min(most, count) for count in self.chunks)


@dataclass(frozen=True)
class _Seconds:
    """Of one micro-batch: forward, backward of inputs, backward of weights."""

    forward: float
    input: float
    weight: float

    @property
    def all(self) -> float:
        return self.forward + self.input + self.weight


class Bounds:
    """For the layouts of one config on one kind of hardware."""

    def __init__(self, config: Config, hardware: Hardware, cpu: bool) -> None:
        self.config, self.hardware, self.cpu = config, hardware, cpu
        self.windows = sorted({config.model.window_of(i) for i in range(config.model.layers)}, key=str)
        self.layer = lru_cache(maxsize=None)(self._layer)
        self.ends = lru_cache(maxsize=None)(self._ends)
        self.ranks = lru_cache(maxsize=None)(self._ranks)
        self.kept = lru_cache(maxsize=None)(self._kept)
        self.parameters = lru_cache(maxsize=None)(self._parameters)

    def seconds(self, layout: Layout, policy: Policy, most: int | None) -> float:
        """Of a step. most: first layers of each chunk that the policy applies to; None for all."""
        divided = layout.schedule in DIVIDED
        shape = layout.tp, layout.sequence, layout.micro
        plain, again = self.layer(shape, "none", divided), self.layer(shape, policy, divided)
        embedding, head = self.ends(shape, divided)
        least_forward, least_input = plain.forward, plain.input
        micro_batches = self.config.batch.global_samples // (layout.micro * layout.dp)
        longest = 0.0
        for rank in self.ranks(layout.pp, layout.chunks, layout.schedule):
            changed = rank.recomputed(most) if policy != "none" else 0
            rest = sum(rank.chunks) - changed
            busy = changed * again.all + rest * plain.all
            weight = changed * again.weight + rest * plain.weight
            for end, here in ((embedding, rank.first), (head, rank.last)):
                if here:
                    busy, weight = busy + end.all, weight + end.weight
            # The first forward comes through all layers before; the last gradient goes back through them.
            there, back = rank.before * least_forward, rank.before * least_input
            whole = micro_batches * busy
            behind = max(whole, whole - micro_batches * weight + back) if divided else whole + back
            longest = max(longest, there + behind)
        return longest

    def bytes(self, layout: Layout, policy: Policy, most: int | None) -> int:
        """Of the first pipeline rank."""
        rank = self.ranks(layout.pp, layout.chunks, layout.schedule)[0]
        shape = layout.tp, layout.sequence, layout.micro
        plain, kept = self.kept(shape, "none"), self.kept(shape, policy)
        micro_batches = self.config.batch.global_samples // (layout.micro * layout.dp)
        activations = 0
        for count, layers in zip(_held(layout, micro_batches), rank.chunks, strict=True):
            changed = (layers if most is None else min(most, layers)) if policy != "none" else 0
            activations += count * (changed * kept + (layers - changed) * plain)
        return self._state(layout, sum(rank.chunks)) + activations

    def least(self, layout: Layout) -> int:
        """Bytes below which no schedule and no policy brings the layout's axes, micro-batch and ZeRO stage."""
        layers = max(1, self.config.model.layers // layout.pp - 1)
        micro_batches = self.config.batch.global_samples // (layout.micro * layout.dp)
        kept = min(self.kept((layout.tp, layout.sequence, layout.micro), policy) for policy in POLICIES)
        # Every schedule that has one forward more than backwards on the first rank when it is full.
        return self._state(layout, layers) + min(layout.pp, micro_batches) * kept * layers // (1 + (layout.pp > 1))

    def _state(self, layout: Layout, layers: int) -> int:
        config = self.config
        width = DTYPES[config.precision].itemsize
        wide = max(width, 4)
        layer, first = self.parameters(layout.tp)
        count = layers * layer + first
        backend, stage, *rest = layout.zero.split("-")
        level = int(stage)
        moments = 1 if config.optimizer.kind == "muon" else 2
        optimizer = 0 if rest else count * (moments * wide + (wide if width < wide else 0))
        return (
            count * width // (layout.dp if level == 3 else 1)
            + count * wide // (layout.dp if level >= 2 else 1)
            + optimizer // (layout.dp if level >= 1 else 1)
        )

    def _in(self, shape: tuple[int, bool, int]) -> Config:
        tp, sequence, micro = shape
        return Layout(tp=tp, sequence=sequence, micro=micro).on(self.config)

    def _shape(self, shape: tuple[int, bool, int]) -> Shape:
        tp, sequence, micro = shape
        config = self.config
        return Shape(tp, sequence and tp > 1, micro, config.batch.sequence, config.precision, config.compile)

    def _layer(self, shape: tuple[int, bool, int], policy: Policy, divided: bool) -> _Seconds:
        """Of the cheapest kind of layer."""
        model = self.config.model
        costs = [
            layer_cost(model, window, policy, self._shape(shape), self.hardware, MEGAPT) for window in self.windows
        ]
        return min((_passes(cost, divided) for cost in costs), key=lambda seconds: seconds.all)

    def _ends(self, shape: tuple[int, bool, int], divided: bool) -> tuple[_Seconds, _Seconds]:
        model, multiple = self.config.model, self.config.parallel.vocabulary_multiple
        rows = math.ceil(math.ceil(model.vocabulary / shape[0]) / multiple) * multiple
        arguments = model, self._shape(shape), rows, self.hardware, MEGAPT
        return _passes(embedding_cost(*arguments), divided), _passes(head_cost(*arguments), divided)

    def _ranks(self, pp: int, chunks: int, schedule: str) -> list[_Rank]:
        """The first rank, and of the others those that no other one surely outlasts."""
        config = Layout(pp=pp, chunks=chunks, schedule=schedule).on(self.config)
        layers, where = split_layers(config), stage_placement(config)
        made = []
        for rank in range(pp):
            virtual = [where.virtual(rank, chunk) for chunk in range(chunks)]
            counts = tuple(len(layers[v]) for v in virtual)
            last = where.virtual_stages - 1
            made.append(_Rank(counts, layers[virtual[0]].start, where.rank(0) == rank, where.rank(last) == rank))
        kept = [made[0]]
        for one in sorted(made[1:], key=lambda one: (-sum(one.chunks), -one.before)):
            if one.last or not any(sum(k.chunks) >= sum(one.chunks) and k.before >= one.before for k in kept):
                kept.append(one)
        return kept

    def _kept(self, shape: tuple[int, bool, int], policy: Policy) -> int:
        return layer_activations(self._in(shape), self.cpu, policy)

    def _parameters(self, tp: int) -> tuple[int, int]:
        """Elements of a tensor rank: of a layer, and of what stands in front of the first."""
        layer = first = 0
        for spec in parameter_table(self.config.model).values():
            if spec.layer == 0 or (spec.layer is None and spec.end == "first"):
                count = math.prod(spec.shard(0, tp, self.config.parallel.vocabulary_multiple).shape)
                layer, first = (layer + count, first) if spec.layer == 0 else (layer, first + count)
        return layer, first


def _passes(cost: Cost, divided: bool) -> _Seconds:
    waits = cost.apart_waits if divided else (cost.joined_waits, 0.0)
    return _Seconds(
        cost.forward + cost.forward_waits,
        cost.input + cost.again + cost.again_waits + waits[0],
        cost.weight + waits[1],
    )


def _held(layout: Layout, micro_batches: int) -> list[int]:
    """Micro-batches of each chunk that the first rank holds when its first backward begins."""
    pp, chunks = layout.pp, layout.chunks
    if layout.schedule == "gpipe":
        return [micro_batches]
    if layout.schedule == "interleaved":
        held = min(2 * (pp - 1) + (chunks - 1) * pp + 1, micro_batches * chunks)
        rounds, rest = divmod(held, pp * chunks)
        return [rounds * pp + min(max(rest - chunk * pp, 0), pp) for chunk in range(chunks)]
    if layout.schedule == "zb-v":
        # The first chunk's backward is the model's last.
        return [min(pp, micro_batches), 0]
    return [min(pp, micro_batches)]
