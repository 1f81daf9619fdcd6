"""The yardstick for operations in 16 bits: plain PyTorch in the same precision, both against fp64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def outputs(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], upstream: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    """What a function gives, and its gradient by every input, in fp64 for comparison."""
    given = [t.detach().to(dtype).clone().requires_grad_() for t in inputs]
    result = function(*given)
    gradients = torch.autograd.grad(result, given, upstream.to(result.dtype))
    return [result.detach().double(), *(g.double() for g in gradients)]


def distance(a: Tensor, b: Tensor) -> float:
    """Root-mean-square difference, relative to b's root mean square."""
    return float((a - b).norm() / b.norm())


def assert_accurate(
    own: Callable[..., Tensor], plain: Callable[..., Tensor], inputs: Sequence[Tensor], upstream: Tensor
) -> None:
    """fp64: the same. fp32 and bf16: at most twice plain PyTorch's error, three times for gradients.

    inputs and upstream must hold values that bf16 represents exactly, or rounding them would hide other errors.
    """
    exact = outputs(plain, inputs, upstream, torch.float64)
    for ours, expected in zip(outputs(own, inputs, upstream, torch.float64), exact, strict=True):
        assert distance(ours, expected) < 1e-13
    for dtype in (torch.float32, torch.bfloat16):
        ours, theirs = (outputs(f, inputs, upstream, dtype) for f in (own, plain))
        for index, (a, b, expected) in enumerate(zip(ours, theirs, exact, strict=True)):
            assert a.isfinite().all()
            floor = 4 * torch.finfo(torch.float32).eps if dtype == torch.float32 else 0.0
            limit = (3 if index else 2) * distance(b, expected) + floor
            assert distance(a, expected) <= limit, (dtype, index, distance(a, expected), distance(b, expected))


def random(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    """Normal values that bf16 represents exactly, as fp64."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).bfloat16().double()
