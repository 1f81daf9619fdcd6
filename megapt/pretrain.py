"""Pretraining: from a config file to checkpoints, on one rank or thousands. The loop reads top to bottom."""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megapt.config import Config, Loaded, dump, load
from megapt.data.batches import BatchSchedule
from megapt.data.composite import CompositeDataset
from megapt.data.open import ValidationSet, open_train, open_valid, schedule
from megapt.data.receipt import Receipt
from megapt.errors import UserError
from megapt.files import write_whole
from megapt.launcher import RankEnvironment, rank_environment
from megapt.lr import LearningRate
from megapt.rules import check_world

if TYPE_CHECKING:
    from torch import Tensor

    from megapt.checkpoint.upkeep import Upkeep
    from megapt.engine import Engine
    from megapt.mesh import ParallelMesh


def main(arguments: Sequence[str]) -> int:
    """Train as this rank. Exit status 0 when the run ended, or was stopped and saved.

    Everything that can be refused without the other ranks is refused before a process group exists.
    """
    environment = rank_environment(dict(os.environ))
    try:
        loaded = _planned(_parse(arguments), environment)
        data = check_world(loaded.config, environment.world)
        plan = RunPlan.of(loaded.config)
        _check_device(loaded.config, data, environment)
    except UserError:
        if environment.local_rank == 0:
            raise
        time.sleep(10)  # the same on every rank of this machine: one of them says it, and the launcher ends the rest
        return 2
    return _join_and_train(loaded, plan, environment)


def _check_device(config: Config, data: int, environment: RankEnvironment) -> None:
    """UserError where this machine cannot do what the config asks of it."""
    from megapt.distributed import device_of
    from megapt.kernel_choice import check_kernels
    from megapt.model.compiled import check_compiler
    from megapt.plan.memory import layer_policies

    device = device_of(environment)
    layer_policies(config, data, cpu=device.type == "cpu")
    if config.compile:
        check_compiler(device)
    check_kernels(config, device)


def _parse(arguments: Sequence[str]) -> Loaded:
    parser = argparse.ArgumentParser(prog="launch/pretrain.sh", allow_abbrev=False)
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument("--local_rank", type=int, help="set by the launcher; LOCAL_RANK counts")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace the file's")
    parser.add_argument("--from-scratch", action="store_true", help="fresh weights where checkpoint.load is missing")
    options = parser.parse_intermixed_args(list(arguments))
    scratch = ["checkpoint.from_scratch=true"] if options.from_scratch else []
    return load(options.config, [*options.overrides, *scratch])


def _planned(given: Loaded, environment: RankEnvironment) -> Loaded:
    """The same tree with a layout where it says `parallel: auto`."""
    from megapt.distributed import device_of
    from megapt.plan.auto import describe, resolve

    if given.config.parallel.auto is None:
        return given
    loaded = resolve(given, environment.world, device_of(environment))
    line = describe(given, loaded, environment.world)
    if environment.rank == 0 and line is not None:
        print(line, flush=True)
    return loaded


@dataclass(frozen=True)
class RunPlan:
    """What a config means in steps and samples, before any rank meets another."""

    train: CompositeDataset
    valid: list[ValidationSet]
    batches: BatchSchedule
    steps: int
    lr: LearningRate

    @classmethod
    def of(cls, config: Config) -> RunPlan:
        batch, optimizer = config.batch, config.optimizer
        batches, steps = schedule(config)
        train = open_train(config, batches.first_sample(steps))
        valid = open_valid(config) if config.train.validate_samples else []
        for one in valid:
            if one.data.num_samples_per_epoch < batch.global_samples:
                raise UserError(
                    f"the validation set {one.data.name} has {one.data.num_samples_per_epoch} samples of "
                    f"{batch.sequence} tokens, less than one global batch of {batch.global_samples}; give it more data "
                    "(data.split), or set train.validate_samples=0"
                )
        lr = LearningRate(
            optimizer.lr, steps, optimizer.warmup_steps, optimizer.schedule, optimizer.floor, optimizer.decay_steps
        )
        return cls(train, valid, batches, steps, lr)

    def valid_batches(self, one: ValidationSet, wanted: int) -> int:
        """Global batches that `wanted` validation samples are, one at least and as many as there are."""
        size = self.batches.sizes[-1]
        return min(max(1, wanted // size), one.data.num_samples_per_epoch // size)


def _join_and_train(loaded: Loaded, plan: RunPlan, environment: RankEnvironment) -> int:
    from megapt.checkpoint import AgreedError
    from megapt.distributed import join, leave
    from megapt.engine import Engine
    from megapt.mesh import describe_rank
    from megapt.monitor.signals import StopRequest
    from megapt.monitor.watchdog import Watchdog

    config = loaded.config
    environment, device = join(environment, timedelta(seconds=2 * config.run.stall_timeout + 600))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    data, tensor = check_world(config, environment.world), config.parallel.tensor
    limit = config.run.time_limit
    with (
        # Outside the watchdog: a launcher that tells the survivors to stop must not keep them from naming who died.
        StopRequest(limit * 60 if limit else None) as stop,
        Watchdog(
            environment.master_addr,
            environment.master_port,
            environment.rank,
            environment.world,
            lambda rank: describe_rank(rank, data, tensor),
            stall_timeout=config.run.stall_timeout,
            prefix=f"watchdog/{attempt}",
        ) as watchdog,
    ):
        watchdog.beat(0, "building the model")
        try:
            engine = Engine(config, environment.world, device)
            training = Training(loaded, plan, engine, watchdog.beat, stop.reason)
            training.start()
            training.run()
        except AgreedError as error:
            # All ranks are here: rank 0 says it, and nobody is to blame. What one rank raises, the watchdog reports.
            if environment.rank == 0:
                print(f"megapt: error: {error}", file=sys.stderr)
            watchdog.close()
            return 2
    leave()
    return 0


class Training:
    """The loop's state on this rank: the step reached, the receipt of data consumed, metrics not yet written."""

    def __init__(
        self,
        loaded: Loaded,
        plan: RunPlan,
        engine: Engine,
        beat: Callable[[int, str], None],
        stop_reason: Callable[[], str | None],
    ) -> None:
        from megapt.data.loader import StepLoader

        self.loaded, self.config, self.plan, self.engine = loaded, loaded.config, plan, engine
        self.beat, self.stop_reason = beat, stop_reason
        self.folder = Path(self.config.run.folder)
        self.leader = engine.mesh.rank == 0
        self.step, self.skipped = 0, 0
        self.receipt = Receipt.of(plan.train)
        dp, batch, data = engine.mesh.dp, self.config.batch, self.config.data
        self.loader = StepLoader(plan.train, plan.batches, batch.micro, dp.rank, dp.size, data.prefetch, data.workers)
        self.unwritten: list[tuple[int, Tensor, Tensor, Tensor]] = []
        self.loss: float | None = None  # of the newest step that was logged
        self.validation: dict[str, Any] | None = None  # step and loss of the newest one
        self.upkeep = self._make_upkeep()

    # Starting

    def start(self) -> None:
        """Resume the newest checkpoint of the run folder, else start from given weights or fresh ones. Collective."""
        from megapt import checkpoint
        from megapt.monitor.progress import emit

        together, given = self._together(), self.config.checkpoint
        found = self.upkeep.choose()
        origin = "fresh weights"
        if found is not None:
            try:
                self._resume(found)
            except checkpoint.AgreedError as error:
                advice = self.upkeep.without(found) if f"{found} is damaged" in str(error) else ""
                raise checkpoint.AgreedError(f"{error}{advice}") from error
            if given.from_scratch and self.leader:
                emit(f"from_scratch: {self.folder} has a committed checkpoint, which the run goes on from")
            origin = f"resumed from {found}"
        elif (source := checkpoint.choose(self.engine.mesh, self._given)) is not None:
            self._load(source, weights_only=not given.load_optimizer)
            origin = f"weights {'and moments ' if given.load_optimizer else ''}of {source}"
        elif given.load is not None and self.leader:
            emit(f"WARNING: fresh weights: checkpoint.load = {given.load} does not exist")
        # The loader would meet token ids that the model does not know only once the run folder exists.
        together.run(lambda: self.loader.step(min(self.step, self.plan.steps - 1)))
        together.agree()
        if self.leader:
            together.run(lambda: self._open_run_folder(origin))
        together.agree()
        self.upkeep.reserve(self.engine.backend.fragments())

    def _given(self) -> Path | None:
        """The checkpoint to start from, if any; only with `from_scratch` may it be missing."""
        from megapt import checkpoint

        given = self.config.checkpoint
        if given.load is None or given.from_scratch and not Path(given.load).exists():
            return None
        try:
            return checkpoint.resolve(given.load)
        except UserError as error:
            if Path(given.load).exists():
                raise
            raise UserError(f"{error}; --from-scratch would start from fresh weights instead") from None

    def _make_upkeep(self) -> Upkeep:
        from megapt.checkpoint.upkeep import Upkeep
        from megapt.model.table import parameter_table
        from megapt.monitor.progress import emit

        mesh, config = self.engine.mesh, self.config.checkpoint
        agreement = _StopAgreement(mesh) if config.asynchronous else None
        return Upkeep(
            config,
            self.folder,
            mesh,
            parameter_table(self.config.model),
            say=emit,
            measure=lambda step, figures: self.metrics.log(step, **figures),
            agree=agreement.agreed if agreement is not None else lambda reason: False,
        )

    def _together(self) -> Any:
        from megapt.checkpoint.together import Together

        return Together(self.engine.mesh)

    def _load(self, source: Path, weights_only: bool) -> dict[str, Any]:
        from megapt import checkpoint

        engine, model = self.engine, self.config.model
        self.beat(self.step, f"loading {source}")
        meta = checkpoint.load(source, engine.backend.fragments(), engine.mesh, model, weights_only=weights_only)
        if not weights_only:
            together = self._together()
            together.run(lambda: _check_state(source, meta))
            together.agree()
        engine.backend.loaded(*((0,) if weights_only else (meta["updates"], meta.get("scalars"))))
        return meta

    def _layout(self) -> dict[str, int]:
        mesh = self.engine.mesh
        return {"world": mesh.world, "pipeline": mesh.pp.size, "data": mesh.dp.size, "tensor": mesh.tp.size}

    def _resume(self, source: Path) -> None:
        meta = self._load(source, weights_only=False)
        together = self._together()
        together.run(lambda: self._check_receipt(source, meta))
        together.agree()
        self.step, self.skipped, self.receipt = meta["step"], meta["skipped"], Receipt.from_dict(meta["receipt"])
        self.validation = meta.get("validation")

    def _check_receipt(self, source: Path, meta: dict[str, Any]) -> None:
        receipt = Receipt.from_dict(meta["receipt"])
        receipt.check(self.plan.train)
        expected = self.plan.batches.first_sample(meta["step"])
        if receipt.samples != expected:
            raise UserError(
                f"{source} had consumed {receipt.samples} samples at step {meta['step']}, but this config's batches "
                f"would have consumed {expected}: batch.samples, batch.tokens and batch.ramp must stay as they were"
            )

    def _open_run_folder(self, origin: str) -> None:
        from megapt.data.show import print_sources
        from megapt.model.table import parameter_table
        from megapt.monitor.metrics import Metrics
        from megapt.monitor.progress import Progress, peak_flops
        from megapt.monitor.run_folder import RunFolder, describe_environment
        from megapt.plan.flops import model_flops_per_token
        from megapt.summary import print_summary

        config, mesh = self.config, self.engine.mesh
        self.run_folder = RunFolder(self.folder)  # kept, since it holds the folder's lock
        self._warn_of_lost_steps()
        self.metrics = Metrics(self.folder, config.run.tensorboard, self.step + 1)
        self.upkeep.claim()
        machines = describe_environment(device=str(mesh.device), world_size=mesh.world, layout=self._layout())
        self.run_folder.record(dump(config), machines)
        given = config.run.peak_tflops
        peak, peak_text = peak_flops(mesh.device, given * 1e12 if given else None)
        sequence = config.batch.sequence
        self.progress = Progress(
            self.plan.steps,
            self.step,
            (lambda s: self.plan.batches.size(s) * sequence)
            if config.batch.ramp
            else config.batch.global_samples * sequence,  # no sum over the steps of a long run
            model_flops_per_token(config.model, sequence),
            peak,
            mesh.world,
        )
        print_summary(
            config,
            mesh,
            self.engine.backend.describe(),
            parameters=parameter_table(config.model).count(),
            start=f"step {self.step} of {self.plan.steps}, {origin}",
            samples_per_epoch=self.plan.train.num_samples_per_epoch,
            total_samples=self.plan.batches.first_sample(self.plan.steps),
            peak=peak_text,
        )
        if len(self.plan.train.sources) > 1:
            print_sources(self.plan.train, self.plan.batches.first_sample(self.plan.steps))

    def _warn_of_lost_steps(self) -> None:
        """Someone who expects a run to go on must see that it begins again."""
        from megapt.checkpoint.upkeep import leftovers
        from megapt.monitor.metrics import FILE_NAME, read_metrics
        from megapt.monitor.progress import emit

        if self.step > 0:
            return
        metrics = self.folder / FILE_NAME
        reached = max((line["step"] for line in read_metrics(metrics)), default=0) if metrics.exists() else 0
        torn = leftovers(self.upkeep.places)
        if reached or torn:
            traces = [f"metrics up to step {reached}"] * bool(reached)
            traces += [f"checkpoints that were never committed ({', '.join(torn)})"] * bool(torn)
            emit(f"WARNING: fresh weights: {self.folder} has {' and '.join(traces)}, but no committed checkpoint")

    # The loop

    def run(self) -> None:
        """Train until the last step or a stop request, validate, save."""
        config = self.config
        stop = _StopAgreement(self.engine.mesh)
        interval_start, interval_step = time.perf_counter(), self.step
        while self.step < self.plan.steps:
            self.beat(self.step, "loading data")
            batch = self.loader.step(self.step)
            self.beat(self.step, "training")
            lr = self.plan.lr(self.step)
            record = self.step + 1 == config.run.timeline_step
            loss, result = self.engine.train_step(batch, lr, record)
            self.step += 1
            if record:
                self._write_timeline()
            self.receipt.advance(self.plan.train, batch.sample_ids)
            self.unwritten.append((self.step, loss, result.grad_norm, result.skipped))
            stopping = stop.agreed(self.stop_reason())

            last = self.step == self.plan.steps
            validating = last or self._due(config.train.validate_every)
            saving = last or stopping or self.upkeep.due(self.step)
            if saving or self._due(config.run.log_every):
                now = time.perf_counter()
                self._log(lr, now - interval_start, self.step - interval_step)
                interval_start, interval_step = now, self.step
            if validating:
                self._validate()
            if saving:
                self._save(final=last or stopping)
            else:
                self.upkeep.watch(self.step)
            if validating or saving:
                interval_start = time.perf_counter()
            if stopping:
                if self.leader:
                    print(f"stopped at step {self.step}: {self.stop_reason() or 'asked for on another rank'}; saved")
                break
        self.upkeep.close()
        self.loader.close()
        if self.leader:
            self.metrics.close()

    def _write_timeline(self) -> None:
        """What the ranks of the first pipeline computed when in the step just done. Collective."""
        if self.engine.mesh.dp.rank or self.engine.mesh.tp.rank:
            return
        timeline = self.engine.pipeline.timeline()
        if timeline is not None:
            write_whole(self.folder / "timeline.json", timeline.to_json().encode())

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _log(self, lr: float, seconds: float, steps: int) -> None:
        """Bring the interval's losses and norms to the host, write them down, print a line. Collective."""
        import torch

        from megapt.monitor.progress import emit, memory_bytes

        losses = self.engine.mean_losses([loss for _, loss, _, _ in self.unwritten])
        norms = torch.stack([norm for _, _, norm, _ in self.unwritten]).tolist()
        skips = torch.stack([skipped for _, _, _, skipped in self.unwritten]).tolist()
        self.skipped += sum(skips)
        numbers = [step for step, *_ in self.unwritten]
        self.unwritten.clear()
        self.loss = losses[-1] if math.isfinite(losses[-1]) else None
        if not self.leader:
            return
        memory = memory_bytes(self.engine.mesh.device)
        line = self.progress.line(
            self.step,
            loss=losses[-1],
            lr=lr,
            grad_norm=norms[-1],
            step_seconds=seconds,
            skipped=self.skipped,
            memory=memory.peak,
        )
        emit(line)
        speed = self.progress.throughput
        assert speed is not None
        for step, loss, norm, skipped in zip(numbers, losses, norms, skips, strict=True):
            tokens = self.plan.batches.first_sample(step) * self.config.batch.sequence
            scalars = {"loss": loss, "grad_norm": norm, "lr": self.plan.lr(step - 1), "tokens": tokens}
            if skipped:
                scalars["skipped"] = 1
            if step == self.step:
                scalars |= {"tokens_per_second": speed.tokens_per_second, "memory": memory.peak}
                scalars |= {} if speed.mfu is None else {"mfu": speed.mfu}
            self.metrics.log(step, **scalars)

    def _validate(self) -> None:
        """Mean loss over the same validation samples every time: of each source, and over all by weight. Collective."""
        from megapt.data.loader import eval_batches
        from megapt.monitor.progress import emit

        if not self.plan.valid:
            return
        self.beat(self.step, "validation")
        batch, dp = self.config.batch, self.engine.mesh.dp
        losses, samples = {}, 0
        for one in self.plan.valid:
            count = self.plan.valid_batches(one, self.config.train.validate_samples)
            batches = eval_batches(one.data, count, batch.global_samples, batch.micro, dp.rank, dp.size)
            losses[one.name] = self.engine.evaluate(batches)
            samples += count * batch.global_samples
        if not self.leader:
            return
        overall = sum(one.weight * losses[one.name] for one in self.plan.valid)
        parts, scalars = "", {}
        if len(losses) > 1:
            parts = f" ({', '.join(f'{name} {loss:.4f}' for name, loss in losses.items())})"
            scalars = {f"valid_loss/{name}": loss for name, loss in losses.items()}
        emit(f"step {self.step}/{self.plan.steps} | validation loss {overall:.4f}{parts} over {samples} samples")
        self.metrics.log(self.step, valid_loss=overall, valid_samples=samples, **scalars)
        self.validation = {"step": self.step, "loss": overall} if math.isfinite(overall) else None

    def _save(self, final: bool) -> None:
        """Write a checkpoint, or start to. Collective."""
        from megapt.monitor.run_folder import versions

        engine = self.engine
        self.beat(self.step, "saving")
        if self.leader:
            self.metrics.flush()
        meta = {
            "step": self.step,
            "updates": engine.backend.updates,
            "scalars": engine.backend.scalars(),
            "skipped": self.skipped,
            "loss": self.loss,
            "validation": self.validation,
            "receipt": self.receipt.to_dict(),
            "config": self.config.model_dump(),
            "layout": self._layout() | {"zero": f"{self.config.zero.backend}-{self.config.zero.stage}"},
            "versions": versions(),
        }
        self.upkeep.save(self.step, engine.backend.fragments(), meta, final)


def _check_state(source: Path, meta: dict[str, Any]) -> None:
    """UserError unless a checkpoint says how far its run had come: one of another program may not."""
    kinds = {"step": int, "updates": int, "skipped": int, "receipt": dict}
    if wrong := [key for key, kind in kinds.items() if type(meta.get(key)) is not kind]:
        raise UserError(
            f"{source} does not say how far its run had come (meta: {', '.join(wrong)}); its weights alone can be had "
            "with checkpoint.load and a new run.folder"
        )


class _StopAgreement:
    """All ranks stop at the same step. The flag of a step is read one step later, when it has long arrived, so that
    the host never waits for it. It lives on the CPU: reading one on the GPU would wait for all that is enqueued there.

    Collective."""

    def __init__(self, mesh: ParallelMesh) -> None:
        import torch.distributed as dist

        self.mesh = mesh
        own_group = mesh.world > 1 and mesh.device.type != "cpu"
        self.group = dist.new_group(backend="gloo") if own_group else None
        self.pending: tuple[Any, Tensor] | None = None

    def agreed(self, reason: str | None) -> bool:
        """Collective, once per step: whether some rank had a reason to stop at the step before."""
        import torch
        import torch.distributed as dist

        from megapt.mesh import all_reduce

        if self.mesh.world == 1:
            return reason is not None
        stopping = False
        if self.pending is not None:
            work, flag = self.pending
            work.wait()
            stopping = bool(flag.item())
        flag = torch.tensor(int(reason is not None), dtype=torch.int32)
        self.pending = (all_reduce(flag, op=dist.ReduceOp.MAX, group=self.group, async_op=True), flag)
        return stopping
