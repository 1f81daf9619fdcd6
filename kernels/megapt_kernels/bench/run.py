"""One run of the benchmark: every implementation of every case, first held against exact results, then timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megapt_kernels import build, library, registry
from megapt_kernels.bench import work
from megapt_kernels.bench.accuracy import Errors, Judge, compute, leaves_of, live, output_gradients
from megapt_kernels.bench.cases import Case, Inputs
from megapt_kernels.bench.measure import Ceilings, Clock, NotCapturable, clock_of
from megapt_kernels.bench.rivals import Rival, rivals_of
from megapt_kernels.bench.rows import Row, Writer, environment

DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}


class DeviceLost(RuntimeError):
    """An implementation left the device in a state in which this process can do nothing more with it."""


@dataclass
class Settings:
    """impls: lower-case names and kinds, or "all". seconds: to time one row. budget: seconds for all cases together,
    warm-up, compilation and exact results included; None for as long as they take."""

    impls: tuple[str, ...] = ("all",)
    passes: tuple[str, ...] = ("fwd", "bwd", "fwd+bwd")
    seconds: float = 0.3
    budget: float | None = None
    preset: str = "cpu"
    seed: int = 0


@dataclass
class Run:
    """Measures cases on one device and writes their rows."""

    device: torch.device
    dtype: torch.dtype
    settings: Settings
    writer: Writer
    say: Callable[[str], None]
    failed: bool = field(default=False, init=False)
    _judge: Judge | None = field(default=None, init=False)
    _end: float = field(default=float("inf"), init=False)  # of all cases
    _case_end: float = field(default=float("inf"), init=False)

    def start(self) -> None:
        """The ceilings and their rows; from here on the budget counts."""
        self._about = environment(self.device) | {"preset": self.settings.preset, "dtype": DTYPE_NAMES[self.dtype]}
        self._clock: Clock = clock_of(self.device)
        self._about["timing"] = self._clock.kind
        with self._clock.here():
            top = self._ceilings = Ceilings(self._clock, self.dtype, self.settings.seconds)
        copied = {"bytes": top.copy_bytes, "gb_per_s": top.copy_rate / 1e9}
        product = {"flops": 2 * top.gemm_size**3, "tflops": top.gemm_rate / 1e12}
        for name, times, shape, columns in (
            ("copy", top.copy_times, {"bytes": top.copy_bytes}, copied),
            ("gemm", top.gemm_times, {"N": top.gemm_size}, product),
        ):
            row = {"record": "ceiling", "status": "ok", "op": name, "case": "", "impl": "torch", "mode": top.mode}
            row |= self._about | _columns(times) | columns | {"shape": shape}
            self.writer.write(row)
        self.say(f"{self._about['name']}: copy {top.copy_rate / 1e9:,.0f} GB/s, {self._about['dtype']} matrix product "
                 f"{top.gemm_rate / 1e12:,.2f} TFLOP/s")  # fmt: skip
        if self.settings.budget is not None:
            self._end = time.perf_counter() + self.settings.budget

    def measure(self, case: Case, left: int = 1) -> list[Row]:
        """All rows of one case. left: cases until the end, this one among them, which share the rest of the budget."""
        begin, now = len(self.writer.rows), time.perf_counter()
        self._share = (self._end - now) / left
        self._case_end = now + self._share
        passes = [p for p in self.settings.passes if p in case.passes]
        if passes:
            with self._clock.here():
                self._measure(case, passes)
        else:
            reason = f"{case.title} is measured as {', '.join(case.passes)} only"
            self._row(case, None, None, None, "skipped", reason)
        return self.writer.rows[begin:]

    def _measure(self, case: Case, passes: list[str]) -> None:
        self._judge = None

        def make() -> Inputs:
            # New for every implementation: what one writes into its inputs is nothing to the next.
            return case.make(torch.Generator(self.device).manual_seed(self.settings.seed), self.device)

        found = [(rival, self._first(case, rival, make, passes)) for rival in self._asked(case)]
        self._judge = None
        for mode in self._clock.modes[1:]:
            for rival, right in found:
                if right is not None:
                    self._all_passes(case, rival, make(), passes, mode, *right)

    def _first(
        self, case: Case, rival: Rival, make: Callable[[], Inputs], passes: list[str]
    ) -> tuple[dict[str, Errors | None], Row] | None:
        """What an implementation computes, and its times in the first mode."""
        inputs = make()
        right = self._examine(case, rival, inputs, make)
        if right is not None:
            self._all_passes(case, rival, inputs, passes, self._clock.modes[0], *right)
        return right

    def _all_passes(
        self, case: Case, rival: Rival, inputs: Inputs, passes: list[str], mode: str,
        errors: dict[str, Errors | None], extra: Row,
    ) -> None:  # fmt: skip
        for which in passes:
            self._time(case, rival, inputs, which, mode, errors[which], extra)

    def _asked(self, case: Case) -> Iterator[Rival]:
        self._memory = self._free()
        for rival in rivals_of(case, self._memory):
            if rival.wanted(self.settings.impls, self.device):
                yield rival
            elif "all" in self.settings.impls:
                reason = "on a CPU it runs under the emulator, which is timed only where it is asked for by name"
                self._row(case, rival, None, None, "skipped", reason)

    def _examine(
        self, case: Case, rival: Rival, inputs: Inputs, make: Callable[[], Inputs]
    ) -> tuple[dict[str, Errors | None], Row] | None:
        """Errors by pass and further columns of an implementation that runs; one that does not gets its row."""
        try:
            reason = rival.reason(inputs)
            if reason is None and time.perf_counter() > self._case_end:
                reason = self._over()
            if reason is None:
                self._judge = self._judge or Judge(case, make, self._memory)
                errors = self._judge.errors(compute(case, rival.run, inputs))
                against = {"error_against": DTYPE_NAMES[self._judge.dtype]}
                return errors, against | self._resources(case, rival)
        except Exception as error:  # noqa: BLE001 whatever it is, it is this implementation's result
            self._raised(case, rival, None, None, error, {})
            return None
        self._row(case, rival, None, None, "skipped", reason)
        return None

    def _time(
        self, case: Case, rival: Rival, inputs: Inputs, which: str, mode: str, errors: Errors | None, extra: Row
    ) -> None:
        columns = dict(extra)
        if errors is not None:
            columns |= {"error": errors.error, "torch_error": errors.plain, "error_allowed": errors.allowed}
        if time.perf_counter() > self._case_end:
            self._row(case, rival, which, mode, "skipped", self._over(), columns)
            return
        try:
            before, run = _work(case, rival, inputs, which)
            times = self._clock.time(mode, before, run, self.settings.seconds)
            columns |= _columns(times) | self._speed(case, which, times.p50)
            columns["peak_bytes"] = self._clock.peak_bytes(before, run)
        except NotCapturable as error:
            status = "failed" if rival.ours else "skipped"
            self._row(case, rival, which, mode, status, f"cannot run in a CUDA graph: {error}", columns)
            return
        except Exception as error:  # noqa: BLE001
            self._raised(case, rival, which, mode, error, columns)
            return
        if errors is None or errors.within:
            self._row(case, rival, which, mode, "ok", None, columns)
        else:
            reason = f"error {errors.error:.2e} is above {errors.allowed:.2e}"
            self._row(case, rival, which, mode, "failed", reason, columns)

    def _speed(self, case: Case, which: str, p50: float) -> Row:
        moved = work.least_bytes(case.op, case.name, which, case.shape, self.dtype.itemsize)
        flops = work.matrix_flops(case.op, which, case.shape)
        copy, product = moved / self._ceilings.copy_rate * 1e6, flops / self._ceilings.gemm_rate * 1e6
        return {
            "bytes": moved,
            "flops": flops,
            "gb_per_s": moved / p50 / 1e3,
            "tflops": flops / p50 / 1e6,
            "percent_of_copy": 100 * copy / p50,
            "percent_of_copy_of_size": 100 * self._ceilings.copy_of(moved) / p50,
            "percent_of_gemm": 100 * product / p50,
            "percent_of_limit": 100 * max(copy, product) / p50,
        }

    def _resources(self, case: Case, rival: Rival) -> Row:
        """Registers per thread at most, and bytes spilled in all, of the kernels of our CUDA sources for this GPU."""
        loaded = library.loaded()
        emulated = rival.kind == "cuda" and self.device.type == "cpu"
        if rival.kind != "cuda" or emulated or loaded is None:
            return {"emulated": emulated}
        try:
            table = build.resources(loaded.path)
        except build.BuildError as error:
            self.say(f"{case.title}: no registers: {error}")
            return {"emulated": False}
        major, minor = torch.cuda.get_device_capability(self.device)
        source = registry.operation(case.op).check.__module__.rpartition(".")[2]
        kernels = [
            k for k in table if k.source == source and int(k.architecture.strip("smaf_")) == 10 * major + minor
        ]
        if not kernels:
            return {"emulated": False}
        return {
            "emulated": False,
            "registers": max(k.registers for k in kernels),
            "spills": sum(k.spill_stores + k.spill_loads for k in kernels),
        }

    def _over(self) -> str:
        return f"the {self._share:.3g} s for this case were over"

    def _raised(
        self, case: Case, rival: Rival, which: str | None, mode: str | None, error: Exception, columns: Row
    ) -> None:
        """The row of an implementation that raised. DeviceLost if nothing else can run in this process."""
        status, reason = "failed", f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
            status = "failed" if rival.ours else "skipped"
        try:
            self._clock.synchronize()
        except RuntimeError as lost:
            self._row(case, rival, which, mode, "failed", f"{reason}; the device answers no more", columns)
            raise DeviceLost(f"{case.title}, {rival.name}: {reason}") from lost
        self._row(case, rival, which, mode, status, reason, columns)

    def _free(self) -> int | None:
        if self.device.type != "cuda":
            return None
        torch.cuda.empty_cache()
        return int(0.6 * torch.cuda.mem_get_info(self.device)[0])

    def _row(
        self, case: Case, rival: Rival | None, which: str | None, mode: str | None, status: str, reason: str | None,
        columns: Row | None = None,
    ) -> None:  # fmt: skip
        row: Row = {"record": "measurement", "status": status, "reason": reason, "op": case.op, "case": case.name}
        row |= {"impl": rival and rival.name, "kind": rival and rival.kind, "pass": which, "mode": mode}
        self.writer.write(row | self._about | {"shape": case.shape} | (columns or {}))
        self.failed |= status == "failed"


def _columns(times: Any) -> Row:
    return {"p20_us": times.p20, "p50_us": times.p50, "p80_us": times.p80, "repeats": times.repeats}


def _work(
    case: Case, rival: Rival, inputs: Inputs, which: str
) -> tuple[Callable[[], Any] | None, Callable[[Any], Any]]:
    """What is done before the time counts, and what is timed."""
    leaves = leaves_of(case, inputs)
    if which == "fwd":
        # In place, with a graph of autograd, each run would hang on the one before it.
        return None, lambda _: rival.run(inputs if case.in_place else live(case, inputs, leaves))

    def forward() -> tuple[Tensor, ...]:
        return rival.run(live(case, inputs, leaves))

    back = output_gradients(case, forward())

    def backward(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # What the forward saved must outlive the recording of a graph, which reads it at every replay.
        keep = outputs[0].is_cuda and torch.cuda.is_current_stream_capturing()
        return torch.autograd.grad(outputs, leaves, back, retain_graph=keep)

    if which == "bwd":
        return forward, backward
    return None, lambda _: backward(forward())
