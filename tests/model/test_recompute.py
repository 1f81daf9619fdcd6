"""What is computed again gives the same gradients bit for bit, in an undivided backward and in one cut in two."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megapt.batch import Documents, MicroBatch
from megapt.config import from_tree
from megapt.mesh import ParallelMesh
from megapt.model.decoder import DecoderChunk
from megapt.parallel.pipeline.stages import build_chunks
from megapt.parallel.tensor import TensorParallel
from megapt.parallel.weight_gradients import compute
from megapt.parameters import Parameter

ONE = ParallelMesh.create(1, 1, 1, torch.device("cpu"))
SEQUENCE = 12
SIZES: dict[str, Any] = {"layers": 3, "hidden": 32, "heads": 4, "kv_heads": 2, "ffn": 40, "vocabulary": 61}
MODELS: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "gpt2": SIZES | {"norm": "layer_norm", "gated": False, "activation": "gelu", "position": "learned", "bias": "all"},
}
# What other families do differently, as much of it as goes together.
ROPE = {"kind": "longrope", "factor": 2.0, "original_sequence": 8, "short_factors": [1.0], "long_factors": [2.0]}
GEMMA = {"norm_placement": "both", "norm_offset": True, "qk_norm": "head", "embedding_scale": 5.7, "window": 5}
GEMMA |= {"window_pattern": 2, "attention_scale": 0.3, "attention_softcap": 1.0, "rotary_dim": 2, "rope_scaling": ROPE}
FAMILIES: dict[str, dict[str, Any]] = {
    "gemma": SIZES | GEMMA,
    "olmo": SIZES | {"norm_placement": "after", "qk_norm": "whole", "window": 5},
    "neox": SIZES | {"parallel_residual": True, "norm": "layer_norm", "gated": False, "bias": "all"},
}
POLICIES = ("none", "selective", "full")


def chunk_of(model: dict[str, Any], precision: str, policy: str) -> tuple[DecoderChunk, list[Parameter], Any]:
    tree = {"precision": precision, "model": model, "data": {"train": "x"}, "train": {"steps": 1}}
    config = from_tree(tree | {"batch": {"sequence": SEQUENCE, "samples": 2, "micro": 2}}).config
    tp = TensorParallel(ONE.tp)
    (chunk,), parameters = build_chunks(config, ONE, tp, policies=[[policy] * config.model.layers])  # type: ignore
    return chunk, parameters, tp


def batch_of(documents: bool) -> MicroBatch:
    generator = torch.Generator().manual_seed(3)
    tokens, labels = (torch.randint(0, 61, (2, SEQUENCE), generator=generator) for _ in range(2))
    if not documents:
        return MicroBatch(tokens, labels)
    lengths = (5, 7, 12)
    bounds = torch.tensor([0, 5, 12, 24], dtype=torch.int32)
    return MicroBatch(tokens, labels, Documents(lengths, bounds, torch.cat([torch.arange(n) for n in lengths])))


def gradients(
    model: str, precision: str, policy: str, split: bool = False, documents: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and what two micro-batches' backwards leave in every parameter."""
    chunk, parameters, tp = chunk_of((MODELS | FAMILIES)[model], precision, policy)
    for _ in range(2):
        loss = chunk(None, batch_of(documents))
        if not split:
            loss.backward()
            continue
        with tp.weight_gradients.deferring() as queue:
            loss.backward()
        assert len(queue) == 4 * chunk.model.layers
        compute(queue)
        assert not queue
    return loss.detach(), {p.spec.name: p.grad for p in parameters}  # type: ignore[misc]


@pytest.mark.parametrize("model", [*MODELS, *FAMILIES])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("documents", [False, True])
def test_every_policy_and_a_divided_backward_give_the_same_bits(model: str, precision: str, documents: bool) -> None:
    loss, expected = gradients(model, precision, "none", documents=documents)
    assert all(g.abs().max() > 0 for g in expected.values())
    for policy in POLICIES:
        for split in (False, True):
            other, found = gradients(model, precision, policy, split, documents)
            assert torch.equal(loss, other), (policy, split)
            for name, gradient in expected.items():
                assert torch.equal(gradient, found[name]), (policy, split, name)


def test_weight_gradients_wait_until_they_are_computed() -> None:
    chunk, parameters, tp = chunk_of(MODELS["gpt2"], "fp32", "none")
    with tp.weight_gradients.deferring() as queue:
        chunk(None, batch_of(False)).backward()
    assert not tp.weight_gradients.deferred
    waiting = {p.spec.name for p in parameters if p.grad is None}
    assert waiting == {p.spec.name for p in parameters if p.spec.layer is not None and p.dim() == 2}
    reached: list[str] = []
    for p in parameters:
        p.register_post_accumulate_grad_hook(lambda p: reached.append(p.spec.name))  # type: ignore[attr-defined]
    compute(queue)
    assert sorted(reached) == sorted(waiting), "through autograd, once each, where whoever listens meets them"


class _Counted(nn.Module):
    def __init__(self, inner: nn.Module, calls: list[int]) -> None:
        super().__init__()
        self.inner, self.calls = inner, calls

    def forward(self, *args: Any) -> Tensor:
        self.calls[0] += 1
        return self.inner(*args)

    def of_sum(self, *args: Any) -> tuple[Tensor, Tensor]:
        self.calls[0] += 1
        return self.inner.of_sum(*args)


@pytest.mark.parametrize("policy,expected", [("none", 2), ("selective", 4), ("full", 4)])
def test_norms_run_again_once_per_backward(policy: str, expected: int) -> None:
    chunk, _, tp = chunk_of(SIZES | {"layers": 1}, "fp32", policy)
    calls = [0]
    layer = chunk.layers[0]
    layer.attention_norm, layer.mlp_norm = (_Counted(m, calls) for m in (layer.attention_norm, layer.mlp_norm))
    with tp.weight_gradients.deferring() as queue:
        chunk(None, batch_of(False)).backward()
    assert calls[0] == expected
    compute(queue)
    assert calls[0] == expected, "weight gradients use what the input's gradient has made"


def test_the_last_product_of_a_layer_is_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four products forwards, and three again: the fourth one's result is needed by no backward."""
    chunk, _, _ = chunk_of(SIZES | {"layers": 1}, "fp32", "full")
    calls = [0]
    linear = torch.nn.functional.linear

    def counting(*args: Any, **kwargs: Any) -> Tensor:
        calls[0] += 1
        return linear(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "linear", counting)
    loss = chunk(None, batch_of(False))
    assert calls[0] == 4
    loss.backward()
    assert calls[0] == 7


def test_evaluation_keeps_and_repeats_nothing() -> None:
    with torch.no_grad():
        losses = [chunk_of(SIZES, "fp32", policy)[0](None, batch_of(False)) for policy in POLICIES]
    assert len({float(loss) for loss in losses}) == 1 and not any(loss.requires_grad for loss in losses)


def test_a_second_backward_is_refused() -> None:
    chunk, _, _ = chunk_of(SIZES, "fp32", "full")
    loss = chunk(None, batch_of(False))
    loss.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="one backward only"):
        loss.backward()
