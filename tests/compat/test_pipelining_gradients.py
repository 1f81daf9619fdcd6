"""Our schedules against torch.distributed.pipelining's on the same stages: the same gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining import schedules as theirs

from megapt.batch import MicroBatch
from megapt.config import from_tree
from megapt.engine import Engine
from megapt.prove.ranks import run_ranks

MODEL: dict[str, Any] = {"layers": 4, "hidden": 32, "heads": 4, "kv_heads": 2, "ffn": 40, "vocabulary": 61}
SEQUENCE, MICRO_BATCHES, MICRO = 8, 4, 2
TOKENS = SEQUENCE * MICRO_BATCHES * MICRO
PAIRS = [
    ("1f1b", 1, "Schedule1F1B"),
    ("interleaved", 2, "ScheduleInterleaved1F1B"),
    ("zb-v", 2, "ScheduleZBVZeroBubble"),
]


def engine_of(schedule: str, chunks: int) -> Engine:
    tree = {
        "precision": "fp64",
        "model": MODEL,
        "parallel": {"pipeline": 2, "schedule": schedule, "chunks": chunks, "vocabulary_multiple": 1},
        "zero": {"backend": "native", "stage": 0},
        "data": {"train": "unused"},
        "batch": {"sequence": SEQUENCE, "samples": MICRO * MICRO_BATCHES, "micro": MICRO},
        "train": {"steps": 1},
    }
    return Engine(from_tree(tree).config, 2, torch.device("cpu"))


class Stage(nn.Module):
    """One of our chunks as torch's pipeline calls it: tokens or activations in, activations or logits out."""

    def __init__(self, chunk: nn.Module) -> None:
        super().__init__()
        self.chunk = chunk
        self.shape = MicroBatch(torch.zeros(MICRO, SEQUENCE, dtype=torch.long), None)

    def forward(self, x: Tensor) -> Tensor:
        first = x.dtype == torch.long
        y = self.chunk(None, MicroBatch(x, None)) if first else self.chunk(x.flatten(0, 1), self.shape)
        return y.view(MICRO, SEQUENCE, -1).clone()  # torch detaches outputs in place, which views do not allow


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / TOKENS


def run_theirs(engine: Engine, name: str, tokens: Tensor, labels: Tensor) -> float:
    """One step of torch's schedule, which leaves gradients in `.grad`; the loss, zero where the model does not end."""
    where, rank = engine.pipeline.placement, engine.mesh.pp.rank
    count, device, group = where.virtual_stages, torch.device("cpu"), engine.mesh.pp.group
    stages = [
        PipelineStage(Stage(chunk), where.virtual(rank, index), count, device, group=group)
        for index, chunk in enumerate(engine.chunks)
    ]
    make: Callable[..., Any] = getattr(theirs, name)
    run = make(stages if len(stages) > 1 else stages[0], MICRO_BATCHES, loss_fn=loss_of, scale_grads=False)
    losses: list[Tensor] = []
    first = [tokens] if rank == 0 else []
    last = {"target": labels, "losses": losses} if rank == engine.pipeline.last_rank else {}
    run.step(*first, **last)
    return float(sum(loss.detach() for loss in losses))


def two_ranks(rank: int, world: int) -> list[dict[str, float]]:
    generator = torch.Generator().manual_seed(5)
    tokens, labels = torch.randint(0, 61, (2, MICRO * MICRO_BATCHES, SEQUENCE), generator=generator)
    batches = [MicroBatch(t, y) for t, y in zip(tokens.split(MICRO), labels.split(MICRO), strict=True)]
    found = []
    for schedule, chunks, name in PAIRS:
        engine = engine_of(schedule, chunks)
        engine.backend.zero_grad()
        loss = float(engine.pipeline.train(batches, 1 / TOKENS)) / TOKENS
        ours = {p.spec.name: p.main_grad.clone() for p in engine.parameters}
        for p in engine.parameters:
            p._post_accumulate_grad_hooks.clear()  # our accumulation would take the gradients away
        errors = {"loss": abs(run_theirs(engine, name, tokens, labels) - loss)}
        for p in engine.parameters:
            assert p.grad is not None and p.grad.abs().max() > 0
            errors[p.spec.name] = float((p.grad - ours[p.spec.name]).norm() / p.grad.norm())
        found.append(errors)
    return found


@pytest.fixture(scope="module")
def found() -> list[list[dict[str, float]]]:
    return run_ranks(2, two_ranks)


@pytest.mark.parametrize("index", range(len(PAIRS)), ids=[pair[2] for pair in PAIRS])
def test_gradients_are_those_of_torch(found: list[list[dict[str, float]]], index: int) -> None:
    errors = found[0][index] | found[1][index]
    assert len(errors) == 1 + 4 * 9 + 3
    assert {name: error for name, error in errors.items() if not error < 1e-12} == {}
