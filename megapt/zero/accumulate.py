"""Gradients of micro-batches accumulate in full precision: autograd's result moves into `main_grad` at once."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from megapt.parameters import Parameter


class Accumulator:
    """Moves each parameter's gradient into its `main_grad` as soon as autograd has it, and frees it.

    The first gradient of a step is copied and later ones are added, so that nothing need be zeroed beforehand.
    """

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
        if parameter in self._fresh:
            self._fresh.remove(parameter)
            parameter.main_grad.copy_(gradient)
        else:
            parameter.main_grad.add_(gradient)

    def _take(self, parameter: Tensor) -> None:
        assert isinstance(parameter, Parameter)
        if parameter.grad is not None:  # else it was put off: autograd comes by nevertheless
            self.accumulate(parameter, parameter.grad)
            parameter.grad = None
