"""FLOPs against torch's own counter on real models, and against counting pairs of tokens one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from megapt.batch import MicroBatch
from megapt.config import ModelConfig, from_tree
from megapt.engine import Engine
from megapt.plan.flops import CONVENTION, attended, attended_on_average, flops, model_flops_per_token
from tests.distributed.layouts import GPT2, LLAMA, SEQUENCE, tree

_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))


@pytest.mark.parametrize(
    "model", [LLAMA, GPT2, LLAMA | {"parallel_residual": True}, LLAMA | {"norm_placement": "both"}]
)
@pytest.mark.parametrize("policy", ["none", "selective", "full"])
def test_torch_counts_as_many(model: dict[str, Any], policy: str) -> None:
    """The counter sees attention over the whole square, as the literature counts it, and half a forward more in its
    backward, which computes the scores again."""
    config = from_tree(tree(model, precision="fp32") | {"recompute": {"policy": policy}}).config
    engine = Engine(config, 1, torch.device("cpu"), optimize=False)
    rows = config.batch.micro
    tokens = torch.zeros(rows, SEQUENCE, dtype=torch.long)
    counter = FlopCounterMode(
        display=False, custom_mapping={_FORWARD: _attention, _BACKWARD: _attention_backward}
    )
    with counter:
        engine.chunks[0](None, MicroBatch(tokens, tokens)).backward()
    ours = flops(config)
    kernel = ours.model.attention_core / 6  # scores and values are 4 of 12 parts, computed again the half of these
    assert counter.get_total_flops() == pytest.approx((ours.hardware.total + kernel) * tokens.numel(), rel=1e-12)


@pytest.mark.parametrize(
    "window, pattern, attention",
    [(None, 1, "causal"), (None, 1, "bidirectional"), (5, 1, "causal"), (5, 3, "causal"), (100, 1, "causal")],
)
def test_attended_tokens_are_pairs(window: int | None, pattern: int, attention: str) -> None:
    sequence, layers = 23, 4
    model = ModelConfig.model_validate(
        {"layers": layers, "hidden": 8, "heads": 2, "ffn": 8, "vocabulary": 16}
        | {"window": window, "window_pattern": pattern, "attention": attention}
    )
    pairs = 0
    for layer in range(layers):
        reach = model.window_of(layer) or sequence
        for query in range(sequence):
            seen = range(sequence) if attention == "bidirectional" else range(query + 1)
            pairs += sum(query - key < reach for key in seen)
    assert attended_on_average(model, sequence) * layers * sequence == pytest.approx(pairs, rel=1e-12)
    full = sum(min(model.window_of(layer) or sequence, sequence) for layer in range(layers))
    assert attended_on_average(model, sequence, full=True) * layers == pytest.approx(full)


def test_parts_add_up() -> None:
    config = from_tree(tree(LLAMA) | {"recompute": {"policy": "full"}}).config
    counted = flops(config)
    assert counted.model.total == pytest.approx(model_flops_per_token(config.model, SEQUENCE))
    ratio = attended(config.model, SEQUENCE, None) / SEQUENCE
    assert ratio == pytest.approx((SEQUENCE + 1) / (2 * SEQUENCE))
    assert counted.done.attention_core == pytest.approx(counted.model.attention_core * ratio)
    # All but the embedding, the head and the MLP's last product is computed again: a third of its backward and forward.
    again = counted.hardware + counted.model * -1
    assert again.attention_projections == pytest.approx(counted.model.attention_projections / 3)
    assert again.mlp == pytest.approx(counted.model.mlp / 3 * (2 / 3))
    assert again.head == again.embedding == 0
    assert counted.tokens == config.batch.global_samples * SEQUENCE
    text = counted.text()
    assert CONVENTION in text and "attention projections" in text and "PFLOPs per step" in text


def test_a_part_of_the_layers_is_recomputed() -> None:
    base = tree(LLAMA, pp=2, layers_per_stage="2,2")
    some = flops(from_tree(base | {"recompute": {"policy": "full", "layers": 1}}).config)
    every = flops(from_tree(base | {"recompute": {"policy": "full"}}).config)
    assert some.recomputed.total == pytest.approx(every.recomputed.total / 2)
    stated = flops(from_tree(base).config, ["full", "none", "none", "full"])
    assert stated.recomputed.total == pytest.approx(some.recomputed.total)
