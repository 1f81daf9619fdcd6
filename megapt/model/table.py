"""The parameter table of a model: every name, shape, shard, initialisation and tie, stated once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache

from megapt.config import ModelConfig
from megapt.parameters import ParameterSpec, ParameterTable, Partial, Split


@lru_cache(maxsize=8)
def parameter_table(model: ModelConfig) -> ParameterTable:
    """All parameters in the order of the forward pass.

    Initialisation follows GPT-2: normal with `init_std`, projections that write into the residual stream scaled by
    1 / sqrt(2 x layers), norms one (zero where they multiply by 1 + weight), biases zero. Weight decay applies to
    matrices only.
    """
    return ParameterTable(_specs(model))


def _specs(model: ModelConfig) -> Iterator[ParameterSpec]:
    hidden, std = model.hidden, model.init_std
    embedding = Split(dim=0, padded=True)
    yield ParameterSpec("embedding.weight", (model.vocabulary, hidden), embedding, std=std, lookup=True, end="first")
    if model.position == "learned":
        shape = (model.max_sequence, hidden)
        yield ParameterSpec("positions.weight", shape, std=std, partial=Partial.SEQUENCE, lookup=True, end="first")
    for index in range(model.layers):
        yield from _layer(model, index)
    yield from _norm(model, "norm", None)
    tied_to = "embedding.weight" if model.tied_embeddings else None
    yield ParameterSpec("head.weight", (model.vocabulary, hidden), embedding, std=std, tied_to=tied_to, end="last")


def _layer(model: ModelConfig, index: int) -> Iterator[ParameterSpec]:
    at, hidden, width = f"layers.{index}", model.hidden, model.head_width
    query, key = model.heads * width, model.num_kv_heads * width
    inner, residual = model.init_std, model.init_std / math.sqrt(2 * model.layers)
    qkv_bias, bias = model.bias in ("qkv", "all"), model.bias == "all"

    def linear(name: str, out: int, into: int, split: Split, std: float, biased: bool) -> Iterator[ParameterSpec]:
        yield ParameterSpec(f"{at}.{name}.weight", (out, into), split, std=std, layer=index)
        if biased:
            # A column-parallel bias is cut like its rows; a row-parallel one is added once, after the reduction.
            column = split.dim == 0
            yield ParameterSpec(
                f"{at}.{name}.bias",
                (out,),
                split if column else None,
                decay=False,
                layer=index,
                partial=Partial.NEVER if column else Partial.SEQUENCE,
            )

    before, after = model.norm_placement != "after", model.norm_placement != "before"
    if before:
        yield from _norm(model, f"{at}.attention_norm", index)
    yield from linear("attention.q", query, hidden, Split(0, width), inner, qkv_bias)
    yield from linear("attention.k", key, hidden, Split(0, width), inner, qkv_bias)
    yield from linear("attention.v", key, hidden, Split(0, width), inner, qkv_bias)
    if model.qk_norm != "none":
        yield _qk_norm(model, f"{at}.attention.q_norm", index, query)
        yield _qk_norm(model, f"{at}.attention.k_norm", index, key)
    yield from linear("attention.out", hidden, query, Split(1, width), residual, bias)
    if after:
        yield from _norm(model, f"{at}.attention_norm_after", index)
    if before:
        yield from _norm(model, f"{at}.mlp_norm", index)
    if model.gated:
        yield from linear("mlp.gate", model.ffn, hidden, Split(0), inner, bias)
    yield from linear("mlp.up", model.ffn, hidden, Split(0), inner, bias)
    yield from linear("mlp.down", hidden, model.ffn, Split(1), residual, bias)
    if after:
        yield from _norm(model, f"{at}.mlp_norm_after", index)


def _norm(model: ModelConfig, name: str, layer: int | None) -> Iterator[ParameterSpec]:
    end = "last" if layer is None else None
    common = {"decay": False, "layer": layer, "partial": Partial.SEQUENCE, "end": end}
    yield ParameterSpec(f"{name}.weight", (model.hidden,), fill=_one(model), **common)  # type: ignore[arg-type]
    if model.norm == "layer_norm":
        yield ParameterSpec(f"{name}.bias", (model.hidden,), **common)  # type: ignore[arg-type]


def _qk_norm(model: ModelConfig, name: str, layer: int, width: int) -> ParameterSpec:
    """One weight for all heads, of which each tensor rank sees its own only; or one for each, cut like their rows."""
    fill = _one(model)
    if model.qk_norm == "head":
        shape = (model.head_width,)
        return ParameterSpec(f"{name}.weight", shape, fill=fill, decay=False, layer=layer, partial=Partial.ALWAYS)
    split = Split(0, model.head_width)
    return ParameterSpec(f"{name}.weight", (width,), split, fill=fill, decay=False, layer=layer)


def _one(model: ModelConfig) -> float:
    """The weight with which a norm multiplies by one."""
    return 0.0 if model.norm_offset else 1.0
