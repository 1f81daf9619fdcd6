"""Gradients of micro-batches accumulate in full precision: autograd's result moves into `main_grad` at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megapt.parallel.tensor import neighbours
from megapt.parameters import Parameter
from megapt_kernels.registry import operation
from megapt_kernels.wgrad import wgrad_accumulate_


class Accumulator:
    """Moves each parameter's gradient into its `main_grad` as soon as autograd has it, and frees it.

    The first gradient of a step is copied and later ones are added, so that nothing need be zeroed beforehand.
    """

    product = "auto"  # the kind of implementation of `add_product`

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        self.parameters = list(parameters)
        self._fresh: set[Parameter] = set()
        for parameter in self.parameters:
            parameter.register_post_accumulate_grad_hook(self._take)

    def begin(self) -> None:
        """Before the first backward of a step: what was accumulated is forgotten."""
        self._fresh = set(self.parameters)

    def end(self) -> None:
        """After the last backward: a parameter that took no part has gradient zero."""
        for parameter in self._fresh:
            parameter.main_grad.zero_()
        self._fresh.clear()

    def accumulate(self, parameter: Parameter, gradient: Tensor) -> None:
        """Add a gradient to what the step has so far."""
        self._opening(parameter)
        if parameter in self._fresh:
            self._fresh.remove(parameter)
            parameter.main_grad.copy_(gradient)
        else:
            parameter.main_grad.add_(gradient)
        self._arrived(parameter)

    def add_product(self, weights: Sequence[Tensor], dy: Tensor, x: Tensor) -> None:
        """Add to the gradients of weights [N, K] that multiply as one what dy [T, sum of N] and x [T, K] give, without
        a tensor for it: one product where their sums are neighbours in memory and as far."""
        parameters = [w for w in weights if isinstance(w, Parameter)]
        assert len(parameters) == len(weights)
        for parameter in parameters:
            self._opening(parameter)
        fresh = [parameter in self._fresh for parameter in parameters]
        whole = neighbours([parameter.main_grad for parameter in parameters])
        if whole is not None and len(set(fresh)) == 1:
            wgrad_accumulate_(whole, dy, x, fresh=fresh[0], impl=self.product)
        else:
            parts = dy.split([parameter.shape[0] for parameter in parameters], dim=1)
            for parameter, part, first in zip(parameters, parts, fresh, strict=True):
                wgrad_accumulate_(parameter.main_grad, part, x, fresh=first, impl=self.product)
        self._fresh.difference_update(parameters)
        for parameter in parameters:
            self._arrived(parameter)

    def _opening(self, parameter: Parameter) -> None:
        """Before something is added to the parameter's `main_grad`."""

    def _arrived(self, parameter: Parameter) -> None:
        """After the parameter got one more gradient."""

    def _take(self, parameter: Tensor) -> None:
        assert isinstance(parameter, Parameter)
        if parameter.grad is not None:  # else it was put off, or added by its product: autograd comes by nevertheless
            self.accumulate(parameter, parameter.grad)
            parameter.grad = None


def fuses_products(kernel: str, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether weight gradients are added to their sums by the product that makes them.

    `auto` does so on a GPU where some library can: on a CPU the product is the same work, and no faster.
    """
    if kernel != "auto":
        return kernel != "off"
    if device.type == "cpu":
        return False
    some = torch.empty(8, 8, dtype=dtype, device=device)
    total = torch.empty(8, 8, dtype=torch.promote_types(dtype, torch.float32), device=device)
    chosen = operation("wgrad_accumulate_").explain(total, some, some).chosen
    return chosen is not None and chosen.kind != "reference"
