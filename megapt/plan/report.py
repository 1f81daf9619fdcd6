"""A plan as one HTML file: tables and pictures, nothing from outside, no JavaScript."""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Sequence
from html import escape
from pathlib import Path

from megapt.files import StrPath, write_whole
from megapt.plan import pictures
from megapt.plan.flops import CONVENTION
from megapt.plan.search import Option, Plan, room
from megapt.plan.table import gib, loss, memory_groups, memory_items, summary, title

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1200px; padding: 0 1em; color: #222; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
table { display: block; overflow-x: auto; }
th, td { padding: 3px 9px; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th { background: #f4f4f4; text-align: right; } td.text, th.text { text-align: left; }
tr.best td { background: #eef6ee; font-weight: 600; }
img { max-width: 100%; height: auto; } pre { background: #f7f7f7; padding: 1em; overflow-x: auto; font-size: 12.5px; }
.small { color: #555; font-size: 13px; white-space: pre-line; }
"""


def draw(plan: Plan, folder: Path) -> dict[str, Path]:
    """The pictures of a plan as PNG files in a folder, each under its heading."""
    made = {"Memory of each stage": folder / "memory.png"}
    pictures.memory(plan, plan.best, folder / "memory.png")
    if plan.best.layout.pp > 1:
        made["The pipeline's timeline"] = folder / "timeline.png"
        pictures.timeline(plan.best, folder / "timeline.png")
    points = pictures.scaling(plan)
    if len(points) > 1:
        made["More and fewer GPUs"] = folder / "scaling.png"
        pictures.scaling_curves(plan, points, folder / "scaling.png")
    return made


def write(
    path: StrPath,
    name: str,
    plan: Plan,
    rows: Sequence[Option],
    command: str,
    yaml: str,
    notes: Sequence[str] = (),
    drawn: dict[str, Path] | None = None,
) -> None:
    """The report. yaml: the chosen config's; notes: further lines; drawn: what `draw` gave, if it has been called."""
    if drawn is None:
        with tempfile.TemporaryDirectory(prefix="plan-") as folder:
            shown = _inline(draw(plan, Path(folder)))
    else:
        shown = _inline(drawn)
    best = plan.best
    parts = [
        f"<h1>{escape(name)}: {escape(str(best.layout))}</h1>",
        f"<p>{escape(title(plan))}</p><p class=small>{escape(command)}</p>",
        "".join(f"<p>{escape(note)}</p>" for note in notes),
        "<h2>Ranking</h2>", _ranking(plan, rows), f"<p class=small>{escape(summary(plan))}</p>",
        "<h2>Where a step's time goes</h2>", _times(rows),
        *(f"<h2>{escape(heading)}</h2>{image}" for heading, image in shown.items()),
        "<h2>What each stage's ranks hold</h2>", _stages(plan, best),
        "<h2>The best of each tensor and pipeline size</h2>", _ranking(plan, plan.of_each_cell()),
        "<h2>Throughput against memory</h2>",
        "<p>Layouts that no other one beats in both.</p>", _ranking(plan, plan.front),
        "<h2>The config</h2>", f"<pre>{escape(yaml)}</pre>",
        f"<p class=small>{escape(CONVENTION)}</p>",
    ]  # fmt: skip
    head = f"<meta charset=utf-8><title>{escape(name)}</title><style>{_STYLE}</style>"
    page = f"<!doctype html>\n<html lang=en><head>{head}</head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    write_whole(path, page.encode())


def _inline(drawn: dict[str, Path]) -> dict[str, str]:
    return {
        heading: f'<img alt="{escape(heading)}" src="data:image/png;base64,'
        f'{base64.b64encode(path.read_bytes()).decode()}">'
        for heading, path in drawn.items()
    }


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], text: set[int], best: int | None = None) -> str:
    def row(cells: Sequence[str], tag: str, mark: str = "") -> str:
        kinds = (" class=text" if column in text else "" for column in range(len(cells)))
        made = (f"<{tag}{kind}>{escape(cell)}</{tag}>" for cell, kind in zip(cells, kinds, strict=True))
        return f"<tr{mark}>" + "".join(made) + "</tr>"

    body = [row(cells, "td", " class=best" if number == best else "") for number, cells in enumerate(rows)]
    return "<table>" + row(headings, "th") + "".join(body) + "</table>"


def _ranking(plan: Plan, options: Sequence[Option]) -> str:
    items = [name for name in memory_groups(plan.best.worst) if any(memory_groups(o.worst)[name] for o in options)]
    headings = ["#", "layout", "s/step", "tokens/s", "per GPU", "MFU", "bubble", "collectives", "GiB"]
    headings += [*items, "against the best"]
    rows = []
    for number, option in enumerate(options, 1):
        time, held = option.time, memory_groups(option.worst)
        rows.append(
            [
                str(number),
                str(option.layout),
                f"{option.seconds:.3f}",
                f"{time.tokens_per_second:,.0f}",
                f"{time.tokens_per_second / plan.world:,.0f}",
                f"{time.mfu:.1%}",
                f"{time.bubble_share:.1%}",
                f"{time.communication_share:.1%}",
                gib(option.bytes),
                *(gib(held[name]) for name in items),
                "" if option is plan.best else loss(plan.best, option),
            ]
        )
    best = next((number for number, option in enumerate(options) if option is plan.best), None)
    return _table([h.replace("_", " ") for h in headings], rows, {1, len(headings) - 1}, best)


def _times(options: Sequence[Option]) -> str:
    names = [name for name in options[0].time.items if any(o.time.items[name] > 0 for o in options)]
    rows = [[str(o.layout), *(f"{o.time.items[name]:.3f}" for name in names), f"{o.seconds:.3f}"] for o in options]
    return _table(["seconds", *names, "step"], rows, {0}, 0)


def _stages(plan: Plan, option: Option) -> str:
    items = list(dict.fromkeys(name for stage in option.stages for name in memory_items(stage)))
    limit = room(plan.hardware, plan.margin)
    rows = []
    for rank, stage in enumerate(option.stages):
        layers = " + ".join(str(len(chunk)) for chunk in stage.layers)
        held = memory_items(stage)
        rows.append(
            [str(rank), layers, f"{stage.parameters:,}", *(gib(held.get(name, 0)) for name in items), gib(stage.total)]
            + [gib(limit - stage.total)]
        )
    headings = ["rank", "layers", "parameters", *(name.replace("_", " ") for name in items), "GiB", "free"]
    return _table(headings, rows, {1})
