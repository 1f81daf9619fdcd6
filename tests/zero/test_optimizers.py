"""Muon against torch's own, the loss scale's rules, and training in fp16 and with each optimizer on one rank."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megapt.config import LossScaleConfig, MuonConfig, OptimizerConfig, from_tree
from megapt.mesh import ParallelMesh
from megapt.prove.trainer import Trainer
from megapt.zero.loss_scale import LossScale
from megapt.zero.muon import orthogonalise
from tests.distributed.layouts import LLAMA, tree
from tests.zero.harness import (
    TABLE,
    TOLERANCES,
    Case,
    Problem,
    Solution,
    assemble,
    assert_close,
    pieces,
    plain_muon,
    solve,
)

F32, F64 = torch.float32, torch.float64
ONE = ParallelMesh.create(1, 1, 1, torch.device("cpu"))


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (16, 3)])
@pytest.mark.parametrize("nesterov", [True, False])
def test_the_plain_muon_of_these_tests_is_torchs(shape: tuple[int, int], nesterov: bool) -> None:
    """torch.optim.Muon iterates in bf16: its updates agree to that."""
    generator = torch.Generator().manual_seed(1)
    ours, theirs = (nn.Parameter(torch.randn(shape, generator=generator.manual_seed(1))) for _ in range(2))
    config = OptimizerConfig(kind="muon", weight_decay=0.1, muon=MuonConfig(nesterov=nesterov))
    optimizer = torch.optim.Muon([theirs], lr=0.01, weight_decay=0.1, nesterov=nesterov, adjust_lr_fn="match_rms_adamw")
    momentum = torch.zeros_like(ours)
    for _ in range(3):
        before = ours.detach().clone()
        gradient = torch.randn(shape, generator=generator)
        ours.grad, theirs.grad = gradient, gradient.clone()
        plain_muon(ours, momentum, 0.01, config)
        optimizer.step()
        moved = (ours - before).norm()
        assert (ours - theirs).norm() < 0.05 * moved
        with torch.no_grad():
            theirs.copy_(ours)
    torch.testing.assert_close(momentum, optimizer.state[theirs]["momentum_buffer"])


@pytest.mark.parametrize("shape", [(5, 5), (3, 8), (8, 3)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=F64)
    result = orthogonalise(matrix, 5)
    values = torch.linalg.svdvals(result)
    assert result.shape == shape and 0.6 < values.min() and values.max() < 1.25
    # It has the singular vectors of its input, and the same whatever the input's size.
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    inner = u.T @ result @ v.T
    assert (inner - inner.diagonal().diag()).abs().max() < 1e-12
    torch.testing.assert_close(orthogonalise(matrix * 1e4, 5), result)
    assert not orthogonalise(torch.zeros(shape), 5).any()


def test_loss_scale_halves_doubles_and_has_a_floor() -> None:
    scale = LossScale(LossScaleConfig(initial=8.0, window=3, smallest=2.0), torch.device("cpu"))
    good, bad = torch.tensor(True), torch.tensor(False)
    seen = []
    for finite in (good, good, bad, good, good, good, good, bad, bad, bad, bad):
        scale.update(finite)
        seen.append(float(scale.value))
    #       -- 2 good, halved at once -- 3 good: doubled -- floor
    assert seen == [8.0, 8.0, 4.0, 4.0, 4.0, 8.0, 8.0, 4.0, 2.0, 2.0, 2.0]
    scale.update(good)
    again = LossScale(LossScaleConfig(window=3), torch.device("cpu"))
    again.load(scale.scalars())
    for one in (again, scale):
        one.update(good)
        one.update(good)
    assert float(again.value) == float(scale.value) == 4.0
    again.load({})
    assert float(again.value) == 65536.0


def test_loss_scale_stays_finite_without_gradients() -> None:
    scale = LossScale(LossScaleConfig(window=1), torch.device("cpu"))
    for _ in range(300):
        scale.update(torch.tensor(True))
    assert torch.isfinite(scale.value)


def test_fp16_steps_scale_skip_and_recover() -> None:
    """The scale rises by its window, an overflow halves it and changes nothing else, and norms know nothing of it."""
    problem = Problem(Case("native", 1, micro=2, dtype=torch.float16), ONE)
    backend = problem.backend
    norms = [float(problem.step(0).grad_norm)]
    assert backend.scalars() == {"loss_scale": 256.0, "good_steps": 1.0}
    before = pieces(backend, 0)
    result = problem.step(1, spoil=True)
    assert bool(result.skipped) and backend.updates == 1
    assert all(torch.equal(a[3][k], b[3][k]) for a, b in zip(before, pieces(backend, 0), strict=True) for k in a[3])
    assert backend.scalars() == {"loss_scale": 128.0, "good_steps": 0.0}
    norms += [float(problem.step(step).grad_norm) for step in (1, 2)]
    assert backend.scalars() == {"loss_scale": 256.0, "good_steps": 0.0}
    found = Solution(norms, assemble([pieces(backend, 0)], 1))
    assert_close(found, solve(compute=torch.float16), TOLERANCES[torch.float16])


def test_gradients_below_fp16s_range_survive() -> None:
    """fp16 ends at 2^-24: gradients of 2^-28 are there because they are scaled by 2^8."""
    problem = Problem(Case("native", 1, micro=1, dtype=torch.float16), ONE)
    values = {n: (torch.full(s.shape, 2.0**-20), torch.zeros(s.shape)) for n, s in TABLE.items()}
    problem.backend.zero_grad(1)
    loss = problem.chunks[0](values)
    torch.autograd.backward(loss * (problem.backend.loss_scale * 2.0**-8))
    tied, others = 44, 60 + 15 + 15 + 7 + 5  # elements; the tied ones are used twice
    expected = 2.0**-28 * (4 * tied + others) ** 0.5
    assert float(problem.backend.step(1e-2).grad_norm) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("optimizer", ["muon", "heavy", "scaled"])
def test_one_rank_needs_no_process_group(optimizer: str) -> None:
    problem = Problem(Case("native", 1, dtype=F64, optimizer=optimizer), ONE)
    norms = [float(problem.step(step).grad_norm) for step in range(3)]
    found = Solution(norms, assemble([pieces(problem.backend, 0)], 1))
    assert_close(found, solve(optimizer=optimizer), TOLERANCES[F64])
    kinds = {f.parameter.spec.name: list(f.tensors) for f in problem.backend.fragments()}
    matrix = ["weight", "momentum"] if optimizer != "scaled" else ["weight", "exp_avg", "exp_avg_sq"]
    assert kinds["mid.weight"] == matrix and kinds["embedding.weight"] == ["weight", "exp_avg", "exp_avg_sq"]
    assert ("Muon" in problem.backend.describe()) == (optimizer != "scaled")


def test_a_model_trains_in_fp16_as_in_fp32() -> None:
    """Through the engine: the loss is scaled there, and what it reports is not."""
    runs = {}
    for precision in ("fp32", "fp16"):
        trainer = Trainer(from_tree(tree(LLAMA, precision=precision)).config, 1)
        for step in range(4):
            trainer.step(step)
        runs[precision] = trainer.report.numbers
    assert trainer.backend.scalars()["loss_scale"] == 65536.0
    for (kind, step), value in runs["fp32"].items():
        assert runs["fp16"][kind, step] == pytest.approx(value, rel=2e-3 if kind == "loss" else 2e-2), (kind, step)
