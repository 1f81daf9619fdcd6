"""What every rank computed when: measured by the runtime or simulated; as numbers, JSON, text, picture and trace."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from megapt.errors import UserError
from megapt.files import StrPath, open_whole, write_whole
from megapt.parallel.pipeline.actions import Action, Kind

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# By kind of compute: the name in legends and traces, and the colours in pictures.
_LOOKS = {
    Kind.FORWARD: ("forward", "Blues"),
    Kind.BACKWARD: ("backward", "Oranges"),
    Kind.BACKWARD_INPUT: ("backward input", "Purples"),
    Kind.BACKWARD_WEIGHT: ("backward weight", "Greens"),
}
_WIDTH = 14.0  # of a picture, in inches


class Span(NamedTuple):
    """One compute action of a rank, in seconds from the step's start."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """`ranks[rank]` are the compute actions of a pipeline rank in the order in which they ran.

    Raises UserError where a rank's actions overlap, move tensors rather than compute, or end before they start.
    """

    ranks: list[list[Span]]

    def __post_init__(self) -> None:
        for rank, spans in enumerate(self.ranks):
            free = 0.0
            for action, start, end in spans:
                if not action.kind.is_compute:
                    raise UserError(f"a timeline holds compute actions, got {action} on rank {rank}")
                if not free <= start <= end:
                    raise UserError(
                        f"a rank computes one action at a time, in order, from the step's start on; got {action} of "
                        f"rank {rank} from {start} to {end} s where {free} s have passed"
                    )
                free = end

    @property
    def chunks(self) -> int:
        """How many model chunks the actions name."""
        return 1 + max((span.action.chunk for spans in self.ranks for span in spans), default=0)

    @property
    def step(self) -> float:
        """Seconds from the step's start until the last rank's last action ends."""
        return max((spans[-1].end for spans in self.ranks if spans), default=0.0)

    @property
    def busy(self) -> list[float]:
        """Seconds that each rank computes."""
        return [sum(end - start for _, start, end in spans) for spans in self.ranks]

    @property
    def bubble(self) -> float:
        """Idle over busy time of all ranks in the step, as the literature counts it: step / ideal - 1.

        The ideal is the mean of what the ranks compute, so that an uneven split counts as idle time too. A bubble of
        0.25 makes the step 1.25 times as long as the ideal.
        """
        return self._excess(self.step)

    @property
    def rank_bubbles(self) -> list[float]:
        """Idle over busy time of each rank in the step."""
        return [self.step / busy - 1 if busy else 0.0 for busy in self.busy]

    @property
    def span_bubble(self) -> float:
        """Like `bubble`, with the longest time from a rank's first action to its last in place of the step.

        This is how arXiv 2401.10241 counts: ranks may begin the next step while others still end this one, which
        needs an optimizer that does not wait for a norm over all ranks. With one that waits, `bubble` is what counts.
        """
        return self._excess(max((spans[-1].end - spans[0].start for spans in self.ranks if spans), default=0.0))

    def _excess(self, seconds: float) -> float:
        total = sum(self.busy)
        return seconds * len(self.ranks) / total - 1 if total else 0.0

    def to_json(self) -> str:
        """`{"ranks": [[{"action": "F3.0", "start": seconds, "end": seconds}, ...], ...]}`."""
        ranks = [[{"action": str(a), "start": start, "end": end} for a, start, end in spans] for spans in self.ranks]
        return json.dumps({"ranks": ranks})

    @staticmethod
    def from_json(text: str) -> Timeline:
        """What `to_json` wrote. Raises UserError for any other text."""
        try:
            ranks = json.loads(text)["ranks"]
            read = [
                [Span(Action.parse(span["action"]), float(span["start"]), float(span["end"])) for span in spans]
                for spans in ranks
            ]
        except UserError:
            raise
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                'a timeline is JSON of the form {"ranks": [[{"action": "F3.0", "start": 0.0, "end": 0.1}, ...], ...]}, '
                f"got {text[:60]!r} ({error})"
            ) from error
        return Timeline(read)


def text(timeline: Timeline, width: int) -> str | None:
    """One line per rank, with as much of each action's name as `width` columns allow; None where nothing fits.

    The shortest action says how wide a second is; empty where no time passes. Dashes go on with the action before
    them, dots are idle time.
    """
    shortest = min((s.end - s.start for row in timeline.ranks for s in row if s.end > s.start), default=None)
    if shortest is None:
        return ""
    labels = [[_label(span.action, timeline.chunks) for span in row] for row in timeline.ranks]
    margin = len(f"rank {len(timeline.ranks) - 1} ")
    for longest in (max(len(label) for row in labels for label in row) + 1, 1):
        scale = longest / shortest  # columns per second
        if margin + timeline.step * scale <= width:
            break
    else:
        return None
    columns = round(timeline.step * scale)
    lines = []
    for rank, row in enumerate(timeline.ranks):
        line = ["."] * columns
        for label, (_, start, end) in zip(labels[rank], row, strict=True):
            first, last = round(start * scale), round(end * scale)
            line[first:last] = label[:longest].ljust(last - first, "-")[: last - first]
        lines.append(f"{f'rank {rank} ':<{margin}}{''.join(line)}")
    return "\n".join(lines)


def _label(action: Action, chunks: int) -> str:
    """The action's name, without the chunk where there is one only."""
    return str(action) if chunks > 1 else f"{action.kind.value}{action.micro_batch}"


def chrome_trace(timeline: Timeline, path: StrPath) -> None:
    """Write the timeline for chrome://tracing or ui.perfetto.dev: one row per rank, one category per kind."""
    events: list[dict[str, Any]] = []
    for rank, spans in enumerate(timeline.ranks):
        events.append({"name": "thread_name", "ph": "M", "pid": 0, "tid": rank, "args": {"name": f"rank {rank}"}})
        for action, start, end in spans:
            events.append(
                {
                    "name": str(action),
                    "cat": _LOOKS[action.kind][0],
                    "ph": "X",
                    "ts": start * 1e6,
                    "dur": (end - start) * 1e6,
                    "pid": 0,
                    "tid": rank,
                    "args": {"micro_batch": action.micro_batch, "chunk": action.chunk},
                }
            )
    write_whole(path, json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}).encode())


def draw(panels: Mapping[str, Timeline], path: StrPath) -> None:
    """Write a PNG with one panel per timeline under its title, all on one scale of time.

    One row per rank, one colour per kind, darker by chunk, with micro-batch numbers where they fit.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    heights = [len(timeline.ranks) for timeline in panels.values()]
    figure = Figure(figsize=(_WIDTH, sum(0.32 * rows + 0.75 for rows in heights) + 0.5), dpi=120, layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True, height_ratios=[rows + 1 for rows in heights])
    longest = max(timeline.step for timeline in panels.values())
    unit, per_second = ("s", 1.0) if longest >= 1 else ("ms", 1e3)
    for (title, timeline), (axis,) in zip(panels.items(), axes, strict=True):
        axis.set_title(f"{title}: {timeline.step * per_second:.4g} {unit}, bubble {timeline.bubble:.1%}", fontsize=10)
        axis.set_xlim(0, longest * per_second or 1)
        axis.set_ylim(len(timeline.ranks) - 0.5, -0.5)
        axis.set_yticks(range(len(timeline.ranks)), [f"rank {rank}" for rank in range(len(timeline.ranks))], fontsize=8)
        axis.tick_params(axis="x", labelsize=8)
        axis.tick_params(axis="y", length=0)
        axis.spines[["top", "right", "left"]].set_visible(False)
        _draw_rows(axis, timeline, per_second, longest)
    axes[-1][0].set_xlabel(f"time ({unit})", fontsize=8)
    shown = {(s.action.kind, s.action.chunk) for t in panels.values() for row in t.ranks for s in row}
    chunks = 1 + max((chunk for _, chunk in shown), default=0)
    legend = [
        Patch(color=_colour(kind, chunk, chunks), label=_LOOKS[kind][0] + (f", chunk {chunk}" if chunks > 1 else ""))
        for kind in _LOOKS
        for chunk in range(chunks)
        if (kind, chunk) in shown
    ]
    if legend:
        figure.legend(handles=legend, loc="outside lower center", ncols=min(len(legend), 8), fontsize=8, frameon=False)
    with open_whole(path) as file:
        figure.savefig(file, format="png")


def _draw_rows(axis: Axes, timeline: Timeline, per_second: float, longest: float) -> None:
    bars: dict[tuple[int, Kind, int], list[tuple[float, float]]] = defaultdict(list)
    for rank, spans in enumerate(timeline.ranks):
        for action, start, end in spans:
            bars[rank, action.kind, action.chunk].append((start * per_second, (end - start) * per_second))
            points = (end - start) / longest * (_WIDTH - 1) * 72 if longest else 0.0
            number = str(action.micro_batch)
            size = min(7.0, points / (0.7 * len(number)))
            if size >= 5:
                middle, dark = (start + end) / 2 * per_second, action.chunk > 0 and action.chunk >= timeline.chunks / 2
                colour = "white" if dark else "black"
                axis.text(middle, rank, number, ha="center", va="center", fontsize=size, color=colour)
    for (rank, kind, chunk), places in bars.items():
        colours = _colour(kind, chunk, timeline.chunks)
        axis.broken_barh(places, (rank - 0.45, 0.9), facecolors=colours, edgecolor="white", linewidth=0.4)


def _colour(kind: Kind, chunk: int, chunks: int) -> tuple[float, float, float, float]:
    """From light to dark by chunk."""
    from matplotlib import colormaps

    return colormaps[_LOOKS[kind][1]](0.4 + 0.4 * chunk / max(chunks - 1, 1))
