"""The configuration: one typed tree, read from YAML, changed by dotted overrides, printed with every value's origin.

A tree is refused before any process group or file is touched: unknown keys, wrong types and impossible
combinations are all reported at once, each with the file, line and key it comes from.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from megapt.errors import UserError


def _whole(value: Any) -> Any:
    """Let `1e9` stand where a whole number is meant; anything else is left to the strict type check."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


# Beyond any cluster, and small enough that products of two stay sensible numbers.
_MOST = 10**15
Count = Annotated[int, BeforeValidator(_whole), Field(ge=1, le=_MOST)]
CountOrZero = Annotated[int, BeforeValidator(_whole), Field(ge=0, le=_MOST)]
Positive = Annotated[float, Field(gt=0)]
Momentum = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class RopeScaling(Section):
    """Llama 3's scaling of rotary frequencies (long wavelengths divided by `factor`, short ones kept)."""

    kind: Literal["llama3", "linear"]
    factor: Positive
    low_frequency_factor: Positive = 1.0
    high_frequency_factor: Positive = 4.0
    original_sequence: Count = 8192


class ModelConfig(Section):
    """What is computed. Nothing here depends on how many devices compute it."""

    layers: Annotated[Count, Field(le=10_000)]
    hidden: Count
    heads: Count
    kv_heads: Count | None = Field(None, description="key/value heads; default: heads")
    head_dim: Count | None = Field(None, description="default: hidden / heads")
    ffn: Count = Field(description="width of the MLP")
    vocabulary: Count
    max_sequence: Count = 4096
    norm: Literal["rms_norm", "layer_norm"] = "rms_norm"
    norm_eps: Positive = 1e-5
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    gated: bool = True
    position: Literal["rope", "learned"] = "rope"
    rope_theta: Positive = 10000.0
    rope_scaling: RopeScaling | None = None
    bias: Literal["none", "qkv", "all"] = "none"
    tied_embeddings: bool = False
    init_std: Positive = 0.02

    @property
    def num_kv_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def head_width(self) -> int:
        return self.head_dim or self.hidden // self.heads


class ParallelConfig(Section):
    """Where it is computed. Data parallelism is what remains: world / (tensor x pipeline)."""

    tensor: Count = 1
    pipeline: Count = 1
    data: Count | None = Field(None, description="if given, must be what remains")
    sequence: bool | None = Field(None, description="sequence parallelism; default: whenever tensor > 1")
    schedule: Literal["1f1b", "interleaved"] = "1f1b"
    chunks: Count = Field(1, description="model chunks per rank, for the interleaved schedule")
    layers_per_stage: list[Count] | None = Field(None, description="layers of each virtual stage; default: balanced")
    vocabulary_multiple: Count = Field(64, description="vocabulary rows per tensor rank are padded to a multiple")

    @property
    def sequence_parallel(self) -> bool:
        return self.tensor > 1 if self.sequence is None else self.sequence

    @property
    def virtual_stages(self) -> int:
        return self.pipeline * self.chunks


class ZeroConfig(Section):
    stage: Annotated[int, Field(ge=0, le=3)] = 1
    backend: Literal["deepspeed", "native"] = "deepspeed"


class DataConfig(Section):
    train: str = Field(description="prefix of the .bin/.idx pair")
    valid: str | None = Field(None, description="prefix of the validation pair; default: the split's second part")
    split: str = Field("969,30,1", description="train, valid, test shares of the sequences")
    tokenizer: str | None = Field(None, description="copied beside exports; used by generate")


class BatchRamp(Section):
    start: Count = Field(description="samples per step at the beginning")
    increment: Count
    samples: Count = Field(description="samples over which the batch grows to its full size")


class BatchConfig(Section):
    """The global batch, in samples or in tokens, and the micro-batch of one rank."""

    sequence: Count
    samples: Count | None = None
    tokens: Count | None = None
    micro: Count = 1
    ramp: BatchRamp | None = None

    @property
    def global_samples(self) -> int:
        return self.samples if self.samples is not None else (self.tokens or 0) // self.sequence


class OptimizerConfig(Section):
    """AdamW (arXiv 1711.05101) and its learning-rate schedule."""

    lr: Positive = 3e-4
    min_lr: Annotated[float, Field(ge=0)] | None = Field(None, description="default: lr / 10; of no use to constant")
    betas: Annotated[list[Momentum], Field(min_length=2, max_length=2)] = [0.9, 0.95]
    eps: Positive = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    clip: Annotated[float, Field(ge=0)] = Field(1.0, description="largest global gradient norm; 0: no clipping")
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    warmup_steps: CountOrZero = 0
    decay_steps: Count | None = Field(None, description="length of the decay of wsd")

    @property
    def floor(self) -> float:
        """The learning rate at the end of the run's decay."""
        if self.min_lr is None:
            return 0.0 if self.schedule == "constant" else self.lr / 10
        return self.min_lr


class TrainConfig(Section):
    steps: Count | None = None
    tokens: Count | None = Field(None, description="instead of steps")
    validate_every: CountOrZero = Field(0, description="steps between validations; 0: only at the end")
    validate_samples: CountOrZero = Field(256, description="0: no validation")


class CheckpointConfig(Section):
    every: CountOrZero = Field(0, description="steps between checkpoints; 0: only at the end")
    keep: Count = Field(2, description="newest checkpoints kept")
    load: str | None = Field(None, description="start from these weights (a checkpoint of any layout)")


class RunConfig(Section):
    folder: str = "runs/run"
    log_every: Count = 10
    tensorboard: bool = True
    time_limit: Positive | None = Field(None, description="minutes after which to save and stop")
    peak_tflops: Positive | None = Field(None, description="per device, for MFU; default: known GPUs, else n/a")
    stall_timeout: Positive = Field(1800.0, description="seconds without a step before the run is ended with a report")


class Config(Section):
    seed: CountOrZero = 1234
    precision: Literal["fp32", "bf16", "fp64"] = "bf16"
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    zero: ZeroConfig = ZeroConfig()
    data: DataConfig
    batch: BatchConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    run: RunConfig = RunConfig()


@dataclass(frozen=True)
class Loaded:
    """A checked tree, and where each of its values comes from (dotted key -> `file:line`, `override` or `default`)."""

    config: Config
    origins: dict[str, str] = field(default_factory=dict)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, but 1e-4 is the number that everyone means, and no key may stand twice."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        first: dict[tuple[str, str], yaml.ScalarNode] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                known = first.setdefault((key.tag, key.value), key)
                if known is not key:
                    lines = known.start_mark.line + 1, key.start_mark.line + 1
                    raise yaml.YAMLError(
                        f"key `{key.value}` is given twice, in lines {lines[0]} and {lines[1]}; keep one"
                    )
        return node


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:float"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?$|^[-+]?\.(inf|Inf)$|^\.(nan|NaN)$"),
    list("-+0123456789."),
)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Loaded:
    """Read a YAML file, apply `key.sub=value` overrides, check everything that needs no world size.

    Raises UserError listing every problem found.
    """
    path = Path(path)
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise UserError(f"config file {path} does not exist" + (f"; in that folder: {', '.join(near)}" if near else ""))
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=_Loader)
        tree = yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or a date that does not exist
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold sections such as `model:` and `train:`, not {type(tree).__name__}")
    origins = dict(_lines(node, str(path)))
    for override in overrides:
        _apply(tree, origins, override)
    return from_tree(tree, origins)


def from_tree(tree: dict[str, Any], origins: dict[str, str] | None = None) -> Loaded:
    """Check a plain nested dict; `origins` locates its values in the error messages."""
    origins = origins or {}
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise UserError("\n".join(_explain(tree, origins, dict(item)) for item in error.errors())) from None
    problems = [f"{_where(origins, key)}{key}: {message}" for key, message in _conflicts(config)]
    if problems:
        raise UserError("\n".join(problems))
    return Loaded(config, origins)


def check_world(config: Config, world: int) -> int:
    """The data-parallel size that remains in a world of `world` ranks; UserError if the layout does not fit it."""
    parallel, batch = config.parallel, config.batch
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


def show(path: str | Path, overrides: Sequence[str] = ()) -> str:
    """The resolved tree as YAML, each value followed by where it comes from."""
    loaded = load(path, overrides)
    lines = dump(loaded.config).splitlines()
    keys: list[str] = []
    rows: list[tuple[str, str]] = []
    for line in lines:
        indent = (len(line) - len(line.lstrip())) // 2
        key, _, value = line.strip().partition(":")
        keys[indent:] = [key]
        rows.append((line, loaded.origins.get(".".join(keys), "default") if value.strip() else ""))
    width = max(len(line) for line, _ in rows) + 2
    return "\n".join(f"{line:<{width}}# {origin}" if origin else line for line, origin in rows)


def dump(config: Config) -> str:
    """The whole tree as YAML that `load` reads back."""
    return yaml.dump(config.model_dump(), Dumper=_Dumper, sort_keys=False, width=10**6)


class _Dumper(yaml.SafeDumper):
    pass


_Dumper.add_representer(list, lambda d, data: d.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True))


def _lines(node: yaml.Node | None, file: str, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            yield name, f"{file}:{key.start_mark.line + 1}"
            yield from _lines(value, file, f"{name}.")


def _apply(tree: dict[str, Any], origins: dict[str, str], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r} must have the form key.sub=value, e.g. parallel.tensor=2")
    try:
        value = yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"override {override!r}: {text!r} is not a YAML value ({error})") from None
    here: Any = tree
    *path, last = key.split(".")
    for part in path:
        if not isinstance(here.get(part), dict):
            here[part] = {}
        here = here[part]
    here[last] = value
    for stale in [known for known in origins if known.startswith(f"{key}.")]:
        del origins[stale]
    origins.update((name, "override") for name in (key, *_keys(value, key)))


def _keys(value: Any, prefix: str) -> Iterator[str]:
    """Dotted keys of everything within a nested dict."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield f"{prefix}.{key}"
            yield from _keys(inner, f"{prefix}.{key}")


def _where(origins: dict[str, str], key: str) -> str:
    """`file:line: ` of the key itself or of the nearest section above it that was written down."""
    while key:
        if key in origins:
            return f"{origins[key]}: "
        key = key.rpartition(".")[0]
    return ""


def _explain(tree: dict[str, Any], origins: dict[str, str], item: dict[str, Any]) -> str:
    loc = [part for part in item["loc"] if isinstance(part, str)]
    key = ".".join(loc)
    where = _where(origins, key)
    if item["type"] == "extra_forbidden":
        section: Any = Config
        for part in loc[:-1]:
            section = _section(section.model_fields[part].annotation)
        return f"{where}unknown key `{key}`; {_closest(loc[-1], list(section.model_fields))}"
    if item["type"] == "missing":
        return f"{where}`{key}` is missing and has no default"
    return f"{where}`{key}`: {item['msg'][0].lower()}{item['msg'][1:]} (given: {item['input']!r})"


def _section(annotation: Any) -> Any:
    options = [annotation, *getattr(annotation, "__args__", ())]
    return next(o for o in options if isinstance(o, type) and issubclass(o, Section))


def _closest(word: str, names: list[str]) -> str:
    import difflib

    near = difflib.get_close_matches(word, names, n=1)
    return (f"did you mean `{near[0]}`? " if near else "") + f"Known here: {', '.join(names)}"


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


def _conflicts(config: Config) -> Iterator[tuple[str, str]]:
    """Every rule between values that needs no world size, as (key, message)."""
    yield from _model_conflicts(config.model)
    yield from _parallel_conflicts(config)
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
    if model.position == "rope" and model.head_width % 2:
        yield "model.head_dim", f"rotary positions need an even head dimension, not {model.head_width}"
    if model.position != "rope" and model.rope_scaling is not None:
        yield "model.rope_scaling", "needs model.position = rope"


def _parallel_conflicts(config: Config) -> Iterator[tuple[str, str]]:
    model, parallel, batch, zero = config.model, config.parallel, config.batch, config.zero
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
    if parallel.chunks > 1 and parallel.schedule != "interleaved":
        yield "parallel.chunks", "more than one chunk per rank needs parallel.schedule = interleaved"
    if parallel.schedule == "interleaved" and (parallel.chunks < 2 or parallel.pipeline < 2):
        yield "parallel.schedule", "interleaved needs parallel.pipeline >= 2 and parallel.chunks >= 2"
    stages = parallel.virtual_stages
    if parallel.layers_per_stage is not None:
        given = parallel.layers_per_stage
        if len(given) != stages or sum(given) != model.layers:
            yield (
                "parallel.layers_per_stage",
                f"{given} must name {stages} stages (pipeline x chunks) that sum to model.layers = {model.layers}",
            )
    elif model.layers < stages:
        yield "parallel.pipeline", f"{model.layers} layers cannot fill {stages} stages; at most {model.layers} stages"
    if zero.stage > 1 and parallel.pipeline > 1:
        yield (
            "zero.stage",
            f"ZeRO {zero.stage} with pipeline = {parallel.pipeline} would reduce gradients at every micro-batch; with "
            "a pipeline use stage 0 or 1, or set parallel.pipeline = 1",
        )
    if zero.stage > 1 and zero.backend == "native":
        yield "zero.stage", f"the native backend has stages 0 and 1, not {zero.stage}; use zero.backend = deepspeed"
