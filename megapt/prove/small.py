"""Small models of a configuration's shape: what is computed stays, only sizes shrink."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megapt.config import Config, ModelConfig

SAMPLES, SEQUENCE = 8, 16  # the global batch
VOCABULARY = 61  # a prime: it divides over no number of ranks, and some rank always holds padding
LAYERS = 4  # at least; as many as there are stages


@dataclass(frozen=True)
class Shape:
    """A model and all else of a configuration that decides what is computed, as a tree without a layout."""

    name: str
    tree: dict[str, Any]

    @property
    def tied(self) -> bool:
        return bool(self.tree["model"]["tied_embeddings"])


def small_model(model: ModelConfig) -> dict[str, Any]:
    """The model's own norm, activation, positions, biases, ties and ratio of query to key/value heads, in small.

    The weights are large enough that every part of the model matters: attention is not uniform, and soft-capped
    logits reach the bend.
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
    if model.rope_scaling is not None:
        tree["rope_scaling"]["original_sequence"] = SEQUENCE
    if model.logit_softcap is not None:
        tree["logit_softcap"] = 2.0
    return tree


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
        "data": {"train": "none", "masked_lm": config.data.model_dump()["masked_lm"], "documents": _documents(config)},
        "batch": {"sequence": SEQUENCE, "samples": SAMPLES},
        "optimizer": optimizer,
        "train": {"steps": 3, "z_loss": max(config.train.z_loss, 1e-2) if config.train.z_loss else 0.0},
    }
    return Shape(name, tree)


def _documents(config: Config) -> bool:
    """Whether attention and positions end with a document."""
    if config.data.documents is None:
        return config.data.packing != "concatenate"
    return config.data.documents


def _built_in(name: str, documents: bool, **model: Any) -> Shape:
    sizes = {"layers": LAYERS, "hidden": 32, "heads": 4, "ffn": 48, "vocabulary": VOCABULARY}
    data = {"train": "none", "documents": documents}
    tree = {"model": sizes | model, "data": data, "batch": {"sequence": 1, "samples": 1}}
    return shape_of(name, Config.model_validate(tree | {"train": {"steps": 1}}))


def built_in() -> list[Shape]:
    """Llama (grouped heads, scaled rotary positions, gated; packed documents) and GPT-2 (tied, biases, learned
    positions)."""
    llama = {"kv_heads": 2, "rope_scaling": {"kind": "llama3", "factor": 4.0}}
    gpt2 = {"norm": "layer_norm", "activation": "gelu_tanh", "gated": False, "position": "learned", "bias": "all"}
    return [_built_in("llama", True, **llama), _built_in("gpt2", False, **gpt2, tied_embeddings=True)]
