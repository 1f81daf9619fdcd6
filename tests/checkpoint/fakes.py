"""Fragments of a model's state with known values, in any layout, without a model."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megapt.config import ModelConfig
from megapt.mesh import ParallelMesh
from megapt.model.table import parameter_table
from megapt.parameters import Parameter, ParameterSpec
from megapt.zero.base import Fragment

LLAMA = ModelConfig(
    layers=3, hidden=12, heads=4, kv_heads=2, head_dim=4, ffn=8, vocabulary=21, max_sequence=16
)
GPT2 = ModelConfig(
    layers=2, hidden=8, heads=4, ffn=16, vocabulary=21, max_sequence=10, norm="layer_norm",
    activation="gelu_tanh", gated=False, position="learned", bias="all", tied_embeddings=True,
)  # fmt: skip
KINDS = ("weight", "exp_avg", "exp_avg_sq")


def meta_of(model: ModelConfig) -> dict[str, Any]:
    """The part of a run's meta by which loading knows the model."""
    return {"config": {"model": model.model_dump()}}


@dataclass(frozen=True)
class Layout:
    """cut: how dp ranks share a tensor rank's state.

    `whole`: each has all of it (ZeRO 0); `flat`: all parameters as one buffer, cut evenly; `each`: every
    parameter cut in unequal parts, some of them empty.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    cut: str = "whole"
    padding: int = 1
    dtype: torch.dtype = torch.float32


def true_value(name: str, kind: str, shape: tuple[int, ...]) -> Tensor:
    """fp32, each element of each tensor different from its neighbours and from other tensors."""
    start = zlib.crc32(f"{kind}/{name}".encode()) % 10000
    count = int(torch.Size(shape).numel())
    return (torch.arange(count, dtype=torch.float32) + start).view(shape) / 7


def fragments(
    model: ModelConfig, layout: Layout, pp: int, dp: int, tp: int, fill: float | None = None
) -> list[Fragment]:
    """Those of one rank: holding the true values, or everywhere `fill`. Padding holds -7 in either case."""
    specs = [spec for spec in parameter_table(model).values() if _stage(spec, model, layout) == pp]
    if layout.pp == 1:
        specs = [spec for spec in specs if spec.tied_to is None]
    shards = [(spec, spec.shard(tp, layout.tp, layout.padding)) for spec in specs]
    sizes = [int(torch.Size(shard.shape).numel()) for _, shard in shards]
    out = []
    for (spec, shard), (start, stop) in zip(shards, _cuts(sizes, layout, dp), strict=True):
        if start == stop and layout.cut == "flat":
            continue
        parameter = Parameter(torch.empty(shard.shape))
        parameter.spec, parameter.shard, parameter.owner = spec, shard, spec.tied_to is None
        tensors = {}
        for kind in KINDS:
            local = torch.full(shard.shape, -7.0, dtype=layout.dtype)
            value = true_value(spec.tied_to or spec.name, kind, spec.shape)
            shard.valid(local).copy_(value[shard.slices()] if fill is None else torch.tensor(fill))
            tensors[kind] = local.flatten()[start:stop].clone()
        out.append(Fragment(parameter, start, stop - start, tensors))
    return out


def of_rank(
    model: ModelConfig, layout: Layout, mesh: ParallelMesh, fill: float | None = None
) -> list[Fragment]:
    return fragments(model, layout, *mesh.coordinates, fill=fill)


def check_loaded(loaded: list[Fragment], kinds: tuple[str, ...] = KINDS) -> int:
    """Every element is the true value bit for bit, padding is zero; returns how many were compared."""
    count = 0
    for fragment in loaded:
        spec, shard = fragment.parameter.spec, fragment.parameter.shard
        for kind in kinds:
            local = torch.zeros(shard.shape)
            value = true_value(spec.tied_to or spec.name, kind, spec.shape)
            shard.valid(local).copy_(value[shard.slices()])
            expected = local.flatten()[fragment.start : fragment.start + fragment.numel]
            found = fragment.tensors[kind]
            assert torch.equal(found, expected.to(found.dtype)), f"{kind} of {spec.name} at {shard}"
            count += found.numel()
    return count


def _stage(spec: ParameterSpec, model: ModelConfig, layout: Layout) -> int:
    if spec.layer is not None:
        return spec.layer * layout.pp // model.layers
    return 0 if spec.name in ("embedding.weight", "positions.weight") else layout.pp - 1


def _cuts(sizes: list[int], layout: Layout, dp: int) -> list[tuple[int, int]]:
    if layout.cut == "whole":
        return [(0, size) for size in sizes]
    if layout.cut == "each":
        part = [-(-size // layout.dp) + 1 for size in sizes]
        return [(min(dp * p, size), min((dp + 1) * p, size)) for p, size in zip(part, sizes, strict=True)]
    share = -(-sum(sizes) // layout.dp)
    cuts, at = [], 0
    for size in sizes:
        start = min(max(dp * share - at, 0), size)
        cuts.append((start, max(start, min((dp + 1) * share - at, size))))
        at += size
    return cuts
