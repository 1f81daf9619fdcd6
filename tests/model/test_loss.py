"""The blockwise output projection with its loss against plain cross entropy over whole logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megapt.batch import IGNORE
from megapt.config import ModelConfig
from megapt.mesh import Axis
from megapt.model.table import parameter_table
from megapt.parallel import loss as module
from megapt.parallel.loss import LossSettings, VocabularyHead
from megapt.parallel.tensor import ParameterFactory, TensorParallel
from megapt_kernels import cross_entropy
from tests.model.accuracy import assert_accurate, random

TOKENS, HIDDEN, VOCABULARY = 50, 24, 67
ALONE = TensorParallel(Axis(0, 1, None))
PLAIN = LossSettings()


def labels_of(ignored: float = 0.2) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    labels = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    return labels.masked_fill(torch.rand(TOKENS, generator=generator) < ignored, IGNORE)


def fused(h: Tensor, rows: Tensor, labels: Tensor, length: int, settings: LossSettings = PLAIN) -> Tensor:
    training = torch.is_grad_enabled()
    return module._LinearCrossEntropy.apply(h, rows, labels, ALONE, 0, length, settings, training, "auto")


def own(h: Tensor, weight: Tensor, labels: Tensor, settings: LossSettings = PLAIN) -> Tensor:
    """Through rows of padding, as a padded vocabulary has them."""
    return fused(h, F.pad(weight, (0, 0, 0, 5)), labels, VOCABULARY, settings)


def capped(h: Tensor, weight: Tensor, settings: LossSettings) -> Tensor:
    logits = (h @ weight.t()).to(torch.promote_types(h.dtype, torch.float32))
    cap = settings.softcap
    return logits if cap is None else cap * torch.tanh(logits / cap)


def plain(h: Tensor, weight: Tensor, labels: Tensor, settings: LossSettings = PLAIN) -> Tensor:
    return F.cross_entropy(capped(h, weight, settings), labels, reduction="sum")


def trained(h: Tensor, weight: Tensor, labels: Tensor, settings: LossSettings) -> Tensor:
    """What the gradients are those of: cross entropy and the z-loss."""
    log_z = capped(h, weight, settings).logsumexp(1)
    return plain(h, weight, labels, settings) + settings.z_loss * (log_z.square() * (labels != IGNORE)).sum()


@pytest.mark.parametrize("scale", [0.1, 1.0, 8.0])
@pytest.mark.parametrize("blocks", ["one", "many"])
def test_loss_is_as_accurate_as_plain_operations(
    scale: float, blocks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if blocks == "many":
        monkeypatch.setattr(cross_entropy, "_BLOCK_ELEMENTS", (16 * (VOCABULARY + 5),) * 2)
    labels = labels_of()
    inputs = [random(TOKENS, HIDDEN, seed=1, scale=scale), random(VOCABULARY, HIDDEN, seed=2)]
    upstream = torch.tensor(0.5, dtype=torch.float64)
    assert_accurate(lambda h, w: own(h, w, labels), lambda h, w: plain(h, w, labels), inputs, upstream)


def test_gradients_by_finite_differences() -> None:
    labels = labels_of()[:6]
    h, weight = random(6, HIDDEN, seed=1).requires_grad_(), random(VOCABULARY, HIDDEN, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda h, w: own(h, w, labels), (h, weight))


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("z_loss", [0.0, 0.05])
@pytest.mark.parametrize("blocks", ["one", "many"])
def test_soft_cap_and_z_loss_are_those_of_plain_operations(
    softcap: float | None, z_loss: float, blocks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The value is the cross entropy alone, the gradients include the z-loss."""
    if blocks == "many":
        monkeypatch.setattr(cross_entropy, "_BLOCK_ELEMENTS", (16 * (VOCABULARY + 5),) * 2)
    settings, labels = LossSettings(softcap, z_loss), labels_of()
    h, weight = random(TOKENS, HIDDEN, seed=1), random(VOCABULARY, HIDDEN, seed=2)
    for dtype, close in ((torch.float64, 1e-13), (torch.float32, 1e-6)):
        gradients = []
        for function in (own, trained):
            given = [t.to(dtype, copy=True).requires_grad_() for t in (h, weight)]
            function(*given, labels, settings).backward()
            gradients.append([t.grad for t in given])
        with torch.no_grad():
            value = float(own(h.to(dtype), weight.to(dtype), labels, settings))
        assert value == pytest.approx(float(plain(h, weight, labels, settings)), rel=close)
        for mine, theirs in zip(*gradients, strict=True):
            assert float((mine - theirs).norm() / theirs.norm()) < 2 * close


def test_logits_for_generation_are_capped() -> None:
    tree = {"layers": 1, "hidden": HIDDEN, "heads": 2, "ffn": 4, "vocabulary": VOCABULARY}
    table = parameter_table(ModelConfig.model_validate(tree))
    settings = LossSettings(softcap=0.05)
    head = VocabularyHead(ParameterFactory(table, ALONE, 7, torch.float64, torch.device("cpu")), settings)
    h = random(TOKENS, HIDDEN, seed=1)
    expected = capped(h, head.weight.detach()[:VOCABULARY], settings)
    assert expected.abs().max() > 0.04  # where the cap bends
    torch.testing.assert_close(head.logits(h).detach(), expected, rtol=1e-14, atol=0)


def test_tokens_without_loss_count_for_nothing() -> None:
    h, weight = random(TOKENS, HIDDEN, seed=1).requires_grad_(), random(VOCABULARY, HIDDEN, seed=2)
    loss = own(h, weight, torch.full((TOKENS,), IGNORE))
    loss.backward()
    assert float(loss.detach()) == 0.0 and not h.grad.any()  # type: ignore[union-attr]


def test_logits_far_apart_stay_finite() -> None:
    h = torch.tensor([[1e4], [-1e4]], dtype=torch.float32).requires_grad_()
    weight = torch.tensor([[1.0], [-1.0], [0.5]])
    loss = fused(h, weight, torch.tensor([1, 1]), 3)
    loss.backward()
    assert float(loss.detach()) == 2e4 and h.grad.isfinite().all()  # type: ignore[union-attr]


def test_head_pads_without_effect() -> None:
    tree = {"layers": 1, "hidden": HIDDEN, "heads": 2, "ffn": 4, "vocabulary": VOCABULARY}
    table = parameter_table(ModelConfig.model_validate(tree))
    h, labels = random(TOKENS, HIDDEN, seed=1), labels_of()
    losses = []
    for multiple in (1, 64):
        factory = ParameterFactory(table, ALONE, 7, torch.float64, torch.device("cpu"), multiple)
        head = VocabularyHead(factory)
        assert head.logits(h).shape == (TOKENS, VOCABULARY)
        losses.append(head(h, labels).detach())
        assert float(plain(h, head.weight[:VOCABULARY].detach(), labels)) == pytest.approx(float(losses[-1]), rel=1e-13)
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-14)


def test_evaluation_computes_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under no_grad the loss must cost one product per block, not three."""
    h, rows = torch.randn(8, 4), torch.randn(VOCABULARY, 4, requires_grad=True)
    calls = []
    original = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *a, **k: (calls.append(1), original(*a, **k))[1])
    with torch.no_grad():
        fused(h, rows, torch.zeros(8, dtype=torch.long), VOCABULARY)
    assert len(calls) == 1


def test_the_scale_is_not_rounded_to_bf16() -> None:
    """One over a token count is no bf16 number; rounding it first would shift all gradients by up to 0.4 %."""
    torch.manual_seed(0)
    h = torch.randn(64, 16).bfloat16()
    rows = torch.randn(VOCABULARY, 16).bfloat16().requires_grad_()
    labels = torch.randint(0, VOCABULARY, (64,))
    sums = []
    for scale in (1.0, 1 / 5000):
        loss = fused(h, rows, labels, VOCABULARY)
        (gradient,) = torch.autograd.grad(loss * scale, rows)
        sums.append(float(gradient.double().norm()) / scale)
    assert abs(sums[1] / sums[0] - 1) < 5e-4
