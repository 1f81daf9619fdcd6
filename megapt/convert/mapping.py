"""What a family of Hugging Face models is called and shaped like, as data that reads in both directions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megapt.config import ModelConfig
from megapt.parameters import ParameterTable

ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}


@dataclass(frozen=True)
class Row:
    """One tensor of theirs: our tensors joined along dimension 0, then transposed where they store [in, out].

    `{layer}` in the names stands for a layer's index. Biases are vectors, which no transposition touches.
    """

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False

    def at(self, layer: int) -> Row:
        return Row(
            self.theirs.format(layer=layer), tuple(n.format(layer=layer) for n in self.ours), self.transposed
        )

    def shape(self, table: ParameterTable) -> tuple[int, ...]:
        """Of their tensor."""
        first = table[self.ours[0]].shape
        joined = (sum(table[name].shape[0] for name in self.ours), *first[1:])
        return tuple(reversed(joined)) if self.transposed else joined

    def join(self, ours: Sequence[Tensor]) -> Tensor:
        """Their tensor from ours."""
        joined = ours[0] if len(ours) == 1 else torch.cat(list(ours))
        return joined.T.contiguous() if self.transposed else joined


def linear(theirs: str, *ours: str, transposed: bool = False) -> tuple[Row, Row]:
    """The rows of a projection's weight and bias."""
    return (
        Row(f"{theirs}.weight", tuple(f"{name}.weight" for name in ours), transposed),
        Row(f"{theirs}.bias", tuple(f"{name}.bias" for name in ours)),
    )


# What no family has unless it says so.
_COMMON: dict[str, tuple[Any, ...]] = {"attention": ("causal",), "logit_softcap": (None,)}


@dataclass(frozen=True)
class Family:
    """legal: per field of ModelConfig the values this family can express; rows: all tensors that its variants
    have; config: the content of config.json that says what is computed."""

    name: str
    legal: Callable[[ModelConfig], dict[str, tuple[Any, ...]]]
    rows: tuple[Row, ...]
    config: Callable[[ModelConfig], dict[str, Any]]

    def refusals(self, model: ModelConfig) -> list[str]:
        """Why a model cannot be written as this family, field by field; empty if it can."""
        return [
            f"model.{key} is {getattr(model, key)!r} (legal: {', '.join(map(repr, values))})"
            for key, values in {**_COMMON, **self.legal(model)}.items()
            if getattr(model, key) not in values
        ]

    def expand(self, model: ModelConfig, table: ParameterTable) -> list[Row]:
        """The rows of one model in the table's order; every parameter is in exactly one of them."""
        rows = [
            row.at(layer)
            for row in self.rows
            for layer in range(model.layers if "{layer}" in row.theirs else 1)
        ]
        own = {name: at for at, (name, spec) in enumerate(table.items()) if spec.tied_to is None}
        rows = sorted((row for row in rows if row.ours[0] in own), key=lambda row: own[row.ours[0]])
        mapped = [name for row in rows for name in row.ours]
        assert sorted(mapped) == sorted(own), f"{self.name} does not map {set(own) ^ set(mapped)}"
        return rows
