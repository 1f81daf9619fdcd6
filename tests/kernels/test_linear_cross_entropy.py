"""The projection with its loss, a block of tokens at a time, alone and with the vocabulary cut over ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megapt.prove.ranks import run_ranks
from megapt_kernels import cross_entropy, library, linear_cross_entropy, vocab_parallel_cross_entropy
from megapt_kernels.cross_entropy import block_tokens, linear_cross_entropy_with_gradients
from megapt_kernels.memory import Peak, needs
from megapt_kernels.registry import Unsupported

IMPLS = ["reference", "cuda"]
TOKENS, HIDDEN, VOCABULARY = 50, 24, 67


def numbers(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """fp64 numbers that bf16 and fp16 represent exactly."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    return values.bfloat16().half().double()


def labels(ignored: float = 0.2) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    return ids.masked_fill(torch.rand(TOKENS, generator=generator) < ignored, -100)


def plain(h: Tensor, weight: Tensor, ids: Tensor, softcap: float | None, z_loss: float) -> tuple[Tensor, Tensor]:
    """The loss, and what the gradients are those of."""
    scores = (h @ weight.t()).to(torch.promote_types(h.dtype, torch.float32))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    loss = F.cross_entropy(scores, ids, reduction="sum")
    return loss, loss + z_loss * (scores.logsumexp(1).square() * (ids != -100)).sum()


def gradients(h: Tensor, weight: Tensor, run: Any) -> list[Tensor]:
    """[value, dh, dw] of `run(h, weight) -> (value, what is trained)`, with a slope of 0.3."""
    h, weight = h.clone().requires_grad_(), weight.clone().requires_grad_()
    value, trained = run(h, weight)
    (trained * 0.3).backward()
    assert h.grad is not None and weight.grad is not None
    return [value.detach(), h.grad, weight.grad]


def many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "_BLOCK_ELEMENTS", (16 * (VOCABULARY + 5),) * 2)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("blocks", ["one", "many"])
def test_as_accurate_as_plain_operations(
    device: str, impl: str, blocks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if blocks == "many":
        many_blocks(monkeypatch)
    h, weight, ids = numbers(TOKENS, HIDDEN, seed=1), numbers(VOCABULARY, HIDDEN, seed=2), labels()
    h, weight, ids = h.to(device), weight.to(device), ids.to(device)
    for softcap, z_loss in ((None, 0.0), (3.0, 0.01)):
        rules = dict(length=VOCABULARY, softcap=softcap, z_loss=z_loss, impl=impl)

        def ours(h: Tensor, w: Tensor, rules: dict[str, Any] = rules) -> tuple[Tensor, Tensor]:
            loss = linear_cross_entropy(h, F.pad(w, (0, 0, 0, 5)), ids, **rules)
            return loss, loss

        def theirs(h: Tensor, w: Tensor, rules: tuple[Any, ...] = (softcap, z_loss)) -> tuple[Tensor, Tensor]:
            return plain(h, w, ids, *rules)

        exact = gradients(h, weight, theirs)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            got, expected = (gradients(h.to(dtype), weight.to(dtype), f) for f in (ours, theirs))
            assert got[0].dtype == torch.float32 and got[1].dtype == got[2].dtype == dtype
            for a, b, c, factor in zip(got, expected, exact, (2, 3, 3), strict=True):
                bound = factor * float((b.double() - c).norm()) + 1e-6 * float(c.norm())
                assert float((a.double() - c).norm()) <= bound, (dtype, softcap, factor)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradients_by_finite_differences(softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "_BLOCK_ELEMENTS", (4 * 11,) * 2)
    h, weight = numbers(6, 3, seed=1).requires_grad_(), numbers(11, 3, seed=2).requires_grad_()
    ids = labels()[:6] % 9
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, ids, length=9, softcap=softcap, impl="reference"), (h, weight)
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_no_tokens_all_ignored_and_no_gradient_wanted(device: str, impl: str) -> None:
    h, weight, ids = (t.to(device) for t in (numbers(4, 3).float(), numbers(5, 3).float(), labels()[:4] % 5))
    for given, target in ((h[:0], ids[:0]), (h, torch.full_like(ids, -100))):
        loss, dh, dw = gradients(given, weight, lambda h, w, t=target: (linear_cross_entropy(h, w, t, impl=impl),) * 2)
        assert float(loss) == 0.0 and not dh.any() and not dw.any() and dw.shape == weight.shape
    loss, none, nothing = linear_cross_entropy_with_gradients(h, weight, ids, training=False, impl=impl)
    assert none is None and nothing is None
    torch.testing.assert_close(loss, plain(h, weight, ids, None, 0.0)[0])
    frozen = weight.requires_grad_(False)
    h.requires_grad_()
    linear_cross_entropy(h, frozen, ids, impl=impl).backward()
    assert h.grad is not None and not linear_cross_entropy(h.detach(), frozen, ids, impl=impl).requires_grad


def test_the_slope_is_not_rounded(device: str) -> None:
    """One over a number of tokens, in bf16, would bias every gradient by up to 0.4 %."""
    h, weight, ids = (t.to(device) for t in (numbers(TOKENS, HIDDEN), numbers(VOCABULARY, HIDDEN, seed=2), labels()))
    h, weight = h.bfloat16().requires_grad_(), weight.bfloat16().requires_grad_()
    _, _, dw = linear_cross_entropy_with_gradients(h, weight, ids)
    assert dw is not None and dw.dtype == torch.float32
    slope = torch.tensor(1.0009765625 / 3, device=device)  # between two bf16 numbers
    (linear_cross_entropy(h, weight, ids) * slope).backward()
    assert weight.grad is not None and torch.equal(weight.grad, (dw * slope).bfloat16())


@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_as_one_graph_with_its_backward(device: str, impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    many_blocks(monkeypatch)
    h, weight, ids = (t.to(device) for t in (numbers(TOKENS, HIDDEN), numbers(VOCABULARY, HIDDEN, seed=2), labels()))
    h, weight = h.bfloat16(), weight.bfloat16()

    def run(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return (linear_cross_entropy(h * 2, w, ids, impl=impl),) * 2

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(h, weight, compiled), gradients(h, weight, run), rtol=0, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_logits_never_exist_as_a_whole(device: str, impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, hidden, columns, block = 512, 8, 640, 32
    monkeypatch.setattr(cross_entropy, "_BLOCK_ELEMENTS", (block * columns,) * 2)
    h, weight = numbers(tokens, hidden).to(device), numbers(columns, hidden, seed=2).to(device)
    ids = torch.arange(tokens, device=device)
    for dtype in (torch.bfloat16, torch.float32):
        given = h.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        with Peak(*given, ids) as peak:
            linear_cross_entropy(*given, ids, softcap=30.0, impl=impl).backward()
        wide = impl == "reference"  # it works in fp32
        assert peak.largest == block * columns * (4 if wide else dtype.itemsize)  # 1/16 of the logits
        assert peak.peak < tokens * columns * dtype.itemsize / 2


def test_memory_is_counted_while_it_lives(device: str) -> None:
    x = torch.zeros(1000)
    with Peak(x) as peak:
        y = x + 1
        del y
        y = (x * 2).view(10, 100)
        z = y.add_(1)[0]
    assert (peak.peak, peak.largest, peak.live) == (4000, 4000, 4000)
    del y, z
    assert peak.live == 0


def test_needs_at_a_real_size(device: str) -> None:
    tokens, hidden, columns = 8192, 4096, 128256
    of = {need.name: need for need in needs(tokens, hidden, columns)}
    logits, gradients = 2 * tokens * columns, 2 * (tokens + columns) * hidden
    assert {need.left for need in of.values()} == {gradients}
    assert of["F.linear, F.cross_entropy"].peak >= 3 * logits
    for impl in IMPLS:  # the logits, in their place their gradient, and those of h and of the weight
        assert of[f"vocab_parallel_cross_entropy, {impl}"].peak < logits + gradients + (1 << 20)
    block = 2 * block_tokens(tokens, columns, gpu=True) * columns
    longer = {need.name: need for need in needs(4 * tokens, hidden, columns)}
    for impl, blocks in (("reference", 3), ("cuda", 1)):  # beside dw in fp32; more tokens take what h takes
        need = of[f"linear_cross_entropy, {impl}"]
        assert need.peak < 4 * columns * hidden + max(blocks * block, gradients) + 8 * tokens * hidden
        assert longer[need.name].peak - need.peak < 2 * 4 * 3 * tokens * hidden


def test_blocks_are_whole_tiles_on_a_gpu_and_never_empty() -> None:
    assert block_tokens(8192, 128256, gpu=True) == 2048  # of 2093
    assert block_tokens(8192, 128256, gpu=False) == 65
    assert block_tokens(100, 1000, gpu=True) == 100 and block_tokens(0, 1000, gpu=True) == 1
    assert block_tokens(5, 1 << 30, gpu=True) == 1
    assert block_tokens(8192, 1 << 22, gpu=True) == 64


def test_wrong_arguments_are_named() -> None:
    h, weight, ids = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3, dtype=torch.int64)
    for bad, keywords, words in (
        ((h[0], weight, ids), {}, "h has two dimensions"),
        ((h, weight[0], ids), {}, "weight has two dimensions"),
        ((h.int(), weight, ids), {}, "h is bf16, fp16, fp32 or fp64, not torch.int32"),
        ((h, weight.half(), ids), {}, "weight has the dtype of h, torch.float32, not torch.float16"),
        ((h, weight.to("meta"), ids), {}, "weight is on meta, h on cpu"),
        ((h, weight[:, :3], ids), {}, "weight has rows as wide as those of h, 4, not 3"),
        ((h, weight, ids[:2]), {}, r"target has shape \(3,\)"),
        ((h, weight, ids), {"length": 6}, "length is from 0 to the number of columns, 5, not 6"),
        ((h, weight, ids), {"impl": "liger"}, "liger"),
    ):
        with pytest.raises(Unsupported, match=f"linear_cross_entropy: .*{words}"):
            linear_cross_entropy(*bad, **keywords)


def cut(rank: int, world: int, impl: str, group: Any, length: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Both operations on this rank's rows of the vocabulary: `length` real ones of each rank but the last."""
    start = min(rank * length, VOCABULARY)
    real = min(length, VOCABULARY - start)
    h = numbers(TOKENS, HIDDEN, seed=1).to(dtype).requires_grad_()
    weight = F.pad(numbers(VOCABULARY, HIDDEN, seed=2)[start : start + real], (0, 0, 0, length + 3 - real))
    weight = weight.to(dtype).requires_grad_()
    rules = dict(start=start, length=real, softcap=3.0, z_loss=0.01, impl=impl)
    total = linear_cross_entropy(h, weight, labels(), group, **rules)
    (total * 0.3).backward()
    logits = (h.detach() @ weight.detach().t()).requires_grad_()
    losses = vocab_parallel_cross_entropy(logits * 1, labels(), group, **rules)
    losses.backward(torch.linspace(0.5, 1.5, TOKENS))
    assert h.grad is not None and weight.grad is not None and logits.grad is not None
    assert not logits.grad[:, real:].any() and not weight.grad[real:].any()
    parts = {"dw": weight.grad[:real], "dlogits": logits.grad[:, :real]}
    return {"total": total.detach(), "losses": losses.detach(), "dh": h.grad, **parts}


def on_ranks(rank: int, world: int, path: str, cases: list[Any]) -> tuple[list[dict[str, Tensor]], list[str]]:
    """Each case, and what a target beyond all ranks' columns gives with each implementation."""
    library.load_emulated(path)
    cross_entropy._BLOCK_ELEMENTS = (16 * (VOCABULARY + 3),) * 2
    results = [cut(rank, world, impl, dist.group.WORLD, length, dtype) for impl, length, dtype in cases]
    words = []
    for impl in IMPLS:
        try:
            lost = vocab_parallel_cross_entropy(torch.zeros(3, 4), torch.tensor([1, 8, 7]), dist.group.WORLD, impl=impl)
            words.append(str(lost.tolist()))
        except IndexError as error:
            words.append(str(error))
    return results, words


def test_two_ranks_compute_what_one_does(device: str) -> None:
    """The second rank has the fewer columns, or padding only; one start of processes for all cases."""
    if device == "cuda":
        pytest.skip("ranks talk over gloo, on the CPU")
    wide, narrow = torch.float32, torch.bfloat16
    cases = [(impl, length, dtype) for impl in IMPLS for length in (40, VOCABULARY) for dtype in (wide, narrow)]
    loaded = library.loaded()
    assert loaded is not None
    ranks = run_ranks(2, on_ranks, str(loaded.path), cases)
    for number, (impl, _, dtype) in enumerate(cases):
        alone = cut(0, 1, impl, None, VOCABULARY, dtype)
        parts = [results[number] for results, _ in ranks]
        close = dict(rtol=2e-6, atol=2e-6) if dtype == wide else dict(rtol=2e-2, atol=2e-2)
        for name, dim in (("total", None), ("losses", None), ("dh", None), ("dw", 0), ("dlogits", 1)):
            if dim is None:
                assert torch.equal(parts[0][name], parts[1][name]), name
            whole = parts[0][name] if dim is None else torch.cat([p[name] for p in parts], dim)
            torch.testing.assert_close(whole, alone[name], **close)
    reference, cuda = ranks[0][1]
    assert ranks[1][1] == [reference, cuda]
    assert reference == "cross entropy: target 8 of token 1 is neither ignore_index nor in the vocabulary"
    assert cuda.startswith("[2.07944") and cuda.split(", ")[1] == "nan"
