"""`megapt prove`: run a small model of a configuration's shape in every layout, and certify that all agree."""

from __future__ import annotations

import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megapt.errors import UserError

if TYPE_CHECKING:
    from megapt.prove.cases import Case
    from megapt.prove.small import Shape


class Precision(StrEnum):
    fp64 = "fp64"
    fp32 = "fp32"


def prove(
    config: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG] [KEY=VALUE]...",
            help="YAML file of a run, and values that replace the file's; without, a Llama and a GPT-2.",
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A covering set: every pair of values occurs (the default; minutes).")
    ] = False,
    full: Annotated[
        bool, typer.Option("--full", help="All that is legal of the main axes' product; half an hour.")
    ] = False,
    layouts: Annotated[
        str | None, typer.Option(metavar="LIST", help="These layouts, as in 'tp=2,pp=2;dp=4,zero=deepspeed-2'.")
    ] = None,
    why: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="A B", help="Name the first operation of layout B that differs from A."),
    ] = None,
    precision: Annotated[Precision, typer.Option(help="What the small models compute in.")] = Precision.fp64,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Ranks of a layout, at most, of --quick and --full; default: 8.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Write certificate.json, .md and .png there.")
    ] = None,
) -> None:
    """Prove that the layout does not change the math: losses, every gradient, norms, weights, moments, resuming.

    A small model of the configuration's shape trains in every layout, on ranks of this machine's CPU, and each is held
    against one process within bounds that follow from rounding alone. Exit status 0 only if all are inside.
    """
    if sum([quick, full, layouts is not None, why is not None]) > 1:
        raise UserError("choose one of --quick, --full, --layouts and --why")
    if ranks is not None and (layouts is not None or why is not None):
        raise UserError("--ranks limits --quick and --full; the layouts given here have their own numbers of ranks")
    if out is not None and why is not None:
        raise UserError("--why writes no certificate: leave out --out")
    shapes = _shapes(config or [])
    if why is not None:
        raise typer.Exit(_why(shapes, why, precision.value))
    if layouts is not None:
        raise typer.Exit(_prove(_given(shapes, layouts, precision.value), [], precision.value, out))
    cases, left_out = _matrix(shapes, full, precision.value, ranks or 8)
    raise typer.Exit(_prove(cases, left_out, precision.value, out))


def _shapes(words: list[str]) -> list[Shape]:
    from megapt.config import load
    from megapt.prove.small import built_in, shape_of

    files = [word for word in words if "=" not in word]
    if len(files) > 1 or (words and words[0] not in files):
        raise UserError(f"give one CONFIG, then key=value; got {' '.join(words)}")
    if not files:
        return built_in()
    return [shape_of(Path(files[0]).stem, load(files[0], words[1:]).config)]


def _given(shapes: list[Shape], layouts: str, precision: str) -> list[Case]:
    from megapt.prove.cases import Case
    from megapt.prove.job import require_ranks
    from megapt.prove.layout import Layout

    chosen = Layout.parse_list(layouts)
    require_ranks(chosen)
    cases = [Case(shape, layout) for shape in shapes for layout in dict.fromkeys(chosen)]
    for case in cases:
        case.config(precision)  # refuses what is not legal, before anything starts
    return cases


def _matrix(shapes: list[Shape], full: bool, precision: str, ranks: int) -> tuple[list[Case], list[str]]:
    """The cases, and what is left out of them."""
    from megapt.prove.cases import Matrix
    from megapt.prove.job import bearable_ranks, has_compiler

    left_out: list[str] = []
    bearable = bearable_ranks()
    if bearable < ranks:
        left_out.append(f"layouts of more than {bearable} ranks, which this machine's free memory does not bear")
    compiler = has_compiler()
    if not full:
        left_out.append("compile=on, which --full runs")
    elif not compiler:
        left_out.append("compile=on, since this machine has no C++ compiler (g++, clang++, or CXX)")
    cuda = precision == "fp32" and compiler and full
    if not cuda:
        left_out.append("kernels=cuda, which --full runs under the emulator in fp32, where there is a C++ compiler")
    matrix = Matrix(shapes, min(ranks, bearable), precision, compiler, cuda)
    return (matrix.full() if full else matrix.quick()), left_out


def _prove(cases: list[Case], left_out: list[str], precision: str, out: Path | None) -> int:
    from megapt.prove import certificate
    from megapt.prove.job import Prover

    for reason in left_out:
        _say(f"left out: {reason}")
    _say(f"{len(cases)} layouts in {precision}")
    with Prover(precision, _say) as prover:
        proof = prover.run(cases)
    if out is not None:
        certificate.write(out, proof, shlex.join(["megapt", *sys.argv[1:]]), left_out)
        _say(f"certificate: {out / certificate.MARKDOWN}")
    failed = [outcome for outcome in proof.outcomes if not outcome.passed]
    for outcome in failed:
        _say(f"{outcome.case}: {outcome.verdict}")
    for name, worst in proof.plain.items():
        for quantity, value in worst.items():
            if not value.inside:
                _say(f"{name}: the reference's {quantity} ({value.name}) is not plain PyTorch's: {value.error:.1e}")
    count = len(proof.outcomes)
    _say(
        f"{count - len(failed)} of {count} layouts compute the same as one process, and that as plain PyTorch"
        if proof.passed or failed
        else "the layouts agree, but the reference is not what plain PyTorch computes"
    )
    return 0 if proof.passed else 1


def _why(shapes: list[Shape], pair: tuple[str, str], precision: str) -> int:
    from megapt.prove.cases import Case
    from megapt.prove.job import require_ranks
    from megapt.prove.layout import Layout
    from megapt.prove.why import explain

    a, b = (Layout.parse(text) for text in pair)
    require_ranks([a, b])
    if a.optimizer != b.optimizer:
        names = [layout.optimizer or "the configured one" for layout in (a, b)]
        raise UserError(f"--why compares layouts of one optimizer, not of {' and '.join(names)}")
    for shape in shapes:
        for layout in (a, b):
            Case(shape, layout).config(precision)  # refuses what is not legal
    status = 0
    for shape in shapes:
        explanation = explain(Case(shape, a), Case(shape, b), precision, _say)
        for line in explanation.lines():
            _say(f"{shape.name}: {line}" if len(shapes) > 1 else line)
        status |= explanation.first is not None
    return status


def _say(line: str) -> None:
    typer.echo(line)
    sys.stdout.flush()
