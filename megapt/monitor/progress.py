"""The line a run prints: where it is, how well it learns, how fast it goes, when it ends."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

# Dense bf16 FLOP/s with fp32 accumulation, from the vendors' data sheets; the first pattern found in the name
# of the CUDA device counts, so the special forms of a chip stand before the chip.
PEAK_BF16_FLOPS: tuple[tuple[str, float], ...] = (
    (r"\bGB200\b", 2500e12),
    (r"\bB200\b", 2250e12),
    (r"\bB100\b", 1750e12),
    (r"\bH100.*\bPCIe\b", 756e12),
    (r"\bH100.*\bNVL\b", 835e12),
    (r"\bH200.*\bNVL\b", 835e12),
    (r"\b(H100|H200|GH200|H800)\b", 989e12),
    (r"\bH20\b", 148e12),
    (r"\b(A100|A800)\b", 312e12),
    (r"\bA30\b", 165e12),
    (r"\bA40\b", 149.7e12),
    (r"\bA10\b", 125e12),
    (r"\bL40S\b", 362e12),
    (r"\bL4\b", 121e12),
)

# Share of the newest interval in the smoothed rate behind the ETA: about the last three lines count.
_NEWEST_SHARE = 0.3


@dataclass(frozen=True)
class Throughput:
    """Speed over one interval: global tokens per second, model FLOPs utilisation (0 to 1), seconds left."""

    tokens_per_second: float
    mfu: float | None
    eta_seconds: float


class Progress:
    """Makes the progress lines of a run.

    Args:
        total_steps: steps of the whole run.
        start_step: steps done before this process started; 0 for a fresh run.
        tokens_per_step: tokens of a global batch, or a function from the step (counted from 0) to them.
        flops_per_token: model FLOPs, forward and backward, of one token; ``None`` where MFU makes no sense.
        peak_flops: peak FLOP/s of one device (see ``peak_flops``), or ``None`` where it is not known.
        world: number of devices.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int,
        tokens_per_step: int | Callable[[int], int],
        flops_per_token: float | None,
        peak_flops: float | None,
        world: int,
    ) -> None:
        self.total_steps = total_steps
        self.throughput: Throughput | None = None
        self._step = start_step
        self._tokens_per_step = tokens_per_step
        self._flops_per_token = flops_per_token
        self._peak_flops = peak_flops
        self._world = world
        self._tokens_left = self._tokens_between(start_step, total_steps)
        self._seconds_per_token: float | None = None

    def line(
        self,
        step: int,
        *,
        loss: float,
        lr: float,
        grad_norm: float | None,
        step_seconds: float,
        skipped: int = 0,
        memory: int | None = None,
    ) -> str:
        """The line after ``step`` steps are done; ``self.throughput`` then holds its speeds as numbers.

        Args:
            step: number of steps done, above that of the line before.
            loss: training loss, nats per token.
            lr: learning rate of the last step.
            grad_norm: norm of the gradients before clipping; ``None`` where it was not computed.
            step_seconds: wall time the steps since the last line took together; leave out validation and
                saving to keep them out of the speed.
            skipped: steps skipped so far for gradients that were not finite; named only when there are some.
            memory: bytes to report (see ``memory_bytes``).
        """
        speed = self._measure(step, step_seconds)
        parts = [
            f"step {step}/{self.total_steps}",
            f"loss {loss:.3f}",
            f"lr {lr:.1e}",
            "norm n/a" if grad_norm is None else f"norm {grad_norm:.2f}",
            f"{format_count(speed.tokens_per_second)} tok/s",
            self._mfu_text(speed.mfu),
        ]
        if memory is not None:
            parts.append(f"mem {format_memory(memory)}")
        if skipped:
            parts.append(f"skipped {skipped}")
        parts.append(f"ETA {format_duration(speed.eta_seconds)}")
        return " | ".join(parts)

    def _measure(self, step: int, seconds: float) -> Throughput:
        assert step > self._step, f"line for step {step} after that for step {self._step}"
        assert seconds > 0, f"{step - self._step} steps in {seconds} s"
        tokens = self._tokens_between(self._step, step)
        self._step = step
        self._tokens_left = max(self._tokens_left - tokens, 0)
        newest = seconds / tokens
        before = newest if self._seconds_per_token is None else self._seconds_per_token
        self._seconds_per_token = before + _NEWEST_SHARE * (newest - before)
        mfu = None
        if self._flops_per_token is not None and self._peak_flops is not None:
            mfu = self._flops_per_token / newest / (self._world * self._peak_flops)
        self.throughput = Throughput(1.0 / newest, mfu, self._tokens_left * self._seconds_per_token)
        return self.throughput

    def _mfu_text(self, mfu: float | None) -> str:
        if mfu is None or self._peak_flops is None:
            return "MFU n/a"
        return f"MFU {100 * mfu:.1f} % of {self._world} x {self._peak_flops / 1e12:.4g} TFLOP/s"

    def _tokens_between(self, start: int, end: int) -> int:
        if callable(self._tokens_per_step):
            return sum(self._tokens_per_step(step) for step in range(start, end))
        return self._tokens_per_step * max(end - start, 0)


def emit(line: str) -> None:
    """Print a line and flush it, so that a log file and a terminal both show it at once."""
    print(line, file=sys.stdout, flush=True)


class Memory(NamedTuple):
    """Bytes in use now, and the most there ever were."""

    current: int
    peak: int


def memory_bytes(device: torch.device | str) -> Memory:
    """Memory of this process: allocated tensors on CUDA, the resident set on the CPU."""
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        return Memory(torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device))
    import resource

    import psutil

    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    current = psutil.Process().memory_info().rss
    # Linux updates ru_maxrss lazily, so it may lie a little below the resident set of this moment.
    return Memory(current, max(current, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit))


def peak_flops(device: torch.device | str, given: float | None = None) -> tuple[float | None, str]:
    """Peak dense bf16 FLOP/s of one device, and where the figure comes from, in words.

    Args:
        device: the device the model runs on.
        given: a figure from the user; it counts before the table.
    """
    import torch

    if given is not None:
        return given, f"{given / 1e12:.4g} TFLOP/s, as given"
    device = torch.device(device)
    if device.type != "cuda":
        return None, f"no peak is known for device type {device.type}, so MFU is not shown"
    name = torch.cuda.get_device_name(device)
    peak = peak_flops_of(name)
    if peak is None:
        return None, f"no peak is known for {name}, so MFU is not shown"
    return peak, f"{peak / 1e12:.4g} TFLOP/s, dense bf16 of {name}"


def peak_flops_of(name: str) -> float | None:
    """Peak dense bf16 FLOP/s by the name CUDA gives a device, such as ``"NVIDIA A100-SXM4-80GB"``."""
    return next((peak for pattern, peak in PEAK_BF16_FLOPS if re.search(pattern, name)), None)


def format_count(value: float) -> str:
    """Three significant digits: ``950``, ``12.3k``, ``1.24M``, ``2.50G``."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        # 0.9995 of a unit would round up to 1000 of the smaller one.
        if value >= 0.9995 * limit:
            scaled = value / limit
            return f"{scaled:.{2 if scaled < 9.995 else 1 if scaled < 99.95 else 0}f}{unit}"
    return f"{value:.0f}" if value >= 99.5 else f"{value:.3g}"


def format_memory(value: int) -> str:
    """Bytes as ``312 MiB``, from 10 GiB on as ``41.3 GiB``."""
    return f"{value / 2**30:.1f} GiB" if value >= 10 * 2**30 else f"{value / 2**20:.0f} MiB"


def format_duration(seconds: float) -> str:
    """Two units at most: ``45s``, ``2m13s``, ``3h05m``, ``2d04h``."""
    whole = round(seconds)
    for size, unit, small, small_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // small:02d}{small_unit}"
    return f"{whole}s"
