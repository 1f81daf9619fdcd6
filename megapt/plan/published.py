"""Predictions for published training runs beside what was published, with the errors as they are.

`python -m megapt.plan.published --out FOLDER` writes them. Two constants are fitted, both on Megatron-Core's weak
scaling and on nothing else: `in_step`, which stands in the hardware files and is the same for all GPUs, and
`published_runs.HIDDEN`, which is that system's.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from megapt.files import open_whole, write_whole
from megapt.plan import hardware
from megapt.plan.published_runs import HIDDEN, TABLES, Run, runs

FITTED_ON = "megatron-core"


@dataclass(frozen=True)
class Row:
    """A published figure and the predicted one, in the table's unit; items: shares of the predicted step."""

    run: Run
    predicted: float
    items: dict[str, float]

    @property
    def error(self) -> float:
        """Of the prediction, relative to what was published."""
        return self.predicted / self.run.published - 1


def rows(of: Iterable[Run] | None = None) -> list[Row]:
    """Predictions of all published runs, or of those given."""
    made = []
    for run in runs() if of is None else of:
        predicted, step = run.predict()
        shares = {name: seconds / step.seconds for name, seconds in step.items.items()}
        made.append(Row(run, predicted, shares))
    return made


def mean_error(of: Sequence[Row]) -> float:
    """The mean of the absolute errors."""
    return sum(abs(row.error) for row in of) / len(of)


def fit(in_steps: Sequence[float] = (), hidden: Sequence[float] = ()) -> tuple[float, float]:
    """`in_step` and `hidden` out of these with the least mean square of log(predicted / published) over `FITTED_ON`;
    by default out of a grid of hundredths, and of twentieths."""
    chosen = [run for run in runs() if run.table == FITTED_ON]

    def misfit(values: tuple[float, float]) -> float:
        in_step, share = values
        changed = [
            replace(
                run,
                hardware=run.hardware.model_copy(update={"in_step": in_step}),
                software=replace(run.software, hidden=share),
            )
            for run in chosen
        ]
        return sum(math.log(1 + row.error) ** 2 for row in rows(changed))

    steps = in_steps or [step / 100 for step in range(70, 101)]
    return min(product(steps, hidden or [share / 20 for share in range(20)]), key=misfit)


def write(folder: Path) -> list[Row]:
    """`published.json`, `published.md` and `published.png` into the folder."""
    made = rows()
    folder.mkdir(parents=True, exist_ok=True)
    tables = [
        {
            "table": table.title,
            "unit": table.unit,
            "assumed": table.assumed,
            "fitted_on": table.key == FITTED_ON,
            "mean_absolute_error": mean_error([row for row in made if row.run.table == table.key]),
            "rows": [
                {
                    "run": row.run.name,
                    "published": row.run.published,
                    "predicted": row.predicted,
                    "error": row.error,
                    "items": row.items,
                }
                for row in made
                if row.run.table == table.key
            ],
        }
        for table in TABLES
    ]
    constants = {"in_step": hardware.load("h100").in_step, "hidden": HIDDEN}
    text = json.dumps({"fitted": constants, "tables": tables}, indent=1)
    write_whole(folder / "published.json", (text + "\n").encode())
    write_whole(folder / "published.md", _markdown(made).encode())
    _draw(made, folder / "published.png")
    return made


_HEAD = """# Predicted against published

The planner's time model (`megapt/plan/time.py`, [planning.md](../../planning.md)) against published training runs. Made
by

    python -m megapt.plan.published --out docs/results/planner

Two constants are fitted, on the first table only: kernels in a step run at {in_step} of the speed that they have in a
benchmark (`in_step`, the same on every GPU), and Megatron-Core hides {hidden} of the collectives of tensor parallelism.
All else are datasheets, benchmarks of single kernels, and shapes; their sources stand in `megapt/plan/hardware/*.yaml`
and `megapt/plan/published_runs.py`. Mean absolute error: {fitted:.1f} % over the {fitted_runs} runs fitted on,
{tested:.1f} % over the {tested_runs} others.

![predicted against published](published.png)

| table | runs | mean absolute error | mean error |
|---|---|---|---|"""


def _markdown(made: Sequence[Row]) -> str:
    fitted = [row for row in made if row.run.table == FITTED_ON]
    tested = [row for row in made if row.run.table != FITTED_ON]
    head = _HEAD.format(
        in_step=hardware.load("h100").in_step,
        hidden=HIDDEN,
        fitted=100 * mean_error(fitted),
        fitted_runs=len(fitted),
        tested=100 * mean_error(tested),
        tested_runs=len(tested),
    )
    lines = [head]
    for table in TABLES:
        own = [row for row in made if row.run.table == table.key]
        bias = sum(row.error for row in own) / len(own)
        title = f"{table.title}{' (fitted on)' if table.key == FITTED_ON else ''}"
        lines.append(f"| {title} | {len(own)} | {100 * mean_error(own):.1f} % | {100 * bias:+.1f} % |")
    for table in TABLES:
        lines += ["", f"## {table.title}", "", f"Assumed: {table.assumed}.", ""]
        lines += [f"| run | published, {table.unit} | predicted | error | where the time goes |"]
        lines += ["|---|---|---|---|---|"]
        for row in (row for row in made if row.run.table == table.key):
            where = sorted(row.items.items(), key=lambda item: -item[1])[:5]
            shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in where if share >= 0.005)
            digits = 0 if row.run.published >= 1000 else 1
            figures = f"{row.run.published:,.{digits}f} | {row.predicted:,.{digits}f}"
            lines.append(f"| {row.run.name} | {figures} | {100 * row.error:+.1f} % | {shares} |")
    return "\n".join(lines) + "\n"


def _draw(made: Sequence[Row], path: Path) -> None:
    """Predicted over published TFLOP/s per GPU."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 7), layout="constrained")
    axes = figure.subplots()
    ends = [90, 700]
    axes.fill_between(ends, [0.9 * end for end in ends], [1.1 * end for end in ends], color="0.9", label="within 10 %")
    axes.plot(ends, ends, color="0.6", linewidth=1)
    for table, marker in zip(TABLES, "osD^vP*", strict=True):
        own = [row for row in made if row.run.table == table.key]
        published = [row.run.tflops(row.run.published) for row in own]
        predicted = [row.run.tflops(row.predicted) for row in own]
        axes.plot(published, predicted, marker, markersize=7, label=table.key)
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends, aspect="equal")
    ticks = [100, 150, 200, 300, 400, 500, 600]
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(ticks, labels=[str(tick) for tick in ticks])
        axis.set_ticks([], minor=True)
    axes.set_xlabel("published, TFLOP/s per GPU")
    axes.set_ylabel("predicted, TFLOP/s per GPU")
    axes.set_title("Model FLOPs (sc21: with recomputation); fitted on megatron-core only")
    axes.legend()
    with open_whole(path) as file:
        figure.savefig(file, dpi=110, format="png", metadata={"Software": None})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m megapt.plan.published", description="Predicted against published.")
    parser.add_argument("--out", type=Path, required=True, help="folder for published.json, .md and .png")
    parser.add_argument("--fit", action="store_true", help="print what the constants would be if fitted anew")
    given = parser.parse_args(arguments)
    if given.fit:
        in_step, hidden = fit()
        print(f"in_step {in_step:.2f}, hidden {hidden:.2f}")
    made = write(given.out)
    for table in TABLES:
        own = [row for row in made if row.run.table == table.key]
        print(f"{100 * mean_error(own):5.1f} % mean absolute error over {len(own):2} runs: {table.title}")


if __name__ == "__main__":
    main()
