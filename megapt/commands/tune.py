"""`megapt tune`: the planner's best few layouts take some steps on the machine at hand, and the fastest is written."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megapt.errors import UserError

if TYPE_CHECKING:
    from megapt.plan.hardware import Hardware


def tune(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the run.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Values that replace the file's, by dotted key."),
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="Layouts to run, at most.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Steps of each that are timed.")] = 5,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Ranks of this machine; default: its GPUs, else its cores.")
    ] = None,
    hardware: Annotated[
        str | None, typer.Option(help="A name, or a file of `megapt plan calibrate`; default: what is found here.")
    ] = None,
    only: Annotated[
        str | None, typer.Option(metavar="LAYOUT", help="Values that every layout must have, as in tp=2.")
    ] = None,
    write: Annotated[Path, typer.Option(metavar="FILE", help="Write the fastest layout's config there.")] = Path(
        "tuned.yaml"
    ),
) -> None:
    """Try the planner's best layouts on this machine, on random tokens, and write the fastest one as a config.

    Each trial corrects the predictions of those still to run. A layout that fails is named with its reason, and the
    others go on.
    """
    from megapt.launcher import usable_cores, visible_devices

    if not write.parent.is_dir():
        raise UserError(f"{write.parent} is no folder; {write.name} cannot be written there")
    devices = visible_devices(os.environ)
    most = len(devices) or usable_cores()
    if devices and ranks is not None and ranks > most:
        raise UserError(f"--ranks {ranks}: this machine has {most} GPUs, and each rank takes one")
    if not devices:
        os.environ["DS_ACCELERATOR"] = "cpu"
    _tune(config, overrides or [], trials, steps, ranks or most, hardware, only, write)


def _tune(
    config: Path,
    overrides: list[str],
    trials: int,
    steps: int,
    world: int,
    hardware: str | None,
    only: str | None,
    write: Path,
) -> None:
    from megapt.config import load
    from megapt.plan import preset
    from megapt.plan import tune as job
    from megapt.plan.advice import nothing_fits
    from megapt.plan.candidates import Wanted
    from megapt.plan.search import search
    from megapt.plan.table import title

    loaded = load(config, overrides)
    device = _hardware(hardware, world)
    wanted = Wanted.parse(only) if only else None
    plan = search(loaded.config, world, device, top=max(trials, 10), only=wanted)
    if not plan.ranked:
        raise UserError(nothing_fits(plan))
    typer.echo(f"{title(plan)}: up to {trials} of {plan.legal} layouts, {steps} steps each")
    tuning = job.tune(loaded, plan, trials, steps, say=typer.echo)
    for line in job.lines(tuning):
        typer.echo(line)
    best = tuning.best
    assert best is not None
    command = shlex.join(["megapt", "tune", str(config), *overrides, "--trials", str(trials), "--ranks", str(world)])
    rows = [trial.option for trial in tuning.trials if trial.seconds is not None]
    source = config.read_text(encoding="utf-8")
    preset.write(write, loaded, source, plan, best.option, rows, command, job.lines(tuning))
    typer.echo(f"{write}: the config of {best.option.layout}, {best.seconds:.4g} s per step")


def _hardware(name: str | None, ranks: int) -> Hardware:
    """As named, or this machine's: on the CPU each rank has its part of the memory."""
    import psutil

    from megapt.distributed import device_of
    from megapt.launcher import rank_environment
    from megapt.plan import hardware
    from megapt.plan.auto import detect
    from megapt.plan.search import is_cpu

    found = hardware.load(name) if name else detect(device_of(rank_environment({})))
    if not is_cpu(found):
        return found
    each = psutil.virtual_memory().available / 2**30 / ranks
    return found.what_if([f"memory={min(each, 1024):.3f}GiB"])
