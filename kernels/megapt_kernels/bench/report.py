"""What a run prints and draws."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megapt_kernels.bench.rows import Row
from megapt_kernels.bench.work import TARGETS


def table(rows: Sequence[Row]) -> Any:
    """A rich table of one case, the quickest of each pass first; what did not run comes last, with its reason."""
    from rich.table import Table
    from rich.text import Text

    first = rows[0]
    shape = " ".join(f"{name}={size:,}" for name, size in first["shape"].items())
    title = f"{first['op']}{' (' + first['case'] + ')' if first['case'] else ''}  {first['dtype']}  {shape}"
    made = Table(title=title, title_justify="left")
    for name in ("pass", "mode", "implementation"):
        made.add_column(name)
    for name in _NUMBERS:
        made.add_column(name, justify="right")
    for row in sorted((r for r in rows if r["p50_us"]), key=lambda r: (r["pass"], r["mode"], r["p50_us"])):
        made.add_row(*_cells(row), style="red" if row["status"] == "failed" else None)
    for row in rows:
        if not row["p50_us"]:
            where = [row["pass"] or "", row["mode"] or "", row["impl"] or ""]
            made.add_row(*where, Text(row["status"], style="red" if row["status"] == "failed" else "dim"))
    return made


_NUMBERS = (
    "p50 us", "p20-p80", "GB/s", "TFLOP/s", "% copy", "(of size)", "% GEMM", "target", "MiB", "error", "torch's"
)  # fmt: skip


def reasons(rows: Sequence[Row]) -> list[str]:
    """One line for each row that was not timed, or was wrong."""
    found = [
        f"{row['status']}: {row['impl'] or row['op']}{' ' + row['pass'] if row['pass'] else ''}"
        f"{' ' + row['mode'] if row['mode'] else ''}: {row['reason']}"
        for row in rows
        if row["status"] != "ok"
    ]
    return list(dict.fromkeys(found))


def _cells(row: Row) -> list[str]:
    flops = row["flops"]
    return [
        row["pass"],
        row["mode"],
        f"{row['impl']} (emulated)" if row["emulated"] else row["impl"],
        _number(row["p50_us"]),
        f"{_number(row['p20_us'])}-{_number(row['p80_us'])}",
        f"{row['gb_per_s']:,.0f}" if row["gb_per_s"] >= 10 else f"{row['gb_per_s']:.2f}",
        _number(row["tflops"]) if flops else "",
        f"{row['percent_of_copy']:.0f}",
        f"{row['percent_of_copy_of_size']:.0f}",
        f"{row['percent_of_gemm']:.0f}" if flops else "",
        target(row),
        f"{row['peak_bytes'] / 2**20:,.0f}" if row["peak_bytes"] is not None else "",
        f"{row['error']:.1e}" if row["error"] is not None else "",
        f"{row['torch_error']:.1e}" if row["torch_error"] is not None else "",
    ]


def target(row: Row) -> str:
    """What an H200 or an H100 should reach, for a row measured on one."""
    known = TARGETS.get((row["op"], row["case"], row["pass"]))
    if known is None or not re.search(r"\bH[12]00\b", row["name"]):
        return ""
    unit = {"percent_of_copy": "% copy", "percent_of_gemm": "% GEMM", "tflops": "TFLOP/s"}[known[0]]
    return f"{known[1]:g} {unit}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def plot(rows: Sequence[Row], path: Path) -> None:
    """Bars: how much of the device's limit each implementation reaches, a field for each case and pass."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    timed = [r for r in rows if r["record"] == "measurement" and r["p50_us"]]
    modes = {r["mode"] for r in timed}
    mode = "cudagraph" if "cudagraph" in modes else "eager"
    fields: dict[tuple[str, str, str], list[Row]] = {}
    for row in timed:
        if row["mode"] == mode:
            fields.setdefault((row["op"], row["case"], row["pass"]), []).append(row)
    if not fields:
        return
    columns = 3
    lines = -(-len(fields) // columns)
    bars = max(len(f) for f in fields.values())
    height = 0.5 + lines * (0.9 + 0.26 * bars)
    figure, axes = plt.subplots(lines, columns, figsize=(15, height), squeeze=False)
    for axis in axes.flat[len(fields) :]:
        axis.set_visible(False)
    for axis, ((op, case, which), here) in zip(axes.flat, fields.items(), strict=False):
        here = sorted(here, key=lambda r: r["percent_of_limit"])
        colors = ["tab:red" if r["status"] == "failed" else _COLORS.get(r["kind"], "tab:gray") for r in here]
        drawn = axis.barh([r["impl"] for r in here], [r["percent_of_limit"] for r in here], color=colors)
        axis.bar_label(drawn, [f" {r['percent_of_limit']:.0f} %, {_number(r['p50_us'])} us" for r in here], fontsize=7)
        axis.set_xlim(0, max(115, 1.35 * here[-1]["percent_of_limit"]))
        axis.axvline(100, color="black", linewidth=0.6)
        axis.tick_params(labelsize=7)
        axis.set_title(f"{op}{' (' + case + ')' if case else ''} {which}", fontsize=9)
    about = timed[0]
    where = f"{about['name']}, {about['dtype']}, {about['preset']}, {mode}"
    figure.suptitle(f"% of the limit by bytes or matrix products: {where}", y=1 - 0.15 / height, va="top")
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.5 / height))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)


_COLORS = {
    "cuda": "tab:green",
    "triton": "tab:olive",
    "library": "tab:blue",
    "reference": "tab:purple",
    "eager": "silver",
    "compile": "tab:orange",
}
