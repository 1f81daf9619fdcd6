"""The layout never changes the math: every layout against one process, on every quantity, after five steps."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch

from megapt.config import from_tree
from tests.distributed.layouts import GPT2, LLAMA, Trainer, Whole, assemble, batch_of, train_many, tree
from tests.distributed.spawn import run_ranks

MODELS = {"llama": LLAMA, "gpt2": GPT2}
LAYOUTS = [(tp, pp, dp) for tp in (1, 2) for pp in (1, 2) for dp in (1, 2)]


def cases(precision: str) -> dict[int, list[dict[str, Any]]]:
    """The matrix {tp} x {pp} x {dp} x {schedule} x {ZeRO stage and backend}, by world size: in fp64 on the untied model
    and in fp32 on the tied one, and in each the sharding stages on the other model too."""
    by_world: dict[int, list[dict[str, Any]]] = defaultdict(list)
    whole = LLAMA if precision == "fp64" else GPT2
    for model in MODELS.values():
        for tp, pp, dp in LAYOUTS:
            stages = [("native", 1), ("deepspeed", 1)]
            stages += [("native", 0), ("deepspeed", 0)] if model is whole else []
            stages += [("deepspeed", 2), ("deepspeed", 3)] if model is whole and pp == 1 else []
            schedules: list[dict[str, Any]] = [{}]
            schedules += [{"schedule": "interleaved", "chunks": 2}] if pp > 1 else []
            for zero in stages:
                for schedule in schedules:
                    by_world[tp * pp * dp].append(tree(model, tp, pp, precision, zero, **schedule))
    # What the plain matrix leaves out: no sequence parallelism, shared key/value heads, uneven stages, micro-batches.
    by_world[2].append(tree(LLAMA, 2, 1, precision, sequence=False))
    by_world[4].append(tree(LLAMA, 4, 1, precision, ("native", 0)))
    by_world[4].append(tree(LLAMA, 4, 1, precision, ("deepspeed", 1)))
    by_world[2].append(tree(GPT2, 1, 2, precision, layers_per_stage=[1, 3]))
    by_world[4].append(tree(GPT2, 1, 4, precision, ("native", 1), micro=1))
    return by_world


def name(one: dict[str, Any], world: int) -> str:
    parallel, zero = one["parallel"], one["zero"]
    model = "gpt2" if one["model"] is GPT2 or one["model"].get("tied_embeddings") else "llama"
    data = world // (parallel["tensor"] * parallel["pipeline"])
    extra = {k: v for k, v in parallel.items() if k not in ("tensor", "pipeline", "vocabulary_multiple")}
    return (
        f"{model} tp{parallel['tensor']} pp{parallel['pipeline']} dp{data} {zero['backend']}-{zero['stage']} "
        f"micro {one['batch']['micro']} {extra or ''}"
    )


def errors(run: Whole, reference: Whole) -> dict[str, float]:
    """Largest differences: losses and norms relative, tensors relative to the largest element of their kind.

    Relative to a whole kind, because some gradients (of a key's bias, say) are exactly zero in theory and noise here.
    """
    found = {
        "loss": max(abs(a - b) / abs(b) for a, b in zip(run.losses, reference.losses, strict=True)),
        "norm": max(abs(a - b) / abs(b) for a, b in zip(run.norms, reference.norms, strict=True)),
    }
    per_step = []
    for mine, theirs in zip(run.gradients, reference.gradients, strict=True):
        assert mine.keys() == theirs.keys()
        largest = max(float(t.abs().max()) for t in theirs.values())
        per_step.append(max(float((mine[n] - t).abs().max()) for n, t in theirs.items()) / largest)
    found["first gradient"], found["gradient"] = per_step[0], max(per_step)
    assert run.state.keys() == reference.state.keys()
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        theirs = {key: t for key, t in reference.state.items() if key[1] == kind}
        largest = max(float(t.abs().max()) for t in theirs.values())
        found[kind] = max(float((run.state[key] - t).abs().max()) for key, t in theirs.items()) / largest
    return found


def reference(model: dict[str, Any], precision: str) -> Whole:
    (result,) = train_many(0, 1, [tree(model, precision=precision)])
    return assemble([result])


@pytest.fixture(scope="module")
def references() -> dict[tuple[str, str], Whole]:
    return {(m, p): reference(MODELS[m], p) for m in MODELS for p in ("fp64", "fp32")}


def bounds(one: dict[str, Any], model: str, references: dict[tuple[str, str], Whole]) -> dict[str, float]:
    """fp64: 1e-10. fp32: a few times the error that fp32 itself makes in one process against fp64: a layout may only
    reorder sums. DeepSpeed keeps masters and moments in fp32 for fp64 weights, so there only what comes before the
    first update is held to 1e-10."""
    rounding = errors(references[model, "fp32"], references[model, "fp64"])
    fp32 = {kind: max(8 * error, 2e-6) for kind, error in rounding.items()}
    if one["precision"] == "fp32":
        return fp32
    exact = dict.fromkeys(rounding, 1e-10)
    if one["zero"]["backend"] == "native":
        return exact
    return fp32 | {"first gradient": 1e-10}


@pytest.mark.parametrize("precision", ["fp64", "fp32"])
@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_every_layout_computes_the_same(
    world: int, precision: str, references: dict[tuple[str, str], Whole]
) -> None:
    trees = cases(precision)[world]
    per_rank = run_ranks(world, train_many, trees, timeout=280) if world > 1 else [train_many(0, 1, trees)]
    failures = []
    for index, one in enumerate(trees):
        run = assemble([results[index] for results in per_rank])
        model = "gpt2" if one["model"].get("tied_embeddings") else "llama"
        found = errors(run, references[model, precision])
        limit = bounds(one, model, references)
        bad = {kind: f"{error:.1e} > {limit[kind]:.1e}" for kind, error in found.items() if not error <= limit[kind]}
        if bad:
            failures.append(f"{name(one, world)}: {bad}")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("model", MODELS)
def test_one_process_is_torch(model: str, references: dict[tuple[str, str], Whole]) -> None:
    """The reference itself against torch.optim.AdamW, clip_grad_norm_ and a loss by plain cross_entropy."""
    config = from_tree(tree(MODELS[model])).config
    trainer = Trainer(config, 1)
    (chunk,) = trainer.engine.chunks
    parameters = [torch.nn.Parameter(p.detach().clone()) for p in trainer.parameters]
    decay = [p for p, own in zip(parameters, trainer.parameters, strict=True) if own.spec.decay]
    plain = [p for p, own in zip(parameters, trainer.parameters, strict=True) if not own.spec.decay]
    section = config.optimizer
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": section.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=section.lr,
        betas=(section.betas[0], section.betas[1]),
        eps=section.eps,
    )
    own_names = {id(p): n for n, p in chunk.named_parameters()}
    expected = references[model, "fp64"]
    for step in range(5):
        tokens, labels = batch_of(step, config)
        values = {own_names[id(own)]: p for own, p in zip(trainer.parameters, parameters, strict=True)}
        logits = torch.func.functional_call(chunk, values, (tokens, *tokens.shape), tie_weights=True)
        loss = torch.nn.functional.cross_entropy(logits, labels.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, section.clip)
        optimizer.step()
        assert float(loss.detach()) == pytest.approx(expected.losses[step], rel=1e-10)
        assert float(norm) == pytest.approx(expected.norms[step], rel=1e-10)
    for own, p in zip(trainer.parameters, parameters, strict=True):
        torch.testing.assert_close(p.detach(), expected.state[own.spec.name, "weight"], rtol=1e-10, atol=1e-12)
