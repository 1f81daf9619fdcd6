"""Dynamic loss scaling for fp16 (arXiv 1710.03740), on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from megapt.config import LossScaleConfig

_LARGEST = 2.0**64  # gradients that stay zero must not drive the scale to infinity, from which it never comes back


class LossScale:
    """A factor on the loss that keeps small gradients above what fp16 rounds to zero.

    value: fp32 scalar, the scale of the present step. Halved after a step whose gradients overflowed (which updates
    nothing), doubled after `window` good steps in a row.
    """

    def __init__(self, config: LossScaleConfig, device: torch.device) -> None:
        self.config = config
        self.value = torch.tensor(config.initial, dtype=torch.float32, device=device)
        self._good = torch.zeros((), dtype=torch.int64, device=device)

    def update(self, finite: Tensor) -> None:
        """After a step; finite: bool scalar on the device."""
        good = self._good + 1
        grown = good >= self.config.window
        larger = (self.value * 2).clamp_max(_LARGEST)
        smaller = (self.value / 2).clamp_min(self.config.smallest)
        self.value = torch.where(finite, torch.where(grown, larger, self.value), smaller)
        self._good = torch.where(finite & ~grown, good, torch.zeros_like(good))

    def scalars(self) -> dict[str, float]:
        return {"loss_scale": float(self.value), "good_steps": float(self._good)}

    def load(self, scalars: dict[str, float]) -> None:
        """What `scalars` gave; a checkpoint of a run without loss scaling has nothing, and the scale starts anew."""
        self.value = torch.full_like(self.value, scalars.get("loss_scale", self.config.initial))
        self._good = torch.full_like(self._good, int(scalars.get("good_steps", 0)))
