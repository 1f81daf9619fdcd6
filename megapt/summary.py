"""What a run is about to do, as a table printed before its first step."""

from __future__ import annotations

from megapt.config import Config
from megapt.mesh import ParallelMesh
from megapt.plan.memory import stage_memory


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
    for rank, stage in enumerate(stages):
        layers = " + ".join(f"{r.start}-{r.stop - 1}" if r else "none" for r in stage.layers)
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
    table.add_row("optimizer", f"AdamW, lr {optimizer.lr:g}, {optimizer.schedule} to {optimizer.floor:g}; {zero}")
    table.add_row("kernels", "; ".join(kernels(config, mesh)))
    table.add_row("peak", peak)
    Console(width=120, highlight=False).print(table)


def kernels(config: Config, mesh: ParallelMesh) -> list[str]:
    """Which implementation computes what on this device in this precision, in words."""
    model, cpu = config.model, mesh.device.type == "cpu"
    rotary = model.position == "rope"
    if cpu:
        attention = "torch's blockwise flash kernel for CPUs" + (", rotary positions on the way in" if rotary else "")
    else:
        attention = f"torch scaled_dot_product_attention in {config.precision}" + (
            ", rotary positions before it" if rotary else ""
        )
    if model.norm == "layer_norm":
        norm = "LayerNorm: torch"
    else:
        norm = "RMSNorm: megapt, in blocks of rows" if cpu else "RMSNorm: torch"
    mlp = model.activation + (", recomputed in the backward pass: megapt" if model.gated else ": torch")
    wide = "fp64" if config.precision == "fp64" else "fp32"
    return [
        f"attention: {attention}",
        norm,
        f"MLP's {'gated ' if model.gated else ''}{mlp}",
        f"cross entropy: megapt, with the output projection, in blocks of tokens, softmax in {wide}",
        f"gradient reduction: {_reduction(config)}",
    ]


def _reduction(config: Config) -> str:
    """Precision of the sum of gradients over data-parallel ranks: DeepSpeed's is fp32, for fp64 weights too."""
    return "fp64" if config.precision == "fp64" and config.zero.backend == "native" else "fp32"


def _bytes(value: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError
