"""What ranks do in the tests of ZeRO backends. Functions are module-level: ranks are started by name."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import nn

from megapt.batch import MicroBatch
from megapt.config import ModelConfig
from megapt.mesh import Axis, ParallelMesh
from megapt.model.decoder import DecoderChunk
from megapt.model.table import parameter_table
from megapt.parallel.tensor import ParameterFactory, TensorParallel
from megapt.parameters import ParameterTable
from megapt.prove.ranks import run_ranks
from megapt.zero.buckets import Bucket
from megapt.zero.native import NativeBackend
from megapt.zero.reduction import Sharding
from tests.zero.harness import (
    LRS,
    OPTIMIZERS,
    STEPS,
    TABLE,
    Case,
    Job,
    Pieces,
    Problem,
    Reference,
    Solution,
    assemble,
    in_turn,
    make,
    pieces,
    restore,
    summed,
)


def work(rank: int, world: int, jobs: list[Job]) -> dict[tuple[str, str], Any]:
    return in_turn(
        jobs,
        {
            "train": _train,
            "skip": _skip,
            "resume": _resume,
            "fine": _fine,
            "overlap": _overlap,
            **{n: _decoder for n in MODELS},
        },
    )


@functools.cache
def _outcome(world: int, jobs: tuple[Job, ...]) -> list[dict[tuple[str, str], Any]] | RuntimeError:
    try:
        return run_ranks(world, work, list(jobs))
    except RuntimeError as error:
        return error


def ranks_of(world: int, jobs: tuple[Job, ...]) -> list[dict[tuple[str, str], Any]]:
    """What `work` gives on each rank: started once, and failing for all tests if a rank fails."""
    outcome = _outcome(world, jobs)
    if isinstance(outcome, RuntimeError):
        raise outcome
    return outcome


def solution(ranks: list[dict[tuple[str, str], Any]], what: str, case: Case) -> Solution:
    """What a case's ranks found, as global tensors; every rank must have found the same norms."""
    found = [rank[what, case.id] for rank in ranks]
    assert all(f["norms"] == found[0]["norms"] for f in found)
    table = parameter_table(MODELS[what]) if what in MODELS else None
    return Solution(found[0]["norms"], gathered([f["pieces"] for f in found], case, table))


def gathered(ranks: list[Pieces], case: Case, table: ParameterTable | None = None) -> dict[str, Any]:
    more = {} if table is None else {"table": table}
    return assemble(ranks, case.tp, copies=case.dp if case.stage == 0 else 1, **more)


def _train(case: Case, mesh: ParallelMesh) -> dict[str, Any]:
    problem = Problem(case, mesh)
    problem.backend.zero_grad(1)  # a step that is given up must leave nothing in the next
    torch.autograd.backward(problem.chunks[0]({name: summed(name, 1, range(1)) for name in TABLE}))
    norms = []
    for step in range(STEPS):
        result = problem.step(step)
        assert result.grad_norm.shape == () and not result.skipped
        norms.append(float(result.grad_norm))
    assert problem.backend.updates == STEPS
    for p in problem.parameters:  # what a backend does to parameters must leave what they know of themselves
        assert p.spec.name and tuple(p.shard.shape) and p.owner == (p.spec.tied_to is None)
    if case.stage < 3 and case.optimizer != "rounding":
        _check_weights(problem)
    return {"norms": norms, "pieces": pieces(problem.backend, mesh.tp.rank)}


def _check_weights(problem: Problem) -> None:
    """The weights that the next forward uses are the masters, rounded to their precision."""
    for f in problem.backend.fragments():
        weight = f.parameter.data.flatten()[f.start : f.start + f.numel]
        assert torch.equal(weight, f.tensors["weight"].to(weight.dtype)), f.parameter.spec.name


def _skip(case: Case, mesh: ParallelMesh) -> dict[str, Any]:
    """A step with infinite gradients on one rank, between good ones."""
    problem = Problem(case, mesh)
    norms = [float(problem.step(0).grad_norm)]
    before = pieces(problem.backend, mesh.tp.rank)
    bad = problem.step(1, spoil=True)
    assert bool(bad.skipped) and not torch.isfinite(bad.grad_norm) and problem.backend.updates == 1
    assert same(before, pieces(problem.backend, mesh.tp.rank)), "a skipped step changed the state"
    if case.dtype == torch.float16:
        assert problem.backend.scalars() == {"loss_scale": 128.0, "good_steps": 0.0}
    norms += [float(problem.step(step).grad_norm) for step in range(1, STEPS)]
    assert problem.backend.updates == STEPS
    return {"norms": norms, "pieces": pieces(problem.backend, mesh.tp.rank)}


def _resume(case: Case, mesh: ParallelMesh) -> dict[str, Any]:
    """Save after two steps and go on; load into a fresh backend over other weights and go on: bit-equal."""
    problem = Problem(case, mesh)
    norms = [float(problem.step(step).grad_norm) for step in (0, 1)]
    saved, scalars = pieces(problem.backend, mesh.tp.rank), problem.backend.scalars()
    norms.append(float(problem.step(2).grad_norm))
    straight = pieces(problem.backend, mesh.tp.rank)
    again = Problem(case, mesh, seed=99)
    assert not same(saved, pieces(again.backend, mesh.tp.rank))
    restore(again.backend, saved, 2, scalars)
    assert same(saved, pieces(again.backend, mesh.tp.rank)) and again.backend.updates == 2
    assert float(again.step(2).grad_norm) == norms[-1]
    assert same(straight, pieces(again.backend, mesh.tp.rank)), "training did not go on bit for bit"
    return {"norms": norms, "pieces": straight}


def _fine(case: Case, mesh: ParallelMesh) -> dict[str, Any]:
    """Gradients of 256 once and 1 otherwise: in bf16, 256 + 1 is 256, on a rank as between ranks."""
    problem = Problem(case, mesh)
    batches = []
    for m in range(case.micro):
        size = 256.0 if mesh.dp.rank == 0 and m == 0 else 1.0
        batches.append({n: (torch.full(s.shape, size), torch.zeros(s.shape)) for n, s in TABLE.items()})
    norm = float(problem.run(batches, 1e-2).grad_norm)
    # exp_avg is (1 - beta1) of the clipped gradient: it shows each element of the sum.
    moment = {f.parameter.spec.name: f.tensors["exp_avg"].tolist() for f in problem.backend.fragments()}
    return {"norm": norm, "moment": moment}


def same(a: Pieces, b: Pieces) -> bool:
    """Bit for bit."""
    return len(a) == len(b) and all(
        x[:3] == y[:3] and all(torch.equal(x[3][key], y[3][key]) for key in x[3]) for x, y in zip(a, b, strict=True)
    )


# Real decoders: tied vocabulary, learned positions and biases; shared key/value heads and gated MLPs.
_SMALL = {
    "layers": 2,
    "hidden": 16,
    "heads": 4,
    "ffn": 32,
    "vocabulary": 37,
    "max_sequence": 8,
    "init_std": 0.1,
}
MODELS = {
    "gpt2": ModelConfig(
        **_SMALL,
        norm="layer_norm",
        activation="gelu_tanh",
        gated=False,
        position="learned",
        bias="all",
        tied_embeddings=True,
    ),
    "llama": ModelConfig(**_SMALL, kv_heads=1, bias="qkv"),
}
_SEQUENCES, _LENGTH = 8, 8


def _chunk(model: ModelConfig, tp: TensorParallel, dtype: torch.dtype) -> tuple[ParameterFactory, DecoderChunk]:
    factory = ParameterFactory(parameter_table(model), tp, 5, dtype, torch.device("cpu"))
    return factory, DecoderChunk(model, factory, range(model.layers), True, True)


def _losses(chunk: nn.Module, step: int, sequences: range, micro: int) -> Iterator[torch.Tensor]:
    """Each micro-batch's part of the mean loss over the global batch, enlarged so that gradients are clipped."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(37, (_SEQUENCES, _LENGTH + 1), generator=generator)[sequences.start : sequences.stop]
    for part in tokens.chunk(micro):
        yield chunk(None, MicroBatch(part[:, :-1], part[:, 1:])) * (20.0 / (_SEQUENCES * _LENGTH))


def _decoder(case: Case, mesh: ParallelMesh) -> dict[str, Any]:
    model = MODELS[case.model]
    tp = TensorParallel(mesh.tp, case.sequence and case.tp > 1)
    factory, chunk = _chunk(model, tp, case.dtype)
    parameters = list(factory.made.values())
    backend = make(case, nn.ModuleList([chunk]), parameters, mesh, tp)
    share = _SEQUENCES // case.dp
    mine = range(mesh.dp.rank * share, (mesh.dp.rank + 1) * share)
    norms = []
    for step in range(STEPS):
        backend.zero_grad(case.micro)
        for loss in _losses(chunk, step, mine, case.micro):
            torch.autograd.backward(loss)
        with torch.no_grad():  # validation between backward and step must disturb nothing
            list(_losses(chunk, 100, mine, 1))
        norms.append(float(backend.step(LRS[step]).grad_norm))
    return {"norms": norms, "pieces": pieces(backend, mesh.tp.rank)}


def _overlap(case: Case, mesh: ParallelMesh) -> dict[str, Any]:
    """What happens in which order in two steps, and how many full buckets of gradients there are at a time."""
    factory, chunk = _chunk(MODELS[case.model], TensorParallel(mesh.tp), case.dtype)
    backend = make(case, nn.ModuleList([chunk]), list(factory.made.values()), mesh, TensorParallel(mesh.tp))
    assert isinstance(backend, NativeBackend)
    backend.attach(SimpleNamespace(chunks=[chunk]))  # type: ignore[arg-type]
    events: list[str] = []
    held: list[int] = []
    memory = [0]

    def record(name: str) -> None:
        work = getattr(Bucket, name)

        def recorded(bucket: Bucket, *given: Any) -> Any:
            if name != "gathered" or bucket._gathering is not None:
                events.append(name)
            done = work(bucket, *given)
            held.append(sum(b.grads is not None for b in backend.buckets))
            if isinstance(reducer := backend.accumulator, Sharding):
                memory.append(len(reducer._free) + len(reducer._held) + len(reducer._flying))
            return done

        patches.enter_context(mock.patch.object(Bucket, name, recorded))

    for name, part in {"layer 0": chunk.layers[0], "layer 1": chunk.layers[1], "head": chunk.head}.items():
        assert part is not None
        part.register_forward_pre_hook(lambda *_, name=name: events.append(f"forward {name}"))
    chunk.layers[0].attention_norm.weight.register_hook(lambda _: events.append("backward ended"))  # type: ignore
    with contextlib.ExitStack() as patches:
        for name in ("reduce", "gather", "gathered", "hold", "release"):
            record(name)
        for step in range(2):
            backend.zero_grad(case.micro)
            for loss in _losses(chunk, step, range(2 * mesh.dp.rank, 2 * mesh.dp.rank + 2), case.micro):
                torch.autograd.backward(loss)
            kept = sum(b.grads.numel() for b in backend.buckets if b.grads is not None)
            kept += sum(b.grad.numel() for b in backend.buckets if b.grads is None)
            events.append("step")
            backend.step(1e-2)
    elements = sum(b.width * b.shards for b in backend.buckets)
    return {
        "events": events,
        "buckets": len(backend.buckets),
        "kept": kept / elements,
        "open": max(held),
        "memory": max(memory),
    }


def solve_decoder(name: str, dtype: torch.dtype = torch.float32, optimizer: str = "adamw") -> Solution:
    """One process."""
    factory, chunk = _chunk(MODELS[name], TensorParallel(Axis(0, 1, None)), dtype)
    reference = Reference([(p, p.spec) for p in factory.made.values()], OPTIMIZERS[optimizer])
    norms = []
    for step in range(STEPS):
        torch.autograd.backward(list(_losses(chunk, step, range(_SEQUENCES), 1)))
        norms.append(reference.step(LRS[step]))
    state = {
        n: {k: p.shard.valid(t) for k, t in {"weight": p.detach(), **reference.state(p)}.items()}
        for n, p in factory.made.items()
    }
    return Solution(norms, state)
