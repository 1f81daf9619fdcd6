"""The summary that launch/gpu_check.sh writes: Markdown and a picture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

OURS = ("cuda", "triton")


def markdown(results: dict[str, dict[str, Any]], out: Path, rehearsal: bool) -> str:
    """All parts so far; pictures are those that lie in `out`."""
    title = "# Rehearsal on a CPU: tiny shapes, no measure of speed" if rehearsal else "# GPU check"
    lines = [title, "", "| part | result | seconds | |", "|---|---|---|---|"]
    lines += [f"| {part} | {r['status']} | {r['seconds']} | {_cell(r['message'])} |" for part, r in results.items()]
    about = results.get("environment", {})
    if "name" in about:
        lines += ["", "## Environment", "", "| | |", "|---|---|"]
        shown = {name: value for name, value in about.items() if name not in ("status", "message", "seconds")}
        lines += [f"| {name} | {_cell(value)} |" for name, value in shown.items()]
    if (out / "bench.jsonl").exists() and "kernels" in results:
        lines += ["", "## Kernels", "", *_kernels(out / "bench.jsonl")]
    if variants := results.get("training", {}).get("variants"):
        lines += ["", "## Training", "", *_training(variants)]
    for name in ("bench.png", "training.png", "quickstart.png"):
        if (out / name).exists():
            lines += ["", f"![{name.removesuffix('.png')}]({name})"]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _kernels(path: Path) -> Iterator[str]:
    """For each operation and pass, our quickest beside the quickest of all others."""
    from megapt_kernels.bench.report import target
    from megapt_kernels.bench.rows import read

    rows = [r for r in read(path) if r["record"] == "measurement" and r["status"] == "ok"]
    modes = {r["mode"] for r in rows}
    mode = "cudagraph" if "cudagraph" in modes else "eager"
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["mode"] == mode:
            groups.setdefault((row["op"], row["case"], row["pass"]), []).append(row)
    yield f"Medians in us, {mode}; share of the limit that the device's copy or matrix product sets."
    yield ""
    yield "| operation | pass | ours | us | of limit | quickest other | us | ours is | target | registers | spills |"
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    for (op, case, which), here in groups.items():
        ours = min((r for r in here if r["kind"] in OURS), key=lambda r: r["p50_us"], default=None)
        other = min((r for r in here if r["kind"] not in OURS), key=lambda r: r["p50_us"], default=None)
        cells = [f"{op} {case}".strip(), which, *_timed(ours), f"{ours['percent_of_limit']:.0f} %" if ours else ""]
        cells += [*_timed(other), f"{other['p50_us'] / ours['p50_us']:.2f} x as fast" if ours and other else ""]
        built = (ours[column] if ours else None for column in ("registers", "spills"))
        cells += [target(here[0]), *("" if value is None else str(value) for value in built)]
        yield f"| {' | '.join(cells)} |"


def _timed(row: dict[str, Any] | None) -> tuple[str, str]:
    return (row["impl"], f"{row['p50_us']:,.1f}") if row else ("", "")


def _training(variants: dict[str, dict[str, Any]]) -> Iterator[str]:
    first = next(iter(variants.values()))
    base = variants.get("reference")
    yield f"{first['config']}, {first['precision']}, {first['tokens_per_step']:,} tokens per step; medians."
    yield ""
    yield "| kernels | tokens/s | against none | ms per step | MFU | of a matrix product | peak memory, GiB |"
    yield "|---|---|---|---|---|---|---|"
    for name, found in variants.items():
        gain = f"{found['tokens_per_second'] / base['tokens_per_second']:.3f} x" if base else ""
        mfu = f"{100 * found['mfu']:.1f} %" if found["mfu"] else ""
        cells = [name, f"{found['tokens_per_second']:,.0f}", gain, f"{1e3 * found['step_seconds']['median']:,.1f}", mfu]
        cells += [f"{100 * found['gemm_share']:.0f} %", f"{found['peak_memory_bytes'] / 2**30:.2f}"]
        yield f"| {' | '.join(cells)} |"


def training_plot(variants: dict[str, dict[str, Any]], path: Path) -> None:
    """Bars: tokens per second with each choice of kernels."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 0.5 + 0.4 * len(variants)))
    speeds = [found["tokens_per_second"] for found in variants.values()]
    bars = axis.barh(list(variants), speeds, color="tab:green")
    axis.bar_label(bars, [f" {speed:,.0f}" for speed in speeds], fontsize=8)
    axis.set_xlim(0, 1.2 * max(speeds))
    axis.invert_yaxis()
    axis.set_xlabel("tokens/s")
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)
