"""How far a build is: a bar on a terminal, a line now and then elsewhere; both on standard error."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from megapt.data.build_state import State

if TYPE_CHECKING:
    from rich.progress import Progress

_LINE_SECONDS = 10.0
_BAR_SECONDS = 0.2


class BuildProgress:
    """Shows what `state` says, when told that it has changed. `total`: bytes of all input files, 0 where unknown."""

    def __init__(self, show: bool, total: int, state: State) -> None:
        self._show, self._total, self._state = show, total, state
        self._bar: Progress | None = None

    def __enter__(self) -> Self:
        self._began = self._shown = time.monotonic()
        self._drawn = -1
        self._start = (self._state.used, self._state.bytes, self._state.documents)
        if self._show and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            # Drawn by `update` alone: a thread that draws would keep workers from starting by fork.
            self._bar = Progress(TextColumn("tokenizing"), BarColumn(), TextColumn("{task.fields[text]}"),
                                 console=Console(stderr=True), auto_refresh=False)
            self._bar.add_task("tokenizing", total=self._total or None, text="")
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if self._show and kind is None and self._drawn != self._state.used:
            self._draw()
        if self._bar is not None:
            self._bar.stop()

    def update(self) -> None:
        """The state has changed."""
        now = time.monotonic()
        if self._show and now - self._shown >= (_LINE_SECONDS if self._bar is None else _BAR_SECONDS):
            self._shown = now
            self._draw()

    def _draw(self) -> None:
        self._drawn = self._state.used
        if self._bar is None:
            print(f"tokenizing: {self._text()}", file=sys.stderr, flush=True)
        else:
            self._bar.update(self._bar.task_ids[0], completed=self._state.used, text=self._text(), refresh=True)

    def _text(self) -> str:
        state, seconds = self._state, max(time.monotonic() - self._began, 1e-9)
        used, read, documents = self._start
        parts = [f"{state.documents:,} documents", f"{(state.documents - documents) / seconds:,.0f}/s",
                 f"{(state.bytes - read) / 1e6 / seconds:.1f} MB/s"]
        if self._total:
            share = min(state.used / self._total, 1.0)
            parts.insert(0, f"{share:.0%}")
            if share < 1 and state.used > used:
                left = round((self._total - state.used) / (state.used - used) * seconds)
                parts.append(f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left")
        return ", ".join(parts)
