"""The decoder against transformers' models with the same random weights: logits, loss and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megapt.batch import MicroBatch
from megapt.config import from_tree
from megapt.convert.export import family_of
from megapt.mesh import ParallelMesh
from megapt.model import decoder
from megapt.model.table import parameter_table
from megapt.parallel.pipeline.stages import build_chunks
from megapt.parallel.tensor import TensorParallel
from megapt_kernels.glu import geglu, swiglu
from tests.distributed.layouts import GPT2, LLAMA
from tests.model.accuracy import assert_accurate, distance, random

ONE = ParallelMesh.create(1, 1, 1, torch.device("cpu"))
BATCH, SEQUENCE = 2, 24
MODELS: dict[str, dict[str, Any]] = {
    "llama, grouped heads, llama3 positions": LLAMA | {"layers": 2},
    "llama, gelu, biases, tied": LLAMA | {"layers": 2, "activation": "gelu", "bias": "all", "tied_embeddings": True},
    "gpt2": GPT2 | {"layers": 2},
}


def both(model: dict[str, Any], precision: str) -> tuple[Any, dict[str, Any], torch.nn.Module]:
    """Our chunk, our parameters by name, and transformers' model, all weights random and equal."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tree = {"precision": precision, "model": model, "data": {"train": "x"}, "train": {"steps": 1}}
    config = from_tree(tree | {"batch": {"sequence": SEQUENCE, "samples": 1}}).config
    (chunk,), parameters = build_chunks(config, ONE, TensorParallel(ONE.tp))
    for index, p in enumerate(parameters):
        p.shard.valid(p.data).copy_(random(*p.spec.shape, seed=index, scale=0.15) + p.spec.fill)
    ours = {p.spec.name: p for p in parameters}
    family, kept = family_of(config.model), config.model
    fields = dict(family.config(kept))
    theirs = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            fields.pop("model_type"), **fields, vocab_size=kept.vocabulary, tie_word_embeddings=kept.tied_embeddings
        )
    ).to(ours["embedding.weight"].dtype)
    state = theirs.state_dict()
    for row in family.expand(kept, parameter_table(kept)):
        state[row.theirs].copy_(row.join([ours[n].shard.valid(ours[n].data) for n in row.ours]))
    return chunk, ours, theirs.eval()


@pytest.mark.parametrize("precision", ["fp64", "fp32"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_loss_and_gradients_are_those_of_transformers(name: str, precision: str) -> None:
    chunk, ours, theirs = both(MODELS[name], precision)
    model = chunk.model
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, model.vocabulary, (BATCH, SEQUENCE), generator=generator)
    labels = torch.randint(0, model.vocabulary, (BATCH, SEQUENCE), generator=generator)
    # transformers' rotary tables are fp32 whatever the model.
    close = 1e-12 if precision == "fp64" and model.position == "learned" else 2e-5
    logits = theirs(tokens).logits
    with torch.no_grad():
        mine = chunk(None, MicroBatch(tokens, None))
    assert logits.abs().max() > 1
    assert distance(mine, logits.detach().flatten(0, 1)) < close
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    loss.backward()
    own = chunk(None, MicroBatch(tokens, labels))
    own.backward()
    assert float(own.detach()) == pytest.approx(float(loss.detach()), rel=close)
    gradients = {n: p.grad for n, p in theirs.named_parameters()}
    for row in family_of(model).expand(model, parameter_table(model)):
        joined = row.join([ours[n].shard.valid(ours[n].grad) for n in row.ours])
        expected = gradients[row.theirs]
        if expected.norm() > 1e-6 * loss.detach().abs():  # a key's bias has none but rounding
            assert distance(joined, expected) < 10 * close, row.theirs


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_gated_activation_is_as_accurate_as_plain_operations(activation: str) -> None:
    def plain(y: Tensor) -> Tensor:
        gate, up = y.chunk(2, dim=-1)
        return decoder._activate(gate, activation) * up

    def own(y: Tensor) -> Tensor:
        if activation == "silu":
            return swiglu(y)
        return geglu(y, approximate="tanh" if activation == "gelu_tanh" else "none")

    assert_accurate(own, plain, [random(300, 160, seed=1, scale=3.0)], random(300, 80, seed=2))
    assert torch.autograd.gradcheck(own, random(3, 8, seed=3).requires_grad_())
