"""What a run is about to do, as a table printed before its first step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby

import torch

from megapt.config import Config
from megapt.kernel_choice import chosen
from megapt.mesh import ParallelMesh
from megapt.model.kernels import Kernels
from megapt.parallel.pipeline.stages import DTYPES, split_layers
from megapt.plan.memory import StageMemory, stage_memory
from megapt.zero.accumulate import fuses_products
from megapt_kernels.library import missing


def print_summary(
    config: Config,
    mesh: ParallelMesh,
    zero: str,
    *,
    parameters: int,
    start: str,
    samples_per_epoch: int,
    total_samples: int,
    peak: str,
) -> None:
    """Layout, parameters and estimated memory per pipeline stage, batch, data, and what computes."""
    from rich.console import Console
    from rich.table import Table

    model, parallel, batch = config.model, config.parallel, config.batch
    stages = stage_memory(config, mesh.dp.size, cpu=mesh.device.type == "cpu")
    table = Table(title=f"{config.run.folder}: {start}", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")

    axes = f"pipeline {mesh.pp.size} x data {mesh.dp.size} x tensor {mesh.tp.size}"
    layout = f"{mesh.world} ranks on {mesh.device.type}: {axes}"
    sequence = ", sequence parallel" if parallel.sequence_parallel and parallel.tensor > 1 else ""
    schedule = f", {parallel.schedule}" + (f" with {parallel.chunks} chunks" if parallel.chunks > 1 else "")
    table.add_row("layout", layout + sequence + (schedule if mesh.pp.size > 1 else ""))
    table.add_row("model", f"{parameters:,} parameters, {model.layers} layers, {config.precision}")
    if parallel.virtual_stages > 1:
        table.add_row("split", f"{layout_text(config)} layers per virtual stage, {_reason(config)}")
    if config.recompute.policy != "none":
        table.add_row("recompute", _recompute(config, stages))
    for rank, stage in enumerate(stages):
        layers = " + ".join(_span(r) for r in stage.layers)
        parts = ("weights", "gradients", "optimizer", "activations")
        items = ", ".join(f"{part} {_bytes(getattr(stage, part))}" for part in parts)
        table.add_row(
            f"stage {rank}",
            f"layers {layers}: {stage.parameters:,} parameters per rank; estimated {_bytes(stage.total)} ({items})",
        )
    micro = batch.global_samples // (batch.micro * mesh.dp.size)
    table.add_row(
        "batch",
        f"{batch.global_samples} x {batch.sequence} = {batch.global_samples * batch.sequence:,} tokens per step, in "
        f"{micro} micro-batches of {batch.micro} per rank" + (", ramped" if batch.ramp else ""),
    )
    table.add_row(
        "data",
        f"{samples_per_epoch:,} samples per epoch, {total_samples / samples_per_epoch:.2f} epochs in this run",
    )
    optimizer = config.optimizer
    kind = "Muon (other than matrices: AdamW)" if optimizer.kind == "muon" else "AdamW"
    table.add_row("optimizer", f"{kind}, lr {optimizer.lr:g}, {optimizer.schedule} to {optimizer.floor:g}; {zero}")
    table.add_row("kernels", "; ".join(kernels(config, mesh)))
    table.add_row("peak", peak)
    Console(width=120, highlight=False).print(table)


def layout_text(config: Config) -> str:
    """The layers of each virtual stage, as `parallel.layers_per_stage` takes them: 3,4*6,3."""
    runs = [(count, len(list(same))) for count, same in groupby(len(layers) for layers in split_layers(config))]
    return ",".join(str(count) if times == 1 else f"{count}*{times}" for count, times in runs)


def _span(layers: range) -> str:
    if len(layers) < 2:
        return str(layers.start) if layers else "none"
    return f"{layers.start}-{layers.stop - 1}"


def _reason(config: Config) -> str:
    if config.parallel.layers_per_stage is not None:
        return "as given"
    return "balanced by " + ("layer_costs" if config.parallel.layer_costs else "FLOPs") + " with the output projection"


def _recompute(config: Config, stages: Sequence[StageMemory]) -> str:
    """Layers of each pipeline rank by what they compute again."""
    mixes = []
    for stage in stages:
        count = Counter(policy for chunk in stage.policies for policy in chunk)
        parts = [f"{count[policy]} {policy}" for policy in ("full", "selective", "none") if count[policy]]
        mixes.append(" + ".join(parts))
    runs, first = [], 0
    for mix, same in groupby(mixes):
        last = first + len(list(same)) - 1
        runs.append(f"{mix} on " + (f"rank {first}" if first == last else f"ranks {first}-{last}"))
        first = last + 1
    recompute = config.recompute
    within = f" within {recompute.budget:g} GiB" if recompute.budget is not None else ""
    return f"{recompute.policy}{within}; layers: " + ", ".join(runs)


def kernels(config: Config, mesh: ParallelMesh) -> list[str]:
    """Which implementation computes what on this device in this precision, in words."""
    model = config.model
    how = Kernels.of(config)

    def by(key: str) -> str:
        kind = getattr(how, key, "auto")
        return "torch, compiled" if kind == "compiled" else chosen(config, mesh.device, key)

    kernel, own = _attention(config, mesh.device)
    attention = f"{kernel} in {config.precision}"
    if model.position == "rope":
        attention += f", rotary positions {'on the way in' if own and how.rope == 'auto' else by('rope')}"
    activation = f"gated {model.activation}: {by('glu')}" if model.gated else f"{model.activation}: torch"
    if not model.gated and how.glu == "compiled":
        activation += ", compiled"
    wide = "fp64" if config.precision == "fp64" else "fp32"
    loss = f"{by('cross_entropy')}, with the output projection, in blocks of tokens, softmax in {wide}"
    return [
        f"attention: {attention}",
        f"{'LayerNorm' if model.norm == 'layer_norm' else 'RMSNorm'}: {by('norm')}",
        f"MLP's {activation}",
        f"cross entropy: {loss}",
        f"gradient reduction: {_reduction(config)}",
        *_updates(config, mesh),
        *_not_built(mesh),
    ]


def _not_built(mesh: ParallelMesh) -> list[str]:
    """On a GPU, why our kernels do not run where they do not."""
    reason = missing(mesh.device) if mesh.device.type == "cuda" else None
    return [] if reason is None else [f"our CUDA kernels are not in use: {reason}"]


def _attention(config: Config, device: torch.device) -> tuple[str, bool]:
    """What `model.attention` calls, and whether from a function of ours that turns queries and keys on their way in."""
    model = config.model
    if device.type != "cpu" or config.kernels.attention != "auto":
        return chosen(config, device, "attention"), False
    if model.attention_softcap is not None:
        return "megapt, by blocks of queries (capped scores)", True
    flash = "torch's blockwise flash kernel for CPUs"
    windowed = model.window is not None and model.window < config.batch.sequence
    return (f"{flash}, windows by blocks of queries" if windowed else flash), True


def _updates(config: Config, mesh: ParallelMesh) -> list[str]:
    """Of the native backend: what updates, and what adds weight gradients where their product does."""
    if config.zero.backend != "native":
        return []
    lines = [f"update: {chosen(config, mesh.device, 'adamw')}"]
    if fuses_products(config.kernels.wgrad, DTYPES[config.precision], mesh.device):
        lines.append(f"weight gradients added by their product: {chosen(config, mesh.device, 'wgrad')}")
    return lines


def _reduction(config: Config) -> str:
    """Precision of the sum of gradients over data-parallel ranks: DeepSpeed's is fp32, for fp64 weights too."""
    return "fp64" if config.precision == "fp64" and config.zero.backend == "native" else "fp32"


def _bytes(value: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError
