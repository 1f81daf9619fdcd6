"""RMSNorm (arXiv 1910.07467) and LayerNorm, with weights that every tensor rank holds whole."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megapt.config import ModelConfig
from megapt.parallel.tensor import ParameterFactory


class RMSNorm(nn.Module):
    def __init__(self, model: ModelConfig, factory: ParameterFactory, name: str) -> None:
        super().__init__()
        self.eps = model.norm_eps
        (self.weight,) = factory(f"{name}.weight")

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class LayerNorm(nn.Module):
    def __init__(self, model: ModelConfig, factory: ParameterFactory, name: str) -> None:
        super().__init__()
        self.eps = model.norm_eps
        (self.weight,) = factory(f"{name}.weight")
        (self.bias,) = factory(f"{name}.bias")

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def make_norm(model: ModelConfig, factory: ParameterFactory, name: str) -> nn.Module:
    return (RMSNorm if model.norm == "rms_norm" else LayerNorm)(model, factory, name)
