"""Training speed on this machine's CPU: megapt beside the Trainer of transformers, in one run.

Run it where megapt, transformers and accelerate can be imported; it takes three to five minutes on two quiet cores:

    python docs/results/cpu-training/compare.py --output result.json

Each side trains the same Llama (llama-16m.yaml) in a process of its own, on random tokens, with AdamW and clipping,
one micro-batch per step. The sides take turns, a few steps at a time, and their order changes from round to round:
what else the machine does then burdens all of them alike. Each round gives one time per side and so one ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from megapt.config import Config

HERE = Path(__file__).resolve().parent
CONFIG = HERE / "llama-16m.yaml"
RIVALS = {
    "fp32": ["trainer"],
    # autocast with fp32 weights; the whole model in bf16, optimizer state included
    "bf16": ["trainer", "trainer-bf16-weights"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2, help="steps of a side in a round")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--precision", nargs="+", choices=RIVALS, default=list(RIVALS))
    parser.add_argument("--backend", nargs="+", choices=("native", "deepspeed"), default=["native"])
    parser.add_argument("--output", type=Path, default=None, help="write the result there as JSON")
    parser.add_argument("--override", nargs="*", default=[], help="key=value changes of the config")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--scratch", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        serve(options.side, options.precision[0], options.override, options.scratch)
        return
    with tempfile.TemporaryDirectory(prefix="compare-") as options.scratch:
        precisions = {precision: compare(precision, options) for precision in options.precision}
    result = {**about(options), "precisions": precisions}
    if options.output is not None:
        temporary = options.output.with_name(options.output.name + ".partial")
        temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, options.output)


def about(options: argparse.Namespace) -> dict[str, Any]:
    """What was run, and where."""
    import torch

    from megapt import bench

    torch.set_num_threads(options.threads)
    return {
        "environment": bench.environment_of(torch.device("cpu")),
        "config": bench.load(CONFIG, options.override).config.model_dump(include={"model", "batch", "optimizer"}),
        "rounds": options.rounds,
        "steps_per_round": options.steps,
    }


def compare(precision: str, options: argparse.Namespace) -> dict[str, Any]:
    """Rounds of all sides of one precision; prints a table."""
    ours = [f"megapt-{backend}" for backend in options.backend]
    sides = {name: Side(name, precision, options) for name in [*ours, *RIVALS[precision]]}
    order = list(sides)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in sides}
    gemm = []
    try:
        for side in sides.values():
            side.ask(steps=2)  # warm up
        for round_number in range(options.rounds):
            first = round_number % len(order)
            turn = order[first:] + order[:first]
            for name in turn if round_number % 2 == 0 else reversed(turn):
                answer = sides[name].ask(steps=options.steps)
                seconds[name].append(answer["seconds"] / options.steps)
                cpu_seconds[name].append(answer["cpu_seconds"] / options.steps)
            gemm.append(sides[ours[0]].ask(gemm=True)["flops"])
        facts = {name: side.ask(facts=True) for name, side in sides.items()}
    finally:
        for side in sides.values():
            side.end()
    flops = flops_per_step(options)
    report = {
        "gemm_flops_per_second": median(gemm),
        "sides": {
            name: summary(seconds[name], seconds[ours[0]], flops / median(gemm), facts[name])
            | {"cpu_seconds_per_step": median(cpu_seconds[name])}
            for name in sides
        },
    }
    show(precision, report, ours[0])
    return report


def summary(seconds: list[float], ours: list[float], ideal: float, facts: dict[str, Any]) -> dict[str, Any]:
    """What is reported of a side. ideal: seconds of a step that ran at the speed of a large matrix product."""
    ratios = sorted(theirs / mine for theirs, mine in zip(seconds, ours, strict=True))
    middle = median(seconds)
    return {
        "what": facts["what"],
        "tokens_per_second": facts["tokens"] / middle,
        "gemm_share": ideal / middle,
        "peak_memory_bytes": facts["peak_memory_bytes"],
        "time_over_megapt": {"median": median(ratios), "min": ratios[0], "max": ratios[-1]},
        "step_seconds": {"median": middle, "rounds": seconds},
    }


def flops_per_step(options: argparse.Namespace) -> float:
    from megapt.config import load
    from megapt.plan.flops import model_flops_per_token

    config = load(CONFIG, options.override).config
    per_token = model_flops_per_token(config.model, config.batch.sequence)
    return per_token * config.batch.micro * config.batch.sequence


def show(precision: str, report: dict[str, Any], first: str) -> None:
    print(f"\n{precision}: a large matrix product runs at {report['gemm_flops_per_second'] / 1e9:,.0f} GFLOP/s")
    print(
        f"{'':22}{'tokens/s':>10}{'of GEMM':>10}{'memory':>12}{'CPU s/step':>12}   "
        f"time / {first} (median, range over rounds)"
    )
    for name, side in report["sides"].items():
        ratio = side["time_over_megapt"]
        print(
            f"{name:22}{side['tokens_per_second']:10,.0f}{100 * side['gemm_share']:9.0f}%"
            f"{side['peak_memory_bytes'] / 2**20:8,.0f} MiB{side['cpu_seconds_per_step']:12.2f}"
            f"   {ratio['median']:.2f} ({ratio['min']:.2f} .. {ratio['max']:.2f})",
            flush=True,
        )


class Side:
    """A process that trains when asked, and answers in lines of JSON."""

    def __init__(self, name: str, precision: str, options: argparse.Namespace) -> None:
        command = [sys.executable, __file__, "--side", name, "--precision", precision, "--scratch", options.scratch]
        command += ["--override", *options.override]
        environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
        self.name = name
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with exit code {self.process.wait()}; its messages are above")
        return json.loads(line)

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()


def serve(side: str, precision: str, overrides: list[str], scratch: str) -> None:
    """One side: trains as many steps as each request asks for."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever libraries print goes to stderr

    from megapt.config import load

    config = load(CONFIG, [f"precision={precision}", *overrides]).config
    clock = Clock(config, answers)
    if side.startswith("megapt"):
        train_megapt(config, side.removeprefix("megapt-"), clock)
    else:
        train_trainer(config, side, clock, scratch)


class Clock:
    """Between steps: answers requests, and lets the next steps begin when there is one for them."""

    def __init__(self, config: Config, answers: TextIO) -> None:
        self.config, self.answers = config, answers
        self.what = ""
        self.left = 0
        self.started = 0.0, 0.0

    def tick(self) -> None:
        """Call before the first step and after every one."""
        if self.left > 0:
            self.left -= 1
            if self.left == 0:
                now = time.perf_counter(), time.process_time()
                self._answer(seconds=now[0] - self.started[0], cpu_seconds=now[1] - self.started[1])
        while self.left == 0:
            line = sys.stdin.readline()
            if not line:
                os._exit(0)  # a Trainer would go on to the end of its run
            request = json.loads(line)
            if "steps" in request:
                self.left = request["steps"]
                self.started = time.perf_counter(), time.process_time()
            elif "gemm" in request:
                self._gemm()
            else:
                self._facts()

    def _answer(self, **answer: Any) -> None:
        self.answers.write(json.dumps(answer) + "\n")
        self.answers.flush()

    def _gemm(self) -> None:
        import torch

        from megapt import bench

        self._answer(flops=bench.gemm_flops(bench.DTYPES[self.config.precision], torch.device("cpu")))

    def _facts(self) -> None:
        from megapt.monitor.progress import memory_bytes

        batch = self.config.batch
        self._answer(what=self.what, peak_memory_bytes=memory_bytes("cpu").peak, tokens=batch.micro * batch.sequence)


def train_megapt(config: Config, backend: str, clock: Clock) -> None:
    import torch

    from megapt import bench
    from megapt.engine import Engine

    zero = config.zero.model_copy(update={"backend": backend})
    engine = Engine(config.model_copy(update={"zero": zero}), 1, torch.device("cpu"))
    clock.what = engine.backend.describe()
    clock.tick()
    for _ in bench.endless_steps(engine):
        clock.tick()


def train_trainer(config: Config, side: str, clock: Clock, scratch: str) -> None:
    """As its documentation would have it: autocast for bf16, PyTorch's fused AdamW, no logging, no saving."""
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from megapt.bench import RandomTokens
    from megapt.convert.export import family_of

    fields = dict(family_of(config.model).config(config.model))
    kind = fields.pop("model_type")
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **fields, vocab_size=config.model.vocabulary, tie_word_embeddings=False)
    )
    whole = side == "trainer-bf16-weights"
    if whole:
        model = model.to(torch.bfloat16)
    autocast = config.precision == "bf16" and not whole
    tokens = RandomTokens(config.model.vocabulary, config.batch.sequence - 1)
    rows = [torch.from_numpy(tokens.sample([i])[0]) for i in range(64 * config.batch.micro)]
    optimizer = config.optimizer
    arguments = TrainingArguments(
        scratch, use_cpu=True, bf16=autocast, per_device_train_batch_size=config.batch.micro, max_steps=10**6,
        optim="adamw_torch_fused", learning_rate=optimizer.lr, weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.betas[0], adam_beta2=optimizer.betas[1], max_grad_norm=optimizer.clip,
        lr_scheduler_type="constant", logging_strategy="no", save_strategy="no", report_to=[], disable_tqdm=True,
    )  # fmt: skip

    class Pause(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.tick()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.tick()

    how = "bf16 autocast" if autocast else f"{next(model.parameters()).dtype} weights".removeprefix("torch.")
    attention = model.config._attn_implementation
    clock.what = f"transformers {transformers.__version__} Trainer, {how}, {attention} attention, fused AdamW"
    data = [{"input_ids": row, "labels": row} for row in rows]
    Trainer(model=model, args=arguments, train_dataset=data, callbacks=[Pause()]).train()


if __name__ == "__main__":
    main()
