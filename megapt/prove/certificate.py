"""What a proof found, for people (Markdown and a picture) and for programs (JSON)."""

from __future__ import annotations

import json
import math
import platform
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from io import BytesIO
from pathlib import Path
from typing import Any

import megapt
from megapt.files import write_whole
from megapt.prove.cases import AXES, coverage
from megapt.prove.compare import SPREAD, UNIT, Worst
from megapt.prove.job import MICROS, Outcome, Proof
from megapt.prove.trainer import FIRST, RESUMED, SAVE_AFTER, STEPS

JSON, MARKDOWN, PICTURE = "certificate.json", "certificate.md", "certificate.png"


def write(folder: Path, proof: Proof, command: str, left_out: Iterable[str] = ()) -> None:
    """The three files; each appears whole or not at all. left_out: what was not run, and why."""
    facts = describe(proof, command, list(left_out))
    write_whole(folder / JSON, _json(facts).encode())
    write_whole(folder / PICTURE, _picture(proof))
    write_whole(folder / MARKDOWN, _markdown(proof, facts).encode())


def _json(facts: dict[str, Any]) -> str:
    """With a line for each layout, so that thousands of them can still be read and compared."""
    rest = json.dumps({key: value for key, value in facts.items() if key != "layouts"}, indent=1, allow_nan=False)
    layouts = ",\n".join(f"  {json.dumps(layout, allow_nan=False)}" for layout in facts["layouts"])
    return rest.removesuffix("\n}") + f',\n "layouts": [\n{layouts}\n ]\n}}\n'


def describe(proof: Proof, command: str, left_out: list[str]) -> dict[str, Any]:
    """All of a proof as JSON."""
    cases = [outcome.case for outcome in proof.outcomes]
    shapes = tuple(dict.fromkeys(case.shape.name for case in cases))
    values, pairs = coverage(cases, {"shape": shapes, **AXES})
    return {
        "passed": proof.passed,
        "command": command,
        "precision": proof.precision,
        "seconds": round(proof.seconds, 1),
        "environment": environment(),
        "bounds": {
            "unit_roundoff": UNIT[proof.precision],
            "spread": SPREAD,
            "runs": math.sqrt(2.0) if proof.precision == "fp64" else 1.0,
            "rounding_measured_with_micro_batches_of": MICROS,
        },
        "steps": {"trained": STEPS, "saved_after": SAVE_AFTER},
        "shapes": {case.shape.name: case.shape.tree["model"] for case in cases},
        "covered": {"values": values, "pairs": pairs},
        "left_out": left_out,
        "plain_torch": {name: _quantities(worst) for name, worst in proof.plain.items()},
        "layouts": [_layout(outcome) for outcome in proof.outcomes],
    }


def environment() -> dict[str, str]:
    """Versions, processor, commit and date of this run."""
    found = {"date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), "commit": _commit()}
    found |= {"python": platform.python_version(), "system": platform.system(), "machine": platform.machine()}
    found["megapt"] = megapt.__version__
    for package in ("torch", "deepspeed", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _commit() -> str:
    """The commit that this code is of, marked where files differ from it."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("" if not git("status", "--porcelain") else " with changes")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _finite(value: float) -> float | None:
    """To four digits. JSON has no infinity: None stands for an element that is missing or not a number."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


def _quantities(worst: dict[str, Worst]) -> dict[str, Any]:
    return {
        quantity: {
            "name": value.name,
            "error": _finite(value.error),
            "bound": _finite(value.bound),
            "scale": _finite(value.scale),
            "relative": _finite(value.relative),
            "ratio": _finite(value.ratio),
        }
        for quantity, value in worst.items()
    }


def _layout(outcome: Outcome) -> dict[str, Any]:
    resumes = outcome.planned.resumes
    return {
        "shape": outcome.case.shape.name,
        "layers": outcome.case.layers,
        "layout": str(outcome.case.layout),
        "resumed_from": "the reference" if resumes is None else str(resumes.layout),
        "passed": outcome.passed,
        "seconds": round(outcome.seconds, 2),
        "error": outcome.error,
        "quantities": _quantities(outcome.worst),
    }


def _markdown(proof: Proof, facts: dict[str, Any]) -> str:
    failed = [outcome for outcome in proof.outcomes if not outcome.passed]
    count = len(proof.outcomes)
    verdict = (
        f"All {count} layouts compute the same."
        if proof.passed
        else f"**{len(failed)} of {count} layouts do not compute the same.**"
    )
    if not failed and not proof.passed:
        verdict = "**The reference is not what plain PyTorch computes.**"
    lines = [
        "# Certificate: the layout does not change the math",
        "",
        f"{verdict} {facts['precision']}, {STEPS} steps, a checkpoint after {SAVE_AFTER} steps resumed in another "
        f"layout; {facts['seconds']:.0f} seconds.",
        "",
        f"    {facts['command']}",
        "",
        f"![log10 of the largest relative error, per layout and quantity]({PICTURE})",
        "",
        *_environment_lines(facts["environment"]),
        "",
        "Each cell: the error and its bound, of the value that comes nearest to its bound. Bounds follow from the "
        "precision and from rounding errors measured on the reference (docs/proof.md). Names and ratios are in "
        f"[{JSON}]({JSON}).",
        "",
        *_summary(proof),
        "",
        *_table(proof),
        "",
        "## The reference against plain PyTorch",
        "",
        "Autograd, `cross_entropy`, `clip_grad_norm_` and `torch.optim.AdamW` on the same model in one process.",
        "",
        *_plain_lines(proof),
        "",
        "## Covered",
        "",
        *(f"- {axis}: {', '.join(_shown(v) for v in values)}" for axis, values in facts["covered"]["values"].items()),
        f"- {facts['covered']['pairs']:,} pairs of values of different axes",
        *(f"- left out: {reason}" for reason in facts["left_out"]),
    ]
    for outcome in failed:
        lines += ["", f"## {outcome.case}", "", *_failure(outcome)]
    return "\n".join(lines) + "\n"


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value) or "as configured"


def _environment_lines(facts: dict[str, str]) -> list[str]:
    return ["| " + " | ".join(facts) + " |", "|" + "---|" * len(facts), "| " + " | ".join(facts.values()) + " |"]


def quantities_of(proof: Proof) -> list[str]:
    """Columns: what was compared, in the order in which a step makes it."""
    known = [q for outcome in proof.outcomes for q in outcome.worst]
    order = [f"{FIRST}loss", f"{FIRST}gradient", "loss", "gradient", "norm", "weight", "copy"]
    return sorted(set(known), key=lambda q: (q.startswith(RESUMED), *(q.removeprefix(RESUMED) != o for o in order), q))


def _table(proof: Proof) -> list[str]:
    quantities = quantities_of(proof)
    lines = [
        "| layout | resumed from | " + " | ".join(quantities) + " | |",
        "|---|---|" + "--:|" * len(quantities) + "---|",
    ]
    for outcome in proof.outcomes:
        cells = [_cell(outcome.worst[q]) if q in outcome.worst else "" for q in quantities]
        resumes = outcome.planned.resumes
        source = "reference" if resumes is None else str(resumes.layout)
        verdict = "pass" if outcome.passed else "**FAIL**"
        lines.append(f"| {outcome.case} | {source} | " + " | ".join(cells) + f" | {verdict} |")
    return lines


def _cell(worst: Worst) -> str:
    return f"{worst.error:.0e} / {worst.bound:.0e}"


def _summary(proof: Proof) -> list[str]:
    """Of every quantity the layout that comes nearest to the bound, or is furthest beyond."""
    lines = ["| quantity | value | error | bound | ratio | layout |", "|---|---|--:|--:|--:|---|"]
    for quantity in quantities_of(proof):
        found = [(o.worst[quantity], o.case) for o in proof.outcomes if quantity in o.worst]
        worst, case = max(found, key=lambda item: item[0].ratio)
        numbers = f"{worst.error:.1e} | {worst.bound:.1e} | {worst.ratio:.2g}"
        lines.append(f"| {quantity} | {worst.name} | {numbers} | {case} |")
    return lines


def _plain_lines(proof: Proof) -> list[str]:
    lines = ["| model | quantity | largest error | its bound | ratio |", "|---|---|--:|--:|--:|"]
    for name, worsts in proof.plain.items():
        for quantity, w in worsts.items():
            lines.append(f"| {name} | {quantity} ({w.name}) | {w.error:.1e} | {w.bound:.1e} | {w.ratio:.2g} |")
    return lines


def _failure(outcome: Outcome) -> list[str]:
    if outcome.error is not None:
        return ["It did not run to its end:", "", *(f"    {line}" for line in outcome.error.splitlines())]
    return [
        f"- {quantity}: {w.name} is off by {w.error:.2e}, its bound is {w.bound:.2e}"
        for quantity, w in outcome.worst.items()
        if not w.inside
    ]


def _picture(proof: Proof) -> bytes:
    """A heat map of log10 of the largest relative error, a row per layout and a column per quantity."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    quantities = quantities_of(proof)
    grid = [[_exponent(o.worst.get(q)) for q in quantities] for o in proof.outcomes]
    height = min(0.2, 60 / len(grid)) if grid else 0.2  # inches of a row
    figure, axes = plt.subplots(figsize=(0.45 * len(quantities) + 1, height * len(grid) + 0.5))
    image = axes.imshow(grid or [[0.0]], cmap="viridis", vmin=-17, vmax=0, aspect="auto")
    axes.set_xticks(range(len(quantities)), quantities, rotation=60, ha="right", fontsize=7)
    axes.set_yticks(range(len(grid)), [str(o.case) for o in proof.outcomes], fontsize=min(6, 36 * height))
    for row, outcome in enumerate(proof.outcomes):
        for column, quantity in enumerate(quantities):
            worst = outcome.worst.get(quantity)
            if worst is not None and not worst.inside:
                axes.text(column, row, "x", ha="center", va="center", color="red", fontsize=7)
    figure.colorbar(image, label="log10 of the largest relative error", fraction=0.03)
    out = BytesIO()
    figure.savefig(out, format="png", dpi=110, bbox_inches="tight")
    plt.close(figure)
    return out.getvalue()


def _exponent(worst: Worst | None) -> float:
    if worst is None:
        return math.nan
    return math.log10(min(max(worst.relative, 1e-17), 1.0))
