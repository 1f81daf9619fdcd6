"""Short trials: the best few layouts of a plan take some steps on the machine at hand, and what they take counts.

Each trial's time corrects the predictions of those that have not run: the planner's items are scaled by a factor for
computing, one for the collectives of tensor parallelism and one for the rest, fitted to all trials so far.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import yaml

from megapt.config import Loaded
from megapt.errors import UserError
from megapt.plan.search import Option, Plan

GROUPS = {
    "computing": ("products", "attention", "elementwise", "recompute"),
    "tensor collectives": ("tensor collectives",),
}
"""Items of a step that share a factor; all others share a third one."""

NAMES = (*GROUPS, "the rest")
_HELD = 0.05  # how much a factor's distance from the common one counts, beside the error of one trial
_LEAST = 0.05


@dataclass(frozen=True)
class Trial:
    """A layout that was run: seconds of its median step, or why it failed."""

    option: Option
    seconds: float | None
    peak: int | None = None
    error: str = ""


@dataclass
class Tuning:
    """All trials in the order in which they ran, and the factors that they give."""

    plan: Plan
    trials: list[Trial] = field(default_factory=list)
    factors: tuple[float, ...] = (1.0, 1.0, 1.0)

    @property
    def best(self) -> Trial | None:
        done = [trial for trial in self.trials if trial.seconds is not None]
        return min(done, key=lambda trial: trial.seconds or 0.0, default=None)

    def corrected(self, option: Option) -> float:
        """Seconds of a step, as the plan says with the factors of the trials."""
        return float(parts(option) @ np.array(self.factors))


def parts(option: Option) -> npt.NDArray[np.float64]:
    """[3]: a step's planned seconds by group."""
    items = option.time.items
    grouped = [sum(items[name] for name in group) for group in GROUPS.values()]
    return np.array([*grouped, option.seconds - sum(grouped)])


def fit(planned: npt.NDArray[np.float64], measured: npt.NDArray[np.float64]) -> tuple[float, ...]:
    """Factors [3] that bring planned [trials, 3] to measured [trials] seconds with least relative error.

    They are drawn to the one factor that fits all trials best, since few trials cannot tell three apart; none is
    negative.
    """
    relative = planned / measured[:, None]
    common = float(np.exp(-np.mean(np.log(relative.sum(1)))))
    size = planned.shape[1]
    left = np.concatenate([relative, _HELD * np.eye(size)])
    right = np.concatenate([np.ones(len(measured)), np.full(size, _HELD * common)])
    found = np.linalg.lstsq(left, right, rcond=None)[0]
    return tuple(float(value) for value in np.maximum(found, _LEAST * common))


def tune(
    loaded: Loaded,
    plan: Plan,
    trials: int,
    steps: int,
    run: Callable[[Option], Trial] | None = None,
    say: Callable[[str], None] = print,
) -> Tuning:
    """Run up to `trials` layouts, first the plan's best, then always the one that the corrected plan says is best.

    run: takes a layout's steps, default on this machine's ranks. Raises UserError where every trial fails.
    """
    tuning = Tuning(plan)
    waiting = different(plan.ranked)
    while waiting and len(tuning.trials) < trials:
        option = min(waiting, key=tuning.corrected)
        waiting.remove(option)
        expected = tuning.corrected(option)
        trial = run(option) if run is not None else on_this_machine(loaded, option, steps)
        tuning.trials.append(trial)
        number = f"{len(tuning.trials)}/{min(trials, len(waiting) + len(tuning.trials))} {option.layout}: "
        if trial.seconds is None:
            say(f"{number}failed: {trial.error}")
            continue
        say(f"{number}{trial.seconds:.4g} s per step; planned {option.seconds:.4g}, after other trials {expected:.4g}")
        done = [one for one in tuning.trials if one.seconds is not None]
        planned = np.stack([parts(one.option) for one in done])
        tuning.factors = fit(planned, np.array([one.seconds for one in done]))
    if tuning.best is None:
        reasons = "; ".join(f"{trial.option.layout}: {trial.error}" for trial in tuning.trials)
        raise UserError(f"none of {len(tuning.trials)} layouts could be run: {reasons}")
    return tuning


def different(options: Sequence[Option]) -> list[Option]:
    """The best of all that share tensor and pipeline size and ZeRO stage, and the best with another micro-batch."""
    found: dict[tuple[int, int, str], list[Option]] = {}
    for option in options:
        same = found.setdefault((*option.layout.cell, option.layout.zero), [])
        if len(same) < 2 and all(option.layout.micro != other.layout.micro for other in same):
            same.append(option)
    return sorted((option for same in found.values() for option in same), key=lambda option: option.seconds)


def on_this_machine(loaded: Loaded, option: Option, steps: int, warmup: int = 2, timeout: float = 900.0) -> Trial:
    """A trial in fresh ranks on this machine, on random tokens: one rank per GPU, or on the CPU sharing its cores."""
    from megapt.launcher import local_port

    world = option.layout.world
    with tempfile.TemporaryDirectory(prefix="tune-") as folder:
        config, result = Path(folder) / "config.yaml", Path(folder) / "result.json"
        config.write_text(yaml.safe_dump(option.config.model_dump(), sort_keys=False), encoding="utf-8")
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world)),
            *("--master-addr", "127.0.0.1", "--master-port", str(local_port({}))),
            *("-m", "megapt", "bench", "train", str(config)),
            *("--steps", str(steps), "--warmup", str(warmup), "--json", str(result)),
        ]
        try:
            done = subprocess.run(
                command, env=_environment(), capture_output=True, text=True, timeout=timeout, check=False
            )
        except subprocess.TimeoutExpired:
            return Trial(option, None, error=f"took more than {timeout:.0f} s")
        if done.returncode != 0 or not result.is_file():
            return Trial(option, None, error=reason(done.stderr + done.stdout))
        measured = json.loads(result.read_text(encoding="utf-8"))
        return Trial(option, float(measured["step_seconds"]["median"]), int(measured["peak_memory_bytes"]))


def _environment() -> dict[str, str]:
    """Without the variables of a launcher around this process."""
    mine = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
    environment = {name: value for name, value in os.environ.items() if name not in mine}
    root = str(Path(__file__).parents[2])
    kept = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    return environment | {"PYTHONPATH": os.pathsep.join([root, *kept])}


def reason(output: str) -> str:
    """The line of a failed run's output that says most: an error's last line, not the launcher's words about it."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    for sign in ("megapt: error:", "OutOfMemoryError", "MemoryError", "Error:", "error:"):
        found = [line for line in lines if sign in line and "ChildFailedError" not in line]
        if found:
            return found[0][:300]
    return (lines[-1] if lines else "the ranks ended without a word")[:300]


def lines(tuning: Tuning) -> list[str]:
    """Planned beside measured, fastest first, and the factors."""
    done = sorted((t for t in tuning.trials if t.seconds is not None), key=lambda t: t.seconds or 0.0)
    made = [f"{'measured s':>11}{'planned s':>11}{'corrected s':>13}{'error':>8}  layout"]
    for trial in done:
        assert trial.seconds is not None
        corrected = tuning.corrected(trial.option)
        made.append(
            f"{trial.seconds:>11.4f}{trial.option.seconds:>11.4f}{corrected:>13.4f}"
            f"{corrected / trial.seconds - 1:>+8.1%}  {trial.option.layout}"
        )
    made += [f"{'failed':>11}  {t.option.layout}: {t.error}" for t in tuning.trials if t.seconds is None]
    factors = ", ".join(f"{name} x{value:.2f}" for name, value in zip(NAMES, tuning.factors, strict=True))
    made.append(f"this machine against the plan: {factors}")
    return made

