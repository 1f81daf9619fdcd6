"""The figures of this page: every schedule's formula beside its simulation, as a table, JSON and a picture."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from megapt.files import write_whole
from megapt.parallel.pipeline import timeline
from megapt.parallel.pipeline.check import check
from megapt.parallel.pipeline.schedules import schedule
from megapt.parallel.pipeline.simulate import Costs, Simulation, simulate

STAGES, MICRO_BATCHES = 8, 32
TIMES = ((1.0, 1.0, 1.0), (1.0, 1.2, 0.8))  # F, I, W of one micro-batch on one rank
BYTES, WEIGHT_SHARE = 1.0, 0.8
CASES = (("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("interleaved", 4), ("zb-h1", 1), ("zb-v", 2))
PICTURE = (("1f1b", 1), ("interleaved", 2), ("zb-h1", 1), ("zb-v", 2))


def formula(name: str, chunks: int, f: float, i: float, w: float) -> float | None:
    """Idle seconds of the longest rank as the papers give them; None where theirs does not hold."""
    hops = STAGES - 1
    match name:
        case "gpipe" | "1f1b" | "interleaved":
            return hops * (f + i + w) / chunks
        case "zb-h1":
            return hops * (f + i - w) if w <= min(f, i) else None
    return 0.0 if f == i == w else None


def run(name: str, chunks: int, stages: int, micro_batches: int, times: tuple[float, float, float]) -> Simulation:
    made = schedule(name, stages, chunks, micro_batches)
    costs = Costs.even(stages, chunks, *times, activation_bytes=BYTES, weight_share=WEIGHT_SHARE)
    return simulate(made, costs)


def results() -> list[dict[str, object]]:
    """One entry per schedule and times."""
    rows: list[dict[str, object]] = []
    for times in TIMES:
        for name, chunks in CASES:
            found = run(name, chunks, STAGES, MICRO_BATCHES, times)
            report = check(schedule(name, STAGES, chunks, MICRO_BATCHES))
            ideal = MICRO_BATCHES * sum(times)
            rows.append(
                {
                    "schedule": name,
                    "chunks": chunks,
                    "times": times,
                    "step": round(found.timeline.step, 9),
                    "formula": formula(name, chunks, *times),
                    "idle": round(found.timeline.span_bubble * ideal, 9),
                    "idle_step": round(found.timeline.step - ideal, 9),
                    "bubble": round(found.timeline.bubble, 9),
                    "peak_live": report.peak_live,
                    "peak_held": report.peak_held,
                    "peak_bytes": [round(held, 9) for held in found.peak_bytes],
                }
            )
    return rows


def table(rows: list[dict[str, object]]) -> str:
    """The page's table."""
    lines = [
        "| schedule | chunks | F, I, W | idle, formula | idle, simulated | idle in the step | bubble of the step | "
        "activations, first and last rank |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        times, held, idle = row["times"], row["peak_bytes"], row["formula"]
        assert isinstance(times, tuple) and isinstance(held, list)
        cells = [
            row["schedule"],
            row["chunks"],
            ", ".join(f"{seconds:g}" for seconds in times),
            "none" if idle is None else f"{idle:g}",
            f"{row['idle']:g}",
            f"{row['idle_step']:g}",
            f"{row['bubble']:.2%}",
            f"{held[0]:g}, {held[-1]:g}",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder of the results")
    output = parser.parse_args().output
    rows = results()
    setting = {"stages": STAGES, "micro_batches": MICRO_BATCHES, "weight_share": WEIGHT_SHARE}
    write_whole(output / "result.json", (json.dumps({**setting, "rows": rows}, indent=1) + "\n").encode())
    panels = {
        f"{name}{f', {chunks} chunks' if chunks > 1 else ''}": run(name, chunks, 4, 8, TIMES[0]).timeline
        for name, chunks in PICTURE
    }
    timeline.draw(panels, output / "timelines.png")
    print(table(rows))


if __name__ == "__main__":
    main()
