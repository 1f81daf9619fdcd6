"""FLOPs and memory against figures worked out by hand, and against what the engine really allocates."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megapt.batch import MicroBatch
from megapt.config import Config, ModelConfig, from_tree, load
from megapt.engine import Engine
from megapt.errors import UserError
from megapt.model.positions import rotary_table
from megapt.model.recompute import Policy
from megapt.model.table import parameter_table
from megapt.parallel.pipeline.check import check
from megapt.parallel.pipeline.schedules import schedule
from megapt.parameters import Parameter
from megapt.plan.flops import model_flops_per_token
from megapt.plan.memory import (
    Activations,
    _time_again,
    deferred_activations,
    layer_activations,
    layer_policies,
    stage_memory,
)
from megapt.prove.small import built_in
from megapt.rules import check_world
from tests.distributed.layouts import GPT2, LLAMA, SEQUENCE, tree

CONFIGS = Path(__file__).parents[2] / "configs"
FAMILIES = {shape.name: shape.tree["model"] for shape in built_in() if shape.brief}


def test_flops_follow_the_published_formula() -> None:
    """Megatron's count, 72 B S L h^2 (1 + S / 6h + V / 12hL) without recomputation, for a GPT with ffn = 4h."""
    layers, hidden, sequence, vocabulary = 96, 12288, 2048, 51200
    gpt = ModelConfig(
        layers=layers, hidden=hidden, heads=96, ffn=4 * hidden, vocabulary=vocabulary, gated=False, tied_embeddings=True
    )
    per_token = 72 * layers * hidden**2 * (1 + sequence / (6 * hidden) + vocabulary / (12 * hidden * layers))
    assert model_flops_per_token(gpt, sequence) == pytest.approx(per_token, rel=1e-12)


@pytest.mark.parametrize("preset,world", [("llama-8b", 32), ("llama-70b", 256), ("llama-405b", 1024)])
def test_presets_fit_their_hardware(preset: str, world: int) -> None:
    config = load(CONFIGS / f"{preset}.yaml", ["parallel.vocabulary_multiple=1"]).config
    stages = stage_memory(config, check_world(config, world))
    assert max(stage.total for stage in stages) <= 0.95 * 79.1 * 2**30  # of an H100, with the search's margin
    # Norms are held whole by every tensor rank, the rest is cut evenly: stages add up to the model.
    table, tensor = parameter_table(config.model), config.parallel.tensor
    norms = sum(spec.numel for spec in table.values() if spec.split is None)
    assert sum(stage.parameters for stage in stages) == (table.count() - norms) // tensor + norms


@pytest.mark.parametrize("model", [LLAMA, GPT2])
@pytest.mark.parametrize("precision, kind", [("fp32", "adamw"), ("bf16", "adamw"), ("fp64", "adamw"), ("bf16", "muon")])
def test_state_is_what_the_native_backend_allocates(model: dict, precision: str, kind: str) -> None:
    made = tree(model, precision=precision)
    config = from_tree({**made, "optimizer": {**made["optimizer"], "kind": kind}}).config
    engine = Engine(config, 1, torch.device("cpu"))
    (stage,) = stage_memory(config, 1)
    assert stage.parameters == sum(p.numel() for p in engine.parameters)
    assert stage.weights == sum(p.numel() * p.element_size() for p in engine.parameters)
    assert stage.gradients == sum(p.main_grad.numel() * p.main_grad.element_size() for p in engine.parameters)
    masters = precision == "bf16"
    state = 0
    for fragment in engine.backend.fragments():
        for name, tensor in fragment.tensors.items():
            state += tensor.numel() * tensor.element_size() if masters or name != "weight" else 0
    assert stage.optimizer == state


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_tied_copy_has_no_optimizer_state(kind: str) -> None:
    def optimizer(tied: bool) -> list[int]:
        made = tree(GPT2 | {"tied_embeddings": tied}, pp=2, precision="bf16", layers_per_stage="2,2")
        return [stage.optimizer for stage in stage_memory(from_tree(made | {"optimizer": {"kind": kind}}).config, 1)]

    tied, untied = optimizer(True), optimizer(False)
    assert tied[0] == untied[0]
    assert untied[1] - tied[1] == 3 * 4 * GPT2["vocabulary"] * GPT2["hidden"]  # master and two moments in fp32


def _saved_bytes(engine: Engine, forward: Callable[[], Tensor]) -> int:
    """Bytes of the storages that autograd keeps, each once; parameters, positions and indices not counted."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            kept[tensor.untyped_storage().data_ptr()] = tensor  # holding it, so that no address is used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    assert output.requires_grad
    for tensor in (*engine.parameters, *(_rotary(engine) or ())):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _rotary(engine: Engine) -> tuple[Tensor, Tensor] | None:
    model, dtype = engine.config.model, engine.pipeline.dtype
    if model.position != "rope":
        return None
    return rotary_table(model, SEQUENCE, torch.device("cpu"), torch.promote_types(dtype, torch.float32))


@pytest.mark.parametrize("model", [LLAMA, GPT2, LLAMA | {"norm": "layer_norm", "gated": False}, *FAMILIES.values()])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("policy", ["none", "selective", "full"])
def test_activations_are_what_autograd_keeps(model: dict, precision: str, policy: Policy) -> None:
    plain = tree(model, precision=precision) | {"recompute": {"policy": policy}}
    config = from_tree(plain).config
    engine = Engine(config, 1, torch.device("cpu"), optimize=False)
    chunk, micro = engine.chunks[0], config.batch.micro
    x = torch.ones(micro * SEQUENCE, config.model.hidden, dtype=engine.pipeline.dtype, requires_grad=True)
    tokens = torch.zeros(micro, SEQUENCE, dtype=torch.long)
    batch = MicroBatch(tokens, tokens)
    layer = chunk.get_submodule("layers.1")
    one = _saved_bytes(engine, lambda: layer(x, batch, _rotary(engine)))
    assert layer_activations(config, cpu=True, policy=policy) == pytest.approx(one, rel=0.02)

    every = _saved_bytes(engine, lambda: chunk(None, batch))
    (stage,) = stage_memory(config, 1, cpu=True)
    again = layer_activations(config, cpu=True) - layer_activations(config, cpu=True, policy=policy)
    assert stage.activations - again == pytest.approx(every, rel=0.02)


@pytest.mark.parametrize("model", [LLAMA, GPT2])
def test_what_waits_for_weight_gradients_is_what_the_queue_holds(model: dict) -> None:
    config = from_tree(tree(model, precision="fp32")).config
    engine = Engine(config, 1, torch.device("cpu"), optimize=False)
    tokens = torch.zeros(config.batch.micro, SEQUENCE, dtype=torch.long)
    with engine.tp.weight_gradients.deferring() as queue:
        engine.chunks[0](None, MicroBatch(tokens, tokens)).backward()
    held: dict[int, Tensor] = {}
    for gradient in queue:
        tensors = [t for t in gradient.start.args if isinstance(t, Tensor) and not isinstance(t, Parameter)]  # type: ignore[attr-defined]
        held |= {t.untyped_storage().data_ptr(): t for t in tensors}
    measured = sum(tensor.untyped_storage().nbytes() for tensor in held.values())
    assert config.model.layers * deferred_activations(config) == pytest.approx(measured, rel=0.02)


def test_ranks_that_share_key_heads_keep_a_whole_one() -> None:
    def layer(tp: int) -> int:
        return layer_activations(from_tree(tree(LLAMA, tp=tp, precision="fp32")).config, cpu=True)

    # From two to four ranks all is halved but the key and the value head that two ranks then share.
    tokens, width = 2 * SEQUENCE, LLAMA["hidden"] // LLAMA["heads"]
    assert layer(4) - layer(2) // 2 == tokens * 2 * width * 4 // 2


def _head_bytes() -> int:
    """What the head's norm keeps, the gradient of the projection's input, and that of its weight."""
    return 2 * SEQUENCE * (2 * 32 + 1) * 4 + 61 * 32 * 4


@pytest.mark.parametrize("data,live", [(1, [4, 3, 2, 1]), (2, [2, 2, 2, 1]), (4, [1, 1, 1, 1])])
def test_micro_batches_in_flight_are_those_of_the_schedule(data: int, live: list[int]) -> None:
    """Eight samples in micro-batches of two, over one, two or four replicas."""
    config = from_tree(tree(LLAMA, pp=4, precision="fp32")).config
    stages = stage_memory(config, data)
    assert live == check(schedule("1f1b", 4, 1, 4 // data)).peak_live
    layer, head = layer_activations(config, cpu=False), [0, 0, 0, _head_bytes()]
    assert [s.activations for s in stages] == [n * layer + h for n, h in zip(live, head, strict=True)]


def test_chunks_in_flight_weigh_what_a_chunk_does() -> None:
    config = from_tree(tree(LLAMA, pp=2, precision="fp32", schedule="interleaved", chunks=2)).config
    first, last = stage_memory(config, 1)
    peaks = check(schedule("interleaved", 2, 2, 4)).peak_live
    layer = layer_activations(config, cpu=False)
    assert first.activations == peaks[0] * layer and peaks[0] == 5
    assert last.activations == peaks[1] * layer + _head_bytes()


def test_a_schedule_that_puts_weight_gradients_off_holds_what_they_need() -> None:
    config = from_tree(tree(LLAMA, pp=4, precision="fp32", schedule="zb-h1")).config
    layer, deferred = layer_activations(config, cpu=False), deferred_activations(config)
    assert [s.activations for s in stage_memory(config, 1)][1:3] == [3 * layer + deferred, 2 * layer + 2 * deferred]
    report = check(schedule("zb-h1", 4, 1, 4))
    assert (report.peak_live, report.peak_held) == ([4, 3, 2, 1], [4, 4, 4, 4])


def test_the_end_of_a_v_lies_on_the_first_rank() -> None:
    config = from_tree(tree(LLAMA, pp=2, precision="fp32", schedule="zb-v", chunks=2)).config
    first, last = stage_memory(config, 1)
    assert [len(r) for r in first.layers + last.layers] == [1, 1, 1, 1] and first.layers[1] == range(3, 4)
    embedding = 61 * 32
    assert first.parameters - last.parameters == 2 * embedding + 32
    tied = from_tree(tree(GPT2, pp=2, precision="fp32", schedule="zb-v", chunks=2)).config
    first, last = stage_memory(tied, 1)
    assert first.parameters - last.parameters == embedding + 32 * 32 + 2 * 32, "one matrix, positions, the last norm"


def _budget(gib: float, **more: Any) -> Config:
    plain = tree(LLAMA | {"layers": 8}, pp=2, precision="fp32", **more)
    return from_tree(plain | {"recompute": {"policy": "budget", "budget": gib}}).config


def test_a_budget_is_kept_by_computing_as_little_again_as_can_be() -> None:
    ranks = [s.activations for s in stage_memory(_budget(1.0), 1)]
    assert layer_policies(_budget(1.0), 1) == [[["none"] * 4]] * 2
    previous = 0.0
    for share in (0.95, 0.8, 0.7, 0.6):
        config = _budget(ranks[0] * share / 2**30)
        for rank, (stage, free) in enumerate(zip(stage_memory(config, 1), ranks, strict=True)):
            assert stage.activations <= ranks[0] * share
            assert stage.activations < free or stage.policies == [["none"] * 4], rank
        work = sum(_time_again(config, policy) for policy in layer_policies(config, 1)[0][0])
        assert work > previous, "less memory costs more"
        previous = work
        cheaper = [mix for mix in _mixes(4) if sum(_time_again(config, policy) for policy in mix) < work]
        activations = Activations(config, 1, cpu=False)
        assert cheaper and all(activations.peak(0, [mix]) > ranks[0] * share for mix in cheaper)


def _mixes(layers: int) -> list[list[Policy]]:
    kinds: tuple[Policy, ...] = ("full", "selective", "none")
    return [list(mix) for mix in combinations_with_replacement(kinds, layers)]


def test_a_budget_that_cannot_be_kept_is_refused_with_the_least_that_can() -> None:
    with pytest.raises(UserError, match=r"pipeline rank 0.*at least ([\d.e-]+) GiB") as refused:
        layer_policies(_budget(1e-6), 1)
    least = float(str(refused.value).split("at least ")[1].split(" GiB")[0])
    assert layer_policies(_budget(least), 1)[0] == [["full"] * 4]


def test_layers_say_how_many_of_each_chunk_compute_again() -> None:
    plain = tree(LLAMA, pp=2, precision="fp32", schedule="interleaved", chunks=2, layers_per_stage="2,1*3")
    config = from_tree(plain | {"model": LLAMA | {"layers": 5}, "recompute": {"policy": "full", "layers": 1}}).config
    assert layer_policies(config, 1) == [[["full", "none"], ["full"]], [["full"], ["full"]]]


def test_many_micro_batches_change_no_peak() -> None:
    def activations(samples: int) -> list[int]:
        plain = tree(LLAMA, pp=2, precision="fp32", schedule="interleaved", chunks=2)
        config = from_tree(plain | {"batch": {"sequence": SEQUENCE, "samples": samples}}).config
        return [stage.activations for stage in stage_memory(config, 1)]

    assert activations(8) == activations(1 << 20)
