"""Every key of config.json is read, or known to change nothing, or refused by name; so in configs as published."""

from __future__ import annotations

import json
from typing import Any

import pytest

from megapt.config import ModelConfig
from megapt.convert.families import BY_TYPE, FAMILIES, family_of, family_of_config
from megapt.errors import UserError

PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama 2 7B": (
        """{"architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
        "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008, "max_position_embeddings": 4096,
        "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": null, "tie_word_embeddings": false,
        "torch_dtype": "float16", "transformers_version": "4.31.0.dev0", "use_cache": true, "vocab_size": 32000}""",
        {"rope_theta": 10000.0, "head_dim": None, "bias": "none", "max_sequence": 4096, "norm_eps": 1e-5},
    ),
    "Llama 3.2 1B": (
        """{"architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "hidden_act": "silu",
        "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072,
        "mlp_bias": false, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16,
        "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 32.0,
        "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192, "rope_type":
        "llama3"}, "rope_theta": 500000.0, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0.dev0", "use_cache": true, "vocab_size": 128256}""",
        {
            "tied_embeddings": True,
            "rope_scaling": {
                "kind": "llama3",
                "factor": 32.0,
                "low_frequency_factor": 1.0,
                "high_frequency_factor": 4.0,
                "original_sequence": 8192,
            },
        },
    ),
    "Mistral 7B": (
        """{"architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
        "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
        "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": false,
        "torch_dtype": "bfloat16", "transformers_version": "4.34.0.dev0", "use_cache": true, "vocab_size": 32000}""",
        {"window": 4096, "kv_heads": 8},
    ),
    "Qwen2.5 7B": (
        """{"architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id":
        151643, "hidden_act": "silu", "hidden_size": 3584, "initializer_range": 0.02, "intermediate_size": 18944,
        "max_position_embeddings": 131072, "max_window_layers": 28, "model_type": "qwen2", "num_attention_heads": 28,
        "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
        "sliding_window": 131072, "tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version":
        "4.40.1", "use_cache": true, "use_mrope": false, "use_sliding_window": false, "vocab_size": 152064}""",
        {"window": None, "bias": "qkv", "rope_theta": 1e6},
    ),
    "Qwen3 0.6B": (
        """{"architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id":
        151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024,
        "initializer_range": 0.02, "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers":
        28, "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 1000000, "sliding_window": null,
        "tie_word_embeddings": true, "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": true,
        "use_sliding_window": false, "vocab_size": 151936}""",
        {"head_dim": 128, "qk_norm": "head", "rope_theta": 1e6},
    ),
    "GPT-2": (
        """{"activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
        "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12,
        "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": null, "summary_first_dropout": 0.1,
        "summary_proj_to_labels": true, "summary_type": "cls_index", "summary_use_proj": true,
        "task_specific_params": {"text-generation": {"do_sample": true, "max_length": 50}}, "vocab_size": 50257}""",
        {"ffn": 3072, "tied_embeddings": True, "activation": "gelu_tanh"},
    ),
    "Pythia 70M": (
        """{"architectures": ["GPTNeoXForCausalLM"], "bos_token_id": 0, "classifier_dropout": 0.1, "eos_token_id": 0,
        "hidden_act": "gelu", "hidden_size": 512, "initializer_range": 0.02, "intermediate_size": 2048,
        "layer_norm_eps": 1e-05, "max_position_embeddings": 2048, "model_type": "gpt_neox", "num_attention_heads": 8,
        "num_hidden_layers": 6, "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": false,
        "torch_dtype": "float16", "transformers_version": "4.24.0", "use_cache": true, "use_parallel_residual": true,
        "vocab_size": 50304}""",
        {"rotary_dim": 16, "parallel_residual": True, "bias": "all", "activation": "gelu"},
    ),
    "Gemma 2 2B": (
        """{"architectures": ["Gemma2ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": 1,
        "final_logit_softcapping": 30.0, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "hidden_activation":
        "gelu_pytorch_tanh", "hidden_size": 2304, "initializer_range": 0.02, "intermediate_size": 9216,
        "max_position_embeddings": 8192, "model_type": "gemma2", "num_attention_heads": 8, "num_hidden_layers": 26,
        "num_key_value_heads": 4, "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0, "sliding_window": 4096, "torch_dtype": "float32", "transformers_version":
        "4.42.4", "use_cache": true, "vocab_size": 256000}""",
        {"window": 4096, "window_pattern": 2, "embedding_scale": 48.0, "attention_scale": 1 / 16}
        | {"logit_softcap": 30.0, "attention_softcap": 50.0, "tied_embeddings": True, "norm_offset": True},
    ),
    "Phi 4 mini": (
        json.dumps(
            {"architectures": ["Phi3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0}
            | {"bos_token_id": 199999, "embd_pdrop": 0.0, "eos_token_id": 199999, "full_attn_mod": 1}
            | {"hidden_act": "silu", "hidden_size": 3072, "initializer_range": 0.02, "intermediate_size": 8192}
            | {"interpolate_factor": 1, "lm_head_bias": False, "max_position_embeddings": 131072, "mlp_bias": False}
            | {"model_type": "phi3", "num_attention_heads": 24, "num_hidden_layers": 32, "num_key_value_heads": 8}
            | {"original_max_position_embeddings": 4096, "pad_token_id": 199999, "partial_rotary_factor": 0.75}
            | {"resid_pdrop": 0.0, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 262144}
            | {"rope_scaling": {"type": "longrope", "short_factor": [1] * 48, "long_factor": [1, 1.5] * 24}}
            | {"tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.45.0"}
            | {"use_cache": True, "vocab_size": 200064}
        ),
        {"rotary_dim": 96, "window": 262144, "tied_embeddings": True},
    ),
    "OLMo 2 7B": (
        """{"architectures": ["Olmo2ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "eos_token_id":
        100257, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008,
        "max_position_embeddings": 4096, "model_type": "olmo2", "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 32, "pad_token_id": 100277, "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta":
        500000, "tie_word_embeddings": false, "torch_dtype": "float32", "transformers_version": "4.47.0.dev0",
        "use_cache": false, "vocab_size": 100352}""",
        {"norm_placement": "after", "qk_norm": "whole", "norm_eps": 1e-6},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read_and_written_back(name: str) -> None:
    text, expected = PUBLISHED[name]
    tree = json.loads(text)
    family = family_of_config(tree, "config.json")
    fields, _ = family.read(tree)
    assert {key: fields.get(key) for key in expected} == expected
    model = ModelConfig.model_validate(fields)
    assert family.refusals(model) == []  # what is written reads back as the same model


def config(kind: str) -> dict[str, Any]:
    name = next(name for name, (text, _) in PUBLISHED.items() if f'"{kind}"' in text)
    return json.loads(PUBLISHED[name][0])


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "an unknown key": ("llama", {"clip_qkv": 8.0}, "clip_qkv is 8.0: no such key is known for Llama"),
    "a key of another family": ("olmo2", {"sliding_window": 8}, "sliding_window is 8: no such key is known"),
    "an activation": ("llama", {"hidden_act": "relu"}, "hidden_act is 'relu'; legal: 'silu', 'swish', 'gelu'"),
    "biases of one half": ("llama", {"attention_bias": True}, "mlp_bias is False; legal: what attention_bias says"),
    "a size that is text": ("llama", {"hidden_size": "64"}, "hidden_size is '64'; legal: a positive whole number"),
    "a flag that is a number": ("llama", {"tie_word_embeddings": 0}, "tie_word_embeddings is 0; legal: true, false"),
    "infinity": ("llama", {"rms_norm_eps": float("inf")}, "rms_norm_eps is inf; legal: a positive number"),
    "another class": ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "legal: 'LlamaForCausalLM'"),
    "dynamic scaling": (
        "llama",
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        "rope_scaling.type is 'dynamic'",
    ),
    "a scaling without its factor": ("llama", {"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
    "a key of another scaling": (
        "llama",
        {"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 3.0}},
        "rope_scaling.beta_fast is 3.0; legal: to leave it out of a scaling of type 'linear'",
    ),
    "yarn of DeepSeek": (
        "qwen2",
        {"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": 0.7}},
        "rope_scaling.mscale is 0.7; legal: null",
    ),
    "two bases": (
        "llama",
        {"rope_parameters": {"rope_theta": 3.0}, "rope_theta": 2.0},
        "rope_theta is given as 2.0 and",
    ),
    "two scalings": (
        "llama",
        {"rope_parameters": {"rope_theta": 3.0}, "rope_scaling": {"type": "linear", "factor": 2.0}},
        "rope_scaling is {'type': 'linear', 'factor': 2.0}; legal: what rope_parameters says, {'rope_theta': 3.0}",
    ),
    "partial rotation": (
        "mistral",
        {"rope_parameters": {"partial_rotary_factor": 0.5}},
        "rope_parameters.partial_rotary_factor is 0.5; legal: 1.0",
    ),
    "positions by kind of layer": (
        "gemma2",
        {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
        "rope_parameters.full_attention is {'rope_theta': 1000000.0}; legal: to leave it out",
    ),
    "scaling in Phi 3": ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.type is 'linear'"),
    "experts in Qwen2's config": (
        "qwen2",
        {"num_experts": 8},
        "model_type 'qwen2' is a mixture of experts (num_experts)",
    ),
    "windows in the upper layers": (
        "qwen2",
        {"use_sliding_window": True, "max_window_layers": 20},
        "max_window_layers is 20; legal: what gives every layer a window, or none",
    ),
    "irregular windows": (
        "gemma2",
        {"layer_types": ["full_attention"] * 13 + ["sliding_attention"] * 13},
        "legal: 'sliding_attention' in every layer, or in all but each n-th",
    ),
    "chunked attention": (
        "gemma2",
        {"layer_types": ["chunked_attention"] * 26},
        "legal: 26 of 'sliding_attention' and",
    ),
    "too few layer types": ("gemma2", {"layer_types": ["full_attention"]}, "legal: 26 of 'sliding_attention' and"),
    "both directions": ("gemma2", {"use_bidirectional_attention": True}, "legal: null, False"),
    "cross attention": ("gpt2", {"add_cross_attention": True}, "add_cross_attention is True; legal: False"),
    "scores by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "legal: False"),
    "no biases in attention": ("gpt_neox", {"attention_bias": False}, "attention_bias is False; legal: True"),
    "an encoder": ("llama", {"is_encoder_decoder": True}, "is_encoder_decoder is True; legal: False"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_computed_is_refused_by_key(what: str) -> None:
    kind, change, message = REFUSED[what]
    with pytest.raises(UserError) as caught:
        tree = config(kind) | change
        family_of_config(tree, "config.json").read(tree)
    assert message in str(caught.value)


def test_keys_that_are_null_say_nothing() -> None:
    tree = config("llama") | {"quantization_config": None, "auto_map": None, "architectures": None}
    family = family_of_config(tree, "config.json")
    assert family.read(tree)[0] == family.read(config("llama"))[0]


def test_keys_of_an_unknown_scaling_are_not_judged() -> None:
    with pytest.raises(UserError) as caught:
        BY_TYPE["llama"].read(config("llama") | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0, "alpha": 1.0}})
    (_, problem) = str(caught.value).splitlines()
    assert problem.startswith("rope_scaling.rope_type is 'dynamic'; legal: 'default', 'linear'")


def test_all_problems_are_told_at_once() -> None:
    tree = config("llama") | {"alibi": True, "hidden_act": "relu"}
    del tree["vocab_size"], tree["num_hidden_layers"]
    with pytest.raises(UserError) as caught:
        BY_TYPE["llama"].read(tree, "there/config.json")
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("there/config.json says what cannot be computed here (Llama)") and len(lines) == 5
    for key in ("alibi", "hidden_act", "vocab_size", "num_hidden_layers"):
        assert any(line.startswith(f"{key} is") for line in lines)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "qwen2_moe"])
def test_mixtures_of_experts_are_refused_by_name(kind: str) -> None:
    with pytest.raises(UserError, match=f"model_type '{kind}' is a mixture of experts .*; legal: llama, mistral"):
        family_of_config(config("mistral") | {"model_type": kind, "num_local_experts": 8}, "config.json")


def test_dropout_is_told() -> None:
    _, notes = BY_TYPE["gpt2"].read(config("gpt2"))
    names = ("attn_pdrop", "embd_pdrop", "resid_pdrop")
    assert notes == [f"{name} is 0.1: training goes on without dropout" for name in names]


def test_every_family_is_found_by_what_only_it_computes() -> None:
    for family in FAMILIES:
        text = next(text for text, _ in PUBLISHED.values() if f'"{family.model_type}"' in text)
        model = ModelConfig.model_validate(family.read(json.loads(text))[0])
        assert family_of(model) is family, family.name
