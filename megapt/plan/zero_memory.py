"""What the ZeRO backends hold between steps, and what they allocate while they reduce and update."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

from megapt.config import Config, ModelConfig
from megapt.model.table import parameter_table
from megapt.parallel.pipeline.stages import DTYPES
from megapt.parameters import ParameterSpec

Contents = tuple[tuple[int, bool, bool], ...]
"""Of each chunk of a rank: how many layers, and whether it has the model's beginning and its end."""


@dataclass(frozen=True)
class ZeroMemory:
    """Of one rank, in bytes; parameters in elements. What is allocated on top of what is held between steps, by item:

    later: in passes after the first backward; ending: where a backward ends, instead. fetch: in forwards in front of
    the head, where `later` is there from the beginning.
    reductions: of each bucket in the order of the backward, where reducing takes memory; two are under way at once and
    take `flying` as much. room: of the memory that two buckets' gradients fill in turn, where they have none of their
    own. gradients: of a `layer`, the `head` and the `embedding`. step: in the optimizer step.
    """

    parameters: int
    weights: int
    main_grad: int
    masters: int
    moments: int
    later: dict[str, int] = field(default_factory=dict)
    ending: dict[str, int] = field(default_factory=dict)
    fetch: int = 0
    reductions: tuple[int, ...] = ()
    flying: float = 0.0
    room: int = 0
    gradients: dict[str, int] = field(default_factory=dict)
    step: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Elements:
    """Of a rank's parameters: all, those that it optimizes, those of its matrices, of its copy of a tied one (`copy`)
    or of the owner of one that is copied elsewhere (`copied`). parts: of a layer, the head and the embedding. blocks:
    what stays together in a bucket, in the order of the backward pass."""

    count: int
    owned: int
    matrices: int
    copy: int
    copied: int
    parts: dict[str, int]
    blocks: tuple[int, ...]


@lru_cache(maxsize=1024)
def elements(model: ModelConfig, tensor: int, multiple: int, contents: Contents) -> Elements:
    begins, ends = (any(chunk[i] for chunk in contents) for i in (1, 2))
    layers = sum(chunk[0] for chunk in contents)
    count = owned = matrices = copy = copied = 0
    blocks: dict[str, dict[str, int]] = {"first": {}, "layer": {}, "last": {}}
    for spec, times in _specs(model, layers, begins, ends):
        if spec.tied_to is not None and begins:
            continue  # the same tensor as its owner
        numel = math.prod(spec.shard(0, tensor, multiple).shape)
        count += times * numel
        if spec.tied_to is not None:
            copy = numel
            continue
        copied = numel if spec.has_copy and not ends else copied
        owned += times * numel
        matrices += times * numel if spec.role == "matrix" else 0
        found = blocks[spec.end or "layer"]
        name = _TOGETHER.sub("together", spec.name)
        found[name] = found.get(name, 0) + numel
    layer = [*reversed(blocks["layer"].values())]
    order = [*reversed(blocks["last"].values()), *(layer * layers), *reversed(blocks["first"].values())]
    names = {"head": "last", "layer": "layer", "embedding": "first"}
    parts = {part: sum(blocks[name].values()) for part, name in names.items()}
    return Elements(count, owned, matrices, copy, copied, parts, tuple(order))


_TOGETHER = re.compile(r"\b([qkv]|gate|up)(?=\.)")


def _specs(model: ModelConfig, layers: int, begins: bool, ends: bool) -> Iterator[tuple[ParameterSpec, int]]:
    """The rows of the table on a rank, and how often; layers are alike."""
    here = {"first": begins, "last": ends}
    for spec in parameter_table(model).values():
        if spec.end is not None and here[spec.end]:
            yield spec, 1
        elif spec.layer == 0 and layers:
            yield spec, layers


@lru_cache(maxsize=1024)
def buckets(blocks: tuple[int, ...], size: int) -> tuple[int, ...]:
    """Elements of each bucket, as the native backend fills them."""
    filled: list[int] = []
    for block in blocks:
        if filled and filled[-1] + block <= size:
            filled[-1] += block
        else:
            filled.append(block)
    return tuple(filled)


def zero_memory(config: Config, data: int, cpu: bool, contents: Contents) -> ZeroMemory:
    """Of a rank with these chunks, in a run with `data` data-parallel ranks, on GPUs or on CPUs."""
    parallel = config.parallel
    own = elements(config.model, parallel.tensor, parallel.vocabulary_multiple, contents)
    if config.zero.backend == "native":
        return _native(config, data, cpu, own)
    return _deepspeed(config, data, cpu, own)


def _native(config: Config, data: int, cpu: bool, own: Elements) -> ZeroMemory:
    width = DTYPES[config.precision].itemsize
    wide = max(width, 4)
    stage = config.zero.stage if data > 1 else 0
    shards = data if stage else 1
    muon = config.optimizer.kind == "muon"
    update = _muon_step(config, data, shards, cpu, own.matrices) if muon else 0
    sizes: tuple[int, ...] = ()
    if cpu and stage or stage == 2:
        sizes = tuple(size * wide for size in buckets(own.blocks, config.zero.bucket))
    # On a CPU a reduction goes through a copy; stage 2 reduces into a shard of its own.
    flying = cpu + (1 / shards if stage == 2 else 0.0)
    room = max(sizes) if stage == 2 else 0
    pairs = [a + b for a, b in zip(sizes, (0, *sizes), strict=False)] or [0]
    later = int(min(2, len(sizes)) * room + pairs[-1] * flying) if stage == 2 else 0
    # Reductions end, then the copy's gradient arrives at the owner, and in the end its new value at the copy.
    reduction = int(max(pairs) * flying) if stage == 1 else 0
    update = max(update, own.copied * wide, own.copy * width)
    return ZeroMemory(
        parameters=own.count,
        weights=own.count * width,
        main_grad=(own.owned // (shards if stage == 2 else 1) + own.copy) * wide,
        masters=own.owned // shards * wide if width < wide else 0,
        moments=(2 * own.owned - (own.matrices if muon else 0)) // shards * wide,
        later={"buckets": later},
        reductions=sizes,
        flying=flying,
        room=room,
        gradients={part: size * wide for part, size in own.parts.items()},
        step={"step": update} if update >= reduction else {"buckets": reduction},
    )


def _muon_step(config: Config, data: int, shards: int, cpu: bool, matrices: int) -> int:
    """What `zero.muon` allocates. matrices: elements of this tensor rank's, of which it orthogonalises 1 / data whole.

    The update in full precision and in that of the iteration, shards that were collected over dp, the matrices, and
    two exchanges, of which tensor ranks' is the larger.
    """
    tensor, wide = config.parallel.tensor, max(DTYPES[config.precision].itemsize, 4)
    width = wide if cpu or wide == 8 else 2
    mine = matrices // data * width
    update = matrices // shards * (wide + (width if width != wide else 0))
    collected = mine if shards > 1 else 0
    table = parameter_table(config.model).values()
    shapes = [spec.shape for spec in table if spec.layer == 0 and spec.role == "matrix"]
    largest = max(3 * m * n + 2 * min(m, n) ** 2 for m, n in shapes) * width
    tall = sum(m * n for m, n in shapes if m > n) / sum(m * n for m, n in shapes)
    orthogonal = mine + (4 * mine if tensor > 1 else max(int(tall * mine), largest))
    returned = mine + (mine if shards > 1 else matrices * width) + matrices // shards * width if data > 1 else 0
    return update + collected + max(orthogonal, returned)


# DeepSpeed's defaults: elements of one all-reduce of stages 0 and 1 in bf16, and in stage 3 of gathered weights that
# stay, and of those that are gathered ahead.
_ALL_REDUCED, _LIVE, _PREFETCHED = 5 * 10**8, 10**9, 5 * 10**7


def _deepspeed(config: Config, data: int, cpu: bool, own: Elements) -> ZeroMemory:
    width = DTYPES[config.precision].itemsize
    wide, stage, offload = max(width, 4), config.zero.stage, config.zero.offload
    shards = data if stage else 1
    shard = own.owned // shards * 4
    several = config.batch.global_samples // data > config.batch.micro
    bucket = min(config.zero.bucket, own.owned)
    here = cpu or not offload  # a CPU's memory is the host's
    weights, main_grad, gathered, ending, step, fetch = own.count * width, own.count * wide, 0, 0, 0, 0
    if stage < 2:
        step = min(own.owned, _ALL_REDUCED) * 4 if width == 2 and not offload else shard
    elif stage == 2:
        main_grad = 0
        ending = bucket * width + (bucket * (width + 4) if width == 2 else shard)
    else:
        weights, main_grad = own.count * width // shards, shard
        fetch = min(own.count, _PREFETCHED) * width
        gathered = min(own.count, _LIVE) * width + bucket * 4
    held = {"main_grad": shard} if stage == 2 and here else {}
    masters = shard if here else 0
    if offload and cpu:
        masters += shard // 2 + shard  # a copy of the weights' shard, and its gradients
    return ZeroMemory(
        parameters=own.count,
        weights=weights,
        main_grad=main_grad,
        masters=masters,
        moments=2 * shard if here else 0,
        later={"buckets": gathered} | (held if several else {}),
        ending={"buckets": ending} | held if stage == 2 else {},
        fetch=fetch,
        step={"step": step} | held,
    )
