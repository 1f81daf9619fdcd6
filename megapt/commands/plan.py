"""`megapt plan`: the layouts of a model on a cluster, ranked; what each loses; the best one as a config."""

from __future__ import annotations

import json
import math
import shlex
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from megapt.errors import UserError

if TYPE_CHECKING:
    from megapt.config import Loaded
    from megapt.plan.hardware import Hardware
    from megapt.plan.search import Plan


class _PlanUnlessNamed(TyperGroup):
    """`megapt plan CONFIG` plans; a first word that names another command runs that."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or args[0] not in self.commands:
            args = ["layouts", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(help="Rank layouts by speed and memory, before renting the cluster.", cls=_PlanUnlessNamed)


class Backend(StrEnum):
    native = "native"
    deepspeed = "deepspeed"


class Device(StrEnum):
    cpu = "cpu"
    cuda = "cuda"


MOST = 1 << 20  # ranks: beyond it the numbers that work take long to be found

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the run.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Values that replace the file's, by dotted key."),
]


@dataclass(frozen=True)
class _Request:
    """What is planned, and the command that says so again."""

    config: Path
    overrides: list[str]
    loaded: Loaded
    hardware: Hardware
    hardware_name: str
    gpus: int
    margin: float
    top: int
    backend: str | None
    only: str | None
    changes: list[str]

    @property
    def command(self) -> str:
        from megapt.plan.search import MARGIN

        words = ["megapt", "plan", str(self.config), *self.overrides, "--gpus", str(self.gpus)]
        words += ["--hardware", self.hardware_name]
        if self.margin != MARGIN:
            words += ["--memory-margin", f"{self.margin:g}"]
        for name, value in (("--backend", self.backend), ("--only", self.only)):
            words += [name, value] if value else []
        return shlex.join(words)

    def search(self, hardware: Hardware) -> Plan:
        from megapt.plan.candidates import Wanted
        from megapt.plan.search import search

        only = Wanted.parse(self.only) if self.only else None
        config = self.loaded.config
        return search(
            config, self.gpus, hardware, margin=self.margin, top=self.top, backend=self.backend, only=only
        )


@app.command("layouts", hidden=True)
def layouts(
    config: ConfigFile,
    overrides: Overrides = None,
    gpus: Annotated[int | None, typer.Option(min=1, max=MOST, help="Ranks: one per GPU, or per CPU core.")] = None,
    hardware: Annotated[str, typer.Option(help="Its name, or a file that `megapt plan calibrate` wrote.")] = "h100",
    memory_margin: Annotated[
        float | None, typer.Option(min=0.0, max=0.95, help="Share of the memory that stays free; default: 0.05.")
    ] = None,
    backend: Annotated[
        Backend | None, typer.Option(help="ZeRO backend; default: native, deepspeed where it alone can.")
    ] = None,
    only: Annotated[
        str | None, typer.Option(metavar="LAYOUT", help="Values that every layout must have, as in tp=8,micro=1.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Rows of the table.")] = 10,
    every: Annotated[
        bool, typer.Option("--all", help="Rank all layouts, not the best one of each tensor and pipeline size.")
    ] = False,
    explain: Annotated[
        list[str] | None, typer.Option(metavar="LAYOUT", help="Say what a layout such as tp=4,pp=8 loses, and where.")
    ] = None,
    what_if: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Plan on changed hardware too: network=200Gb, memory=141GiB, ..."),
    ] = None,
    tokens: Annotated[float | None, typer.Option(min=1.0, help="Of the whole run: prints days and GPU-hours.")] = None,
    budget_hours: Annotated[
        float | None, typer.Option(min=0.0, help="GPU-hours that may be spent: prints days and tokens.")
    ] = None,
    write: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the chosen layout's config there.")] = None,
    pick: Annotated[int, typer.Option(min=1, help="The row of the table that --write takes.")] = 1,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the plan there; - prints nothing else.")
    ] = None,
    pictures: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Draw memory, timeline, scaling.")] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write one report with everything in it.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Take a step of the config's own layout on fake tensors instead.")
    ] = False,
    world: Annotated[int | None, typer.Option(min=1, max=MOST, help="Ranks of the dry run; default: --gpus.")] = None,
    rank: Annotated[str, typer.Option(help="Ranks to be run: all-stages, or numbers as in 0,512.")] = "all-stages",
) -> None:
    """Rank every legal layout of a model on a cluster by speed, with its memory by item; nothing is run.

    `megapt plan calibrate` measures the present device, and `megapt tune` tries the best layouts on it.
    """
    from megapt.config import load
    from megapt.plan import hardware as devices
    from megapt.plan.search import MARGIN

    changes = what_if or []
    loaded = load(config, overrides or [])
    chosen = devices.load(hardware)
    chosen.what_if(changes)  # refused before anything is worked out
    if dry_run:
        _dry_run(loaded, world or gpus, rank, chosen)
        return
    if gpus is None:
        raise UserError("say how many ranks: --gpus 512")
    for file in (write, html, json_file):
        if file is not None and not file.parent.is_dir():
            raise UserError(f"{file.parent} is no folder; {file.name} cannot be written there")
        if file is not None and file.is_dir():
            raise UserError(f"{file} is a folder; name a file in it")
    if pictures is not None and pictures.exists() and not pictures.is_dir():
        raise UserError(f"--pictures {pictures} is a file; name a folder")
    for option, amount in (("--tokens", tokens), ("--budget-hours", budget_hours)):
        if amount is not None and not math.isfinite(amount):
            raise UserError(f"{option} {amount}: give a number, as in 15e12")
    margin = MARGIN if memory_margin is None else memory_margin
    named = backend.value if backend else None
    request = _Request(
        config, overrides or [], loaded, chosen, hardware, gpus, margin, top, named, only, changes
    )
    _Answer(request, every, tokens, budget_hours, pick).give(explain or [], write, json_file, pictures, html)


class _Answer:
    """A plan, said in all the ways that were asked for."""

    def __init__(
        self, request: _Request, every: bool, tokens: float | None, gpu_hours: float | None, pick: int
    ) -> None:
        from megapt.plan.advice import nothing_fits

        self.request, self.every = request, every
        self.plan = request.search(request.hardware)
        if not self.plan.ranked:
            raise UserError(nothing_fits(self.plan))
        self.rows = (self.plan.ranked if every else self.plan.of_each_cell())[: request.top]
        if pick > len(self.rows):
            raise UserError(f"--pick {pick}: the table has {len(self.rows)} rows; --top makes it longer")
        self.picked = self.rows[pick - 1]
        from megapt.plan.table import length

        self.notes = length(self.plan, self.picked, tokens, gpu_hours)

    def give(
        self, explained: list[str], write: Path | None, json_file: Path | None, pictures: Path | None, html: Path | None
    ) -> None:
        from megapt.plan.candidates import Wanted
        from megapt.plan.explain import difference, explain

        wishes = [Wanted.parse(text) for text in explained]
        for option in (*self.rows, *self.plan.front):
            option.layout.checked(self.request.loaded.config)  # what is printed, the runtime takes
        if json_file is not None and str(json_file) == "-":
            typer.echo(json.dumps(self._as_dict(), indent=2))
        else:
            self._print_table()
        for wish in wishes:
            self.notes += explain(self.plan, wish).lines()
        if self.request.changes:
            other = self.request.search(self.request.hardware.what_if(self.request.changes))
            self.notes += difference(self.plan, other, self.request.changes)
        quiet = json_file is not None and str(json_file) == "-"
        for note in self.notes:
            typer.echo(note, err=quiet)
        for line in self._write(write, None if quiet else json_file, pictures, html):
            typer.echo(line, err=quiet)

    def _print_table(self) -> None:
        from rich.console import Console

        from megapt.plan.table import WIDTH, details, ranking, summary, title, whole_width

        console = Console(highlight=False)
        table = ranking(self.plan, self.rows, title(self.plan))
        console = Console(highlight=False, width=max(console.width, WIDTH, whole_width(table)))
        console.print(table)
        console.print()
        console.print(details(self.plan, self.rows))
        typer.echo(summary(self.plan))

    def _write(
        self, write: Path | None, json_file: Path | None, pictures: Path | None, html: Path | None
    ) -> list[str]:
        from megapt.files import write_whole
        from megapt.plan import preset, report

        request, said = self.request, []
        if write is not None:
            source = request.config.read_text(encoding="utf-8")
            preset.write(write, request.loaded, source, self.plan, self.picked, self.rows, request.command)
            said.append(f"{write}: the config of {self.picked.layout}")
        if json_file is not None:
            write_whole(json_file, json.dumps(self._as_dict(), indent=2).encode() + b"\n")
            said.append(f"{json_file}: the plan")
        drawn = None
        if pictures is not None:
            pictures.mkdir(parents=True, exist_ok=True)
            drawn = report.draw(self.plan, pictures)
            said += [f"{path}: {heading.lower()}" for heading, path in drawn.items()]
        if html is not None:
            name = request.config.stem
            text = preset.body(request.loaded, self.picked.config)
            report.write(html, name, self.plan, self.rows, request.command, text, self.notes, drawn)
            said.append(f"{html}: the report")
        return said

    def _as_dict(self) -> dict[str, Any]:
        from megapt.plan.table import plan_as_dict

        return {"command": self.request.command, "notes": self.notes} | plan_as_dict(self.plan, self.rows)


def _dry_run(loaded: Loaded, world: int | None, ranks: str, hardware: Hardware) -> None:
    """Peaks and collectives of a step on fake tensors, beside the estimate."""
    from rich.console import Console
    from rich.table import Table

    from megapt.plan.dry_run import dry_run, stage_ranks
    from megapt.plan.memory import stage_memory
    from megapt.plan.search import is_cpu
    from megapt.rules import check_world

    config = loaded.config
    if world is None:
        raise UserError("say how many ranks: --world 4096")
    data = check_world(config, world)
    chosen = stage_ranks(config, world) if ranks == "all-stages" else _rank_numbers(ranks)
    device = "cpu" if is_cpu(hardware) else "cuda"
    done = dry_run(config, world, chosen, device)
    estimates = stage_memory(config, data, cpu=is_cpu(hardware))
    look: dict[str, Any] = {"box": None, "header_style": "bold"}
    table = Table("rank", "pp", "dp", "tp", "peak MiB", "estimated", "error", "peak is in", **look)
    for one in done:
        pp, dp, tp = one.coordinates
        estimate = estimates[pp].allocated
        sizes = (f"{size / 2**20:,.1f}" for size in (one.peak, estimate))
        table.add_row(*map(str, (one.rank, pp, dp, tp)), *sizes, f"{estimate / one.peak - 1:+.1%}", one.when)
    console = Console(highlight=False, width=max(Console().width, 100))
    console.print(table)
    counts = Table("rank", "collective", "axis", "ranks", "times", "MiB each", "MiB sent", **look)
    for one in done:
        for item in one.collectives:
            counts.add_row(
                str(one.rank), item.kind, item.axis, str(item.ranks), f"{item.count:,}",
                f"{item.bytes / 2**20:,.3f}", f"{item.sent / 2**20:,.1f}",
            )  # fmt: skip
    console.print(counts)


def _rank_numbers(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise UserError(f"--rank {text!r}: give all-stages, or numbers of ranks as in 0,512")
    return [int(part) for part in parts]


@app.command("calibrate")
def calibrate(
    out: Annotated[Path, typer.Argument(metavar="FILE", help="YAML file of hardware to write.")],
    device: Annotated[Device | None, typer.Option(help="Default: a GPU where there is one.")] = None,
    seconds: Annotated[float, typer.Option(min=1.0, help="How long measuring may take.")] = 60.0,
) -> None:
    """Measure the present device's copies, matrix products, attention and launches as a file of hardware."""
    import torch

    from megapt.plan.calibrate import calibrate as job

    if not out.parent.is_dir():
        raise UserError(f"{out.parent} is no folder; {out.name} cannot be written there")
    job(out, torch.device(device.value) if device else None, seconds)
    typer.echo(f"{out}: hardware for megapt plan --hardware {out}")

