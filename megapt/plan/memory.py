"""An estimate of the memory of each pipeline stage's ranks, from the parameter table and the layout."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from megapt.config import Config
from megapt.errors import UserError
from megapt.model.recompute import Policy
from megapt.model.table import parameter_table
from megapt.parallel.pipeline.stages import DTYPES, split_layers, stage_placement
from megapt.plan.levels import Passes, cached_schedule, levels
from megapt.plan.working import Place
from megapt.plan.zero_memory import zero_memory

Policies = list[list[Policy]]
"""What each layer of each chunk of a rank computes again in the backward pass."""


@dataclass(frozen=True)
class StageMemory:
    """What one rank of a pipeline stage holds: parameters in elements, the rest in bytes.

    weights, gradients, optimizer: between steps. activations: what forwards keep for their backwards, at the
    schedule's peak. items: everything at the moment when it is most (`when`), by item; see `ITEMS`.
    """

    layers: list[range]
    policies: Policies
    parameters: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    items: dict[str, int]
    when: str

    @property
    def allocated(self) -> int:
        """What torch allocates at most."""
        return sum(size for item, size in self.items.items() if item not in ("fragmentation", "context"))

    @property
    def total(self) -> int:
        return sum(self.items.values())


ITEMS = {
    "weights": "weights, with the copy of a tied one",
    "main_grad": "gradients in full precision",
    "masters": "weights in full precision, where they are narrower",
    "moments": "the optimizer's moments",
    "activations": "what forwards keep for their backwards, or a backward has computed again",
    "deferred": "what waits for the gradients of weights that a schedule puts off",
    "gathers": "whole sequences, gathered from tensor ranks",
    "loss": "logits of a block of tokens, and the output projection's gradients",
    "transfers": "stages' inputs and outputs on their way",
    "buckets": "gradients and weights on their way between data-parallel ranks",
    "working": "gradients within a backward, and other short-lived tensors",
    "step": "what the optimizer step allocates",
    "batch": "a step's tokens and labels, and tables of positions",
    "fragmentation": "of a GPU: what the allocator cannot use",
    "context": "of a GPU: CUDA, its libraries and NCCL",
}
"""What each of `StageMemory.items` is, where there is any of it."""

# A GPU's memory beyond what torch allocates. The context: CUDA's own, kernels, cuBLAS and NCCL's buffers, which grow
# with the communicators. Fragmentation: a share of what comes and goes within a step; what stays is packed.
CONTEXT_BYTES = 3 << 29
FRAGMENTATION = 0.04


def stage_memory(config: Config, data: int, cpu: bool = False) -> list[StageMemory]:
    """One entry per pipeline rank, of a run with `data` data-parallel ranks on GPUs, or on CPUs if `cpu`.

    Follows the schedule's actions, the passes of `plan.working` and the ZeRO backend's buffers; compiling is left out.

    Raises UserError where `recompute.budget` is too small.
    """
    activations = Activations(config, data, cpu)
    policies = activations.policies()
    place = Place.of(config, cpu)
    return [_stage(config, data, cpu, activations, place, policies[r], r) for r in range(config.parallel.pipeline)]


def _stage(
    config: Config, data: int, cpu: bool, activations: Activations, place: Place, policies: Policies, rank: int
) -> StageMemory:
    layers, where = activations.layers, activations.where
    virtual = [where.virtual(rank, chunk) for chunk in range(config.parallel.chunks)]
    last = where.virtual_stages - 1
    contents = tuple((len(layers[v]), v == 0, v == last) for v in virtual)
    state = zero_memory(config, data, cpu, contents)
    held = {"weights": state.weights, "main_grad": state.main_grad, "masters": state.masters, "moments": state.moments}
    held["batch"] = _batch(config, data)
    passes = Passes(activations.schedule, rank, place, policies, [(first, end) for _, first, end in contents])
    best, when = passes.most(state)
    step = dict(state.step)
    if sum(step.values()) > sum(best.values()):
        best, when = step, "optimizer step"
    items = {item: held.get(item, 0) + best.get(item, 0) for item in ITEMS}
    if not cpu:
        coming = sum(best.values())
        items |= {"fragmentation": int(FRAGMENTATION * coming), "context": CONTEXT_BYTES}
    return StageMemory(
        layers=[layers[v] for v in virtual],
        policies=policies,
        parameters=state.parameters,
        weights=state.weights,
        gradients=state.main_grad,
        optimizer=state.masters + state.moments,
        activations=activations.peak(rank, policies),
        items={item: size for item, size in items.items() if size},
        when=when,
    )


def _batch(config: Config, data: int) -> int:
    batch, model = config.batch, config.model
    tokens = batch.global_samples // data * batch.sequence
    wide = max(DTYPES[config.precision].itemsize, 4)
    return 2 * 8 * tokens + (batch.sequence * model.rotary_width * wide if model.position == "rope" else 0)


def layer_policies(config: Config, data: int, cpu: bool = False) -> list[Policies]:
    """What the layers of each pipeline rank compute again, as `config.recompute` says or within its budget.

    Raises UserError where `recompute.budget` is too small.
    """
    return Activations(config, data, cpu).policies()


class Activations:
    """What forwards keep for their backwards on each pipeline rank of a run."""

    def __init__(self, config: Config, data: int, cpu: bool) -> None:
        self.config, self.cpu = config, cpu
        parallel, batch = config.parallel, config.batch
        self.where = stage_placement(config)
        self.layers = layers = split_layers(config)
        self.counts = [
            [len(layers[self.where.virtual(rank, chunk)]) for chunk in range(parallel.chunks)]
            for rank in range(parallel.pipeline)
        ]
        steps = batch.global_samples // (batch.micro * data)
        if parallel.schedule != "gpipe":  # which keeps them all
            # The pipeline is full long before this many micro-batches; more change no peak.
            steps = min(steps, 4 * parallel.pipeline)
        self.schedule = cached_schedule(parallel.schedule, parallel.pipeline, parallel.chunks, steps)
        self.layer = {policy: layer_activations(config, cpu, policy) for policy in _RANKED}

    def policies(self) -> list[Policies]:
        """One entry per rank; UserError where nothing keeps within the budget."""
        recompute = self.config.recompute
        if recompute.policy == "budget":
            return [self._within_budget(rank) for rank in range(len(self.counts))]
        policy, most = recompute.policy, recompute.layers
        return [[_mix(n, {policy: n if most is None else most}) for n in counts] for counts in self.counts]

    def peak(self, rank: int, policies: Policies) -> int:
        """Bytes that a rank holds at most: of forwards whose backward is to come, of backwards whose weight gradients
        are, and of the one layer that is being computed again."""
        kept = [sum(self.layer[policy] for policy in chunk) for chunk in policies]
        last = self.where.virtual_stages - 1
        if self.where.rank(last) == rank:
            kept[self.where.chunk(last)] += self._head()
        deferred = [len(chunk) * deferred_activations(self.config) for chunk in policies]
        again = max(self.layer["none"] - self.layer[policy] for chunk in policies for policy in chunk)
        made, where = self.schedule, self.where
        counts = levels(made.name, where.stages, where.chunks, made.micro_batches, rank).after
        return int((counts @ np.array(kept + deferred, dtype=np.int64)).max()) + again

    def _head(self) -> int:
        """What the norm keeps, and the gradients of the projection's input and weight, which its forward makes."""
        parallel = self.config.parallel
        width = DTYPES[self.config.precision].itemsize
        head = parameter_table(self.config.model)["head.weight"]
        shape = head.shard(0, parallel.tensor, parallel.vocabulary_multiple).shape
        return 2 * _stream(self.config) * width + _statistics(self.config, self.cpu) + math.prod(shape) * max(width, 4)

    def _within_budget(self, rank: int) -> Policies:
        """The mix of policies that computes least again, first layers most, the same in each chunk."""
        budget, counts = int((self.config.recompute.budget or 0) * 2**30), self.counts[rank]
        cost = {policy: _time_again(self.config, policy) for policy in _RANKED}
        least = None
        longest = max(counts)
        amounts = [(full, selective) for full in range(longest + 1) for selective in range(longest + 1 - full)]
        mixes = [[_mix(n, {"full": full, "selective": selective}) for n in counts] for full, selective in amounts]
        for mix in sorted(mixes, key=lambda mix: sum(cost[policy] for chunk in mix for policy in chunk)):
            peak = self.peak(rank, mix)
            if peak <= budget:
                return mix
            least = peak if least is None else min(least, peak)
        assert least is not None
        raise UserError(
            f"recompute.budget = {self.config.recompute.budget} GiB is too small for pipeline rank {rank}: with the "
            f"{self.config.parallel.schedule} schedule it holds at least {least / 2**30 * 1.0005:.4g} GiB of "
            "activations, whatever is computed again. Raise the budget to that, or take a smaller batch.micro, more "
            "parallel.tensor, or more parallel.pipeline"
        )


_RANKED: tuple[Policy, ...] = ("full", "selective", "none")
"""Policies, from the one that keeps least on."""

# What a GPU multiplies and adds in the time in which it moves a byte: 150 to 300 on those of the last years.
_FLOPS_PER_BYTE = 200


def _mix(layers: int, amounts: dict[Policy, int]) -> list[Policy]:
    """That many layers of each policy, in the order of `_RANKED`; what remains keeps everything."""
    mixed = [policy for policy in _RANKED for _ in range(amounts.get(policy, 0))]
    rest: list[Policy] = ["none"] * layers
    return [*mixed, *rest][:layers]


def _tokens(config: Config) -> int:
    return config.batch.micro * config.batch.sequence


def _stream(config: Config) -> int:
    """Elements of a tensor between tensor-parallel regions, such as the residual stream."""
    between = config.parallel.tensor if config.parallel.sequence_parallel else 1
    return _tokens(config) // between * config.model.hidden


def _statistics(config: Config, cpu: bool) -> int:
    """Bytes of what a norm keeps beside its input: one number per token, or a LayerNorm two, on a CPU rounded."""
    width = DTYPES[config.precision].itemsize
    wide = max(width, 4)
    per_token = wide if config.model.norm == "rms_norm" else 2 * (width if cpu else wide)
    return per_token * _stream(config) // config.model.hidden


def _heads(config: Config) -> tuple[int, int]:
    """Of a tensor rank: query heads, key/value heads; ranks beyond the key/value heads share them."""
    tensor = config.parallel.tensor
    return config.model.heads // tensor, max(1, config.model.num_kv_heads // tensor)


def layer_activations(config: Config, cpu: bool, policy: Policy = "none") -> int:
    """Bytes that a tensor rank keeps of one layer's forward for its backward, for one micro-batch.

    That is, by what makes it: what each norm takes, and what the linear layers behind it take; queries, keys and values
    as attention takes them, its result and one sum of exponentials per head; the MLP's first projection and the input
    of its second. Where queries and keys are normalised, what was projected lives beside them. With `selective` what
    norms, attention and activation make is not kept, and the projection is as it was before turning; with `full` only
    the stream at the layer's beginning is.
    """
    model, tensor = config.model, config.parallel.tensor
    width = DTYPES[config.precision].itemsize
    stream = _stream(config) * width
    if policy == "full":
        return stream
    heads, kv_heads = _heads(config)
    norms = _norms(config, stream, _statistics(config, cpu), policy)
    projection = (heads + 2 * kv_heads) * model.head_width * width
    up = (2 if model.gated else 1) * model.ffn // tensor * width
    if policy == "selective":
        return norms + _tokens(config) * (projection + up)
    if model.qk_norm != "none":
        projection = 2 * projection + (heads + kv_heads) * max(width, 4)
    attention = projection + heads * model.head_width * width + heads * max(width, 4)
    down = model.ffn // tensor * width
    return norms + _tokens(config) * (attention + up + down)


def _norms(config: Config, stream: int, statistics: int, policy: Policy) -> int:
    """Bytes that a layer's norms keep, and its linear layers of what norms or the stream give them."""
    placement = config.model.norm_placement
    norms = 4 if placement == "both" else 2
    # The stream before attention and before the MLP, which a parallel residual has once; what norms after take.
    taken = {"before": 1 if config.model.parallel_residual else 2, "after": 4, "both": 4}[placement]
    given = 2 if placement != "after" and policy == "none" else 0
    return (taken + given) * stream + norms * statistics


def deferred_activations(config: Config) -> int:
    """Bytes that a tensor rank keeps of one layer between BACKWARD_INPUT and BACKWARD_WEIGHT, for one micro-batch: the
    input of each linear layer and the gradient of its output."""
    model, tensor = config.model, config.parallel.tensor
    heads, kv_heads = _heads(config)
    attention = (2 * heads + 2 * kv_heads) * model.head_width
    mlp = (3 if model.gated else 2) * model.ffn // tensor
    return (4 * _stream(config) + _tokens(config) * (attention + mlp)) * DTYPES[config.precision].itemsize


def _time_again(config: Config, policy: Policy) -> float:
    """What a layer's backward computes in addition, in FLOPs; bytes moved by cheap operations count as many."""
    if policy == "none":
        return 0.0
    model, tensor, tokens = config.model, config.parallel.tensor, _tokens(config)
    heads, kv_heads = _heads(config)
    attended = config.batch.sequence / 2 if model.attention == "causal" else config.batch.sequence
    core = 4.0 * tokens * heads * model.head_width * attended
    inner = model.ffn // tensor
    up = (2 if model.gated else 1) * inner
    moved = 4 * _stream(config) + tokens * ((4 * heads + 4 * kv_heads) * model.head_width + up + inner)
    again = core + moved * DTYPES[config.precision].itemsize * _FLOPS_PER_BYTE
    if policy == "selective":
        return again
    # The second projection of the MLP is not needed again.
    return again + 2.0 * tokens * model.hidden * ((2 * heads + 2 * kv_heads) * model.head_width + up)
