"""How long the planner's search takes: `python docs/results/planner/search.py` writes search.json and search.md."""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path
from typing import Any

from megapt.config import load
from megapt.files import write_whole
from megapt.plan import hardware
from megapt.plan.search import search

HERE = Path(__file__).parent
CONFIGS = HERE.parents[2] / "configs"
CASES = (
    ("llama-1b", 8), ("llama-8b", 32), ("llama-70b", 256), ("gpt3-175b", 512), ("llama-70b", 1024), ("llama-405b", 1024)
)  # fmt: skip


def measure(name: str, gpus: int) -> dict[str, Any]:
    """Seconds of the process's CPU, since other programs may run beside it."""
    config, device = load(CONFIGS / f"{name}.yaml").config, hardware.load("h100")
    started = time.process_time()
    plan = search(config, gpus, device)
    seconds = time.process_time() - started
    best = plan.best
    return {
        "config": name,
        "gpus": gpus,
        "cpu_seconds": round(seconds, 1),
        "legal": plan.legal,
        "worked_out": plan.timed,
        "front": len(plan.front),
        "best": str(best.layout),
        "step_seconds": round(best.seconds, 3),
        "mfu": round(best.time.mfu, 4),
        "gib": round(best.bytes / 2**30, 1),
    }


def main() -> None:
    rows = [measure(name, gpus) for name, gpus in CASES]
    made = {"hardware": "h100", "python": platform.python_version(), "machine": _processor(), "searches": rows}
    lines = [
        "# How long the search takes",
        "",
        "All legal layouts of the presets on H100s, one process on one core; seconds of CPU. Made by",
        "`python docs/results/planner/search.py`.",
        "",
        f"Python {made['python']}, {made['machine']}.",
        "",
        "| config | GPUs | seconds | legal layouts | worked out | on the front | best | s/step | MFU | GiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['config']} | {row['gpus']:,} | {row['cpu_seconds']} | {row['legal']:,} | {row['worked_out']} "
            f"| {row['front']} | {row['best']} | {row['step_seconds']} | {row['mfu']:.1%} | {row['gib']} |"
        )
    write_whole(HERE / "search.json", json.dumps(made, indent=2).encode() + b"\n")
    write_whole(HERE / "search.md", ("\n".join(lines) + "\n").encode())


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor()


if __name__ == "__main__":
    main()
