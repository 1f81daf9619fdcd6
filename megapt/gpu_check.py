"""What this checkout does on this machine's GPU, in minutes: the work of launch/gpu_check.sh.

Every part is processes of its own with a time limit, so that one that hangs, runs out of memory or breaks the device
costs no other; what it found is on the disk before the next begins.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megapt.files import write_whole
from megapt.gpu_report import markdown, training_plot

ROOT = Path(__file__).resolve().parent.parent
Result = dict[str, Any]

# What of --seconds each part may take, the most important ones first.
PARTS = {"environment": 0.06, "tests": 0.2, "kernels": 0.33, "training": 0.31, "quickstart": 0.1}
NEEDS = {
    "environment": ("torch", "packaging"),
    "tests": ("torch", "numpy"),
    "kernels": ("torch", "numpy", "rich"),
    "training": ("torch", "numpy", "pydantic", "yaml", "typer", "rich"),
    "quickstart": ("torch", "numpy", "pydantic", "yaml", "typer", "rich", "tokenizers", "tiktoken", "psutil"),
}
KERNELS = ("norm", "glu", "rope", "attention", "cross_entropy", "adamw", "wgrad")


@dataclass
class Check:
    """What the parts share. work: a temporary folder. rehearsal: tiny shapes on the CPU."""

    out: Path
    work: Path
    rehearsal: bool
    log: Path
    deadline: float = 0.0

    @property
    def device(self) -> str:
        return "cpu" if self.rehearsal else "cuda"

    def left(self) -> float:
        """Seconds until the part must end."""
        return self.deadline - time.monotonic()

    def run(self, *command: str, limit: float = 1e9, variables: dict[str, str] | None = None) -> tuple[int | None, str]:
        """Exit status, None if it was cut off, and what it printed, which the log gets as well.

        limit: seconds, where the part does not end before. variables: further ones of its environment.
        """
        return _run(command, min(limit, max(1.0, self.left())), self.log, self._variables() | (variables or {}))

    def python(
        self, *arguments: str, limit: float = 1e9, variables: dict[str, str] | None = None
    ) -> tuple[int | None, str]:
        return self.run(sys.executable, "-P", *arguments, limit=limit, variables=variables)

    def _variables(self) -> dict[str, str]:
        paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
        here = {
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONUNBUFFERED": "1",
            "MPLBACKEND": "Agg",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            # Nothing of what is compiled on the way stays on the machine.
            "TRITON_CACHE_DIR": str(self.work / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(self.work / "inductor"),
        }
        if self.rehearsal:
            here |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        elif "CUDA_VISIBLE_DEVICES" not in os.environ:
            here["CUDA_VISIBLE_DEVICES"] = "0"
        return os.environ | here


def _run(command: Sequence[str], limit: float, log: Path, variables: dict[str, str]) -> tuple[int | None, str]:
    with open(log, "ab") as output:
        output.write(f"\n$ {' '.join(command)}\n".encode())
        output.flush()
        start = output.tell()
        process = subprocess.Popen(
            command, cwd=ROOT, env=variables, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            start_new_session=True,
        )  # fmt: skip
        code: int | None = None
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            output.write(f"\ncut off after {limit:.0f} s\n".encode())
        finally:
            # Its children too: a test or a launcher may have started ranks.
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
    with open(log, "rb") as written:
        written.seek(start)
        return code, written.read().decode(errors="replace")


def _failed(message: str, **found: Any) -> Result:
    return {"status": "failed", "message": message, **found}


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it printed nothing"


def _ended(code: int | None, text: str) -> str:
    return "cut off by its time limit" if code is None else f"status {code}: {_last_line(text)[:300]}"


# Environment


def environment(check: Check) -> Result:
    found: Result = {"status": "ok", "message": ""}
    # In a process of its own: this one keeps off the device, which the parts are to have for themselves.
    code, text = check.python("-c", _DEVICE, check.device)
    if code != 0:
        return found | _failed(f"torch does not run here: {_ended(code, text)}")
    found |= json.loads(_last_line(text))
    if shutil.which("nvidia-smi"):
        query = "name,driver_version,memory.total,clocks.max.sm,power.limit"
        _, text = check.run("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", limit=10)
        found["nvidia-smi"] = text.strip()
    reason = found.pop("without kernels")
    if reason is not None and not check.rehearsal:
        return found | _failed(f"our CUDA kernels do not run here: {reason}")
    found["message"] = f"{found['name']}, torch {found['torch']}; CUDA kernels: {reason or found['kernel library']}"
    return found


_DEVICE = """
import json, sys, torch
from megapt import doctor
from megapt_kernels import library
from megapt_kernels.bench.rows import environment
device = torch.device(sys.argv[1])
found = environment(device) | {"without kernels": library.missing(device), "kernel library": None}
if (loaded := library.loaded()) is not None:
    found["kernel library"] = f"{loaded.path} for {', '.join(loaded.architectures)}"
report = doctor.report()
found["missing or out of range"] = report["problems"]
found["optional"] = [f"{part['name']} {part['version'] or ''}" for part in report["optional"] if part["found"]]
print(json.dumps(found))
"""


# Kernel tests


def tests(check: Check) -> Result:
    """tests/kernels on the GPU; without pytest, every operation on small shapes against exact results."""
    if importlib.util.find_spec("pytest") is None:
        code, text = check.python(*_bench(check, check.work / "smoke.jsonl", "cpu"), "--seconds", "0.001")
        message = "pytest is not installed: every implementation on small shapes against exact results instead"
        return {"status": "ok", "message": message} if code == 0 else _failed(f"{message}: {_ended(code, text)}")
    command = ["-m", "pytest", "tests/kernels", "-v", "--tb=short", "-p", "no:cacheprovider"]
    if check.rehearsal:  # what needs no compiled kernels
        command[2:3] = ["tests/kernels/test_bench.py", "-k", "not emulator"]
    if importlib.util.find_spec("pytest_timeout") is None:
        # The project's settings name its option, which pytest refuses without it.
        command += ["-o", "addopts=--import-mode=importlib"]
    else:
        command += ["--timeout", "60"]
    if importlib.util.find_spec("xdist") is not None and not check.rehearsal:
        command += ["-n", str(min(4, os.cpu_count() or 1))]
    code, text = check.python(*command)
    counts, failures = _counted(text)
    message = ", ".join(f"{n} {word}" for word, n in counts.items() if n) or _last_line(text)
    if code == 0:
        return {"status": "ok", "message": message, **counts}
    return _failed(f"{message}; {_ended(code, text)}", **counts, failures=failures)


def _counted(text: str) -> tuple[dict[str, int], list[str]]:
    """Results by word, and the names of failed tests, of a verbose pytest run that may have been cut off."""
    counts = dict.fromkeys(("passed", "failed", "error", "skipped", "xfailed"), 0)
    failures = []
    for line in text.partition("short test summary")[0].splitlines():
        found = re.search(r"(\S+::\S.*?)\s+(PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b", line) or re.search(
            r"\b(PASSED|FAILED|ERROR|SKIPPED|XFAIL)\s+(\S+::\S.*)", line
        )
        if found is None:
            continue
        name, word = found.groups() if "::" in found[1] else (found[2], found[1])
        counts["xfailed" if word == "XFAIL" else word.lower()] += 1
        if word in ("FAILED", "ERROR"):
            failures.append(name.strip())
    return counts, failures


# Microbenchmarks


def _bench(check: Check, rows: Path, preset: str) -> list[str]:
    words = ["-m", "megapt_kernels.bench", "all", "--device", check.device, "--preset", preset]
    return [*words, "--out", str(rows), "--append"]


def kernels(check: Check) -> Result:
    """All operations; where an implementation breaks the process, another goes on with the operation behind it."""
    from megapt_kernels.bench import report
    from megapt_kernels.bench.rows import read
    from megapt_kernels.registry import operations

    rows, endings, left = check.out / "bench.jsonl", [], list(operations())
    while left and check.left() > 20:
        # The rest is for the start, the ceilings, and a last row that takes longer than its case has time.
        budget = 0.85 * check.left() - 10
        command = _bench(check, rows, "cpu" if check.rehearsal else "llama-8b")
        command[2] = ",".join(left)
        amount = ["--seconds", "0.05", "--budget", f"{budget:.1f}"]
        if check.rehearsal:
            amount = ["--seconds", "0.002", "--tokens", "64", "--parameters", "4096"]
            amount += ["--impl", "library,reference,eager"]
        before = len(read(rows)) if rows.exists() else 0
        code, text = check.python(*command, *amount)
        if code in (0, 1):
            break
        if code == 2:
            return _failed(_ended(code, text))
        seen = [row["op"] for row in read(rows)[before:] if row["record"] == "measurement"] if rows.exists() else []
        broken = seen[-1] if seen else left[0]
        endings.append(f"{broken}: {_ended(code, text)}")
        left = left[left.index(broken) + 1 :]
    found = read(rows) if rows.exists() else []
    measured = [row for row in found if row["record"] == "measurement"]
    timed = [row for row in measured if row["p50_us"]]
    failed = [row for row in measured if row["status"] == "failed"]
    failures = [f"{r['op']} {r['case']} {r['impl']} {r['pass'] or ''} {r['mode'] or ''}: {r['reason']}" for r in failed]
    if timed:
        report.plot(timed, check.out / "bench.png")
    result = {"ceilings": {r["op"]: r["gb_per_s"] or r["tflops"] for r in found if r["record"] == "ceiling"}}
    message = f"{len(timed)} timed rows, {sum(r['status'] == 'skipped' for r in measured)} skipped with a reason"
    if endings or failures or not timed:
        return _failed("; ".join([message, *endings, *failures[:5]]), failures=failures, **result)
    return {"status": "ok", "message": message, **result}


# Training


def _variants(check: Check) -> dict[str, dict[str, str]]:
    """Name -> kernels.<operation>: PyTorch's own ("reference"), all of them, and each alone."""
    # Attention in plain operations would take most of the step; PyTorch's flash kernel is what all start from.
    attention = "reference" if check.rehearsal else "torch flash"
    off = dict.fromkeys(KERNELS, "reference") | {"attention": attention, "wgrad": "off"}
    found = {"reference": off, "auto": dict.fromkeys(KERNELS, "auto")}
    alone = KERNELS[:1] if check.rehearsal else KERNELS
    return found | {f"{name} alone": off | {name: "auto"} for name in alone}


def training(check: Check) -> Result:
    """Llama 1B's shape at 4,096 tokens on random tokens: without our kernels, with all of them, with each alone."""
    words = ["batch.tokens=32768", "batch.micro=4", "batch.sequence=4096", "zero.backend=native"]
    steps = ["--steps", "5", "--warmup", "2"]
    if check.rehearsal:
        words = ["batch.tokens=256", "batch.micro=2", "batch.sequence=64", "zero.backend=native", "precision=fp32"]
        words += ["model.layers=2", "model.hidden=64", "model.ffn=128", "model.heads=4", "model.kv_heads=2"]
        words += ["model.vocabulary=512"]
        steps = ["--steps", "2", "--warmup", "1"]
    variants, failures = {}, []
    for name, chosen in _variants(check).items():
        if check.left() < 5:
            failures.append(f"{name}: no time was left")
            continue
        into = check.work / f"{name.replace(' ', '-')}.json"
        kernel_words = [f"kernels.{operation}={kind}" for operation, kind in chosen.items()]
        command = ["-m", "megapt", "bench", "train", "configs/llama-1b-1gpu.yaml", *words, *kernel_words, *steps]
        code, text = check.python(*command, "--json", str(into), limit=90)
        if code == 0 and into.exists():
            variants[name] = json.loads(into.read_text(encoding="utf-8"))
        else:
            failures.append(f"{name}: {_ended(code, text)}")
    result: Result = {"variants": variants, "failures": failures}
    if variants:
        training_plot(variants, check.out / "training.png")
    said = [
        f"{name} {variants[name]['tokens_per_second']:,.0f} tokens/s"
        + (f", MFU {100 * variants[name]['mfu']:.1f} %" if variants[name]["mfu"] else "")
        for name in ("reference", "auto")
        if name in variants
    ]
    if failures:
        return _failed("; ".join([*said, *failures]), **result)
    return {"status": "ok", "message": "; ".join(said), **result}


# Quickstart


def quickstart(check: Check) -> Result:
    """Text, tokenizer, token files, training: `megapt quickstart` where DeepSpeed is installed, else its steps."""
    from megapt.monitor.metrics import plot_loss, read_metrics

    whole = importlib.util.find_spec("deepspeed") is not None and not check.rehearsal
    folder = check.work / "quickstart"
    folder.mkdir()
    jobs = [["-m", "megapt", "quickstart", "--workdir", str(folder)]] if whole else _quickstart_steps(check, folder)
    for job in jobs:
        # As the only rank of a launcher: starting ranks of its own takes DeepSpeed's.
        rank = {"RANK": "0", "WORLD_SIZE": "1"} if "launch/pretrain.sh" in job else {}
        code, text = check.python(*job, variables=rank)
        if code != 0:
            return _failed(f"{' '.join(job[:4])}: {_ended(code, text)}")
    lines = read_metrics(folder / "run" / "metrics.jsonl")
    losses = [line["loss"] for line in lines if "loss" in line]
    speeds = sorted(line["tokens_per_second"] for line in lines if "tokens_per_second" in line)
    valid = [line["valid_loss"] for line in lines if "valid_loss" in line]
    plot_loss(folder / "run" / "metrics.jsonl", check.out / "quickstart.png", {})
    found = {"steps": lines[-1]["step"], "first_loss": losses[0], "valid_loss": valid[-1], "whole": whole}
    found["tokens_per_second"] = speeds[len(speeds) // 2]
    how = "megapt quickstart" if whole else "its steps without DeepSpeed and export"
    message = f"{how}: loss {losses[0]:.3f}, validation loss {valid[-1]:.3f} after {found['steps']} steps"
    if not valid[-1] < losses[0]:
        return _failed(f"{message}: nothing was learned", **found)
    return {"status": "ok", "message": message, **found}


def _quickstart_steps(check: Check, folder: Path) -> list[list[str]]:
    """Commands on the sources of Python's own library, with native ZeRO on one rank."""
    texts, tokenizer, data = folder / "corpus.jsonl", folder / "tokenizer.json", folder / "text"
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[: 40 if check.rehearsal else None]
    lines = (json.dumps({"text": path.read_text(encoding="utf-8", errors="replace")}) + "\n" for path in files)
    write_whole(texts, "".join(lines).encode())
    train = ["launch/pretrain.sh", "--config", "configs/quickstart.yaml", f"data.train={data}"]
    train += [f"data.tokenizer={tokenizer}", f"run.folder={folder / 'run'}", "run.tensorboard=false"]
    train += ["model.vocabulary=512", "zero.backend=native"]
    train += ["parallel.tensor=1", "parallel.pipeline=1", "parallel.data=1"]
    if check.rehearsal:
        train += ["train.steps=8", "train.validate_every=8", "train.validate_samples=16", "optimizer.warmup_steps=2"]
        train += ["model.layers=1", "model.hidden=96", "model.ffn=192", "batch.sequence=64"]
    else:
        train += ["precision=bf16"]
    return [
        ["-m", "megapt", "tokenizer", "train", str(texts), "--vocabulary", "512", "--output", str(tokenizer)],
        ["-m", "megapt", "data", "build", str(texts), "--output", str(data), "--tokenizer", str(tokenizer)],
        train,
    ]


# All of it

_WORK: dict[str, Callable[[Check], Result]] = {
    "environment": environment,
    "tests": tests,
    "kernels": kernels,
    "training": training,
    "quickstart": quickstart,
}


def check(out: Path, parts: Sequence[str], seconds: float, rehearsal: bool) -> int:
    """Run the parts and write summary.json and summary.md into `out` after each; 1 if one of them failed."""
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Result] = {}
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as work:
        here = Check(out.resolve(), Path(work), rehearsal, (out / "log.txt").resolve())
        end = time.monotonic() + seconds
        for number, part in enumerate(parts):
            # What a part leaves over is the later ones'.
            share = PARTS[part] / sum(PARTS[name] for name in parts[number:])
            started = time.monotonic()
            here.deadline = started + share * (end - started)
            results[part] = _result(part, here) | {"seconds": round(time.monotonic() - started, 1)}
            ended = results[part]
            print(f"{part}: {ended['status']} ({ended['seconds']} s): {ended['message']}", flush=True)
            summary = {"rehearsal": rehearsal, "parts": results}
            write_whole(out / "summary.json", json.dumps(summary, indent=2).encode() + b"\n")
            write_whole(out / "summary.md", markdown(results, out, rehearsal).encode())
    print((out / "summary.md").read_text(encoding="utf-8"))
    return int(any(result["status"] == "failed" for result in results.values()))


def _result(part: str, here: Check) -> Result:
    missing = [name for name in NEEDS[part] if importlib.util.find_spec(name) is None]
    if missing:
        return {"status": "skipped", "message": f"needs {', '.join(missing)}, which this Python does not have"}
    try:
        return _WORK[part](here)
    except Exception as error:  # whatever it is, the other parts go on
        return _failed(f"{type(error).__name__}: {error}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="launch/gpu_check.sh",
        description="Kernel tests, microbenchmarks, training and the quickstart on this machine's GPU, in minutes.",
        epilog="Exit status: 0; 1 if a part failed; 2 if there is no GPU, or the arguments are wrong.",
    )
    parser.add_argument("out", type=Path, metavar="FOLDER", help="for summary.md, summary.json and what they name")
    parser.add_argument("--parts", default=",".join(PARTS), help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=520.0, help="for all parts together; default: %(default)s")
    parser.add_argument("--cpu", action="store_true", help="a rehearsal without a GPU: the same parts, tiny shapes")
    given = parser.parse_args(arguments)
    parts = given.parts.split(",")
    for part in parts:
        if part not in PARTS:
            parser.error(f"--parts: there is no part {part!r}; there are {', '.join(PARTS)}")
    if given.out.exists() and any(given.out.iterdir()):
        parser.error(f"{given.out} is not empty: name a new folder")
    if importlib.util.find_spec("torch") is None:
        parser.error(f"{sys.executable} has no torch: name another Python in PYTHON")
    if not given.cpu:
        import torch

        if not torch.cuda.is_available():
            parser.error(f"torch {torch.__version__} finds no CUDA device here; --cpu rehearses the parts on the CPU")
    # A run that is ended takes the processes that it started with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    return check(given.out, parts, given.seconds, given.cpu)


if __name__ == "__main__":
    sys.exit(main())
