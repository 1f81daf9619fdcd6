"""GPT-2 (GPT2LMHeadModel), whose projections are stored [in, out], query, key and value as one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megapt.config import ModelConfig
from megapt.convert.keys import COUNT, NUMBER, Activation, Dropout, Key, Only, Reading, optional
from megapt.convert.mapping import Family, Row, linear


@dataclass(frozen=True)
class _Width:
    """Of the MLP: four times the hidden size where it is not given."""

    def read(self, reading: Reading) -> dict[str, Any]:
        width, hidden = reading.take("n_inner", optional(COUNT), None), reading.tree.get("n_embd")
        return {"ffn": width if width is not None or not isinstance(hidden, int) else 4 * hidden}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        return {"n_inner": model.ffn}


_AT, _OURS = "transformer.h.{layer}", "layers.{layer}"
_QKV = tuple(f"{_OURS}.attention.{name}" for name in "qkv")

GPT2 = Family(
    name="GPT-2",
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    fixed={"norm": "layer_norm", "position": "learned", "gated": False, "bias": "all"},
    parts=(
        Key("n_embd", "hidden", COUNT),
        _Width(),
        Key("n_layer", "layers", COUNT),
        Key("n_head", "heads", COUNT),
        Key("n_positions", "max_sequence", COUNT),
        Activation("activation_function", "gelu_new", tanh="gelu_new"),
        Key("layer_norm_epsilon", "norm_eps", NUMBER, 1e-5),
        Only("scale_attn_weights", True),
        Only("scale_attn_by_inverse_layer_idx", False),
        Only("add_cross_attention", False),
        Dropout(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.1),
    ),
    rows=(
        Row("transformer.wte.weight", ("embedding.weight",)),
        Row("transformer.wpe.weight", ("positions.weight",)),
        *linear(f"{_AT}.ln_1", f"{_OURS}.attention_norm"),
        *linear(f"{_AT}.attn.c_attn", *_QKV, transposed=True),
        *linear(f"{_AT}.attn.c_proj", f"{_OURS}.attention.out", transposed=True),
        *linear(f"{_AT}.ln_2", f"{_OURS}.mlp_norm"),
        *linear(f"{_AT}.mlp.c_fc", f"{_OURS}.mlp.up", transposed=True),
        *linear(f"{_AT}.mlp.c_proj", f"{_OURS}.mlp.down", transposed=True),
        *linear("transformer.ln_f", "norm"),
        Row("lm_head.weight", ("head.weight",)),
    ),
    prefix="transformer.",
    # n_ctx is the size of a mask of old, the summary another head's; reordering and upcasting change rounding only.
    silent=frozenset(
        "n_ctx reorder_and_upcast_attn summary_activation summary_first_dropout summary_proj_to_labels summary_type "
        "summary_use_proj".split()
    ),
    buffers=(f"{_AT}.attn.bias", f"{_AT}.attn.masked_bias"),
    tied=True,
)
