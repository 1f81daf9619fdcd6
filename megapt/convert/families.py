"""The families that are known, and which of them a model or a config.json belongs to."""

from __future__ import annotations

from typing import Any

from megapt.config import ModelConfig
from megapt.convert.gemma2 import GEMMA2
from megapt.convert.gpt2 import GPT2
from megapt.convert.llama import LLAMA
from megapt.convert.mapping import QUANTISED, Family
from megapt.convert.mistral import MISTRAL
from megapt.convert.neox import NEOX
from megapt.convert.olmo2 import OLMO2
from megapt.convert.phi3 import PHI3
from megapt.convert.qwen2 import QWEN2
from megapt.convert.qwen3 import QWEN3
from megapt.errors import UserError

# Where several can express a model, the first is taken.
FAMILIES = (LLAMA, MISTRAL, QWEN2, QWEN3, OLMO2, GEMMA2, PHI3, GPT2, NEOX)
BY_TYPE = {family.model_type: family for family in FAMILIES}

# Keys that say that a model has experts.
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def family_of(model: ModelConfig) -> Family:
    """The family that can express a model; UserError saying for each why it cannot."""
    refusals = {}
    for family in FAMILIES:
        refusals[family.name] = family.refusals(model)
        if not refusals[family.name]:
            return family
    reasons = "\n".join(f"{name}: {'; '.join(why)}" for name, why in refusals.items())
    raise UserError(f"no Hugging Face family computes this model:\n{reasons}")


def family_named(name: str, model: ModelConfig) -> Family:
    """The family of a model_type; UserError where there is none, or where it cannot express the model."""
    if name not in BY_TYPE:
        raise UserError(f"family {name!r} is unknown; legal: {', '.join(BY_TYPE)}")
    if why := BY_TYPE[name].refusals(model):
        raise UserError(f"{BY_TYPE[name].name} cannot express this model: {'; '.join(why)}")
    return BY_TYPE[name]


def family_of_config(tree: dict[str, Any], where: str, ignore_auto_map: bool = False) -> Family:
    """The family of a config.json. UserError for what no family computes: experts, quantised weights, code of the
    model's own (`auto_map`, unless ignored), other kinds of models."""
    quantised = [tree[key] for key in QUANTISED if tree.get(key) is not None]
    if quantised:
        method = quantised[0].get("quant_method") if isinstance(quantised[0], dict) else quantised[0]
        raise UserError(
            f"{where}: the weights are quantised (quant_method {method!r}); legal: fp32, bf16 and fp16 weights: take "
            "the model that was quantised, or dequantise it first"
        )
    if tree.get("auto_map") and not ignore_auto_map:
        raise UserError(
            f"{where}: auto_map {tree['auto_map']!r} says that code of the model's own computes it, which is not run "
            "here; if transformers' own class computes the same, say --ignore-auto-map"
        )
    kind = tree.get("model_type")
    experts = [key for key in _EXPERTS if tree.get(key)]
    if experts or kind == "mixtral" or str(kind).endswith("_moe"):
        raise UserError(
            f"{where}: model_type {kind!r} is a mixture of experts ({', '.join(experts) or 'by its type'}), which the "
            f"model here does not have; legal: {', '.join(BY_TYPE)}"
        )
    if not isinstance(kind, str) or kind not in BY_TYPE:
        raise UserError(f"{where}: model_type {kind!r} is not known; legal: {', '.join(BY_TYPE)}")
    return BY_TYPE[kind]
