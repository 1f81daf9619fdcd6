"""FLOPs per token and per step, from the parameter table and the shapes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import TYPE_CHECKING

from megapt.config import Config, ModelConfig
from megapt.model.table import parameter_table

if TYPE_CHECKING:
    from megapt.model.recompute import Policy

CONVENTION = """\
FLOPs: a multiplication and an addition count as two; the backward of a product counts twice its forward; norms,
activations, rotary positions and the optimizer do not count.
- model FLOPs, as the literature counts (PaLM, arXiv 2204.02311, appendix B), and what MFU is made of: causal attention
  counts as if every token attended to the whole sequence (to its window, where a layer has one).
- model FLOPs as done: causal attention counts the tokens that are attended to, about half.
- hardware FLOPs: model FLOPs and what recomputation computes again; in either way of counting attention (HFU)."""


@dataclass(frozen=True)
class Parts:
    """FLOPs by what multiplies: queries, keys, values and attention's output; scores and their products with the
    values; the MLP; the output projection; the embedding, which looks rows up and costs none."""

    attention_projections: float
    attention_core: float
    mlp: float
    head: float
    embedding: float = 0.0

    @property
    def total(self) -> float:
        return sum(getattr(self, item.name) for item in fields(self))

    def __add__(self, other: Parts) -> Parts:
        return Parts(*(getattr(self, item.name) + getattr(other, item.name) for item in fields(self)))

    def __mul__(self, factor: float) -> Parts:
        return Parts(*(getattr(self, item.name) * factor for item in fields(self)))


@dataclass(frozen=True)
class Flops:
    """FLOPs per token of forward and backward, in the ways of counting that `CONVENTION` states.

    model: as the literature counts, over the full sequence; done: with attention as causality and windows leave it;
    recomputed, recomputed_done: what is computed again beside these. tokens: of one step.
    """

    model: Parts
    done: Parts
    recomputed: Parts
    recomputed_done: Parts
    tokens: int

    @property
    def hardware(self) -> Parts:
        """What HFU is made of, where attention counts as the literature counts it."""
        return self.model + self.recomputed

    @property
    def hardware_done(self) -> Parts:
        return self.done + self.recomputed_done

    def text(self) -> str:
        """A table per token, the step's totals, and the convention."""
        columns = {
            "model": self.model,
            "model, as done": self.done,
            "hardware": self.hardware,
            "hardware, as done": self.hardware_done,
        }
        lines = [f"{'GFLOPs per token':<24}" + "".join(f"{name:>19}" for name in columns)]
        for item in fields(Parts):
            values = (getattr(parts, item.name) for parts in columns.values())
            lines.append(f"{item.name.replace('_', ' '):<24}" + "".join(f"{v / 1e9:>19,.3f}" for v in values))
        totals = [parts.total for parts in columns.values()]
        lines.append(f"{'total':<24}" + "".join(f"{v / 1e9:>19,.3f}" for v in totals))
        lines.append(f"{'PFLOPs per step':<24}" + "".join(f"{v * self.tokens / 1e15:>19,.3f}" for v in totals))
        return "\n".join([*lines, "", CONVENTION])


def model_flops_per_token(model: ModelConfig, sequence: int) -> float:
    """FLOPs of forward and backward per token, as the literature counts them (PaLM, arXiv 2204.02311, appendix B).

    6 per matrix element that multiplies a token (embeddings look up, so they count only as the output projection),
    plus attention scores and values over the whole sequence, 12 x layers x heads x head width x sequence; over its
    window, in a layer that has one. Recomputed work does not count, and causal attention counts as if it were full.
    """
    return 3 * _model_parts(model, sequence).total


def flops(config: Config, policies: Sequence[Policy] | None = None) -> Flops:
    """FLOPs of a training run. policies: what each of the model's layers computes again; default: what
    `config.recompute` says, where that depends on no budget (`plan.memory.layer_policies` knows what a budget gives).
    """
    model, sequence = config.model, config.batch.sequence
    if policies is None:
        policies = _stated_policies(config)
    literal, done = _model_parts(model, sequence), _done_parts(model, sequence)
    again, again_done = Parts(0, 0, 0, 0), Parts(0, 0, 0, 0)
    for (window, policy), count in Counter(
        (model.window_of(index), policy) for index, policy in enumerate(policies)
    ).items():
        again += _again(model, attended(model, sequence, window, full=True), policy) * count
        again_done += _again(model, attended(model, sequence, window), policy) * count
    return Flops(literal * 3, done * 3, again, again_done, config.batch.global_samples * sequence)


def attended(model: ModelConfig, sequence: int, window: int | None, full: bool = False) -> float:
    """Tokens that a token attends to, on average over a sequence without documents.

    full: as the literature counts, the whole sequence or window, whether it lies in the past or not.
    """
    reach = min(window or sequence, sequence)
    if full or model.attention != "causal":
        return float(reach)
    # Token i of the first `reach` ones has i before and with it, later ones have `reach`.
    return reach * (sequence - (reach - 1) / 2) / sequence


def attended_on_average(model: ModelConfig, sequence: int, full: bool = False) -> float:
    """`attended`, averaged over the layers."""
    windows = Counter(model.window_of(index) for index in range(model.layers))
    return sum(attended(model, sequence, window, full) * n for window, n in windows.items()) / model.layers


@lru_cache(maxsize=64)
def _model_parts(model: ModelConfig, sequence: int) -> Parts:
    """Of a forward pass per token, with attention as the literature counts it."""
    return _forward(model, attended_on_average(model, sequence, full=True))


@lru_cache(maxsize=64)
def _done_parts(model: ModelConfig, sequence: int) -> Parts:
    return _forward(model, attended_on_average(model, sequence))


def _forward(model: ModelConfig, attended: float) -> Parts:
    elements = {"attention": 0, "mlp": 0, "head": 0}
    for spec in parameter_table(model).values():
        if len(spec.shape) == 2 and not spec.lookup:
            part = "head" if spec.layer is None else "attention" if ".attention." in spec.name else "mlp"
            elements[part] += spec.numel
    return Parts(
        attention_projections=2.0 * elements["attention"],
        attention_core=4.0 * model.layers * model.heads * model.head_width * attended,
        mlp=2.0 * elements["mlp"],
        head=2.0 * elements["head"],
    )


def not_again(model: ModelConfig) -> tuple[bool, bool]:
    """Whether full recomputation leaves out attention's output projection, and the MLP's second one: those that end in
    the layer's result, which no backward needs (`model/decoder.py`)."""
    return model.parallel_residual, model.norm_placement == "before"


def _again(model: ModelConfig, attended: float, policy: Policy) -> Parts:
    """What one layer's backward computes again, per token."""
    if policy == "none":
        return Parts(0, 0, 0, 0)
    core = 4.0 * model.heads * model.head_width * attended
    if policy == "selective":
        return Parts(0, core, 0, 0)
    without_out, without_down = not_again(model)
    heads = (1 if without_out else 2) * model.heads + 2 * model.num_kv_heads
    widths = (2 if model.gated else 1) + (0 if without_down else 1)
    return Parts(2.0 * model.hidden * heads * model.head_width, core, 2.0 * model.hidden * widths * model.ffn, 0)


def _stated_policies(config: Config) -> list[Policy]:
    recompute, layers = config.recompute, config.model.layers
    if recompute.policy == "budget":
        return ["none"] * layers
    chunks = config.parallel.virtual_stages
    some = layers if recompute.layers is None else min(layers, recompute.layers * chunks)
    rest: list[Policy] = ["none"] * (layers - some)
    stated: list[Policy] = [recompute.policy] * some
    return stated + rest
