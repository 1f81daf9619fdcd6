"""The runtime on two ranks: every schedule and policy against one process, what it tells, and what it holds."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megapt.batch import MicroBatch
from megapt.config import from_tree
from megapt.engine import Engine
from megapt.mesh import ParallelMesh
from megapt.model.table import parameter_table
from megapt.operations import OPERATIONS
from megapt.parallel.loss import LossSettings, VocabularyHead
from megapt.parallel.pipeline.actions import Action, Kind
from megapt.parallel.pipeline.runtime import Pipeline
from megapt.parallel.tensor import ParameterFactory, TensorParallel
from megapt.parallel.weight_gradients import compute
from megapt.prove.ranks import run_ranks
from tests.model.accuracy import random
from tests.model.test_loss import ALONE, TOKENS, VOCABULARY, labels_of, plain, trained

SIZES: dict[str, Any] = {"layers": 6, "hidden": 32, "heads": 4, "kv_heads": 2, "ffn": 40, "vocabulary": 61}
TIED = SIZES | {"tied_embeddings": True, "norm": "layer_norm", "gated": False, "position": "learned", "bias": "all"}
SEQUENCE, MICRO_BATCHES = 8, 6
SCHEDULES = [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("interleaved", 3), ("zb-h1", 1), ("zb-v", 2)]
POLICIES = ("none", "selective", "full")


def tree_of(world: int, model: dict[str, Any], policy: str = "none", **parallel: Any) -> dict[str, Any]:
    return {
        "precision": "fp32",
        "model": model,
        "parallel": {"pipeline": world // parallel.get("tensor", 1), "vocabulary_multiple": 1, **parallel},
        "recompute": {"policy": policy},
        "zero": {"backend": "native", "stage": 0},
        "data": {"train": "unused"},
        "batch": {"sequence": SEQUENCE, "samples": 2 * MICRO_BATCHES, "micro": 2},
        "train": {"steps": 1},
    }


def engine_of(world: int, model: dict[str, Any] = SIZES, policy: str = "none", **parallel: Any) -> Engine:
    return Engine(from_tree(tree_of(world, model, policy, **parallel)).config, world, torch.device("cpu"))


def batches() -> list[MicroBatch]:
    generator = torch.Generator().manual_seed(5)
    pairs = [torch.randint(0, 61, (2, 2, SEQUENCE), generator=generator) for _ in range(MICRO_BATCHES)]
    return [MicroBatch(tokens, labels) for tokens, labels in pairs]


def train(engine: Engine, scale: float | Tensor = 1 / 96, record: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """This rank's part of the loss, and the gradients of what it owns."""
    engine.backend.zero_grad()
    total = engine.pipeline.train(batches(), scale, record)
    return total, {p.spec.name: p.main_grad.clone() for p in engine.parameters if p.owner}


def run_cases(rank: int, world: int) -> list[Any]:
    results = []
    for schedule, chunks in SCHEDULES:
        for policy in POLICIES if schedule in ("1f1b", "zb-h1", "zb-v") else ["none"]:
            engine = engine_of(world, policy=policy, schedule=schedule, chunks=chunks)
            results.append(((schedule, chunks, policy), *train(engine)))
    tied = engine_of(world, TIED, schedule="zb-v", chunks=2)
    results.append(("tied", *train(tied)))
    assert tied.ties.parameter is None and (rank != 0) == ("embedding.weight" not in results[-1][2])
    return results


def run_watching(rank: int, world: int) -> None:
    """What a pipeline tells of itself."""
    engine = engine_of(world, schedule="zb-v", chunks=2)
    pipeline = engine.pipeline
    assert pipeline.last_rank == 0
    seen: list[str] = []
    chunk = pipeline.chunks[1]
    chunk.before = lambda module: seen.append(OPERATIONS.action)  # type: ignore[assignment]
    loss, gradients = train(engine, record=True)
    assert len(seen) == MICRO_BATCHES * (len(chunk.layers) + (rank == 0))  # type: ignore[arg-type]
    assert seen[0].startswith("forward of micro-batch 0, chunk 1 (F0.1, action ")
    assert OPERATIONS.action == "end of the pipeline's actions"
    again, same = train(engine, torch.tensor(1 / 96, dtype=torch.float64))
    assert torch.equal(loss, again) and all(torch.equal(g, same[n]) for n, g in gradients.items())
    timeline = pipeline.timeline()
    assert (timeline is None) == (rank != 0)
    if timeline is not None:
        for spans in timeline.ranks:
            done = {span.action for span in spans}
            assert {Action(Kind.FORWARD, m, c) for m in range(MICRO_BATCHES) for c in range(2)} <= done
            assert {span.action.kind for span in spans} >= {Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT}
            assert all(span.end > span.start for span in spans)


def run_forwards(rank: int, world: int) -> list[tuple[Tensor, Tensor | None]]:
    found = []
    for schedule, chunks in (("1f1b", 1), ("interleaved", 2), ("zb-v", 2)):
        engine = engine_of(world, schedule=schedule, chunks=chunks)
        logits = engine.pipeline.logits(batches()[0].tokens)
        assert (logits is not None) == (rank == engine.pipeline.last_rank)
        found.append((engine.pipeline.evaluate(batches()), logits))
    return found


class _Bias(nn.Module):
    """A chunk whose backward needs none of its activations."""

    def __init__(self, first: bool, last: bool, width: int) -> None:
        super().__init__()
        self.first, self.last = first, last
        self.bias = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor | None, batch: MicroBatch) -> Tensor:
        if x is None:
            x = torch.zeros(batch.tokens.numel(), len(self.bias))
        y = x + self.bias
        return y.sum() if self.last else y


def run_memory(rank: int, world: int) -> int:
    """How much a rank grows while GPipe sends eight activations of 32 MiB that no backward needs."""
    mesh = ParallelMesh.create(2, 1, 1, torch.device("cpu"))
    width = 1 << 23
    chunks = nn.ModuleList([_Bias(rank == 0, rank == 1, width)])
    pipeline = Pipeline(chunks, mesh, TensorParallel(mesh.tp), "gpipe", width, torch.float32)
    made: list[int] = []
    chunks[0].register_forward_hook(lambda *_: made.append(_resident()))
    tokens = torch.zeros(1, 1, dtype=torch.long)
    gc.collect()
    total = pipeline.train([MicroBatch(tokens, tokens)] * 8, 1.0)
    assert float(total) == (0.0 if rank == 0 else 8 * 2 * width)
    assert torch.equal(chunks[0].bias.grad, torch.full((width,), 8.0))  # type: ignore[arg-type]
    return max(made) - made[0]


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def run_tensor_parallel(rank: int, world: int) -> None:
    """Under sequence parallelism too, policies and a divided backward give the same bits."""
    expected: dict[str, Tensor] = {}
    for sequence in (True, False):
        expected.clear()
        for policy in POLICIES:
            for divided in (False, True):
                engine = engine_of(world, TIED, policy, tensor=2, sequence=sequence)
                engine.backend.zero_grad()
                for batch in batches()[:2]:
                    loss = engine.chunks[0](None, batch)
                    if divided:
                        with engine.tp.weight_gradients.deferring() as queue:
                            loss.backward()
                        compute(queue)
                    else:
                        loss.backward()
                for p in engine.parameters:
                    first = expected.setdefault(p.spec.name, p.main_grad.clone())
                    assert torch.equal(first, p.main_grad), (sequence, policy, divided, p.spec.name)


def run_vocabulary_in_two(rank: int, world: int) -> None:
    """Soft cap and z-loss with the vocabulary cut over tensor ranks, against plain operations on all of it."""
    mesh = ParallelMesh.create(1, 1, 2, torch.device("cpu"))
    table = parameter_table(from_tree(tree_of(1, SIZES | {"vocabulary": VOCABULARY})).config.model)
    settings, labels = LossSettings(softcap=0.3, z_loss=0.1), labels_of()
    h = random(TOKENS, SIZES["hidden"], seed=1)
    for sequence in (False, True):
        heads = [
            VocabularyHead(ParameterFactory(table, tp, 7, torch.float64, torch.device("cpu")), settings)
            for tp in (ALONE, TensorParallel(mesh.tp, sequence))
        ]
        whole, cut = heads
        inputs = [h.clone().requires_grad_(), cut.tp.local_tokens(h).clone().requires_grad_()]
        trained(inputs[0], whole.weight, labels, settings).backward()
        loss = cut(inputs[1], labels)
        loss.backward()
        expected = plain(h, whole.weight.detach(), labels, settings)
        torch.testing.assert_close(loss.detach(), expected, rtol=1e-13, atol=0)
        shard = cut.shard
        assert shard.length == VOCABULARY // 2 + (rank == 0)
        for mine, theirs in (
            (inputs[1].grad, cut.tp.local_tokens(inputs[0].grad)),  # type: ignore[arg-type]
            (shard.valid(cut.weight.grad), whole.weight.grad[shard.slices()]),  # type: ignore[arg-type,index]
            (cut.logits(inputs[1].detach()).detach(), whole.logits(h).detach()),
        ):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-15)


def two_ranks(rank: int, world: int) -> dict[str, Any]:
    torch.use_deterministic_algorithms(True)
    run_watching(rank, world)
    run_tensor_parallel(rank, world)
    run_vocabulary_in_two(rank, world)
    return {"cases": run_cases(rank, world), "forwards": run_forwards(rank, world), "memory": run_memory(rank, world)}


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return run_ranks(2, two_ranks)


def test_schedules_and_policies_give_the_bits_of_one_process(found: list[dict[str, Any]]) -> None:
    loss, expected = train(engine_of(1))
    assert float(loss) > 0 and len(expected) == 6 * 9 + 3
    for one, other in zip(found[0]["cases"], found[1]["cases"], strict=True):
        case, gradients = one[0], one[2] | other[2]
        if case == "tied":
            continue
        assert torch.equal(one[1] + other[1], loss), case
        assert gradients.keys() == expected.keys() and not one[2].keys() & other[2].keys(), case
        for name, gradient in expected.items():
            assert torch.equal(gradients[name], gradient), (case, name)


def test_a_tied_matrix_at_both_ends_of_a_v_is_one(found: list[dict[str, Any]]) -> None:
    _, expected = train(engine_of(1, TIED))
    (_, _, first), (_, _, last) = (ranks["cases"][-1] for ranks in found)
    assert (first | last).keys() == expected.keys() - {"head.weight"}
    for name, gradient in (first | last).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-8)


def test_evaluation_and_logits_on_every_placement(found: list[dict[str, Any]]) -> None:
    engine = engine_of(1)
    loss, logits = engine.pipeline.evaluate(batches()), engine.pipeline.logits(batches()[0].tokens)
    assert logits is not None and logits.shape == (2, SEQUENCE, 61)
    for one, other in zip(found[0]["forwards"], found[1]["forwards"], strict=True):
        assert torch.equal(one[0] + other[0], loss)
        assert torch.equal(one[1] if one[1] is not None else other[1], logits)


def test_what_was_sent_is_not_kept_for_the_backward(found: list[dict[str, Any]]) -> None:
    """The first rank's outputs, 32 MiB each, go as they are sent: two on their way and one in the making, not eight."""
    assert found[0]["memory"] < 4 * 32 * 2**20
