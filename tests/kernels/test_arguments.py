"""What no implementation may take, and what surrounds a call: wrong types, shared memory, autocast, transforms."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from megapt_kernels import (
    AdamWShard,
    AttentionSpec,
    Unsupported,
    adamw_step_,
    attention,
    geglu,
    layer_norm,
    linear_cross_entropy,
    moe_permute,
    moe_unpermute,
    rms_norm,
    rope_,
    squared_norm,
    swiglu,
    vocab_parallel_cross_entropy,
    wgrad_accumulate_,
)
from megapt_kernels.arguments import overlaps_itself

TARGET = torch.tensor([0, 1, 2, 3])


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def _shard(size: int = 5) -> AdamWShard:
    return AdamWShard(torch.ones(size), torch.ones(size), torch.zeros(size), torch.zeros(size))


def _adamw() -> dict[str, Any]:
    scalars = {"step": torch.ones(()), "scale": torch.ones(()), "skip": torch.zeros(())}
    return {"shards": [_shard()], "lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, **scalars}


def _calls() -> dict[Callable[..., Any], dict[str, Any]]:
    rules = {"target": TARGET, "group": None, "start": 0, "length": 8, "ignore_index": -100, "softcap": 2.0}
    q = _random(1, 4, 2, 8)
    return {
        rms_norm: {"x": _random(4, 8), "weight": _random(8), "eps": 1e-6, "residual": _random(4, 8), "offset": 0.0},
        layer_norm: {"x": _random(4, 8), "weight": _random(8), "bias": _random(8), "eps": 1e-6},
        rope_: {"x": _random(4, 2, 8), "cos": _random(6, 4), "sin": _random(6, 4), "positions": TARGET, "heads": 1},
        swiglu: {"xy": _random(4, 8)},
        geglu: {"xy": _random(4, 8), "approximate": "none"},
        vocab_parallel_cross_entropy: {"logits": _random(4, 8), **rules, "z_loss": 0.1},
        linear_cross_entropy: {"h": _random(4, 8), "weight": _random(10, 8), **rules, "z_loss": 0.1},
        attention: {"q": q, "k": q[:, :, :1], "v": q[:, :, :1], "spec": AttentionSpec()},
        squared_norm: {"tensors": [_random(5)]},
        wgrad_accumulate_: {"main_grad": _random(3, 5), "dy": _random(4, 3), "x": _random(4, 5), "fresh": False},
        moe_permute: {"x": _random(4, 8), "experts": TARGET.view(4, 1), "num_experts": 4},
        moe_unpermute: {"rows": _random(4, 8), "order": TARGET, "weights": _random(4, 1)},
        adamw_step_: _adamw(),
    }


def _wrong() -> Iterator[Any]:
    yield from ("word", object(), [None], float("nan"), 1 << 70)
    yield numpy.zeros((4, 8), numpy.float32)
    yield _random(4, 8).to_sparse()
    yield torch.nested.nested_tensor([_random(2, 8), _random(2, 8)], layout=torch.jagged)
    yield torch.zeros(4, 8, dtype=torch.complex64)


@pytest.mark.parametrize("function", list(_calls()), ids=lambda f: f.__name__)
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_wrong_types_are_named(function: Callable[..., Any], impl: str) -> None:
    function(**_calls()[function], impl=impl)
    for name in _calls()[function]:
        for value in _wrong():
            with pytest.raises(Unsupported):
                function(**{**_calls()[function], name: value}, impl=impl)
    with pytest.raises(Unsupported, match="impl is one of"):
        function(**_calls()[function], impl=["cuda"])


def test_specs_of_wrong_types_are_named() -> None:
    q = _random(1, 4, 2, 8)
    for changes, words in (
        ({"lengths": [2, 2]}, "spec.lengths is a tuple of whole numbers"),
        ({"lengths": torch.tensor([2, 2])}, "spec.lengths is a tuple of whole numbers"),
        ({"window": 2.5}, "spec.window is a whole number, not float"),
        ({"causal": 1}, "spec.causal is True or False"),
        ({"softcap": float("inf")}, "spec.softcap is a finite number"),
        ({"scale": "1"}, "spec.scale is a number, not str"),
    ):
        with pytest.raises(Unsupported, match=words):
            attention(q, q, q, AttentionSpec(**changes))  # type: ignore[arg-type]


def test_memory_that_elements_share() -> None:
    memory = torch.zeros(100)
    assert overlaps_itself(memory.as_strided((4, 2, 16), (4, 16, 1)))
    assert overlaps_itself(memory[:1].expand(3))
    for apart in (memory.view(10, 10).t(), memory[:0].expand(3, 0), memory[:1].expand(1), memory.view(5, 20)[:, ::3]):
        assert not overlaps_itself(apart)
    logits = torch.zeros(1, 8, requires_grad=True).expand(4, 8)
    with pytest.raises(Unsupported, match="logits is written to"):
        vocab_parallel_cross_entropy(logits, TARGET)
    with pytest.raises(Unsupported, match="main_grad is written to"):
        wgrad_accumulate_(torch.zeros(1, 5).expand(3, 5), _random(4, 3), _random(4, 5))


@pytest.mark.parametrize("impl", ["reference", "library", "cuda"])
def test_optimizer_refuses_shared_memory_and_says_what_it_wrote(impl: str, device: str) -> None:
    one, other = _shard(), _shard()
    call = {**_adamw(), "scale": torch.full((), 2.0)}
    # PyTorch's fused kernel divides a gradient in place: the second shard would see a quarter of it.
    for shards in ([one, AdamWShard(other.master, one.grad, other.exp_avg, other.exp_avg_sq)], [one, one]):
        with pytest.raises(Unsupported, match=r"shards\[0\].* and shards\[1\].* share memory"):
            adamw_step_(**{**call, "shards": shards}, impl="reference")
    negated = AdamWShard(torch._neg_view(other.master), one.grad, one.exp_avg, one.exp_avg_sq)
    with pytest.raises(Unsupported, match="negated view"):
        adamw_step_(**{**call, "shards": [negated]}, impl="reference")
    master, grad, first, second = (t.to(device) for t in (one.master, one.grad, one.exp_avg, one.exp_avg_sq))
    written = (master, first, second)
    versions = [t._version for t in written]
    scalars = {name: call[name].to(device) for name in ("step", "scale", "skip")}
    adamw_step_(**{**call, **scalars, "shards": [AdamWShard(master, grad, first, second)]}, impl=impl)
    assert all(t._version > before for t, before in zip(written, versions, strict=True))


def test_autocast_does_not_reach_inside() -> None:
    h, weight = _random(4, 8), _random(10, 8)
    q, spec = _random(1, 4, 2, 8), AttentionSpec(softcap=2.0)

    def run() -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (h, weight, q)]
        loss = linear_cross_entropy(leaves[0], leaves[1], TARGET)
        y = attention(leaves[2], leaves[2], leaves[2], spec)
        torch.autograd.backward([loss, y], [torch.ones_like(loss), torch.ones_like(y)])
        return [loss, y, *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    plain = run()
    with torch.autocast("cpu", torch.bfloat16):
        inside = run()
    for one, other in zip(plain, inside, strict=True):
        assert torch.equal(one, other)


def test_forward_derivatives_are_refused() -> None:
    q = _random(1, 4, 2, 8)
    with pytest.raises(Unsupported, match="attention: torch.func's transforms"):
        torch.func.jvp(lambda q: attention(q, q, q), (q,), (torch.ones_like(q),))
    with pytest.raises(Unsupported, match="rms_norm: torch.func's transforms"):
        torch.func.vmap(lambda x: rms_norm(x, torch.ones(8)))(q)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(Unsupported, match="forward-mode"):
        swiglu(torch.autograd.forward_ad.make_dual(q, q))


@pytest.mark.parametrize("impl", ["reference", "cuda"])
def test_second_derivatives_are_refused(impl: str, device: str) -> None:
    x = _random(4, 8).to(device)
    calls: list[Callable[[Tensor], Tensor]] = [
        lambda x: rms_norm(x, torch.ones(8, device=device), impl=impl),
        lambda x: swiglu(x, impl=impl),
    ]
    if impl == "cuda":  # the reference of the permutation is made of operators that know theirs
        calls.append(lambda x: moe_permute(x, TARGET.view(4, 1).to(device), 4, impl=impl)[0])
    for call in calls:
        leaf = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(call(leaf).square().sum(), leaf, create_graph=True)
        assert slope.isfinite().all()
        with pytest.raises(RuntimeError, match="differentiate twice"):
            slope.square().sum().backward()


def test_rows_without_a_number_are_nan_on_a_cpu() -> None:
    q, k, v = (_random(1, 6, 2, n) for n in (8, 8, 8))
    for spoiled, token in ((q, 1), (k, 0)):
        for value in (float("nan"), float("inf")):
            before = spoiled[0, token].clone()
            spoiled[0, token] = value
            for spec in (AttentionSpec(), AttentionSpec(window=2)):
                y = attention(q, k, v, spec, impl="torch")
                assert y[0, token].isnan().all()
                assert spoiled is k or y[0, 4:].isfinite().all()
            spoiled[0, token] = before
    zero = torch.zeros(1, 6, 2, 8)
    assert torch.equal(attention(zero, zero, zero, impl="torch"), zero)


def test_orders_that_permute_does_not_make() -> None:
    rows, weights = _random(6, 8), torch.ones(3, 2)
    for order, words in (
        ([0, 1, 2, 3, 4, 9], r"order has slots in \[0, 6\)"),
        ([0, 1, 2, 3, 4, 4], "order has a slot more than once"),
        ([0, 1, 2, -1, 4, 5], "order has a dropped row before one that is not"),
    ):
        with pytest.raises(Unsupported, match=words):
            moe_unpermute(rows, torch.tensor(order), weights, impl="reference")


def test_tensors_without_data() -> None:
    x, ids = torch.empty(6, 8, device="meta"), torch.empty(6, dtype=torch.int64, device="meta")
    rows, order, _ = moe_permute(x, ids.view(6, 1), 4)
    assert moe_unpermute(rows, order, torch.empty(6, 1, device="meta")).shape == x.shape
    table = torch.empty(9, 4, device="meta")
    assert rope_(x.view(6, 1, 8), table, table, ids).shape == (6, 1, 8)
    q = torch.empty(1, 6, 2, 8, device="meta", requires_grad=True)
    y = attention(q, q, q)
    y.sum().backward()
    assert y.shape == q.shape and q.grad is not None and q.grad.is_meta


def test_compiles_whole_at_any_length() -> None:
    for name, call in {
        "attention": lambda t: attention(t, t, t),
        "windows": lambda t: attention(t, t, t, AttentionSpec(window=3, softcap=2.0)),
        "wgrad": lambda t: wgrad_accumulate_(torch.zeros(8, 8), t[0, :, 0], t[0, :, 1]),
    }.items():
        compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
        for length in (5, 9):
            t = _random(2, length, 2, 8)
            torch.testing.assert_close(compiled(t), call(t), msg=name)


def test_a_wrong_environment_is_named_at_the_first_operation() -> None:
    code = (
        "import torch, megapt_kernels as k\n"
        "try: k.swiglu(torch.ones(2, 4))\n"
        "except k.Unsupported as error: print(error)"
    )
    environment = {**os.environ, "MEGAPT_KERNELS": "nonsense"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("swiglu: MEGAPT_KERNELS is one of auto, cuda")
