"""How fast training is: whole steps of a config on random tokens, beside the machine's own matrix-product speed."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterator, Sequence
from itertools import count, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megapt.config import Config, load
from megapt.data.batches import BatchSchedule
from megapt.data.loader import StepLoader
from megapt.distributed import join, leave
from megapt.engine import Engine
from megapt.model.table import parameter_table
from megapt.monitor.progress import emit, memory_bytes, peak_flops
from megapt.parallel.pipeline.stages import DTYPES
from megapt.plan.flops import model_flops_per_token


class RandomTokens:
    """Samples of uniformly random tokens, a pure function of the sample's number: no data set is needed."""

    name = "random tokens"
    num_samples_per_epoch = 1 << 40

    def __init__(self, vocabulary: int, sequence: int) -> None:
        self.vocabulary, self.sequence = vocabulary, sequence

    def sample(self, ids: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int64]:
        """int64 [n, sequence + 1]."""
        return np.stack(
            [np.random.default_rng(int(i)).integers(0, self.vocabulary, self.sequence + 1) for i in ids]
        )

    def fill(
        self, ids: npt.NDArray[np.integer[Any]], tokens: npt.NDArray[np.int64], labels: npt.NDArray[np.int64]
    ) -> None:
        """As CompositeDataset.fill: tokens and labels are int64 [n, sequence]."""
        rows = self.sample(ids)
        tokens[...], labels[...] = rows[:, :-1], rows[:, 1:]

    def loss_tokens(self, ids: npt.NDArray[np.integer[Any]]) -> int:
        return len(ids) * self.sequence


def train(
    path: str | Path, overrides: Sequence[str] = (), steps: int = 20, warmup: int = 5, output: str | Path | None = None
) -> dict[str, Any]:
    """Time `steps` optimizer steps after `warmup` ones; prints the result and writes it as JSON to `output`.

    Runs as one process or under torchrun with the config's layout. tokens_per_second is the median over steps, of the
    whole world; mfu is against the stated peak (None where none is known); gemm_share is the model FLOPs rate over the
    rate of a large matrix product in the same dtype, measured in this run on every rank at once.
    """
    environment, device = join()
    config = load(path, overrides).config
    engine = Engine(config, environment.world, device)
    seconds = time_steps(engine, steps, warmup)
    median = sorted(seconds)[len(seconds) // 2]
    tokens = config.batch.global_samples * config.batch.sequence
    flops = model_flops_per_token(config.model, config.batch.sequence) * tokens / median / environment.world
    gemm = gemm_flops(DTYPES[config.precision], device)
    peak, _ = peak_flops(device, config.run.peak_tflops * 1e12 if config.run.peak_tflops else None)
    result = {
        "config": str(path),
        "overrides": list(overrides),
        "parameters": parameter_table(config.model).count(),
        "layout": {"pipeline": engine.mesh.pp.size, "data": engine.mesh.dp.size, "tensor": engine.mesh.tp.size},
        "zero": engine.backend.describe(),
        "precision": config.precision,
        "tokens_per_step": tokens,
        "step_seconds": {"median": median, "min": min(seconds), "max": max(seconds)},
        "tokens_per_second": tokens / median,
        "model_flops_per_second_per_rank": flops,
        "mfu": flops / peak if peak else None,
        "gemm_flops_per_second_per_rank": gemm,
        "gemm_share": flops / gemm,
        "peak_memory_bytes": memory_bytes(device).peak,
        "environment": environment_of(device),
    }
    if engine.mesh.rank == 0:
        emit(
            f"{result['tokens_per_second']:,.0f} tokens/s, {median:.3f} s per step of {tokens:,} tokens; "
            f"{flops / 1e9:,.1f} GFLOP/s per rank = {100 * flops / gemm:.0f} % of a large matrix product here"
            + (f", MFU {100 * flops / peak:.1f} %" if peak else ", MFU n/a")
            + f"; peak memory {memory_bytes(device).peak / 2**20:,.0f} MiB"
        )
        if output is not None:
            Path(output).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    leave()
    return result


def time_steps(engine: Engine, steps: int, warmup: int) -> list[float]:
    """Wall time of each step, from one step's end to the next one's: loading and the device's work included."""
    ends = [time.perf_counter()]
    for _ in islice(endless_steps(engine), warmup + steps):
        ends.append(time.perf_counter())
    return [end - start for start, end in pairwise(ends)][warmup:]


def endless_steps(engine: Engine) -> Iterator[None]:
    """Trains on random tokens; each item is a finished step."""
    config: Config = engine.config
    device, dp = engine.mesh.device, engine.mesh.dp
    tokens = RandomTokens(config.model.vocabulary, config.batch.sequence)
    schedule = BatchSchedule(config.batch.global_samples, None)
    with StepLoader(tokens, schedule, config.batch.micro, dp.rank, dp.size) as loader:
        for step in count():
            engine.train_step(loader.step(step), config.optimizer.lr)
            _wait(device)
            yield


def gemm_flops(dtype: torch.dtype, device: torch.device, size: int = 2048) -> float:
    """FLOP/s of a square matrix product of `size` (8192 on GPUs): the median of nine."""
    size = 8192 if device.type == "cuda" else size
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out: Tensor = a @ b
    seconds = []
    for _ in range(9):
        _wait(device)
        started = time.perf_counter()
        torch.mm(a, b, out=out)
        _wait(device)
        seconds.append(time.perf_counter() - started)
    return 2.0 * size**3 / sorted(seconds)[4]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def environment_of(device: torch.device) -> dict[str, Any]:
    """The machine, as far as it decides speed."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
