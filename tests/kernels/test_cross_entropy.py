"""Cross entropy over a rank's columns: the reference and the CUDA kernels against plain PyTorch and fp64."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megapt_kernels import explain, library, vocab_parallel_cross_entropy
from megapt_kernels.registry import Unsupported
from tests.kernels.guarded import guarded, sparse
from tests.kernels.planted import Order, planted

IMPLS = ["reference", "cuda"]
INF, NAN = float("inf"), float("nan")
# (tokens, columns, of them real): odd ones, where rows begin anywhere; one column; rows for blocks of 128 and 512.
SHAPES = [(1, 1, 1), (3, 2, 2), (7, 67, 61), (2, 1000, 1000), (3, 4099, 4096), (2, 20001, 20001)]


def random(tokens: int, columns: int, scale: float = 3.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits that bf16 and fp16 represent exactly, and slopes of the losses."""
    generator = torch.Generator().manual_seed(seed + 1000 * tokens + columns)
    logits = (torch.randn(tokens, columns, generator=generator) * scale).to(torch.bfloat16).half().double()
    return logits, torch.rand(tokens, generator=generator) + 0.5


def targets(tokens: int, length: int, ignored: bool = True) -> Tensor:
    target = torch.randint(0, length, (tokens,), generator=torch.Generator().manual_seed(tokens + length))
    if ignored and tokens > 2:
        target[1] = -100
    return target


def plain(logits: Tensor, target: Tensor, length: int, softcap: float | None, z_loss: float) -> tuple[Tensor, Tensor]:
    """Losses, and what the gradient is that of, by operators in fp32 or wider."""
    scores = logits[:, :length].to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    losses = F.cross_entropy(scores, target, reduction="none")
    log_z = scores.logsumexp(1).masked_fill(target == -100, 0)
    return losses, losses + z_loss * log_z.square()


def run_plain(logits: Tensor, target: Tensor, slope: Tensor, *rules: Any) -> list[Tensor]:
    logits = logits.clone().requires_grad_()
    losses, trained = plain(logits, target, *rules)
    trained.backward(slope.to(trained))
    assert logits.grad is not None
    return [losses.detach(), logits.grad]


def run(logits: Tensor, target: Tensor, slope: Tensor, length: int, softcap: float | None, z_loss: float,
        **keywords: Any) -> list[Tensor]:  # fmt: skip
    """Losses and gradient; the logits stay."""
    given = logits.clone().requires_grad_()
    keywords = dict(length=length, softcap=softcap, z_loss=z_loss) | keywords
    losses = vocab_parallel_cross_entropy(given * 1, target, **keywords)
    losses.backward(slope.to(losses))
    assert given.grad is not None
    return [losses.detach(), given.grad]


def error(a: Tensor, exact: Tensor) -> float:
    assert a.isfinite().all()
    return float((a.double() - exact).norm() / exact.norm().clamp_min(1e-30))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("softcap", [None, 2.0, 30.0])
def test_as_accurate_as_plain_operations(device: str, impl: str, softcap: float | None) -> None:
    for shape in SHAPES:
        tokens, columns, length = shape
        logits, slope = (t.to(device) for t in random(tokens, columns))
        target = targets(tokens, length).to(device)
        for z_loss in (0.0, 0.01):
            rules = length, softcap, z_loss
            exact = run_plain(logits, target, slope, *rules)
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                ours = run(logits.to(dtype), target, slope, *rules, impl=impl)
                theirs = run_plain(logits.to(dtype), target, slope, *rules)
                assert ours[0].dtype == torch.float32 and ours[1].dtype == dtype
                for a, b, expected, factor in zip(ours, theirs, exact, (2, 3), strict=True):
                    bound = factor * error(b, expected) + 4 * torch.finfo(torch.float32).eps
                    assert error(a, expected) <= bound, (shape, z_loss, dtype, factor)
                assert not ours[1][:, length:].any()


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradients_by_finite_differences(softcap: float | None) -> None:
    """Of every logit, in fp64. (torch's gradcheck goes backward through one graph several times.)"""
    logits, slope = random(4, 7)
    target, step = targets(4, 5), 1e-6
    gradient = run(logits, target, slope, 5, softcap, 0.0, impl="reference")[1]
    for element in range(logits.numel()):
        moved = [logits.clone() for _ in range(2)]
        for x, sign in zip(moved, (1, -1), strict=True):
            x.view(-1)[element] += sign * step
        high, low = (plain(x, target, 5, softcap, 0.0)[0].mul(slope).sum() for x in moved)
        assert float(gradient.view(-1)[element]) == pytest.approx(float((high - low) / (2 * step)), abs=1e-9)


def test_threads_in_any_order(device: str, thread_order: library.ThreadOrder) -> None:
    """Two losses, for blocks of 128 and of 512 threads; the order must not change a bit."""
    for columns in (67, 4099):
        logits, slope = (t.to(device) for t in random(3, columns))
        logits, target = logits.bfloat16(), targets(3, columns).to(device)
        ours = run(logits, target, slope, columns, None, 1e-3, impl="cuda")
        reference = run(logits, target, slope, columns, None, 1e-3, impl="reference")
        torch.testing.assert_close(ours, reference, rtol=1e-2, atol=1e-6)
        if device == "cpu":
            library.set_thread_order(library.ThreadOrder.forward)
        again = run(logits, target, slope, columns, None, 1e-3, impl="cuda")
        assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_that_begin_anywhere(device: str, dtype: torch.dtype) -> None:
    """Of a slice of a larger tensor, whose other elements stay as they are."""
    for columns in (3, 65, 4100):
        values, slope = random(4, columns)
        target = targets(4, columns).to(device)
        expected = run(values.to(device, dtype), target, slope.to(device), columns, None, 0.0, impl="reference")
        for first in range(4):
            whole = torch.full((5, columns + 5), 7.0, dtype=dtype, device=device)
            logits = whole[:4, first : first + columns].copy_(values)
            losses = vocab_parallel_cross_entropy(logits.requires_grad_(), target, impl="cuda")
            losses.backward(slope.to(device))
            torch.testing.assert_close([losses.detach(), logits.detach()], expected, rtol=1e-2, atol=1e-6)
            whole.detach()[:4, first : first + columns] = 7.0
            assert bool((whole == 7.0).all())


def test_nothing_beyond_the_rows_is_touched(device: str) -> None:
    if device == "cuda":
        pytest.skip("a GPU has no forbidden pages; compute-sanitizer looks there")
    for columns in (1, 7, 64, 4099):
        values, slope = random(2, columns)
        target = targets(2, columns)
        for before in (False, True):
            logits = guarded(values.bfloat16(), before=before).requires_grad_()
            vocab_parallel_cross_entropy(logits, guarded(target, before=before), impl="cuda").sum().backward()


def test_more_than_31_bits_of_elements(device: str) -> None:
    """Rows that begin behind the first 2^31 elements; between them lies memory that is never touched."""
    stride = (1 << 31) + 24
    memory = sparse(stride + 67, torch.bfloat16) if device == "cpu" else torch.empty(
        stride + 67, dtype=torch.bfloat16, device=device
    )  # fmt: skip
    values, slope = (t.to(device) for t in random(2, 67))
    target = targets(2, 67).to(device)
    logits = memory.as_strided((2, 67), (stride, 1)).copy_(values).requires_grad_()
    losses = vocab_parallel_cross_entropy(logits, target, impl="cuda")
    losses.backward(slope)
    expected = run(values.bfloat16(), target, slope, 67, None, 0.0, impl="reference")
    torch.testing.assert_close([losses.detach(), logits.detach()], expected, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_ignored_tokens_and_padding_count_for_nothing_whatever_they_hold(device: str, impl: str) -> None:
    logits, slope = (t.to(device) for t in random(5, 67))
    target = targets(5, 60, ignored=False).to(device)
    expected = run(logits.float(), target, slope, 60, None, 0.01, impl=impl)
    for ignored in ([1, 3], [0, 1, 2, 3, 4]):
        for ignore_index in (-100, 2):  # the second is a token of the vocabulary
            dirty, ids = logits.float(), target.masked_fill(target == ignore_index, 5)
            ids[ignored] = ignore_index
            dirty[:, 60:] = torch.tensor([NAN, INF, -INF, 1e30, 0, -1e30, NAN], device=device)
            dirty[ignored[0], 0], dirty[ignored[1], 1] = NAN, INF
            losses, gradient = run(dirty, ids, slope, 60, None, 0.01, impl=impl, ignore_index=ignore_index)
            assert not losses[ignored].any() and not gradient[ignored].any() and not gradient[:, 60:].any()
            for token in {0, 1, 2, 3, 4} - set(ignored):
                if ids[token] == target[token]:
                    assert torch.equal(losses[token], expected[0][token])
                    assert torch.equal(gradient[token], expected[1][token])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_rows_of_infinities_and_nan_give_what_pytorch_gives(device: str, impl: str, softcap: float | None) -> None:
    rows = {
        "some -inf": [1.0, -INF, 2.0, -INF],
        "-inf at the target": [-INF, 1.0, 2.0, 3.0],
        "all -inf": [-INF] * 4,
        "inf": [1.0, 2.0, INF, 0.0],
        "nan": [1.0, NAN, 0.0, 0.0],
        "nan at the target": [NAN, 1.0, 0.0, 0.0],
        "lowest": [torch.finfo(torch.float32).min] * 4,
    }
    logits = torch.tensor(list(rows.values()), device=device)
    target, slope = torch.zeros(len(rows), dtype=torch.int64, device=device), torch.ones(len(rows), device=device)
    ours = run(logits, target, slope, 4, softcap, 0.0, impl=impl)
    theirs = run_plain(logits, target, slope, 4, softcap, 0.0)
    torch.testing.assert_close(ours[0], theirs[0], equal_nan=True)
    # PyTorch's derivative of a cap of infinity is 0 x inf; the cap is flat there.
    finite = theirs[1].isfinite() | (theirs[0].isnan().unsqueeze(1) if softcap is None else False)
    torch.testing.assert_close(ours[1][finite], theirs[1][finite], equal_nan=True)


@pytest.mark.parametrize("impl", IMPLS)
def test_numbers_far_apart_and_close_to_each_other(device: str, impl: str) -> None:
    logits = torch.tensor([[9.0, 0.0], [0.0, 30.0], [3e4, -3e4], [-3e4, 3e4]], device=device)
    target = torch.tensor([0, 0, 1, 1], device=device)
    losses, gradient = run(logits, target, torch.ones(4, device=device), 2, None, 0.0, impl=impl)
    tail = math.exp(-9) / (1 + math.exp(-9))
    torch.testing.assert_close(losses.cpu(), torch.tensor([-math.log1p(-tail), 30.0, 6e4, 0.0]), rtol=1e-6, atol=1e-7)
    # The model is sure of the target: what is left at it is as exact as the denominator, 1 + e^-9 in fp32.
    torch.testing.assert_close(gradient[0].cpu(), torch.tensor([-tail, tail]), rtol=0, atol=1e-7)
    torch.testing.assert_close(gradient[1:3].cpu(), torch.tensor([[-1.0, 1.0], [1.0, -1.0]]))
    assert not gradient[3].any()


def test_targets_outside_of_the_vocabulary_never_count_silently(device: str) -> None:
    logits, slope = (t.to(device) for t in random(4, 9))
    for wrong in (7, 9, 1 << 40, -1):
        target = torch.tensor([0, wrong, -100, 6], device=device)
        losses, gradient = run(logits.float(), target, slope, 7, None, 0.0, impl="cuda")
        assert losses.isnan().tolist() == [False, True, False, False]
        assert gradient[1, :7].isnan().all() and gradient[[0, 2, 3]].isfinite().all()
    with pytest.raises(IndexError, match="target 7 of token 1 is neither ignore_index nor in the vocabulary"):
        run(logits.cpu().float(), torch.tensor([0, 7, -100, 6]), slope.cpu(), 7, None, 0.0, impl="reference")


@pytest.mark.parametrize("impl", IMPLS)
def test_no_tokens(device: str, impl: str) -> None:
    logits, target = torch.empty(0, 5, device=device), torch.empty(0, dtype=torch.int64, device=device)
    losses, gradient = run(logits, target, logits[:, 0], 5, None, 0.0, impl=impl)
    assert losses.shape == (0,) and gradient.shape == (0, 5)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_gradient_takes_the_logits_place_once(device: str, impl: str) -> None:
    logits, slope = (t.float().to(device) for t in random(4, 9))
    target = targets(4, 9).to(device)
    made = logits.requires_grad_() * 1
    gradients: list[Tensor] = []
    made.register_hook(gradients.append)
    losses = vocab_parallel_cross_entropy(made, target, impl=impl)
    losses.backward(slope, retain_graph=True)
    assert gradients[0].data_ptr() == made.data_ptr()
    with pytest.raises(RuntimeError, match="there is one backward pass"):
        losses.backward(slope)
    made = logits * 1
    losses = vocab_parallel_cross_entropy(made, target, impl=impl)
    made.detach().mul_(2)
    with pytest.raises(RuntimeError, match="nobody else may write to them"):
        losses.backward(slope)
    losses = vocab_parallel_cross_entropy(logits * 1, target, impl=impl)
    weights = slope.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((losses * weights).sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("impl", IMPLS)
def test_the_same_bits_every_time(device: str, impl: str) -> None:
    logits, slope = (t.to(device) for t in random(3, 4099))
    arguments = logits.bfloat16(), targets(3, 4099).to(device), slope, 4099, 30.0, 1e-3
    first, second = (run(*arguments, impl=impl) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_torch_for_comparison(device: str) -> None:
    logits, slope = (t.to(device) for t in random(5, 67))
    target = targets(5, 60).to(device)
    ours = run(logits.bfloat16(), target, slope, 60, None, 0.0, impl="torch")
    torch.testing.assert_close(ours, run(logits.bfloat16(), target, slope, 60, None, 0.0, impl="reference"))


def test_liger(device: str) -> None:
    logits, slope = (t.to(device).float() for t in random(5, 64))
    target = targets(5, 64).to(device)
    if reason := dict(explain("vocab_parallel_cross_entropy", logits, target, start=0, length=64, ignore_index=-100,
                              softcap=None, z_loss=0.0, impl="liger").rejected).get("liger"):  # fmt: skip
        pytest.skip(reason)
    ours = run(logits, target, slope, 64, 3.0, 0.0, impl="liger")
    torch.testing.assert_close(ours, run(logits, target, slope, 64, 3.0, 0.0, impl="reference"))


@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_as_one_graph_with_its_backward(device: str, impl: str) -> None:
    logits, slope = (t.to(device) for t in random(5, 67))
    target = targets(5, 60).to(device)
    rules = dict(length=60, softcap=3.0, z_loss=0.01, impl=impl)

    def trained(x: Tensor) -> Tensor:
        return (vocab_parallel_cross_entropy(x * 2, target, **rules) * slope).sum()

    results = []
    for function in (trained, torch.compile(trained, fullgraph=True, backend="aot_eager")):
        x = logits.bfloat16().requires_grad_()
        loss = function(x)
        loss.backward()
        results.append([loss.detach(), x.grad])
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_operators(device: str) -> None:
    """Schemas, fakes and mutation as declared."""
    ops = torch.ops.megapt_kernels
    logits, slope = (t.to(device).float() for t in random(3, 5))
    target = targets(3, 5, ignored=False).to(device)
    stats = ops.cross_entropy_stats(logits, target, 0, 5, -100, 0.0)
    _, tokens = ops.cross_entropy_combine(stats.unsqueeze(0), target, -100, 0.0)
    torch.library.opcheck(ops.cross_entropy_stats.default, (logits, target, 0, 5, -100, 0.0))
    torch.library.opcheck(ops.cross_entropy_combine.default, (stats.unsqueeze(0), target, -100, 0.1))
    for given in (slope, None):
        torch.library.opcheck(ops.cross_entropy_gradient_.default, (logits, target, tokens, given, 0, 5, -100, 3.0))


def test_operators_refuse_what_they_would_misread(device: str) -> None:
    ops = torch.ops.megapt_kernels
    logits, slope = (t.to(device).float() for t in random(3, 5))
    target, tokens = targets(3, 5).to(device), torch.zeros(4, 3, device=device)
    for bad, words in (
        ((logits.double(), target, 0, 5, -100, 0.0), "logits must be Float, BFloat16 or Half"),
        ((logits.t().contiguous().t(), target, 0, 5, -100, 0.0), "neighbouring columns"),
        ((logits[:1].expand(3, 5), target, 0, 5, -100, 0.0), "rows that lie apart"),
        ((logits, target.int(), 0, 5, -100, 0.0), "target must be Long"),
        ((logits, target[:2], 0, 5, -100, 0.0), "target must have shape"),
        ((logits, target, 0, 6, -100, 0.0), "length must be from 0 to 5"),
    ):
        with pytest.raises(RuntimeError, match=words):
            ops.cross_entropy_stats(*bad)
    for bad_tokens, bad_slope, words in (
        (tokens[:3], None, "tokens must have shape"),
        (tokens.double(), None, "tokens must be Float"),
        (tokens, slope[:2], "slope must have shape"),
    ):
        with pytest.raises(RuntimeError, match=words):
            ops.cross_entropy_gradient_(logits, target, bad_tokens, bad_slope, 0, 5, -100, 0.0)
    with pytest.raises(RuntimeError, match="every must have shape"):
        ops.cross_entropy_combine(tokens.unsqueeze(0), target, -100, 0.0)


def test_wrong_arguments_are_named() -> None:
    logits, target = torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64)
    for bad, keywords, words in (
        ((logits[0], target), {}, "logits has two dimensions"),
        ((logits.long(), target), {}, "logits is bf16, fp16, fp32 or fp64, not torch.int64"),
        ((logits, target.int()), {}, "target is int64, not torch.int32"),
        ((logits, target[:2]), {}, r"target has shape \(3,\), one id for each token, not \(2,\)"),
        ((logits, target.to("meta")), {}, "target is on meta"),
        ((logits[:, :0], target), {}, "at least one column"),
        ((logits, target), {"length": 6}, "length is from 0 to the number of columns, 5, not 6"),
        ((logits, target), {"start": -1}, "start is 0 or more, not -1"),
        ((logits, target), {"softcap": 0.0}, "softcap is above 0, or None for none; not 0.0"),
        ((logits, target), {"z_loss": -1.0}, "z_loss is 0 or more, not -1.0"),
        ((logits, target), {"impl": "fast"}, "impl is one of"),
    ):
        with pytest.raises(Unsupported, match=f"vocab_parallel_cross_entropy: .*{words}"):
            vocab_parallel_cross_entropy(*bad, **keywords)


def test_what_the_kernels_cannot_do_they_say(device: str) -> None:
    def reason(logits: Tensor) -> str | None:
        keywords = dict(start=0, length=logits.shape[1], ignore_index=-100, softcap=None, z_loss=0.0, impl="cuda")
        target = torch.zeros(3, dtype=torch.int64, device=logits.device)
        return dict(explain("vocab_parallel_cross_entropy", logits, target, **keywords).rejected).get("cuda")

    logits = torch.zeros(3, 5, device=device)
    assert reason(logits) is None and reason(logits.half()[:, 1:4]) is None
    apart = "takes rows that lie apart with neighbouring columns, not strides"
    assert reason(torch.zeros(5, 3, device=device).t()) == f"{apart} (1, 3)"
    assert reason(logits[:1].expand(3, 5)) == f"{apart} (0, 1)"
    assert reason(logits.double()) == "takes bf16, fp16 and fp32, not torch.float64"
    assert "2^31 - 1 columns" in str(reason(logits[:, :1].expand(3, 1 << 31)))
    assert "runs on" in str(reason(logits.to("meta"))) or "run on" in str(reason(logits.to("meta")))


def test_planted_bugs_are_found(tmp_path: Path, device: str) -> None:
    """Bugs in three kernels of one copy; what the tests above compare would differ."""
    file = "cross_entropy.cuh"
    barrier, alone = "    __syncthreads();\n", "    if (threadIdx.x != 0) return;"
    row = "    T* row = logits + "
    broken = planted(
        tmp_path,
        "cross_entropy",
        (file, barrier + alone, alone),
        (file, "if (!isnan(own)) picked = own;", "picked = own;"),
        (file, row + "r * stride;", row + "static_cast<int>(r * stride);"),
    )
    logits = random(2, 67)[0].float()
    target, stats = targets(2, 67), torch.empty(3, 2)
    sums = logits.sub(logits.amax(1, keepdim=True)).exp().sum(1)
    wrong = 0
    for order in Order:
        broken.order(order)
        code = broken.call("megapt_cross_entropy_stats", logits, target, stats, 2, 67, 67, 0, 67, -100, 0.0, 0, None)
        wrong += code != 0 or not torch.allclose(stats[1], sums)
    assert wrong, "a missing barrier between the warps' sums and the block's"
    # Two ranks, of which the first has the targets.
    every = torch.stack([torch.stack([stats[0], sums, logits[:, 0]]), torch.stack([stats[0], sums, stats[2] * NAN])])
    losses, tokens = torch.empty(2), torch.empty(4, 2)
    assert broken.call("megapt_cross_entropy_combine", every, target, losses, tokens, 2, 2, -100, 0.0, None) == 0
    assert losses.isnan().all(), "another rank's NaN must not hide the target's logit"
    stride = (1 << 31) + 24
    far = sparse(stride + 67, torch.float32).as_strided((2, 67), (stride, 1)).copy_(logits)
    code = broken.call(
        "megapt_cross_entropy_gradient", far, target, tokens, 2, None, 0, 2, 67, stride, 0, 67, -100, 0.0, 0, None
    )
    assert code != 0 and "cross_entropy_gradient" in broken.error()
