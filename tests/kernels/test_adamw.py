"""AdamW on flat shards and the sum of squares, by every implementation that runs here."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megapt_kernels.adamw import AdamWShard, adamw_step_, squared_norm
from megapt_kernels.registry import Unsupported

from .guarded import guarded, sparse
from .planted import ORDERS, Emulated, planted

IMPLEMENTATIONS = ("cuda", "torch", "reference")
STATE = ("master", "exp_avg", "exp_avg_sq")
BETAS, EPS = (0.9, 0.999), 1e-8


def scalars(device: str, step: float = 3.0, scale: float = 1.0, skip: float = 0.0) -> dict[str, Tensor]:
    return {n: torch.tensor(float(v), device=device) for n, v in (("step", step), ("scale", scale), ("skip", skip))}


def options(device: str, **numbers: float) -> dict[str, Any]:
    return {"lr": 1e-2, "betas": BETAS, "eps": EPS, **scalars(device, **numbers)}


def shard(size: int, device: str, weights: torch.dtype | None = None, ahead: int = 0, **more: float) -> AdamWShard:
    """ahead: elements before it in its tensors, so that they begin at odd addresses."""
    generator = torch.Generator().manual_seed(size)

    def draw(width: float) -> Tensor:
        t = torch.zeros(size + ahead, device=device)[ahead:]
        return t.copy_(torch.randn(size, generator=generator).mul_(width))

    copy = None if weights is None else torch.zeros(size + ahead, dtype=weights, device=device)[ahead:]
    return AdamWShard(draw(1.0), draw(3.0), draw(0.3), draw(0.1).square_(), copy, **more)


def shards(device: str) -> list[AdamWShard]:
    """Very different sizes, treatments, copies and alignments, an empty one among them."""
    return [
        shard(1, device, torch.bfloat16, weight_decay=0.1),
        shard(9001, device, torch.bfloat16, weight_decay=0.1),
        shard(0, device),
        shard(4099, device, torch.float16, ahead=1, lr_factor=0.25),
        shard(31, device, ahead=3, weight_decay=1.0),
        shard(64, device, torch.bfloat16, ahead=2, weight_decay=0.5, lr_factor=2.0),
    ]


def expected(s: AdamWShard, lr: float, step: float, scale: float) -> dict[str, Tensor]:
    """By the paper's formulas in fp64."""
    g, m, v, p = (t.double().cpu() for t in (s.grad / scale, s.exp_avg, s.exp_avg_sq, s.master))
    m, v = BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * v + (1 - BETAS[1]) * g * g
    rate = lr * s.lr_factor
    p = p * (1 - rate * s.weight_decay)
    p -= rate * (m / (1 - BETAS[0] ** step)) / ((v / (1 - BETAS[1] ** step)).sqrt() + EPS)
    return {"master": p, "exp_avg": m, "exp_avg_sq": v}


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(("step", "scale"), [(1.0, 1.0), (1e6, 7.0)])
def test_step_equals_the_formulas(device: str, thread_order: Any, impl: str, step: float, scale: float) -> None:
    mine, plain = shards(device), shards(device)
    want = [expected(s, 1e-2, step, scale) for s in mine]
    adamw_step_(mine, impl=impl, **options(device, step=step, scale=scale))
    adamw_step_(plain, impl="torch", **options(device, step=step, scale=scale))
    for s, t, w in zip(mine, plain, want, strict=True):
        for name in STATE if len(s.master) else ():
            errors = [(getattr(x, name).double().cpu() - w[name]).abs().max().item() for x in (s, t)]
            assert errors[0] <= 2 * errors[1] + 1e-7, (name, errors)
        if s.weights is not None:
            assert torch.equal(s.weights, s.master.to(s.weights.dtype))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("step", [1.0, 2.0, 1000.0, 1e6])
def test_bias_corrections(device: str, impl: str, step: float) -> None:
    """Moments that a constant gradient of 1 leaves: corrected they are 1, so that the step is the learning rate."""
    state = [torch.full((8,), value, device=device) for value in (0.0, 1.0, *(1 - b ** (step - 1) for b in BETAS))]
    adamw_step_([AdamWShard(*state)], impl=impl, **{**options(device, step=step), "lr": 1.0})
    torch.testing.assert_close(state[0], torch.full_like(state[0], -1.0), rtol=5e-7, atol=0)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_twenty_steps_as_torch_adamw(device: str, impl: str) -> None:
    """Errors against an fp64 run of torch.optim.AdamW are those of its own fp32 run."""
    start = [shard(n, device, weight_decay=d) for n, d in ((700, 0.1), (33, 0.0))]
    runs = {}
    for dtype in (torch.float64, torch.float32):
        parameters = [torch.nn.Parameter(s.master.to(dtype, copy=True)) for s in start]
        groups = [{"params": [p], "weight_decay": s.weight_decay} for p, s in zip(parameters, start, strict=True)]
        runs[dtype] = parameters, torch.optim.AdamW(groups, lr=1e-2, betas=BETAS, eps=EPS, foreach=False)
    mine = [
        AdamWShard(s.master, s.grad, torch.zeros_like(s.grad), torch.zeros_like(s.grad), None, s.weight_decay)
        for s in start
    ]
    for step in range(1, 21):
        generator = torch.Generator().manual_seed(step)
        for number, s in enumerate(mine):
            grad = torch.randn(s.grad.shape, generator=generator).to(device)
            s.grad.copy_(grad * 4)
            for parameters, _ in runs.values():
                parameters[number].grad = grad.to(parameters[number].dtype)
        for _, optimizer in runs.values():
            optimizer.step()
        adamw_step_(mine, impl=impl, **options(device, step=step, scale=4.0))
    for s, exact, plain in zip(mine, *(parameters for parameters, _ in runs.values()), strict=True):
        error, theirs = ((t.detach().double() - exact.detach()).abs().max().item() for t in (s.master, plain))
        assert error <= 2 * theirs + 1e-8


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_skip_leaves_every_bit(device: str, impl: str) -> None:
    mine = shards(device)
    for s in mine:
        s.grad[::2] = float("nan")
        if s.weights is not None:
            s.weights.fill_(3.0)  # not the rounded master: stochastic rounding had its way
    before = [{n: getattr(s, n).clone() for n in STATE} for s in mine]
    adamw_step_(mine, impl=impl, **options(device, skip=1.0))
    for s, old in zip(mine, before, strict=True):
        assert all(torch.equal(getattr(s, n), old[n]) for n in STATE)
        assert s.weights is None or bool((s.weights == 3.0).all())


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_gradient_that_is_not_finite_does_not_skip(device: str, impl: str) -> None:
    mine = shard(70, device)
    want = expected(mine, 1e-2, 3.0, 1.0)["master"]
    mine.grad[5] = float("inf")
    adamw_step_([mine], impl=impl, **options(device))
    assert not bool(mine.master[5].isfinite())
    others = torch.arange(70) != 5
    torch.testing.assert_close(mine.master.cpu()[others].double(), want[others], rtol=1e-6, atol=1e-6)


def test_the_same_bits_again_and_at_any_address(device: str, thread_order: Any) -> None:
    results = []
    for ahead in (0, 0, 1, 2):
        s = shard(9001, device, torch.bfloat16, ahead=ahead, weight_decay=0.1)
        adamw_step_([s], impl="cuda", **options(device, scale=3.0))
        results.append(torch.cat([s.master, s.exp_avg, s.exp_avg_sq, s.weights.float()]))  # type: ignore[union-attr]
    assert all(torch.equal(r, results[0]) for r in results)


def test_nothing_beyond_a_shard_is_touched(device: str) -> None:
    if device == "cuda":
        pytest.skip("guarded memory is the CPU's")
    whole = shard(4099, "cpu", torch.bfloat16)
    names = ("master", "grad", "exp_avg", "exp_avg_sq", "weights")
    mine = [AdamWShard(*(guarded(getattr(whole, n), align=align) for n in names)) for align in (1, 16)]
    for given in ([whole], mine):
        adamw_step_(given, impl="cuda", **options("cpu"))
    assert all(torch.equal(getattr(s, n), getattr(whole, n)) for s in mine for n in names)
    masters = [s.master for s in mine]
    assert squared_norm(masters, impl="cuda").item() == pytest.approx(exact(masters), rel=1e-14)


def test_more_shards_than_a_launch_takes(device: str) -> None:
    mine = [shard(1 + n % 7, device, weight_decay=n / 100) for n in range(101)]
    want = [expected(s, 1e-2, 3.0, 1.0)["master"] for s in mine]
    adamw_step_(mine, impl="cuda", **options(device))
    for s, w in zip(mine, want, strict=True):
        torch.testing.assert_close(s.master.double().cpu(), w, rtol=1e-6, atol=1e-6)


def test_fp64_runs_without_our_kernel() -> None:
    s = shard(100, "cpu")
    wide = [AdamWShard(*(getattr(s, n).double() for n in ("master", "grad", "exp_avg", "exp_avg_sq"))) for _ in "ab"]
    want = expected(wide[0], 1e-2, 3.0, 1.0)["master"]
    with pytest.raises(Unsupported, match="float64"):
        adamw_step_(wide, impl="cuda", **options("cpu"))
    adamw_step_(wide[:1], **options("cpu"))
    adamw_step_(wide[1:], impl="reference", **options("cpu"))
    for w in wide:
        torch.testing.assert_close(w.master, want, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"grad": torch.zeros(5)}, r"shards\[0\].grad"),
        ({"exp_avg": torch.zeros(4, dtype=torch.bfloat16)}, r"shards\[0\].exp_avg is"),
        ({"exp_avg_sq": torch.zeros(8)[::2]}, r"shards\[0\].exp_avg_sq"),
        ({"weights": torch.zeros(4)}, r"shards\[0\].weights"),
        ({"master": torch.zeros(4, dtype=torch.int32)}, r"shards\[0\].master"),
        ({"lr": -1.0}, "lr"),
        ({"eps": float("nan")}, "eps"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"step": torch.ones((), dtype=torch.int64)}, "step"),
        ({"skip": torch.zeros(2)}, "skip"),
        ({"scale": torch.ones((), device="meta")}, "scale"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], names: str) -> None:
    tensors = {n: torch.zeros(4) for n in ("master", "grad", "exp_avg", "exp_avg_sq")}
    wrong = AdamWShard(**{**tensors, **{k: v for k, v in change.items() if k in (*tensors, "weights")}})
    others = {k: v for k, v in change.items() if k not in (*tensors, "weights")}
    with pytest.raises(Unsupported, match=f"adamw_step_: {names}"):
        adamw_step_([wrong], **{**options("cpu"), **others})


# ---- the sum of squares


def exact(tensors: list[Tensor]) -> float:
    return sum(t.double().square().sum().item() for t in tensors)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_squared_norm(device: str, thread_order: Any, impl: str) -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(70_000, generator=generator).to(device)
    tensors = [base[:1], base[1:40_000], base[:0], base[7:12], base[8:33_000]]
    total = squared_norm(tensors, impl=impl)
    assert total.dtype == torch.float64 and total.shape == ()
    assert total.item() == pytest.approx(exact(tensors), rel=1e-6 if impl == "torch" else 1e-14)
    assert torch.equal(total, squared_norm(tensors, impl=impl))


@pytest.mark.parametrize("impl", ["cuda", "reference"])
def test_squares_neither_overflow_nor_vanish(device: str, impl: str) -> None:
    tensors = [torch.full((5,), value, device=device) for value in (1e30, 1e-30)]
    assert squared_norm(tensors[:1], impl=impl).item() == pytest.approx(5e60, rel=1e-6)
    assert squared_norm(tensors[1:], impl=impl).item() == pytest.approx(5e-60, rel=1e-6)
    tensors[0][2] = float("nan")
    assert squared_norm(tensors, impl=impl).isnan()


def test_squared_norm_of_many_and_of_none(device: str) -> None:
    tensors = [torch.full((n % 5,), float(n), device=device) for n in range(300)]
    assert squared_norm(tensors, impl="cuda").item() == exact(tensors)
    assert squared_norm([tensors[0]], impl="cuda").item() == 0.0
    nothing = squared_norm([], device=torch.device(device))
    assert nothing.item() == 0.0 and nothing.dtype == torch.float64 and nothing.device.type == device
    with pytest.raises(Unsupported, match=r"squared_norm: tensors\[1\] is one of torch.float32, not torch.float64"):
        squared_norm([torch.ones(1), torch.ones(1).double()])


def test_operators_are_well_formed(device: str) -> None:
    ops = torch.ops.megapt_kernels
    s = shard(6, device, torch.bfloat16)
    lists = [s.master], [s.grad], [s.exp_avg], [s.exp_avg_sq], [s.weights]
    numbers = scalars(device)
    step = (*lists, [0.1], [0.0], *BETAS, EPS, *numbers.values())
    torch.library.opcheck(ops.adamw_step_.default, step)
    torch.library.opcheck(ops.squared_norm.default, ([s.master, s.grad],))
    with pytest.raises(RuntimeError, match="megapt_kernels::adamw_step_: grads must have the sizes"):
        ops.adamw_step_(lists[0], [s.grad[1:]], *step[2:])
    with pytest.raises(RuntimeError, match="megapt_kernels::squared_norm: tensors must be Float"):
        ops.squared_norm([s.weights])


@pytest.mark.parametrize("impl", ["cuda", "reference"])
def test_compiles_whole(device: str, impl: str) -> None:
    def update(mine: list[AdamWShard], numbers: dict[str, Tensor]) -> Tensor:
        adamw_step_(mine, lr=1e-2, betas=BETAS, eps=EPS, impl=impl, **numbers)
        return squared_norm([s.master for s in mine], impl=impl)

    results = []
    for function in (update, torch.compile(update, fullgraph=True, backend="aot_eager")):
        mine = [shard(5, device, torch.bfloat16), shard(3, device, torch.bfloat16, weight_decay=0.1)]
        results.append([function(mine, scalars(device)), *(t for s in mine for t in (s.master, s.exp_avg, s.weights))])
    torch.testing.assert_close(*results)


# ---- planted bugs


def wrong_sum(library: Emulated, x: Tensor) -> bool:
    """Whether any order of threads gives another sum, or an error."""
    wrong = False
    for order in ORDERS:
        library.order(order)
        partials, out = torch.zeros(8, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        data, sizes = (ctypes.c_void_p * 1)(x.data_ptr()), (ctypes.c_int64 * 1)(len(x))
        code = library.call("megapt_squared_norm", 1, data, sizes, partials, out, None)
        wrong |= code != 0 or out.item() != pytest.approx(exact([x]), rel=1e-12)
    return wrong


def stepped(library: Emulated, s: AdamWShard) -> None:
    def one(value: Any, kind: Any = ctypes.c_void_p) -> Any:
        return (kind * 1)(value)

    pointers = [one(getattr(s, n).data_ptr()) for n in ("master", "grad", "exp_avg", "exp_avg_sq")]
    treatment = [one(len(s.master), ctypes.c_int64), one(1e-2, ctypes.c_double), one(0.0, ctypes.c_double)]
    assert library.call(
        "megapt_adamw_step", 1, *pointers, None, *treatment, *BETAS, EPS, *scalars("cpu").values(), 0, None
    ) == 0, library.error()  # fmt: skip


def test_planted_bugs_are_found(tmp_path: Path, device: str) -> None:
    """Updates that begin beyond 2^32 elements, so that few are run: well, and with a 32-bit index. Sums of squares:
    without a barrier, and with a tail that is one too short."""
    late = "adamw.cuh", "chunk = blockIdx.x; chunk <", "chunk = blockIdx.x + (int64_t{1} << 32) / kAdamWChunk; chunk <"
    narrow = (
        "adamw.cuh",
        "begin = (chunk - shard.first_chunk) * kAdamWChunk",
        ("begin = static_cast<unsigned>((chunk - shard.first_chunk) * kAdamWChunk)"),
    )
    barrier = "adamw.cuh", "= x;\n    __syncthreads();\n    double", "= x;\n    double"
    tail = "adamw.cuh", "int i = whole + threadIdx.x; i < count;", "int i = whole + threadIdx.x; i < count - 1;"
    wide_and_short = planted(tmp_path / "short", "adamw", late, tail)
    narrow_and_racing = planted(tmp_path / "racing", "adamw", late, narrow, barrier)

    x = torch.randn(40_001, generator=torch.Generator().manual_seed(1))
    assert not wrong_sum(wide_and_short, x[:40_000]) and wrong_sum(wide_and_short, x)
    assert wrong_sum(narrow_and_racing, x[:40_000])

    size = (1 << 32) + 4101
    for library, reached in ((wide_and_short, True), (narrow_and_racing, False)):
        s = AdamWShard(*(sparse(size, torch.float32) for _ in range(4)))
        s.grad[-4101:] = 1.0
        stepped(library, s)
        assert bool((s.master[-4101:] < 0).all()) == reached


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("impl", ["reference", "library"])
def test_the_norm_leaves_gradients_as_they_are(dtype: torch.dtype, impl: str) -> None:
    gradient = torch.tensor([2.0, 3.0], dtype=dtype)
    assert float(squared_norm([gradient], device=torch.device("cpu"), impl=impl)) == pytest.approx(13)
    assert gradient.tolist() == [2.0, 3.0]
