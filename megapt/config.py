"""The configuration: one typed tree, read from YAML, changed by dotted overrides, printed with every value's origin.

A tree is refused before any process group or file is touched: unknown keys, wrong types and impossible
combinations are all reported at once, each with the file, line and key it comes from.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from megapt.errors import UserError
from megapt.rules import conflicts


def _whole(value: Any) -> Any:
    """Let `1e9` stand where a whole number is meant; anything else is left to the strict type check."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _planned(value: Any) -> Any:
    """`parallel: auto` as `parallel: {auto: detect}`."""
    return {"auto": "detect"} if value == "auto" else value


def _everywhere(value: Any) -> Any:
    """`kernels: auto` and `kernels: reference` as the same choice for every operation; gradients of weights are then
    added by nobody but autograd."""
    if not isinstance(value, str):
        return value
    if value not in ("auto", "reference"):
        raise ValueError("should be auto or reference for all operations, or a section with a choice for each")
    return dict.fromkeys(KernelsConfig.model_fields, value) | ({"wgrad": "off"} if value == "reference" else {})


def _off(value: Any) -> Any:
    """YAML reads a bare `off` as a boolean."""
    return "off" if value is False else value


def _joined(value: Any) -> Any:
    """A list, or a single number, as a layout string."""
    if isinstance(value, list):
        return ",".join(map(str, value))
    return str(value) if isinstance(value, int) else value


# Beyond any cluster, and small enough that products of two stay sensible numbers.
_MOST = 10**15
Count = Annotated[int, BeforeValidator(_whole), Field(ge=1, le=_MOST)]
CountOrZero = Annotated[int, BeforeValidator(_whole), Field(ge=0, le=_MOST)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Momentum = Annotated[float, Field(ge=0, lt=1)]
# A tuple, since parameters and angles are looked up by the model that they belong to.
Factors = Annotated[tuple[Positive, ...], BeforeValidator(_tuple)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class RopeScaling(Section):
    """How rotary angles are changed for sequences beyond the original ones.

    linear: all divided by `factor`; llama3: long wavelengths divided, short ones kept; yarn (arXiv 2309.00071): blended
    between `beta_fast` and `beta_slow` turns over the original sequence; longrope (arXiv 2402.13753): each pair by its
    own factor, `short_factors` up to the original sequence and `long_factors` beyond.
    """

    kind: Literal["llama3", "linear", "yarn", "longrope"]
    factor: Positive
    low_frequency_factor: Positive = 1.0
    high_frequency_factor: Positive = 4.0
    original_sequence: Count = 8192
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0
    attention_factor: Positive | None = Field(
        None, description="yarn and longrope: factor on cosines and sines; default: as the paper computes it"
    )
    short_factors: Factors | None = None
    long_factors: Factors | None = None


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
    norm_placement: Literal["before", "after", "both"] = Field(
        "before", description="of attention and of the MLP, inside of the residual branch"
    )
    norm_offset: bool = Field(False, description="norms multiply by 1 + weight")
    qk_norm: Literal["none", "head", "whole"] = Field(
        "none", description="RMSNorm of queries and keys: of each head, or of all heads as one vector"
    )
    parallel_residual: bool = Field(False, description="attention and MLP read the same input and are added to it")
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    gated: bool = True
    position: Literal["rope", "learned"] = "rope"
    rope_theta: Positive = 10000.0
    rope_scaling: RopeScaling | None = None
    rotary_dim: Count | None = Field(None, description="first dimensions of a head that turn; default: all")
    bias: Literal["none", "qkv", "all"] = "none"
    tied_embeddings: bool = False
    attention: Literal["causal", "bidirectional"] = "causal"
    window: Count | None = Field(None, description="tokens that a token attends to, itself included; default: all")
    window_pattern: Count = Field(1, description="1: every layer has the window; n: all but each n-th layer have it")
    attention_scale: Positive | None = Field(None, description="factor on the scores; default: 1 / sqrt(head_dim)")
    attention_softcap: Positive | None = Field(None, description="scores become cap x tanh(scores / cap)")
    embedding_scale: Positive | None = Field(None, description="factor on the token embeddings; default: 1")
    logit_softcap: Positive | None = Field(None, description="logits become cap x tanh(logits / cap)")
    init_std: Positive = 0.02

    @property
    def num_kv_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def head_width(self) -> int:
        return self.head_dim or self.hidden // self.heads

    @property
    def rotary_width(self) -> int:
        """Dimensions of a head that turn with the position."""
        return self.rotary_dim or self.head_width

    def window_of(self, layer: int) -> int | None:
        """Tokens that a token attends to in a layer, itself included; None for all of its document."""
        full = self.window_pattern > 1 and (layer + 1) % self.window_pattern == 0
        return None if full else self.window


class ParallelConfig(Section):
    """Where it is computed. Data parallelism is what remains: world / (tensor x pipeline)."""

    tensor: Count = 1
    pipeline: Count = 1
    data: Count | None = Field(None, description="if given, must be what remains")
    auto: str | None = Field(
        None, description="hardware by name or file, or `detect`: the planner chooses what the file does not state"
    )
    sequence: bool | None = Field(None, description="sequence parallelism; default: whenever tensor > 1")
    schedule: Literal["gpipe", "1f1b", "interleaved", "zb-h1", "zb-v"] = "1f1b"
    chunks: Count = Field(1, description="model chunks per rank: interleaved takes 2 or more, zb-v 2")
    layers_per_stage: Annotated[str, BeforeValidator(_joined)] | None = Field(
        None, description='layers of each virtual stage, as a list or as "3,4*6,3"; default: balanced by cost'
    )
    layer_costs: list[Positive] | None = Field(None, description="relative cost of each layer; default: all the same")
    vocabulary_multiple: Count = Field(64, description="vocabulary rows per tensor rank are padded to a multiple")

    @property
    def sequence_parallel(self) -> bool:
        return self.tensor > 1 if self.sequence is None else self.sequence

    @property
    def virtual_stages(self) -> int:
        return self.pipeline * self.chunks


class RecomputeConfig(Section):
    """Which activations are computed again in the backward pass instead of kept (arXiv 2205.05198)."""

    policy: Literal["none", "selective", "full", "budget"] = Field(
        "none", description="selective: attention core, activation function and norms; full: whole layers"
    )
    layers: Count | None = Field(None, description="first layers of each chunk that it applies to; default: all")
    budget: Positive | None = Field(None, description="GiB of activations per rank that the budget policy keeps within")


class ZeroConfig(Section):
    stage: Annotated[int, Field(ge=0, le=3)] = 1
    backend: Literal["native", "deepspeed"] = "native"
    offload: bool = Field(False, description="optimizer state in the host's memory (backend deepspeed, no pipeline)")
    bucket: Count = Field(50_000_000, description="elements of one collective, at most")


class SourceConfig(Section):
    """One corpus of a blend."""

    path: str = Field(description="prefix of the .bin/.idx pair")
    name: str | None = Field(None, description="default: the last part of the path")
    weight: Positive | None = Field(None, description="share of the samples, relative to the other sources")
    tokens: Count | None = Field(None, description="instead of a weight: tokens that the whole run takes from it")

    @property
    def label(self) -> str:
        """Its name in phases, metrics and receipts."""
        return self.name or self.path.rstrip("/").rpartition("/")[2]


class PhaseConfig(Section):
    """From a given token of the run on, other weights."""

    from_token: Count
    weights: dict[str, NotNegative] = Field(description="weight of each source by its name; 0 leaves it out")


class FimConfig(Section):
    """Fill in the middle (arXiv 2207.14255): a document is cut in three and its middle moved to the end."""

    rate: Share = Field(0.5, description="share of the documents that are rearranged")
    spm_rate: Share = Field(0.5, description="share of those that put the suffix first")
    prefix: str = Field(description="token in front of the prefix")
    middle: str
    suffix: str


class MaskedLmConfig(Section):
    """BERT's objective (arXiv 1810.04805)."""

    mask: str = Field(description="the mask token")
    rate: Annotated[float, Field(gt=0, lt=1)] = Field(0.15, description="share of the tokens to be predicted")
    random: Share = Field(0.1, description="share of those that become a random token instead of the mask")
    keep: Share = Field(0.1, description="share of those that stay as they are")
    whole_word: bool = False


class DataConfig(Section):
    train: str | list[SourceConfig] = Field(description="prefix of the .bin/.idx pair, or a blend of several")
    valid: str | list[SourceConfig] | None = Field(None, description="default: the split's second part of each source")
    split: str = Field("969,30,1", description="train, valid, test shares of the sequences")
    tokenizer: str | None = Field(None, description="copied beside exports; used by generate")
    order: Literal["arithmetic", "megatron"] = "arithmetic"
    packing: Literal["concatenate", "best_fit", "document"] = Field(
        "concatenate", description="cut the joined documents, fill samples with whole ones, or one document per sample"
    )
    documents: bool | None = Field(
        None, description="attention and positions end with a document; default: for best_fit and document"
    )
    phases: list[PhaseConfig] = []
    fim: FimConfig | None = None
    masked_lm: MaskedLmConfig | None = None
    cache: str | None = Field(None, description="folder of sample indices and remote blocks; default: run.folder/cache")
    cache_bytes: Count = Field(1 << 30, description="size of the cache of remote blocks")
    workers: Count = Field(1, description="threads of each rank that read ahead")
    prefetch: CountOrZero = Field(2, description="steps read ahead")

    @property
    def separates_documents(self) -> bool:
        """Whether attention and positions end with a document."""
        return self.packing != "concatenate" if self.documents is None else self.documents


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


class MuonConfig(Section):
    """Muon: momentum orthogonalised by a Newton-Schulz iteration, for the matrices between embedding and head.

    rms: what the update's root mean square is scaled to, so that AdamW's learning rates fit (arXiv 2502.16982).
    """

    momentum: Momentum = 0.95
    nesterov: bool = True
    iterations: Count = 5
    rms: Positive = 0.2


class LrScale(Section):
    """Factors on the learning rate, by what a parameter is."""

    embedding: Positive = 1.0
    head: Positive = 1.0
    matrix: Positive = 1.0
    vector: Positive = 1.0


class LossScaleConfig(Section):
    """Dynamic loss scaling of fp16: halved when a gradient overflows, doubled after `window` steps without."""

    initial: Positive = 65536.0
    window: Count = 1000
    smallest: Positive = 1.0


class OptimizerConfig(Section):
    """AdamW (arXiv 1711.05101) or Muon, and the learning-rate schedule."""

    kind: Literal["adamw", "muon"] = "adamw"
    muon: MuonConfig = MuonConfig()
    lr_scale: LrScale = LrScale()
    stochastic_rounding: bool = Field(False, description="bf16 weights are drawn around their fp32 masters")
    lr: Positive = 3e-4
    min_lr: NotNegative | None = Field(None, description="default: lr / 10; of no use to constant")
    betas: Annotated[list[Momentum], Field(min_length=2, max_length=2)] = [0.9, 0.95]
    eps: Positive = 1e-8
    weight_decay: NotNegative = 0.1
    clip: NotNegative = Field(1.0, description="largest global gradient norm; 0: no clipping")
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
    z_loss: NotNegative = Field(0.0, description="weight of the squared log of the softmax denominator in the loss")
    validate_every: CountOrZero = Field(0, description="steps between validations; 0: only at the end")
    validate_samples: CountOrZero = Field(256, description="0: no validation")


Fused = Literal["auto", "cuda", "library", "reference"]


class KernelsConfig(Section):
    """What computes each operation: `auto` takes the first of our CUDA kernels, installed libraries and PyTorch's own
    operators that can, or what torch compiles where `compile` is set; another value takes that kind or refuses. One
    word, `auto` or `reference`, may stand for all.
    """

    norm: Fused = Field("auto", description="RMSNorm and LayerNorm, with the sum before them")
    glu: Fused = Field("auto", description="gated activations")
    rope: Fused = Field("auto", description="rotary positions")
    attention: str = Field("auto", description="a kind, triton among them, or an implementation: flash-attn 3")
    cross_entropy: Literal["auto", "cuda", "reference"] = Field("auto", description="softmax and loss of logits")
    adamw: Fused = Field("auto", description="the update of a shard; native ZeRO only")
    wgrad: Annotated[Literal["auto", "library", "reference", "off"], BeforeValidator(_off)] = Field(
        "auto", description="weight gradients added to their sum by the product that makes them; native ZeRO only"
    )


class EphemeralConfig(Section):
    """Checkpoints in between, for a restart that repeats less; the newest of both kinds is resumed."""

    every: Count
    folder: str | None = Field(
        None, description="on a disk that all ranks share; default: run.folder/checkpoints/ephemeral"
    )
    keep: Count = 1


class CheckpointConfig(Section):
    every: CountOrZero = Field(0, description="steps between checkpoints; 0: only at the end")
    keep: Count = Field(2, description="newest checkpoints kept")
    keep_every: Count | None = Field(None, description="those of every n-th step are never removed")
    keep_best: CountOrZero = Field(0, description="those of the lowest validation losses that are kept as well")
    asynchronous: bool = Field(True, description="a background process writes them while training goes on")
    retry: Count = Field(100, description="steps after which one that failed is tried again, if none is due before")
    ephemeral: EphemeralConfig | None = None
    load: str | None = Field(None, description="start from these weights (a checkpoint of any layout)")
    load_optimizer: bool = Field(False, description="their moments and update count too; steps and data start anew")
    from_scratch: bool = Field(False, description="from fresh weights where checkpoint.load does not exist")


class RunConfig(Section):
    folder: str = "runs/run"
    log_every: Count = 10
    tensorboard: bool = True
    time_limit: Positive | None = Field(None, description="minutes after which to save and stop")
    peak_tflops: Positive | None = Field(None, description="per device, for MFU; default: known GPUs, else n/a")
    timeline_step: Count | None = Field(None, description="step whose pipeline actions are timed into timeline.json")
    stall_timeout: Positive = Field(1800.0, description="seconds without a step before the run is ended with a report")


class Config(Section):
    seed: CountOrZero = 1234
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = "bf16"
    loss_scale: LossScaleConfig = LossScaleConfig()
    objective: Literal["next_token", "masked_lm"] = "next_token"
    model: ModelConfig
    parallel: Annotated[ParallelConfig, BeforeValidator(_planned)] = ParallelConfig()
    recompute: RecomputeConfig = RecomputeConfig()
    compile: bool = Field(False, description="torch.compile of what lies between the parallel layers' collectives")
    kernels: Annotated[KernelsConfig, BeforeValidator(_everywhere)] = KernelsConfig()
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
        found = [dict(item) for item in error.errors()]
        raise UserError("\n".join(_explain(origins, item) for item in found if _meant(tree, item))) from None
    problems = [f"{_where(origins, key)}{key}: {message}" for key, message in conflicts(config)]
    if problems:
        raise UserError("\n".join(problems))
    return Loaded(config, origins)


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


def _is_branch(part: Any) -> bool:
    """Whether part of an error's location only says which way to read a value was tried: as text, or as a list."""
    return isinstance(part, str) and (part == "str" or part.startswith("list["))


def _meant(tree: dict[str, Any], item: dict[str, Any]) -> bool:
    """Whether an error is about what was written: where text or a list may stand, both are tried."""
    value: Any = tree
    for part in item["loc"]:
        if _is_branch(part):
            if isinstance(value, list) is (part == "str"):
                return False
        elif isinstance(value, dict | list) and not (isinstance(value, dict) and part not in value):
            value = value[part]
    return True


def _explain(origins: dict[str, str], item: dict[str, Any]) -> str:
    loc = [part for part in item["loc"] if not _is_branch(part)]
    key = ".".join(map(str, loc))
    where = _where(origins, key)
    if item["type"] == "extra_forbidden":
        section: Any = Config
        for part in loc[:-1]:
            if isinstance(part, str):
                section = _section(section.model_fields[part].annotation)
        return f"{where}unknown key `{key}`; {_closest(str(loc[-1]), list(section.model_fields))}"
    if item["type"] == "missing":
        return f"{where}`{key}` is missing and has no default"
    return f"{where}`{key}`: {item['msg'][0].lower()}{item['msg'][1:]} (given: {item['input']!r})"


def _section(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    inner = (_section(option) for option in getattr(annotation, "__args__", ()))
    return next((found for found in inner if found is not None), None)


def _closest(word: str, names: list[str]) -> str:
    import difflib

    near = difflib.get_close_matches(word, names, n=1)
    return (f"did you mean `{near[0]}`? " if near else "") + f"Known here: {', '.join(names)}"
