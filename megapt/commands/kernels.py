"""`megapt kernels`: compile the CUDA kernels, and see which implementation of an operation would run."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megapt.errors import UserError

if TYPE_CHECKING:
    from megapt_kernels.registry import Implementation

app = typer.Typer(help="Build the CUDA kernels, and see what computes each operation.", no_args_is_help=True)


class Device(StrEnum):
    cpu = "cpu"
    cuda = "cuda"


Emulated = Annotated[
    bool, typer.Option("--emulated", help="The library for CPU tensors, in which g++ emulates a GPU: for tests.")
]
PresetName = Annotated[
    str | None, typer.Option(help="Shapes by the benchmark's names; default: llama-8b on a GPU, cpu on a CPU.")
]


@contextmanager
def _errors() -> Iterator[None]:
    """What the kernels refuse, as messages."""
    from megapt_kernels.build import BuildError
    from megapt_kernels.library import LibraryError
    from megapt_kernels.registry import Unsupported

    try:
        yield
    except (BuildError, LibraryError, Unsupported) as error:
        raise UserError(str(error)) from None


@app.command()
def build(
    out: Annotated[
        Path | None,
        typer.Option(help="Also put the library there; kernels/build of a checkout is found without being named."),
    ] = None,
    arch: Annotated[
        str, typer.Option(metavar="LIST", help="Compute capabilities, as nvcc writes them.")
    ] = "80,90a,100a",
    emulated: Emulated = False,
    jobs: Annotated[int | None, typer.Option(min=1, help="Compilers at once; default: one per core.")] = None,
) -> None:
    """Compile what changed, and print the library's path."""
    with _errors():
        from megapt_kernels.build import build as job

        kind = "emulated" if emulated else "cuda"
        typer.echo(job(kind, [a.strip() for a in arch.split(",")], out, jobs, verbose=True))


@app.command()
def resources(
    library: Annotated[
        Path | None, typer.Argument(help="A library with its table beside it; default: the one that would be loaded.")
    ] = None,
) -> None:
    """Print registers, spills and shared memory of every kernel as a Markdown table."""
    with _errors():
        from megapt_kernels.build import markdown
        from megapt_kernels.build import resources as rows

        if library is None:
            from megapt_kernels.library import LibraryError, find

            try:
                library = find("cuda").path
            except LibraryError as error:
                raise UserError(str(error)) from None
        typer.echo(markdown(rows(library)))


@app.command("list")
def list_(preset: PresetName = None) -> None:
    """Show every implementation of every operation, and what keeps it from running here."""
    with _errors():
        from rich.console import Console
        from rich.table import Table

        from megapt_kernels.registry import operation, operations

        table = Table("operation", "implementation", "cpu", "cuda", show_lines=True)
        for name in operations():
            calls = [_calls(name, preset, device)[0] if _has(device) else None for device in Device]
            for position, implementation in enumerate(operation(name).implementations):
                cells = [_verdict(implementation, call) for call in calls]
                table.add_row("" if position else name, implementation.name, *cells)
        Console(width=None if sys.stdout.isatty() else 160, highlight=False).print(table)


@app.command()
def explain(
    op: Annotated[str, typer.Argument(metavar="OP", help="An operation, as `megapt kernels list` names it.")],
    preset: PresetName = None,
    device: Annotated[Device | None, typer.Option(help="Default: cuda where there is one.")] = None,
    impl: Annotated[str, typer.Option(help="auto, a kind or a name of an implementation.")] = "auto",
) -> None:
    """Say which implementation would run with shapes of a known model, and why not those before it."""
    with _errors():
        from megapt_kernels.registry import operation

        found = operation(op)
        device = device or (Device.cuda if _has(Device.cuda) else Device.cpu)
        if not _has(device):
            raise UserError("--device cuda: this process has no CUDA device; there is --device cpu")
        for call in _calls(op, preset, device):
            if call.title != op:
                typer.echo(f"{call.title}:")
            typer.echo(str(found.explain(*call.positional, impl=impl, **call.keywords)))


@dataclass(frozen=True)
class _Call:
    title: str
    positional: tuple[Any, ...]
    keywords: dict[str, Any]


def _calls(op: str, preset: str | None, device: Device) -> list[_Call]:
    """The operation's calls in the benchmark, in bf16 and of few tokens, with tensors on the device."""
    import torch

    from megapt_kernels.bench.cases import cases
    from megapt_kernels.bench.presets import CPU_SHARD, CPU_TOKENS, PRESETS

    name = preset or ("llama-8b" if device is Device.cuda else "cpu")
    if name not in PRESETS:
        raise UserError(f"--preset is one of {', '.join(PRESETS)}, not {name!r}")
    where = torch.device(device.value)
    if op == "squared_norm":  # the benchmark measures it with the optimizer's step
        return [_Call(op, ([torch.empty(CPU_SHARD, device=where)],), {})]
    generator, sizes = torch.Generator(where), PRESETS[name].sized(CPU_TOKENS, shard=CPU_SHARD)
    made = [(case, case.make(generator, where)) for case in cases([op], sizes, torch.bfloat16)]
    return [_Call(case.title, *case.whole_arguments(inputs)) for case, inputs in made]


def _verdict(implementation: Implementation, call: _Call | None) -> str:
    if call is None:
        return "this process has no CUDA device"
    return implementation.supports(*call.positional, **call.keywords) or "runs"


def _has(device: Device) -> bool:
    import torch

    return device is Device.cpu or torch.cuda.is_available()
