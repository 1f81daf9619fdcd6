"""How far results are from exact ones, and how far plain PyTorch of the same dtype is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megapt_kernels.bench.cases import Case, Inputs, mapped

# Of plain PyTorch's error; gradients pass through more roundings.
OUTPUT_FACTOR, GRADIENT_FACTOR = 2.0, 3.0
_BLOCK = 1 << 25


class _InPlace(torch.autograd.Function):
    """The same memory as a leaf's, in a tensor that may be written to."""

    @staticmethod
    def forward(ctx, leaf):
        return leaf.detach()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


@dataclass
class Results:
    outputs: list[Tensor]
    gradients: list[Tensor]


@dataclass(frozen=True)
class Errors:
    """Relative errors ||found - exact|| / ||exact||, of the tensor that is worst beside what it may have.

    error: this implementation's; plain: plain PyTorch's on the same inputs; allowed: the largest that passes.
    """

    error: float
    plain: float
    allowed: float

    @property
    def within(self) -> bool:
        return self.error <= self.allowed  # False for NaN

    @staticmethod
    def worst(found: Sequence[Errors]) -> Errors | None:
        return max(found, key=lambda e: math.inf if math.isnan(e.error) else e.error / e.allowed, default=None)


def leaves_of(case: Case, inputs: Inputs) -> list[Tensor]:
    """The inputs that get gradients, as leaves of autograd that share their memory."""
    return [inputs[name].detach().requires_grad_() for name in case.differentiable]


def live(case: Case, inputs: Inputs, leaves: Sequence[Tensor]) -> Inputs:
    """The inputs with these leaves in their places."""
    placed = [_InPlace.apply(leaf) for leaf in leaves] if case.in_place else leaves
    return inputs | dict(zip(case.differentiable, placed, strict=True))


def output_gradients(case: Case, outputs: Sequence[Tensor]) -> list[Tensor]:
    """What comes back to each output: random, the same for every implementation and precision; 1 for a scalar."""
    made = []
    for seed, output in enumerate(outputs):
        generator = torch.Generator(output.device).manual_seed(seed)
        drawn = torch.randn(output.shape, generator=generator, device=output.device, dtype=torch.float32)
        made.append((drawn if output.dim() else torch.ones_like(drawn)).to(case.dtype).to(output.dtype))
    return made


def compute(case: Case, run: Callable[[Inputs], tuple[Tensor, ...]], inputs: Inputs) -> Results:
    """Outputs and gradients; the inputs may be written to."""
    if not case.differentiable:
        return Results(list(run(inputs)), [])
    leaves = leaves_of(case, inputs)
    outputs = run(live(case, inputs, leaves))
    gradients = torch.autograd.grad(outputs, leaves, output_gradients(case, outputs))
    return Results([o.detach() for o in outputs], list(gradients))


class Judge:
    """Exact results of a case, and plain PyTorch's errors against them.

    make: the inputs, new and the same each time. free: bytes of memory that exact results may take; fp64 where they
    suffice, else fp32. None: fp64.
    """

    def __init__(self, case: Case, make: Callable[[], Inputs], free: int | None) -> None:
        self.case = case
        inputs = make()
        tensors = [t for v in inputs.values() for t in (v if isinstance(v, list) else [v]) if isinstance(t, Tensor)]
        needed = 6 * 8 * sum(t.numel() for t in tensors if t.is_floating_point())
        self.dtype = torch.float64 if free is None or needed <= free else torch.float32
        formula = case.exact or case.plain
        inputs = mapped(lambda t: t.to(self.dtype) if t.is_floating_point() else t, inputs)
        exact = compute(case, formula, inputs)
        self._exact = [*exact.outputs, *exact.gradients]
        self._outputs = len(exact.outputs)
        del exact, inputs
        plain = compute(case, formula, make())
        self._plain = [relative_error(f, e) for f, e in zip(self._of(plain), self._exact, strict=True)]

    def errors(self, results: Results) -> dict[str, Errors | None]:
        """By pass: outputs count for "fwd", gradients for "bwd"."""
        found = []
        for n, (tensor, exact, plain) in enumerate(zip(self._of(results), self._exact, self._plain, strict=True)):
            if tensor.shape != exact.shape:
                raise ValueError(f"result {n} has shape {tuple(tensor.shape)}, not {tuple(exact.shape)}")
            factor = OUTPUT_FACTOR if n < self._outputs else GRADIENT_FACTOR
            allowed = factor * plain + floor(self.case.floor or tensor.dtype)
            found.append(Errors(relative_error(tensor, exact), plain, allowed))
        forward, backward = found[: self._outputs], found[self._outputs :]
        passes = {"fwd": forward, "bwd": backward, "fwd+bwd": found}
        return {name: Errors.worst(part) for name, part in passes.items()}

    @staticmethod
    def _of(results: Results) -> list[Tensor]:
        return [*results.outputs, *results.gradients]


def floor(dtype: torch.dtype) -> float:
    """A quarter of an ulp in 16 bits, which is what rounding the result once costs; 16 ulps in fp32, where sums in
    another order cost more than rounding."""
    return torch.finfo(dtype).eps * (0.25 if dtype.itemsize == 2 else 16)


def relative_error(found: Tensor, exact: Tensor) -> float:
    """||found - exact|| / ||exact|| in fp64, a block at a time; NaN where either holds one."""
    off, size = 0.0, 0.0
    for part, wanted in zip(found.reshape(-1).split(_BLOCK), exact.reshape(-1).split(_BLOCK), strict=True):
        wanted = wanted.double()
        off += float((part.double() - wanted).square_().sum())
        size += float(wanted.square().sum())
    return math.sqrt(off / size) if size else math.sqrt(off)
