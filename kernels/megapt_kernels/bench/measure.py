"""Timing one piece of work on a GPU or a CPU, and what the device can do at best."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

Work = Callable[[], Any]


@dataclass(frozen=True)
class Times:
    """Microseconds: 20th, 50th and 80th percentile of `repeats` runs, each on cold caches on a GPU."""

    p20: float
    p50: float
    p80: float
    repeats: int

    @staticmethod
    def of(seconds: list[float]) -> Times:
        ordered = sorted(seconds)
        p20, p50, p80 = (ordered[round(q * (len(ordered) - 1))] * 1e6 for q in (0.2, 0.5, 0.8))
        return Times(p20, p50, p80, len(ordered))


class NotCapturable(RuntimeError):
    """The work cannot become a CUDA graph: it waits for the device, or allocates in a way that a graph cannot."""


class CpuClock:
    """Wall time of calls on this thread. Caches hold what the call before left there."""

    kind = "wall clock"
    modes = ("eager",)

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def here(self) -> AbstractContextManager[None]:
        return nullcontext()

    def time(self, mode: str, before: Work | None, work: Callable[[Any], Any], seconds: float) -> Times:
        """before: makes what the work gets, outside the time. Ends after `seconds`, but not before 5 runs."""
        found: list[float] = []
        end = time.perf_counter() + seconds
        work(before() if before else None)
        while len(found) < 5 or (time.perf_counter() < end and len(found) < 1000):
            given = before() if before else None
            started = time.perf_counter()
            made = work(given)
            found.append(time.perf_counter() - started)
            del made, given
        return Times.of(found)

    def peak_bytes(self, before: Work | None, work: Callable[[Any], Any]) -> int | None:
        """A CPU's allocator keeps no count."""
        return None

    def synchronize(self) -> None:
        pass


class CudaClock:
    """CUDA events around the work, after the L2 cache was filled with something else.

    A buffer of four times the cache is written before every run: the run finds nothing of its inputs there, and has to
    write back as much of others' data as it leaves of its own. Eager runs hold what Python and the launches add where
    the GPU waits for them; graph runs are the kernels alone.
    """

    kind = "cuda events"
    modes = ("cudagraph", "eager")

    def __init__(self, device: torch.device) -> None:
        self.device = device
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._cold = torch.empty(max(4 * cache, 1 << 28), dtype=torch.uint8, device=device)
        self._stream = torch.cuda.Stream(device)

    @contextmanager
    def here(self) -> Iterator[None]:
        """Where inputs are made and work is done. A graph is recorded on a stream of its own, and a backward pass runs
        on its forward's: with one stream for everything no other has to be waited for."""
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            yield
        torch.cuda.synchronize(self.device)

    def time(self, mode: str, before: Work | None, work: Callable[[Any], Any], seconds: float) -> Times:
        """As CpuClock.time; in mode "cudagraph" `before` runs once, and the work is replayed on what it made."""
        if mode == "eager":
            return self._events(before, work, seconds)
        for _ in range(2):  # what compiles or allocates at first does so outside the recording
            work(before() if before else None)
        given = before() if before else None
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                made = work(given)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            torch.cuda.synchronize(self.device)
            raise NotCapturable(str(error).splitlines()[0]) from error
        times = self._events(None, lambda _: graph.replay(), seconds)
        del made, given  # lived as long as the graph read and wrote there
        return times

    def _events(self, before: Work | None, work: Callable[[Any], Any], seconds: float) -> Times:
        for _ in range(2):
            work(before() if before else None)
        self._stream.synchronize()
        found: list[float] = []
        end = time.perf_counter() + seconds
        while len(found) < 10 or (time.perf_counter() < end and len(found) < 2000):
            pairs = []
            for _ in range(10):
                given = before() if before else None
                self._cold.zero_()
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                made = work(given)
                stop.record()
                pairs.append((start, stop))
                del made, given
            self._stream.synchronize()
            found += [start.elapsed_time(stop) / 1e3 for start, stop in pairs]
        return Times.of(found)

    def peak_bytes(self, before: Work | None, work: Callable[[Any], Any]) -> int | None:
        """Most that one run allocates beyond what was there."""
        given = before() if before else None
        torch.cuda.synchronize(self.device)
        held = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        made = work(given)
        torch.cuda.synchronize(self.device)
        peak = torch.cuda.max_memory_allocated(self.device) - held
        del made
        return peak

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)


Clock = CpuClock | CudaClock


def clock_of(device: torch.device) -> Clock:
    return CudaClock(device) if device.type == "cuda" else CpuClock(device)


# What the device can do

# By device type: bytes that the copy reads and writes in all, and the size of the square matrix product. Both are far
# larger than the caches, and the product large enough to keep all multiprocessors busy.
LARGEST = {"cuda": (1 << 33, 8192), "cpu": (1 << 28, 768)}


class Ceilings:
    """The device's copy bandwidth and matrix product speed, measured here; copies of a given size on demand."""

    def __init__(self, clock: Clock, dtype: torch.dtype, seconds: float) -> None:
        self.clock, self.dtype, self.seconds = clock, dtype, seconds
        self.mode = clock.modes[0]
        self._generator = torch.Generator(clock.device).manual_seed(0)
        self._copies: dict[int, Times] = {}
        self.copy_bytes, self.gemm_size = LARGEST[clock.device.type]
        self.copy_times = self._copy(self.copy_bytes)
        # bytes per second, counting bytes read and bytes written
        self.copy_rate = self.copy_bytes / self.copy_times.p50 * 1e6
        self.gemm_times = self._gemm(self.gemm_size)
        self.gemm_rate = 2 * self.gemm_size**3 / self.gemm_times.p50 * 1e6

    def copy_of(self, moved: int) -> float:
        """Microseconds of a copy that reads and writes `moved` bytes in all, rounded up to a power of 2^(1/4)."""
        step = math.ceil(4 * math.log2(max(moved, 4096)))
        moved_here = min(int(2 ** (step / 4)), self.copy_bytes)
        if moved_here not in self._copies:
            self._copies[moved_here] = self._copy(moved_here)
        return self._copies[moved_here].p50 * moved / moved_here

    def _copy(self, moved: int) -> Times:
        # Not with the default generator, which a recording that failed leaves unusable.
        source = torch.empty(max(1, moved // 8), dtype=torch.int32, device=self.clock.device)
        source.random_(generator=self._generator)
        target = torch.empty_like(source)
        return self.clock.time(self.mode, None, lambda _: target.copy_(source), self.seconds)

    def _gemm(self, size: int) -> Times:
        # Random operands: of zeros the matrix units take less power, and clock higher.
        shape = (2, size, size)
        a, b = torch.randn(shape, generator=self._generator, device=self.clock.device, dtype=self.dtype)
        out = torch.empty(size, size, dtype=self.dtype, device=self.clock.device)
        return self.clock.time(self.mode, None, lambda _: torch.mm(a, b, out=out), self.seconds)
