"""What values of a configuration may stand together: every refusal names the rule, the values and what would fit."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from megapt.errors import UserError

if TYPE_CHECKING:
    from megapt.config import Config, ModelConfig, Section, SourceConfig


def _nearest(value: int, unit: int) -> str:
    below, above = value // unit * unit, math.ceil(value / unit) * unit
    return " or ".join(str(v) for v in dict.fromkeys((below, above)) if v)


def _divisors(number: int, limit: int = 10**9) -> list[int]:
    return [d for d in range(1, min(number, limit) + 1) if number % d == 0]


def _tensor_ok(model: ModelConfig, tensor: int) -> bool:
    kv = model.num_kv_heads
    return not (model.heads % tensor or model.ffn % tensor or (kv % tensor and tensor % kv))


def _factorisations(config: Config, world: int) -> list[tuple[int, int]]:
    chunks = config.parallel.chunks
    return [
        (t, p)
        for t in _divisors(world, 64)
        if _tensor_ok(config.model, t)
        for p in _divisors(world // t, config.model.layers // chunks)
    ][:12]


def conflicts(config: Config) -> Iterator[tuple[str, str]]:
    """Every rule between values that needs no world size, as (key, message)."""
    yield from _model_conflicts(config.model)
    yield from _parallel_conflicts(config)
    yield from _zero_conflicts(config)
    yield from _data_conflicts(config)
    yield from _checkpoint_conflicts(config)
    batch, model, train = config.batch, config.model, config.train
    if (batch.samples is None) == (batch.tokens is None):
        yield "batch", "give the global batch either in `samples` or in `tokens`"
    elif batch.tokens is not None and batch.tokens % batch.sequence:
        fits = _nearest(batch.tokens, batch.sequence)
        yield "batch.tokens", f"{batch.tokens} is not a whole number of sequences of {batch.sequence}; nearest: {fits}"
    if batch.sequence > model.max_sequence:
        yield "batch.sequence", f"{batch.sequence} is longer than model.max_sequence = {model.max_sequence}"
    if (train.steps is None) == (train.tokens is None):
        yield "train", "give the length of the run either in `steps` or in `tokens`"
    if train.tokens is not None and batch.ramp is not None:
        yield "train.tokens", "with a batch ramp the run's length must be given in `steps`"
    steps = train.steps or math.ceil((train.tokens or 0) / (max(batch.global_samples, 1) * batch.sequence))
    if config.run.timeline_step is not None and config.run.timeline_step > steps:
        yield "run.timeline_step", f"{config.run.timeline_step} never comes: the run has {steps} steps"
    optimizer = config.optimizer
    if optimizer.floor > optimizer.lr:
        yield "optimizer.min_lr", f"{optimizer.min_lr} is above optimizer.lr = {optimizer.lr}"
    if optimizer.schedule == "constant" and optimizer.min_lr is not None:
        yield "optimizer.min_lr", "has no effect on the constant schedule: leave it out, or choose another schedule"
    if (optimizer.schedule == "wsd") != (optimizer.decay_steps is not None):
        yield "optimizer.decay_steps", "belongs to the wsd schedule, which needs it, and to no other"


def _model_conflicts(model: ModelConfig) -> Iterator[tuple[str, str]]:
    if model.head_dim is None and model.hidden % model.heads:
        fits = _nearest(model.hidden, model.heads)
        yield "model.hidden", f"{model.hidden} is not divisible by model.heads = {model.heads}; nearest: {fits}"
    if model.heads % model.num_kv_heads:
        fits = ", ".join(map(str, _divisors(model.heads)))
        yield "model.kv_heads", f"{model.num_kv_heads} does not divide model.heads = {model.heads}; legal: {fits}"
    yield from _position_conflicts(model)
    if model.norm == "layer_norm" and model.norm_offset:
        yield "model.norm_offset", "belongs to model.norm = rms_norm, not layer_norm"
    if model.parallel_residual and model.norm_placement != "before":
        yield "model.norm_placement", f"a parallel residual has its norms before, not {model.norm_placement}"
    if model.window_pattern > 1 and model.window is None:
        yield "model.window_pattern", f"{model.window_pattern} has no effect without model.window"
    if model.window is not None and model.attention != "causal":
        yield "model.window", f"needs model.attention = causal, not {model.attention}"


# What only some kinds of rotary scaling read.
_SCALINGS = {
    "low_frequency_factor": ("llama3",),
    "high_frequency_factor": ("llama3",),
    "beta_fast": ("yarn",),
    "beta_slow": ("yarn",),
    "attention_factor": ("yarn", "longrope"),
}


def _position_conflicts(model: ModelConfig) -> Iterator[tuple[str, str]]:
    if model.position != "rope":
        for name in ("rope_scaling", "rotary_dim"):
            if getattr(model, name) is not None:
                yield f"model.{name}", f"needs model.position = rope, not {model.position}"
        return
    width = model.rotary_width
    if model.rotary_dim is None and width % 2:
        yield "model.head_dim", f"rotary positions need an even head dimension, not {width}"
    elif width % 2 or width > model.head_width:
        yield "model.rotary_dim", f"{width} must be even and at most the head dimension, {model.head_width}"
    scaling = model.rope_scaling
    if scaling is None:
        return
    for name, kinds in _SCALINGS.items():
        if scaling.kind not in kinds and name in _given(scaling):
            yield f"model.rope_scaling.{name}", f"has no effect on kind = {scaling.kind}: it belongs to {kinds[0]}"
    if scaling.beta_fast <= scaling.beta_slow:
        message = f"{scaling.beta_fast} must be above model.rope_scaling.beta_slow = {scaling.beta_slow}"
        yield "model.rope_scaling.beta_fast", message
    if scaling.kind == "longrope" and scaling.original_sequence == 1:
        yield "model.rope_scaling.original_sequence", "must be 2 or more for kind = longrope"
    for name in ("short_factors", "long_factors"):
        factors = getattr(scaling, name)
        if (scaling.kind == "longrope") != (factors is not None):
            yield f"model.rope_scaling.{name}", "belongs to kind = longrope, which needs it, and to no other"
        elif factors is not None and len(factors) != width // 2:
            message = f"has {len(factors)} factors; {width} dimensions that turn need {width // 2}"
            yield f"model.rope_scaling.{name}", message


def _parallel_conflicts(config: Config) -> Iterator[tuple[str, str]]:
    model, parallel, batch = config.model, config.parallel, config.batch
    if not _tensor_ok(model, parallel.tensor):
        legal = ", ".join(str(t) for t in range(1, model.heads + 1) if _tensor_ok(model, t))
        yield (
            "parallel.tensor",
            f"{parallel.tensor} must divide model.heads = {model.heads} and model.ffn = {model.ffn}, and divide or be "
            f"a multiple of the {model.num_kv_heads} kv heads; legal: {legal}",
        )
    if parallel.sequence_parallel and batch.micro * batch.sequence % parallel.tensor:
        yield (
            "batch.sequence",
            f"sequence parallelism needs micro-batch x sequence = {batch.micro} x {batch.sequence} divisible by "
            f"tensor = {parallel.tensor}; nearest sequence: {_nearest(batch.sequence, parallel.tensor)}",
        )
    legal = {"interleaved": "2 or more", "zb-v": "2"}.get(parallel.schedule, "1")
    if str(parallel.chunks) != legal and not (legal == "2 or more" and parallel.chunks > 1):
        yield "parallel.chunks", f"{parallel.chunks} chunks per rank; the {parallel.schedule} schedule has {legal}"
    if parallel.schedule in ("interleaved", "zb-v") and parallel.pipeline < 2:
        yield "parallel.schedule", f"{parallel.schedule} needs parallel.pipeline of 2 or more, not {parallel.pipeline}"
    stages = parallel.virtual_stages
    if model.layers < stages:
        yield "parallel.pipeline", f"{model.layers} layers cannot fill {stages} stages; at most {model.layers} stages"
    elif parallel.layers_per_stage is not None:
        try:
            parse_layout(parallel.layers_per_stage, model.layers, stages)
        except UserError as error:
            yield "parallel.layers_per_stage", str(error)
    if parallel.layer_costs is not None and len(parallel.layer_costs) != model.layers:
        count = len(parallel.layer_costs)
        yield "parallel.layer_costs", f"{count} costs for model.layers = {model.layers}; give one for each layer"
    recompute = config.recompute
    if recompute.policy == "budget" and recompute.budget is None:
        yield "recompute.policy", "budget needs `recompute.budget`, the GiB of activations that a rank may hold"
    if recompute.budget is not None and recompute.policy != "budget":
        yield "recompute.budget", f"has no effect on the {recompute.policy} policy: it belongs to budget"
    if recompute.layers is not None and recompute.policy not in ("selective", "full"):
        yield "recompute.layers", f"has no effect on the {recompute.policy} policy: it belongs to selective and full"
    most = model.layers - stages + 1
    if recompute.layers is not None and recompute.layers > max(most, 1):
        yield (
            "recompute.layers",
            f"{recompute.layers} are more than one of {stages} virtual stages of {model.layers} layers can have; at "
            f"most {most}, or leave it out for all",
        )


_PART = re.compile(r"(\d+)(?:\*(\d+))?")


def parse_layout(layout: str, layers: int, stages: int) -> list[int]:
    """The layers of each virtual stage as `layout` says: counts between commas, `a*n` for n stages of a layers.

    `3,4*6,3` is eight virtual stages of 3, 4, 4, 4, 4, 4, 4 and 3 layers. Raises UserError for other texts, and where
    the counts do not make `stages` virtual stages of at least one layer that together have `layers` layers.
    """
    counts: list[int] = []
    for part in layout.split(","):
        match = _PART.fullmatch(part.strip())
        if match is None:
            raise UserError(
                "a layout is numbers of layers between commas, a*n for n stages of a layers each, as in 3,4*6,3; "
                f"got {part.strip()!r} in {layout!r}"
            )
        count, times = match.groups()
        # No more than can be legal, so that a slip of the pen in n costs no memory.
        counts += [int(count)] * min(int(times or 1), stages + 1)
    if len(counts) != stages or sum(counts) != layers or min(counts) < 1:
        least, more = divmod(layers, stages)
        even = ",".join(map(str, [least] * (stages - more) + [least + 1] * more)) if least else "none"
        raise UserError(
            f"a layout gives each of the {stages} virtual stages at least one of the {layers} layers; {layout!r} has "
            f"{len(counts) if len(counts) <= stages else f'more than {stages}'} stages with {sum(counts)} layers, the "
            f"fewest {min(counts, default=0)}; an even one: {even}"
        )
    return counts


def _zero_conflicts(config: Config) -> Iterator[tuple[str, str]]:
    parallel, zero, optimizer = config.parallel, config.zero, config.optimizer
    if zero.stage > 1 and parallel.pipeline > 1:
        yield (
            "zero.stage",
            f"{zero.backend} ZeRO {zero.stage} with pipeline = {parallel.pipeline} would reduce gradients at every "
            "micro-batch; with a pipeline use stage 0 or 1, or set parallel.pipeline = 1",
        )
    if config.precision != "fp16":
        for name in _given(config.loss_scale):
            yield f"loss_scale.{name}", f"has no effect on precision = {config.precision}: it belongs to fp16"
    if optimizer.kind != "muon":
        for name in _given(optimizer.muon):
            yield f"optimizer.muon.{name}", f"has no effect on optimizer.kind = {optimizer.kind}: it belongs to muon"
    if config.loss_scale.smallest > config.loss_scale.initial:
        lowest, initial = config.loss_scale.smallest, config.loss_scale.initial
        yield "loss_scale.smallest", f"{lowest} is above loss_scale.initial = {initial}"
    if zero.stage > 2 and zero.backend == "native":
        yield "zero.stage", f"the native backend has stages 0 to 2, not {zero.stage}; use zero.backend = deepspeed"
    if zero.offload and (zero.backend != "deepspeed" or parallel.pipeline > 1 or zero.stage == 0):
        yield (
            "zero.offload",
            f"needs zero.backend = deepspeed, zero.stage 1 to 3 and parallel.pipeline = 1, not {zero.backend}, "
            f"{zero.stage} and {parallel.pipeline}",
        )
    for name in ("adamw", "wgrad"):
        chosen = getattr(config.kernels, name)
        if zero.backend == "deepspeed" and chosen not in ("auto", "off" if name == "wgrad" else "reference"):
            yield (
                f"kernels.{name}",
                f"{chosen} needs zero.backend = native: DeepSpeed updates weights and accumulates gradients itself",
            )
    if zero.backend == "deepspeed":
        if config.precision == "fp16":
            yield "precision", "fp16 needs zero.backend = native, which scales the loss; or use precision = bf16"
        if optimizer.kind == "muon":
            yield "optimizer.kind", "muon needs zero.backend = native; with deepspeed use adamw"
        if optimizer.stochastic_rounding:
            yield "optimizer.stochastic_rounding", "needs zero.backend = native; or leave it out"
    if optimizer.stochastic_rounding and config.precision != "bf16":
        yield (
            "optimizer.stochastic_rounding",
            f"rounds fp32 masters to bf16 weights; precision is {config.precision}: use bf16, or leave it out",
        )


def _checkpoint_conflicts(config: Config) -> Iterator[tuple[str, str]]:
    checkpoint, train = config.checkpoint, config.train
    every, kept, ephemeral = checkpoint.every, checkpoint.keep_every, checkpoint.ephemeral
    if kept is not None and (every == 0 or kept % every):
        legal = f"nearest: {_nearest(kept, every)}" if every else "which is 0: give both"
        yield "checkpoint.keep_every", f"{kept} is not a multiple of checkpoint.every = {every}, {legal}"
    if checkpoint.keep_best and not (train.validate_every and train.validate_samples):
        yield "checkpoint.keep_best", (
            f"{checkpoint.keep_best} goes by validation losses: it needs train.validate_every and validate_samples "
            f"above 0, not {train.validate_every} and {train.validate_samples}"
        )
    if ephemeral is not None and every and ephemeral.every >= every:
        message = f"{ephemeral.every} must be below checkpoint.every = {every}: they are for the steps in between"
        yield "checkpoint.ephemeral.every", message
    if ephemeral is not None and ephemeral.folder is not None:
        lasting = os.path.join(config.run.folder, "checkpoints")
        if os.path.realpath(ephemeral.folder) == os.path.realpath(lasting):
            message = f"{lasting} holds the lasting checkpoints, which would be removed; name another folder"
            yield "checkpoint.ephemeral.folder", message
    if checkpoint.load_optimizer and checkpoint.load is None:
        yield "checkpoint.load_optimizer", "has no effect without checkpoint.load"


def _given(section: Section) -> list[str]:
    """Values of a section that are not their defaults."""
    return [name for name, field in type(section).model_fields.items() if getattr(section, name) != field.default]


def _data_conflicts(config: Config) -> Iterator[tuple[str, str]]:
    data = config.data
    sources = data.train if isinstance(data.train, list) else []
    for key, given in (("data.train", data.train), ("data.valid", data.valid)):
        if isinstance(given, list):
            yield from _source_conflicts(key, given)
    names = [source.label for source in sources]
    if data.phases and len(sources) < 2:
        yield "data.phases", "weigh the sources of a blend against each other, but data.train is one corpus"
    if data.valid is not None and data.split != type(data).model_fields["split"].default:
        yield "data.split", f"{data.split} has no effect, since data.valid names the validation data: leave one out"
    starts = [phase.from_token for phase in data.phases]
    if starts != sorted(set(starts)):
        yield "data.phases", f"must begin one after the other, not at tokens {starts}"
    for phase in data.phases:
        unknown = [name for name in phase.weights if name not in names]
        if names and unknown:
            yield "data.phases", f"{', '.join(unknown)}: no such source; the sources are {', '.join(names)}"
        elif not any(phase.weights.values()):
            yield "data.phases", f"the phase from token {phase.from_token} gives no source a weight"
    direction = "bidirectional" if config.objective == "masked_lm" else "causal"
    if config.model.attention != direction:
        yield "model.attention", f"objective = {config.objective} needs {direction}, not {config.model.attention}"
    if (config.objective == "masked_lm") != (data.masked_lm is not None):
        yield "data.masked_lm", "belongs to objective = masked_lm, which needs it (at least `mask:`), and to no other"
    if data.masked_lm is not None and data.masked_lm.random + data.masked_lm.keep > 1:
        yield "data.masked_lm", f"random {data.masked_lm.random} and keep {data.masked_lm.keep} sum to more than 1"
    if data.fim is not None and config.objective != "next_token":
        yield "data.fim", f"rearranges text for objective = next_token, not {config.objective}"
    if data.order == "megatron" and data.packing != "concatenate":
        yield "data.packing", f"order = megatron cuts the joined documents: packing = concatenate, not {data.packing}"


def _source_conflicts(key: str, sources: list[SourceConfig]) -> Iterator[tuple[str, str]]:
    names = [source.label for source in sources]
    if not sources:
        yield key, "is a blend of no sources: give a prefix, or a list of `path:` and `weight:`"
        return
    if len(set(names)) != len(names):
        yield key, f"two sources have the same name ({', '.join(names)}); give them `name:`"
    weighted = [source.weight is not None for source in sources]
    budgets = [source.tokens is not None for source in sources]
    if any(w and b for w, b in zip(weighted, budgets, strict=True)) or any(weighted) and any(budgets):
        yield key, "give every source a `weight`, or every source a budget in `tokens`, not both"
    elif any(weighted) != all(weighted) or any(budgets) != all(budgets):
        yield key, "some sources have a weight or a budget and some have none: give it to all, or to none"


def check_world(config: Config, world: int) -> int:
    """The data-parallel size that remains in a world of `world` ranks; UserError if the layout does not fit it."""
    parallel, batch = config.parallel, config.batch
    if parallel.auto is not None:
        raise UserError(
            "parallel: auto becomes a layout where launch/pretrain.sh starts; elsewhere one must stand written: "
            "megapt plan CONFIG --gpus N --write FILE"
        )
    cell = parallel.tensor * parallel.pipeline
    if world % cell:
        layouts = _factorisations(config, world)
        fits = ", ".join(f"tensor={t} pipeline={p} (data={world // (t * p)})" for t, p in layouts)
        raise UserError(
            f"the world of {world} ranks is not divisible by tensor x pipeline = {parallel.tensor} x "
            f"{parallel.pipeline} = {cell}. Layouts of this model that fit {world} ranks: {fits or 'none'}; or start "
            f"{_nearest(world, cell)} ranks"
        )
    data = world // cell
    if parallel.data is not None and parallel.data != data:
        raise UserError(
            f"parallel.data is {parallel.data}, but {world} ranks leave {world} / ({parallel.tensor} x "
            f"{parallel.pipeline}) = {data}; leave it out, set it to {data}, or start {cell * parallel.data} ranks"
        )
    sizes = {"batch.samples": batch.global_samples}
    if batch.ramp:
        sizes |= {"batch.ramp.start": batch.ramp.start, "batch.ramp.increment": batch.ramp.increment}
    for key, size in sizes.items():
        if size % (batch.micro * data):
            raise UserError(
                f"{key} = {size} samples is not divisible by micro-batch x data = {batch.micro} x {data} = "
                f"{batch.micro * data}; nearest that fit: {_nearest(size, batch.micro * data)}"
            )
        if parallel.schedule == "interleaved" and size // (batch.micro * data) % parallel.pipeline:
            unit = batch.micro * data * parallel.pipeline
            raise UserError(
                f"the interleaved schedule needs micro-batches per step ({key} {size} / (micro {batch.micro} x data "
                f"{data}) = {size // (batch.micro * data)}) divisible by pipeline = {parallel.pipeline}; nearest "
                f"sizes: {_nearest(size, unit)}"
            )
    return data
