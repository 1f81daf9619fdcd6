"""Small models of a configuration's shape: what is computed stays, only sizes shrink."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from megapt.config import Config, ModelConfig

SAMPLES, SEQUENCE = 8, 16  # the global batch
VOCABULARY = 61  # a prime: it divides over no number of ranks, and some rank always holds padding
LAYERS = 4  # at least; as many as there are stages


@dataclass(frozen=True)
class Shape:
    """A model and all else of a configuration that decides what is computed, as a tree without a layout.

    brief: whether it differs from others in its layers alone, so that fewer layouts do.
    """

    name: str
    tree: dict[str, Any]
    brief: bool = False

    @property
    def tied(self) -> bool:
        return bool(self.tree["model"]["tied_embeddings"])


def small_model(model: ModelConfig) -> dict[str, Any]:
    """The model's own norms, activation, positions, windows, biases, ties and ratio of query to key/value heads, in
    small.

    The weights are large enough that every part of the model matters: attention is not uniform, and what is soft-capped
    reaches the bend. Windows are shorter than the sequence, and sequences longer than those that positions were made
    for.
    """
    ratio = model.heads // model.num_kv_heads
    if model.num_kv_heads == 1:
        kv_heads, ratio = 1, 4
    elif ratio == 1:
        kv_heads = 4
    else:
        kv_heads = 2 if ratio % 2 == 0 else 4  # two, so that four tensor ranks share them
    tree = model.model_dump()
    tree |= {"layers": LAYERS, "hidden": 32, "ffn": 48, "vocabulary": VOCABULARY, "max_sequence": 2 * SEQUENCE}
    tree |= {"heads": kv_heads * ratio, "kv_heads": kv_heads, "head_dim": 8 if kv_heads * ratio <= 8 else 4}
    tree["init_std"] = 0.2
    tree |= {name: value for name, value in _BENDS.items() if tree[name] is not None}
    if model.rotary_dim is not None:
        tree["rotary_dim"] = max(2, tree["head_dim"] * model.rotary_dim // model.head_width // 2 * 2)
    if model.rope_scaling is not None:
        tree["rope_scaling"] = _small_scaling(tree["rope_scaling"], (tree["rotary_dim"] or tree["head_dim"]) // 2)
    return tree


# Of what a small model sees: caps of which scores and logits go beyond, and windows within the sequence.
_BENDS = {"logit_softcap": 2.0, "attention_softcap": 0.5, "window": 5}


def _small_scaling(scaling: dict[str, Any], pairs: int) -> dict[str, Any]:
    """The same for heads of which `pairs` pairs turn."""
    small: dict[str, Any] = {"original_sequence": SEQUENCE if scaling["kind"] == "llama3" else SEQUENCE // 2}
    for name in ("short_factors", "long_factors"):
        factors = scaling[name]
        if factors is not None:
            small[name] = tuple(factors[index * len(factors) // pairs] for index in range(pairs))
    return scaling | small


def shape_of(name: str, config: Config) -> Shape:
    """The shape of a configuration.

    The optimizer is the configuration's, with numbers under which every part of a step can be seen: gradients are
    clipped, weights decay, and eps is large enough that AdamW does not divide the size of a gradient away.
    """
    optimizer = config.optimizer.model_dump(include={"kind", "muon", "lr_scale", "betas"})
    optimizer |= {"lr": 1e-2, "eps": 1e-4, "weight_decay": 0.1, "clip": 0.5, "schedule": "constant"}
    tree: dict[str, Any] = {
        "seed": config.seed,
        "objective": config.objective,
        "model": small_model(config.model),
        "data": {
            "train": "none",
            "masked_lm": config.data.model_dump()["masked_lm"],
            "documents": config.data.separates_documents,
        },
        "batch": {"sequence": SEQUENCE, "samples": SAMPLES},
        "optimizer": optimizer,
        "train": {"steps": 3, "z_loss": max(config.train.z_loss, 1e-2) if config.train.z_loss else 0.0},
    }
    return Shape(name, tree)


def _built_in(name: str, documents: bool, **model: Any) -> Shape:
    sizes = {"layers": LAYERS, "hidden": 32, "heads": 4, "ffn": 48, "vocabulary": VOCABULARY}
    data = {"train": "none", "documents": documents}
    tree = {"model": sizes | model, "data": data, "batch": {"sequence": 1, "samples": 1}}
    return shape_of(name, Config.model_validate(tree | {"train": {"steps": 1}}))


def built_in() -> list[Shape]:
    """Llama (grouped heads, scaled rotary positions, gated; packed documents) and GPT-2 (tied, biases, learned
    positions); and what other families do differently."""
    llama = {"kv_heads": 2, "rope_scaling": {"kind": "llama3", "factor": 4.0}}
    gpt2 = {"norm": "layer_norm", "activation": "gelu_tanh", "gated": False, "position": "learned", "bias": "all"}
    return [_built_in("llama", True, **llama), _built_in("gpt2", False, **gpt2, tied_embeddings=True), *_families()]


def _families() -> list[Shape]:
    """As much as goes together of Gemma 2 and 3 (norms before and after and of each head, caps, windows in every other
    layer), of OLMo 2 and Phi-3 (norms after and of all heads as one, windows, longrope), and GPT-NeoX (attention and
    MLP beside each other, heads that turn in part)."""
    yarn = {"kind": "yarn", "factor": 4.0}
    longrope = {"kind": "longrope", "factor": 4.0, "short_factors": [1.0] * 4, "long_factors": [1.0, 1.5, 2.0, 4.0]}
    gemma: dict[str, Any] = {"kv_heads": 2, "activation": "gelu_tanh", "tied_embeddings": True, "rope_scaling": yarn}
    gemma |= {"norm_placement": "both", "norm_offset": True, "qk_norm": "head", "embedding_scale": 32**0.5}
    gemma |= {"window": 4096, "window_pattern": 2, "attention_softcap": 50.0, "logit_softcap": 30.0}
    olmo = {"kv_heads": 2, "norm_placement": "after", "qk_norm": "whole", "rope_scaling": longrope, "window": 4096}
    neox: dict[str, Any] = {"norm": "layer_norm", "gated": False, "activation": "gelu", "bias": "all"}
    neox |= {"parallel_residual": True, "rotary_dim": 2}
    shapes = [
        _built_in("gemma", True, **gemma, attention_scale=0.25),
        _built_in("olmo", False, **olmo),
        _built_in("neox", False, **neox),
    ]
    return [replace(shape, brief=True) for shape in shapes]
