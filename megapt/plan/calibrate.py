"""Measures the device at hand and writes it down as a hardware file that `megapt plan` reads.

Copies, products, attention and the start of kernels are timed one by one, then a whole layer, so that the file knows
how much slower kernels run in a step. Where several ranks run, the link between them is measured as well.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import yaml

from megapt.batch import MicroBatch
from megapt.config import ModelConfig
from megapt.errors import UserError
from megapt.files import write_whole
from megapt.mesh import Axis, all_gather
from megapt.model.decoder import Layer
from megapt.model.positions import rotary_table
from megapt.model.table import parameter_table
from megapt.parallel.pipeline.stages import DTYPES
from megapt.parallel.tensor import ParameterFactory, TensorParallel
from megapt.plan import hardware
from megapt.plan.cost import MEGAPT, Rates, Shape, layer_cost, product, rates
from megapt.plan.hardware import Hardware

# By the name that CUDA gives a device: whose datasheet figures it has.
_KNOWN = {"GB200": "gb200", "B200": "b200", "H200": "h200", "H100 PCIe": "h100-pcie", "H100": "h100"}
_KNOWN |= {"A100-SXM4-40GB": "a100-40", "A100": "a100-80", "MI300X": "mi300x"}


def calibrate(out: str | Path, device: torch.device | None = None, seconds: float = 60.0) -> Hardware:
    """Measure `device` (default: a GPU if there is one, else the CPU) in about `seconds` and write `out`.

    What is not measured (links without other ranks, peaks of known GPUs, the network's topology) is taken from the
    file of that GPU, or of a CPU core. Under torchrun every rank measures its own device at once and rank 0 writes.
    Raises UserError for a name that is no YAML file's and for a device that is not there.
    """
    path = Path(out)
    if path.suffix not in (".yaml", ".yml"):
        raise UserError(f"a hardware file's name ends in .yaml, not {path.name!r}; try {path.stem or 'hardware'}.yaml")
    if not 0 < seconds < math.inf:
        raise UserError(f"calibrating takes a positive number of seconds, not {seconds}; 60 is enough for any device")
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
        raise UserError(f"device {device} cannot be measured here; there is cpu" + (" and cuda" * _cuda()))
    bench = Bench(device, seconds / 12)
    name, base = _base(device)
    tree = base.model_dump() | {"name": name}
    tree["launch"] = bench.launch()
    tree["memory"] |= {"gib": _memory(device), "bandwidth": bench.copy() / 1e9, "share": 1.0}
    _products(tree, bench, known=base.name != hardware.load("cpu").name)
    tree["attention"] = bench.attention(Hardware.model_validate(tree).peak_flops(bench.precision))
    tree["host"] = bench.host() / 1e9
    tree["storage"] = _storage(path.absolute().parent) / 1e9
    tree["storage_total"] = max(tree["storage_total"], tree["storage"])
    if dist.is_initialized() and dist.get_world_size() > 1:
        inside = dist.get_world_size() == int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
        tree["node" if inside else "network"] |= bench.link()
    tree["in_step"] = 1.0
    tree["in_step"] = bench.layer(Hardware.model_validate(tree))
    made = Hardware.model_validate(tree)
    if not dist.is_initialized() or dist.get_rank() == 0:
        head = f"# Measured by `megapt plan calibrate` on {name}, torch {torch.__version__}.\n"
        write_whole(path, (head + yaml.safe_dump(_rounded(tree), sort_keys=False)).encode())
    return made


def _cuda() -> bool:
    return torch.cuda.is_available()


def _base(device: torch.device) -> tuple[str, Hardware]:
    """The device's name, and the hardware whose datasheet holds for it: a CPU core's where none is known."""
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"CPU, {threads} thread{'s' * (threads > 1)}", hardware.load("cpu")
    name = torch.cuda.get_device_name(device)
    known = next((file for text, file in _KNOWN.items() if text in name), None)
    if known is not None:
        return name, hardware.load(known)
    units = torch.cuda.get_device_properties(device).multi_processor_count
    return name, hardware.load("cpu").what_if([f"gemm.units={units}", "gemm.depth=128", "host=20"])


def _memory(device: torch.device) -> float:
    """GiB of the device."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory) / 2**30
    import psutil

    return float(psutil.virtual_memory().total) / 2**30


@dataclass(frozen=True)
class Bench:
    """Times operations on a device, each for about `share` seconds."""

    device: torch.device
    share: float

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def precision(self) -> str:
        """Of attention and the layer: what models are trained in there."""
        return "bf16" if self.cuda else "fp32"

    def time(self, operation: Callable[[], Any], share: float | None = None) -> float:
        """Seconds of one call: what a fifth of them stay below, of five at least, since other programs only add."""
        budget = self.share if share is None else share
        operation()
        self.wait()
        found: list[float] = []
        ends = time.perf_counter() + budget
        while len(found) < 5 or time.perf_counter() < ends:
            start = time.perf_counter()
            operation()
            self.wait()
            found.append(time.perf_counter() - start)
        return sorted(found)[len(found) // 5]

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def launch(self) -> float:
        """Seconds in which the host starts one kernel."""
        x = torch.zeros(1, device=self.device)

        def many() -> None:
            for _ in range(200):
                x.add_(1.0)

        return self.time(many) / 200

    def copy(self) -> float:
        """Bytes per second, read and written ones both counted."""
        x = torch.ones(1 << (28 if self.cuda else 24), dtype=torch.float32, device=self.device)
        y = torch.empty_like(x)
        return 2 * x.nbytes / self.time(lambda: y.copy_(x))

    def host(self) -> float:
        """Bytes per second between the host's memory and the device's."""
        x = torch.ones(1 << 24, dtype=torch.float32, pin_memory=self.cuda)
        y = torch.empty_like(x, device=self.device)
        return x.nbytes / self.time(lambda: y.copy_(x, non_blocking=True))

    def product(self, shape: tuple[int, int, int], precision: str, share: float) -> float:
        """Seconds of [m, k] x [k, n]."""
        m, n, k = shape
        a = torch.randn(m, k, device=self.device).to(DTYPES[precision])
        b = torch.randn(k, n, device=self.device).to(DTYPES[precision])
        out = a @ b
        return self.time(lambda: torch.mm(a, b, out=out), share)

    def attention(self, peak: float) -> dict[str, float]:
        """Shares of the peak that causal attention reaches forward and backward, and tokens at which it is half."""
        heads, width = (16, 128) if self.cuda else (2, 128)
        lengths = (1024, 4096, 16384) if self.cuda else (128, 256, 512)
        forward, backward = [], []
        for length in lengths:
            shape = (1, heads, length, width)
            q, k, v = (
                torch.randn(shape, device=self.device, dtype=DTYPES[self.precision], requires_grad=True)
                for _ in range(3)
            )
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            gradient = torch.randn_like(y)
            work = 4.0 * heads * width * length * (length + 1) / 2
            with torch.no_grad():
                ahead = self.time(
                    lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v, is_causal=True),  # type: ignore[misc]
                    self.share / 3,
                )
            back = self.time(
                lambda y=y, g=gradient, qkv=(q, k, v): torch.autograd.grad(y, qkv, g, retain_graph=True),  # type: ignore[misc]
                self.share / 3,
            )
            forward.append(work / ahead / peak)
            backward.append(2.5 * work / back / peak)
        ahead_at_most, half = _saturation(lengths, forward)
        longest = lengths[-1] / (lengths[-1] + half)
        return {"forward": _share(ahead_at_most), "backward": _share(backward[-1] / longest), "half_at": half}

    def link(self) -> dict[str, float]:
        """Latency and bandwidth of all-gathers over all ranks: alpha per hop and beta of a least-squares line."""
        world = dist.get_world_size()
        points = []
        for size in (1 << 10, 1 << 16, 1 << 20, 1 << (28 if self.cuda else 23)):
            part = torch.ones(size // 4, device=self.device)
            out = torch.empty(world * len(part), device=self.device)
            found = []
            for _ in range(7):
                dist.barrier()
                start = time.perf_counter()
                all_gather(out, part)
                self.wait()
                found.append(time.perf_counter() - start)
            points.append((part.nbytes * (world - 1), sorted(found)[3]))
        (_, least), (most, longest) = points[0], points[-1]
        bandwidth = (most - points[0][0]) / max(longest - least, 1e-9)
        return {"bandwidth": bandwidth / 1e9, "latency": least / (world - 1), "share": 1.0}

    def layer(self, measured: Hardware) -> float:
        """Speed of kernels within a layer's forward and backward over that which the measured figures predict."""
        hidden, tokens = (4096, 4096) if self.cuda else (256, 256)
        sizes = {"layers": 1, "hidden": hidden, "heads": hidden // 64, "ffn": 3 * hidden, "vocabulary": 64}
        model = ModelConfig.model_validate(sizes | {"max_sequence": tokens})
        axis, dtype = Axis(0, 1, None), DTYPES[self.precision]
        factory = ParameterFactory(parameter_table(model), TensorParallel(axis), 0, dtype, self.device)
        layer = Layer(model, factory, 0)
        batch = MicroBatch(torch.zeros(1, tokens, dtype=torch.long, device=self.device), None)
        wide = torch.promote_types(dtype, torch.float32)
        rotary = rotary_table(model, tokens, self.device, wide)
        x = torch.randn(tokens, hidden, device=self.device).to(dtype).requires_grad_()

        def step() -> None:
            layer(x, batch, rotary).sum().backward()
            for parameter in layer.parameters():
                parameter.grad = None
            x.grad = None

        shape = Shape(1, False, 1, tokens, self.precision, False)
        cost = layer_cost(model, None, "none", shape, measured, MEGAPT)
        return _share((cost.forward + cost.input + cost.weight) / self.time(step, 2 * self.share))


def _products(tree: dict[str, Any], bench: Bench, known: bool) -> None:
    """Peaks, share and depth of products into the tree: those whose model of a product comes nearest to a range of
    shapes. Of a known device the peak is its datasheet's."""
    precisions = ("bf16",) if bench.cuda else ("fp32", "bf16", "fp64")
    if not known:
        tree["peak"] = {precision: tree["peak"][precision] for precision in precisions}
    sides = (1024, 4096, 8192) if bench.cuda else (128, 384, 768)
    shapes = [(side, side, side) for side in sides]
    shapes += [(sides[1], sides[1], sides[0] // 8), (sides[0] // 8, sides[1], sides[1]), (sides[2], sides[0], sides[1])]
    for precision in precisions:
        every = bench.share * 3 / len(precisions) / len(shapes)
        seconds = [bench.product(shape, precision, every) for shape in shapes]
        speed, depth = _fit_products(Hardware.model_validate(tree), precision, shapes, seconds)
        if precision == precisions[0]:
            tree["gemm"]["depth"] = depth
        if known:
            peak = Hardware.model_validate(tree).peak_flops(precision)
            tree["gemm"] |= {"share": _share(speed / peak), "sustained": _sustained(bench, precision, shapes[2])}
        else:
            tree["gemm"] |= {"share": 1.0, "sustained": 1.0}
            tree["peak"][precision] = speed / 1e12


def _sustained(bench: Bench, precision: str, shape: tuple[int, int, int]) -> float:
    """Speed of a product after having run for a while over that in the beginning."""
    before = bench.product(shape, precision, bench.share / 20)
    bench.product(shape, precision, 3 * bench.share)
    return _share(before / bench.product(shape, precision, bench.share / 4))


def _fit_products(
    base: Hardware, precision: str, shapes: Sequence[tuple[int, int, int]], seconds: Sequence[float]
) -> tuple[float, float]:
    """FLOP/s of large products, and the depth, with the least mean error of log(predicted / measured)."""
    best: tuple[float, float, float] = (math.inf, 0.0, 0.0)
    for depth in (0, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512):
        known = rates(base, precision)
        # The speed at which the shape that is fastest per FLOP takes what it took.
        speeds = []
        for shape, took in zip(shapes, seconds, strict=True):
            one = product(_changed(known, 1.0, depth), *shape)
            speeds.append(one / took)
        for speed in (sorted(speeds)[len(speeds) // 2], max(speeds)):
            guess = _changed(known, speed, depth)
            errors = [abs(math.log(product(guess, *s) / took)) for s, took in zip(shapes, seconds, strict=True)]
            best = min(best, (sum(errors), speed, float(depth)))
    return best[1], best[2]


def _changed(known: Rates, flops: float, depth: float) -> Rates:
    """With other constants; memory as fast as is known."""
    return replace(known, flops=flops, depth=depth)


def _saturation(lengths: Sequence[int], speeds: Sequence[float]) -> tuple[float, float]:
    """(most, half) of speed = most x length / (length + half), by least squares of 1 / speed over 1 / length."""
    x, y = [1 / length for length in lengths], [1 / speed for speed in speeds]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)
    start = mean_y - slope * mean_x
    if slope <= 0 or start <= 0:  # no saturation seen: as fast as the fastest, at any length
        return max(speeds), 0.0
    return 1 / start, slope / start


def _share(value: float) -> float:
    return min(1.0, max(1e-3, value))


def _storage(folder: Path) -> float:
    """Bytes per second that reach the disk of a folder."""
    data = os.urandom(1 << 24)
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(2):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return 2 * len(data) / (time.perf_counter() - start)


def _rounded(value: Any) -> Any:
    """Four digits of every number."""
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value
