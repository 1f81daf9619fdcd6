"""python -m megapt_kernels.bench OP[,OP...]|all [options]"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megapt_kernels import registry
from megapt_kernels.bench.presets import CPU_SHARD, CPU_TOKENS, PRESETS, Preset
from megapt_kernels.bench.rivals import KINDS
from megapt_kernels.bench.rows import Refused, Writer, check_comparable, compare, environment, read
from megapt_kernels.registry import Unsupported


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m megapt_kernels.bench",
        description="Time every implementation of an operation, and rivals, beside the best that this device can do.",
        epilog="Exit status: 0; 1 if an implementation failed or was wrong, or --compare found a slower one; 2 if the "
        "arguments are wrong; 3 if an implementation broke the device's context, so that the rest was not measured. "
        "Columns and method: docs/kernels-bench.md.",
    )
    add = made.add_argument
    add("ops", help=f"operations, or all: {', '.join(registry.operations())}")
    add("--preset", choices=list(PRESETS), help="shapes; default: llama-8b on a GPU, cpu on a CPU")
    add("--tokens", type=_positive, help=f"tokens; default: the preset's, on a CPU {CPU_TOKENS}")
    add("--sequence", type=_positive, help="tokens of a sequence in attention; default: the preset's")
    add("--parameters", type=_positive, help=f"that AdamW updates; default: the preset's, on a CPU {CPU_SHARD}")
    add("--dtype", choices=("bf16", "fp16", "fp32"), help="default: bf16 on a GPU, fp32 on a CPU")
    add("--impl", default="all", help=f"names or kinds ({', '.join(KINDS)}), or all; cuda on a CPU is the emulator")
    add("--pass", dest="passes", default="fwd,bwd,fwd+bwd", help="default: %(default)s")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    add("--seconds", type=_seconds, default=0.3, help="time to measure one row; default: %(default)s")
    add("--budget", type=_seconds, help="seconds in all; each case has its share of the rest, and skips later rows")
    add("--out", type=Path, metavar="FILE", help="append rows there as JSON lines")
    add("--append", action="store_true", help="the file of --out may exist")
    add("--compare", type=Path, metavar="OLD", help="exit with 1 if a row is slower than in that file of rows")
    add("--tolerance", type=_fraction, default=0.05, metavar="5%", help="of --compare; default: 5%%")
    add("--plot", type=_picture, metavar="PNG", help="draw the share of the limit that each implementation reaches")
    add("--seed", type=int, default=0, help="of the random inputs; default: %(default)s")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    try:
        return _run(given)
    except (Refused, Unsupported) as error:
        print(f"megapt_kernels.bench: error: {error}", file=sys.stderr)
        return 2


def _run(given: argparse.Namespace) -> int:
    import torch
    from rich.console import Console

    from megapt_kernels.bench import report
    from megapt_kernels.bench.cases import PASSES, cases
    from megapt_kernels.bench.run import DTYPE_NAMES, DeviceLost, Run, Settings

    ops = _chosen(given.ops, registry.operations(), "operation")
    passes = _chosen(given.passes, PASSES, "pass")
    device = torch.device(given.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise Refused("--device cuda: this process has no CUDA device; --device cpu measures on the CPU")
    preset = _preset(given, device.type)
    dtypes = {name: dtype for dtype, name in DTYPE_NAMES.items()}
    dtype = dtypes[given.dtype or ("bf16" if device.type == "cuda" else "fp32")]
    impls = tuple(name.strip().lower() for name in given.impl.split(","))
    if device.type == "cpu" and "cuda" in impls:
        from megapt_kernels import library

        library.load_emulated()
    todo = cases(ops, preset, dtype)
    known = _known(todo)
    for name in impls:
        if name not in known:
            raise Refused(f"--impl {name}: there are all, {', '.join(sorted(known - {'all'}))}")
    old = read(given.compare) if given.compare else []
    check_comparable(old, environment(device))

    writer = Writer(given.out, given.append)
    console = Console(width=None if sys.stdout.isatty() else 190, highlight=False)
    settings = Settings(impls, passes, given.seconds, given.budget, preset.name, given.seed)
    run = Run(device, dtype, settings, writer, console.print)
    run.start()
    lost = False
    for number, case in enumerate(todo):
        try:
            rows = run.measure(case, len(todo) - number)
        except DeviceLost as error:
            console.print(f"stopped: {error}; what follows was not measured", markup=False, style="red")
            lost = True
            break
        console.print(report.table(rows))
        for line in report.reasons(rows):
            console.print(f"  {line}", markup=False)
    if given.plot:
        report.plot(writer.rows, given.plot)
    slower = False
    if given.compare:
        lines, slower = compare(old, writer.rows, given.tolerance)
        console.print(*lines, sep="\n", markup=False)
    return 3 if lost else 1 if run.failed or slower else 0


def _preset(given: argparse.Namespace, device: str) -> Preset:
    """The shapes: on a CPU, an amount that two cores work off in seconds unless more is asked for."""
    preset = PRESETS[given.preset or ("llama-8b" if device == "cuda" else "cpu")]
    if device == "cpu":
        return preset.sized(given.tokens or CPU_TOKENS, given.sequence, given.parameters or CPU_SHARD)
    return preset.sized(given.tokens, given.sequence, given.parameters)


def _known(todo: Sequence[Any]) -> set[str]:
    from megapt_kernels.bench.rivals import rivals_of

    return {"all", *KINDS, *(r.name.lower() for case in todo for r in rivals_of(case, None))}


def _chosen(text: str, legal: Sequence[str], what: str) -> tuple[str, ...]:
    if text == "all":
        return tuple(legal)
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in legal:
            raise Refused(f"there is no {what} {name!r}; there are all, {', '.join(legal)}")
    return names


def _positive(text: str) -> int:
    value = int(text.replace("_", ""))
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def _picture(text: str) -> Path:
    if not text.endswith((".png", ".pdf", ".svg")):
        raise argparse.ArgumentTypeError(f"{text} ends in none of .png, .pdf and .svg")
    return Path(text)


def _seconds(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def _fraction(text: str) -> float:
    value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    if not 0 <= value < 10:
        raise argparse.ArgumentTypeError(f"{text} is no share such as 5% or 0.05")
    return value


if __name__ == "__main__":
    sys.exit(main())
