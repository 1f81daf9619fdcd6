"""The command line: one command per job, each imported when it runs, so that `--help` loads none of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megapt.commands import checkpoint, convert, data, data_show, kernels, plan, schedule, tokenize
from megapt.commands.collectives import collectives
from megapt.commands.evaluate import evaluate
from megapt.commands.prove import prove
from megapt.commands.tune import tune
from megapt.errors import UserError

if TYPE_CHECKING:
    from megapt.config import Config, Loaded
    from megapt.launcher import RankEnvironment

app = typer.Typer(
    name="megapt",
    help="Pretrain large language models with tensor, pipeline and data parallelism, on CPUs and GPUs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
config_app = typer.Typer(help="Look at configurations.", no_args_is_help=True)
bench_app = typer.Typer(help="Measure speed.", no_args_is_help=True)
app.add_typer(config_app, name="config")
app.add_typer(tokenize.tokenizer_app, name="tokenizer")
app.add_typer(data.app, name="data")
data.app.command("build")(tokenize.build)
data.app.command("show")(data_show.show)
app.add_typer(plan.app, name="plan")
app.command()(tune)
app.add_typer(schedule.app, name="schedule")
app.add_typer(checkpoint.app, name="checkpoint")
app.add_typer(convert.app, name="convert")
app.add_typer(bench_app, name="bench")
app.add_typer(kernels.app, name="kernels")

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the run.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Values that replace the file's, by dotted key."),
]
Checkpoint = Annotated[
    Path,
    typer.Argument(metavar="CHECKPOINT", help="A run folder, its checkpoints folder, or one step's folder."),
]
Tokenizer = Annotated[
    str | None, typer.Option(help="Tokenizer file; default: the one the run's config names.")
]


@app.command()
def doctor(json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False) -> None:
    """Show versions, devices and optional parts, and whether training can run here."""
    from megapt import doctor as job

    raise typer.Exit(job.main(as_json=json))


@config_app.command("show")
def config_show(config: ConfigFile, overrides: Overrides = None) -> None:
    """Print the whole configuration with the origin of every value."""
    from megapt.config import show

    typer.echo(show(config, overrides or []))


@app.command()
def pretrain(
    config: Annotated[Path, typer.Option(help="YAML file of the run.")],
    overrides: Overrides = None,
) -> None:
    """Train in this process alone; for several ranks use launch/pretrain.sh."""
    raise typer.Exit(_pretrain_rank(["--config", str(config), *(overrides or [])]))


@app.command()
def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[list[str], typer.Option(help="Text to continue; may be given several times.")],
    tokens: Annotated[int, typer.Option(min=1, help="New tokens per prompt, at most.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=1, help="Draw among this many likeliest tokens.")] = 50,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draws.")] = 0,
    tokenizer: Tokenizer = None,
    parallel: Annotated[
        list[str] | None,
        typer.Option(metavar="AXIS=N", help="tensor=N, pipeline=N: the layout of several ranks."),
    ] = None,
) -> None:
    """Continue prompts with a trained model, in this process or in the ranks of torchrun."""
    place = _prepare()
    from megapt.generate import generate as job
    from megapt.generate import parse_parallel

    layout = parse_parallel(parallel or [])
    texts = job(checkpoint, prompt, tokens, temperature, top_k, seed, tokenizer, layout)
    if place.rank == 0:
        for text in texts:
            typer.echo(text)


app.command("eval")(evaluate)
app.command()(prove)
app.command()(collectives)


@bench_app.command("train")
def bench_train(
    config: ConfigFile,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps to time.")] = 20,
    warmup: Annotated[int, typer.Option(min=0, help="Steps before those, not timed.")] = 5,
    json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the result there.")
    ] = None,
) -> None:
    """Time training steps of a configuration, in this process or in the ranks of torchrun."""
    _prepare()
    from megapt.bench import train

    train(config, overrides or [], steps, warmup, json)


@app.command()
def quickstart(
    workdir: Annotated[Path, typer.Option(help="Folder for everything that is made.")] = Path(
        "runs/quickstart"
    ),
    text: Annotated[
        Path | None, typer.Option(help="Text to train on; default: the sources of Python's standard library.")
    ] = None,
) -> None:
    """Go the whole way once: tokenizer, data, training, export, generation; minutes on a CPU."""
    from megapt.quickstart import run

    run(workdir, text=text)


def main() -> None:
    """Entry point of `megapt`: a broken rule is one message and exit status 2."""
    try:
        app()
    except UserError as error:
        print(f"megapt: error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.filename is None:
            raise
        # A path that cannot be read or written: its name and the system's reason are the whole story.
        print(f"megapt: error: {error.filename}: {error.strerror}", file=sys.stderr)
        sys.exit(2)


def pretrain_script(script: str, arguments: Sequence[str]) -> int:
    """The work of launch/pretrain.sh: train as the rank a launcher made this process, or start this machine's
    ranks.

    Returns the exit status; does not return where it starts ranks, since the launcher then takes this process
    over.
    """
    from megapt.launcher import rank_environment

    place = None
    try:
        place = rank_environment(os.environ)
        if place.launcher == "single":
            _start_local_ranks(script, arguments)
        return _pretrain_rank(arguments)
    except UserError as error:
        who = f"rank {place.rank} of {place.world}: " if place and place.world > 1 else ""
        print(f"megapt: error: {who}{error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _prepare() -> RankEnvironment:
    """Before a job that computes is imported: torch reads the environment once."""
    from megapt.launcher import prepare_rank

    return prepare_rank(os.environ)


def _pretrain_rank(arguments: Sequence[str]) -> int:
    _prepare()
    from megapt import pretrain as job

    return job.main(list(arguments)) or 0


def _resolved(loaded: Loaded, ranks: int, gpus: bool) -> Config:
    """The config that `parallel: auto` becomes for so many ranks, as each of them will find it."""
    import torch

    from megapt.plan.auto import resolve

    return resolve(loaded, ranks, torch.device("cuda", 0) if gpus else torch.device("cpu")).config


def _start_local_ranks(script: str, arguments: Sequence[str]) -> None:
    """Become the launcher of all ranks of this machine.

    One per CUDA device; on the CPU as many as the layout needs. The config and its fit to that world are
    checked here, where one message can say what is wrong.
    """
    import argparse

    from megapt import launcher
    from megapt.config import load
    from megapt.pretrain import RunPlan
    from megapt.rules import check_world

    parser = argparse.ArgumentParser(
        prog="launch/pretrain.sh", description="Train on this machine: starts its ranks.", allow_abbrev=False
    )
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument(
        "--ranks", type=int, help="default: the visible CUDA devices; on the CPU what the layout needs"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace the file's")
    parser.add_argument("--from-scratch", action="store_true", help="fresh weights where checkpoint.load is missing")
    options = parser.parse_intermixed_args(arguments)

    overrides = [*options.overrides, *["checkpoint.from_scratch=true"] * options.from_scratch]
    loaded = load(options.config, overrides)
    config, devices = loaded.config, launcher.visible_devices(os.environ)
    layout = config.parallel.tensor * config.parallel.pipeline * (config.parallel.data or 1)
    ranks = (len(devices) or layout) if options.ranks is None else options.ranks
    if config.parallel.auto is not None:
        config = _resolved(loaded, ranks, bool(devices))
    port = launcher.local_port(os.environ)
    rank_arguments = ["--config", options.config, *overrides]
    command = launcher.local_command(script, rank_arguments, ranks=ranks, devices=devices, port=port)
    check_world(config, ranks)
    RunPlan.of(config)  # data that is missing or too small is refused before any rank starts
    if not devices:
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.execv(command[0], command)
