"""The DeepSpeed backend: its ZeRO 1 (arXiv 1910.02054) under any pipeline, its ZeRO 2 and 3 without one.

The model is called as it is, never through DeepSpeed's engine: a pipeline runs backwards of its own, several of them
without a forward between, on several chunks. Stages 0 and 1 accumulate gradients in full-precision buffers of our
own and hand them over whole at the step. Stages 2 and 3 must free gradients while the backward pass runs, so
DeepSpeed's hooks take each one as autograd finishes it, and its reduction is completed when a backward ends.

DeepSpeed has no stage 0 that accumulates bf16 gradients in fp32 and skips non-finite ones; stage 0 is its ZeRO 1 over
a group of one rank, after we have summed the gradients over data-parallel ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megapt.config import OptimizerConfig, ZeroConfig
from megapt.errors import UserError
from megapt.mesh import ParallelMesh
from megapt.parallel.gradients import TiedWeights, finalize, is_partial, sum_sharers
from megapt.parallel.tensor import TensorParallel
from megapt.parameters import Parameter
from megapt.zero.accumulate import Accumulator
from megapt.zero.base import Fragment, StepResult, ZeroBackend, accumulation_dtype
from megapt.zero.deepspeed_start import ParallelUnit, axis_of_one, load, quiet
from megapt.zero.optimizers import Treatment, treatment

_MOMENTS = ("exp_avg", "exp_avg_sq")

# What is used of DeepSpeed's wrapped optimizers beyond its documented interface, and where each keeps its masters.
_COMMON = ("optimizer", "overflow", "_grad_acc_hooks")
_FRAGMENTS = ("_lazy_init_hp_params_optimizer_state", "update_lp_params")
_HOOKS = (
    "enter_backward",
    "clear_backward_seen_flag",
    "register_grad_acc_post_hook",
    "unregister_grad_acc_post_hooks",
    "set_gradient_accumulation_boundary",
    "overlapping_partition_gradients_reduce_epilogue",
    "backward_epilogue",
)
_PRIVATE = {
    "BF16_Optimizer": (
        *_COMMON,
        *_FRAGMENTS,
        "bf16_groups",
        "fp32_groups_gradients",
        "fp32_groups_gradients_flat",
        "fp32_groups_has_gradients",
    ),
    "DeepSpeedZeroOptimizer": (
        *_COMMON,
        *_FRAGMENTS,
        *_HOOKS,
        "bit16_groups",
        "use_grad_accum_attribute",
        "averaged_gradients",
        "all_grad_tensors",
        "reduce_gradients",
    ),
    "DeepSpeedZeroOptimizer_Stage3": (
        *_COMMON,
        *_HOOKS,
        "fp16_groups",
        "persistent_parameters",
        "get_local_fp32_param",
        "override_loss_scale",
        "_partition_all_parameters",
        "_reassign_or_swap_out_partitioned_parameters",
    ),
}
_MASTERS = {
    "BF16_Optimizer": "fp32_groups_flat_partition",
    "DeepSpeedZeroOptimizer": "single_partition_of_fp32_groups",
    "DeepSpeedZeroOptimizer_Stage3": "fp32_partitioned_groups_flat",
}


class DeepSpeedBackend(ZeroBackend):
    """See ZeroBackend; `stage` is 0 to 3, or 0 or 1 where the mesh has a pipeline.

    Masters and moments are fp32, for fp64 weights too: those become fp32 numbers at the first update. Stages 0 and 1
    accumulate gradients in fp32 (fp64 for fp64 weights) and reduce them in fp32. In stages 2 and 3 a micro-batch's
    gradient has the weights' precision, and its sum over ranks and micro-batches is fp32.

    chunks: this rank's model chunks, on its device; in stage 3 exactly one, whose parameters have no storage outside
    its forward and backward pass from now on (their table row, shard and owner stay readable).

    Raises UserError for a combination that DeepSpeed does not compute, or a DeepSpeed whose internals differ from
    those relied on. Collective over the world.
    """

    def __init__(
        self,
        chunks: nn.ModuleList,
        parameters: Sequence[Parameter],
        mesh: ParallelMesh,
        tp: TensorParallel,
        ties: TiedWeights,
        optimizer: OptimizerConfig,
        config: ZeroConfig,
    ) -> None:
        super().__init__(parameters, mesh, tp, ties, optimizer)
        self.stage, self.offload, self._bucket = config.stage, config.offload, config.bucket
        stage = config.stage
        self._updates = 0
        self._owned = [p for p in self.parameters if p.owner]
        self._dtype = _check(stage, mesh, chunks, self._owned)
        deepspeed = load(mesh.device)
        self.version: str = deepspeed.__version__
        for p in self.parameters:
            # DeepSpeed counts every parameter of tensor rank 0 in the norm, and of other ranks those marked so.
            p.model_parallel = p.shard.primary  # type: ignore[attr-defined]
        groups, fillers = self._groups()
        model = chunks[0] if stage == 3 else nn.ModuleDict({"chunks": chunks, "fillers": fillers})
        beta1, beta2 = optimizer.betas
        adamw = torch.optim.AdamW(groups, lr=0.0, betas=(beta1, beta2), eps=optimizer.eps, fused=True)
        unit = ParallelUnit(mesh, mesh.dp if stage else axis_of_one(mesh))
        settings = self._config()
        with quiet():
            if stage == 3 and self._dtype == torch.float64:
                # DeepSpeed partitions weights of any precision, but only where it is told another one.
                group = unit.get_data_parallel_group()  # type: ignore[attr-defined]
                deepspeed.zero.Init(model, group, mpu=unit, config_dict_or_path=settings, dtype=torch.float32)
            self._engine, self._zero, _, _ = deepspeed.initialize(
                args=SimpleNamespace(device_rank=mesh.device.index or 0),
                model=model,
                optimizer=adamw,
                mpu=unit,
                config=settings,
            )
        self._kind = self._probe()
        self._create_state()
        self._gradients = _MainGrads(self, self._zero) if stage < 2 else _Hooks(self, self._zero)

    def _groups(self) -> tuple[list[dict[str, Any]], nn.ParameterList]:
        """The optimizer's groups by treatment, and what fills a group that would be empty.

        DeepSpeed runs one collective per non-empty group over the pipeline, so every stage needs all of them.
        """
        fillers = nn.ParameterList()
        groups = []
        for how in self._treatments():
            members: list[nn.Parameter] = [p for p in self._owned if treatment(p, self.optimizer) == how]
            if not members:
                fillers.append(torch.zeros(1, dtype=self._dtype, device=self.mesh.device))
                members = [fillers[-1]]
            groups.append({"params": members, "weight_decay": how.decay, "factor": how.factor})
        return groups, fillers

    def _treatments(self) -> list[Treatment]:
        """Those of this rank's parameters; under a pipeline those of all stages, in one order."""
        own = {treatment(p, self.optimizer) for p in self._owned}
        if self.mesh.pp.size > 1:
            every: list[set[Treatment]] = [set()] * self.mesh.pp.size
            dist.all_gather_object(every, own, group=self.mesh.pp.group)
            own = set().union(*every)
        return sorted(own, key=lambda how: (-how.decay, how.factor))

    def _config(self) -> dict[str, Any]:
        vectors = [p.numel() for p in self._owned if p.dim() == 1]
        # A small model needs no large buffers; DeepSpeed wants an even size.
        bucket = 2 * -(-min(self._bucket, sum(p.numel() for p in self._owned)) // 2)
        pinned = self.mesh.device.type == "cuda"
        offload = {"offload_optimizer": {"device": "cpu", "pin_memory": pinned}} if self.offload else {}
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "managed_gradient_accumulation": False,
            "gradient_clipping": self.optimizer.clip,
            "gradient_allreduce_op": "sum" if self.stage < 3 else "mean",
            "communication_data_type": "fp32",
            "data_types": {"grad_accum_dtype": "fp32"},
            "bf16": {"enabled": self._dtype == torch.bfloat16, "check_grad_overflow": True},
            "zero_force_ds_cpu_optimizer": False,  # its own would be compiled at start; torch's is fused as well
            "timers": {"throughput": {"enabled": False}},  # it would wait for the device in every forward
            "zero_optimization": {
                "stage": max(self.stage, 1),
                "reduce_bucket_size": bucket,
                "allgather_bucket_size": bucket,
                "contiguous_gradients": self.stage > 1,
                # Vectors stay whole on every rank: gathering them would cost more in latency than in memory.
                "stage3_param_persistence_threshold": max(vectors, default=0),
                # It would replace torch's F.linear for the whole process; our layers own their backward pass.
                "memory_efficient_linear": False,
                **offload,
            },
        }

    def _probe(self) -> str:
        """The kind of wrapped optimizer, after checking that it is the one expected and has what is used of it."""
        kind = type(self._zero).__name__
        expected = "DeepSpeedZeroOptimizer_Stage3" if self.stage == 3 else "DeepSpeedZeroOptimizer"
        if self.stage < 2 and self._dtype == torch.bfloat16 and not self.offload:
            expected = "BF16_Optimizer"
        problems = []
        if kind != expected:
            problems.append(f"ZeRO {self.stage} is a {kind}, not a {expected}")
        names = (*_PRIVATE[expected], _MASTERS[expected])
        problems += [f"{kind} has no {name}" for name in names if not hasattr(self._zero, name)]
        if self._engine.managed_gradient_accumulation():
            problems.append("it does not leave gradient accumulation to its caller")
        if self.stage < 3 and self._engine.gradient_average:
            problems.append("it does not sum gradients")
        if not problems and any(m.dtype != torch.float32 for m in getattr(self._zero, _MASTERS[kind])):
            problems.append("its master weights are not fp32")
        if problems:
            raise UserError(
                f"DeepSpeed {self.version} is not built as this backend needs it: {'; '.join(problems)}. Install "
                "deepspeed>=0.19.6,<0.20, or set zero.backend = native (stages 0 and 1)"
            )
        return kind

    @property
    def _masters(self) -> list[Tensor]:
        return getattr(self._zero, _MASTERS[self._kind])

    def _create_state(self) -> None:
        """Moments and step counts from the beginning, as AdamW's first step would create them."""
        state = self._zero.optimizer.state
        for master in self._masters:
            state[master] = {name: torch.zeros_like(master, requires_grad=False) for name in _MOMENTS}
            state[master]["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
        if self.stage < 3:
            self._zero._lazy_init_hp_params_optimizer_state()

    def zero_grad(self, micro_batches: int | None = None) -> None:
        self._gradients.begin()

    def step(self, lr: float) -> StepResult:
        self._gradients.finish()
        for group in self._zero.optimizer.param_groups:
            group["lr"] = lr * group["factor"]
        self._engine.step()
        skipped = bool(self._zero.overflow)
        if not skipped:
            self._updates += 1
            self.ties.share()
        device = self.mesh.device
        norm = torch.as_tensor(self._engine.get_global_grad_norm(), dtype=torch.float32, device=device)
        return StepResult(norm, torch.tensor(skipped, device=device))

    def fragments(self) -> Iterator[Fragment]:
        for p in self._owned:
            fragment = self._partition(p) if self.stage == 3 else _overlap(p)
            if fragment is not None:
                yield fragment

    def _partition(self, p: Parameter) -> Fragment | None:
        """Stage 3 cuts every parameter by itself into equal parts, the last ones padded."""
        tensors = {"weight": self._zero.get_local_fp32_param(p).detach()}
        tensors |= {name: self._zero.get_local_fp32_param(p, name) for name in _MOMENTS}
        width = tensors["weight"].numel()
        start = self.mesh.dp.rank * width
        numel = min(width, torch.Size(p.shard.shape).numel() - start)
        return Fragment(p, start, numel, {name: t[:numel] for name, t in tensors.items()}) if numel > 0 else None

    @torch.no_grad()
    def loaded(self, updates: int, scalars: dict[str, float] | None = None) -> None:
        for state in self._zero.optimizer.state.values():
            state["step"].fill_(updates)
        self._updates = updates
        if self.stage < 3:
            self._zero.update_lp_params()
        else:
            self._zero._partition_all_parameters()
            for index in range(len(self._zero.fp16_groups)):
                self._zero._reassign_or_swap_out_partitioned_parameters(index)
            persistent = self._zero.persistent_parameters
            if persistent:
                persistent[0].all_gather(persistent)
        self.ties.share()

    @property
    def updates(self) -> int:
        return self._updates

    def describe(self) -> str:
        parts = ("optimizer state", "gradients", "weights")[: self.stage]
        where = f"{' and '.join(parts)} sharded over {self.mesh.dp.size} ranks" if parts else "nothing sharded"
        weights = " of fp64 weights" if self._dtype == torch.float64 else ""
        update = "fused AdamW on the host" if self.offload else "fused AdamW"
        return f"DeepSpeed {self.version} ZeRO {self.stage}: {where}, fp32 masters{weights}, fp32 reduction, {update}"


class _MainGrads:
    """Stages 0 and 1: gradients accumulate in `main_grad`, and DeepSpeed gets them whole at the step.

    In bf16 `main_grad` is DeepSpeed's own fp32 gradient buffer; in fp32 it becomes `.grad` at the step, in fp64, and in
    bf16 with offload, it becomes `.grad_accum` in fp32.
    """

    def __init__(self, backend: DeepSpeedBackend, zero: Any) -> None:
        self.backend, self.zero = backend, zero
        self.bf16 = hasattr(zero, "bf16_groups")
        for hook in zero._grad_acc_hooks:  # in fp64: they would take the gradients in fp32
            hook.remove()
        self.handed: list[Parameter] = []
        self.flat: list[Tensor] = zero.fp32_groups_gradients_flat if self.bf16 else []
        for index, group in enumerate(zero.bf16_groups if self.bf16 else zero.bit16_groups):
            if self.bf16:
                pieces = zero.fp32_groups_gradients[index]
            else:
                sizes, first = [p.numel() for p in group], group[0]
                self.flat.append(torch.zeros(sum(sizes), dtype=accumulation_dtype(first.dtype), device=first.device))
                pieces = self.flat[-1].split(sizes)
            for p, piece in zip(group, pieces, strict=True):
                p.main_grad = piece.view(p.shape)
            self.handed += group
        for p in backend.parameters:
            if not p.owner:
                p.main_grad = torch.zeros_like(p, dtype=accumulation_dtype(p.dtype))
        self.accumulator = Accumulator(backend.parameters)

    def begin(self) -> None:
        self.accumulator.begin()
        if self.backend.offload:
            self.zero.averaged_gradients.clear()  # after a skipped step DeepSpeed would add to what was not finite

    def finish(self) -> None:
        self.accumulator.end()
        backend = self.backend
        finalize(backend.parameters, backend.tp, backend.ties)
        if backend.stage == 0:
            for flat in self.flat:
                backend.mesh.dp.all_reduce(flat)
        if self.bf16:
            for has_gradient in self.zero.fp32_groups_has_gradients:
                has_gradient[:] = [True] * len(has_gradient)
        else:
            if backend.offload:
                self.zero.setup_buckets()  # which it does else as the first gradient of a backward arrives
            for p in self.handed:
                gradient = p.main_grad.detach()  # DeepSpeed may point it at other memory
                if self.zero.use_grad_accum_attribute:
                    p.grad_accum = gradient.float()  # type: ignore[attr-defined]
                else:
                    p.grad = gradient


class _Hooks:
    """Stages 2 and 3: DeepSpeed's hooks take gradients during the backward pass.

    What tensor ranks owe each other must then be settled before its hooks run: on the gradient itself, when autograd
    has summed it and before it is stored.
    """

    def __init__(self, backend: DeepSpeedBackend, zero: Any) -> None:
        self.stage, self.zero = backend.stage, zero
        tp = backend.tp
        for p in backend.parameters:
            if is_partial(p, tp) or p.shard.sharers > 1:
                p.register_hook(functools.partial(_complete, p, tp))
        # The engine's own hook expects that its forward and backward were called.
        zero.unregister_grad_acc_post_hooks()
        zero.register_grad_acc_post_hook(self._end_of_backward)
        zero.enter_backward()
        if self.stage == 3:
            zero.override_loss_scale(1.0 / backend.mesh.dp.size)  # it averages over ranks; this makes it a sum

    def begin(self) -> None:
        self.zero.zero_grad()
        if self.stage == 2:
            for held in (self.zero.averaged_gradients, self.zero.all_grad_tensors):
                held.clear()
            self.zero.micro_step_id = -1  # of a step that was given up, offloaded gradients would count
        self.zero.clear_backward_seen_flag()
        # Else each backward would replace what the ones before it have accumulated.
        self.zero.set_gradient_accumulation_boundary(False)

    def finish(self) -> None:
        """Nothing is left to do: every backward has reduced its gradients."""

    def _end_of_backward(self) -> None:
        self.zero.overlapping_partition_gradients_reduce_epilogue()
        self.zero.backward_epilogue()
        self.zero.clear_backward_seen_flag()


def _complete(parameter: Parameter, tp: TensorParallel, gradient: Tensor) -> Tensor:
    """The sum of a gradient's parts over tensor ranks, in full precision."""
    wide = gradient.to(accumulation_dtype(gradient.dtype), copy=True, memory_format=torch.contiguous_format)
    if is_partial(parameter, tp):
        tp.axis.all_reduce(wide)
    if parameter.shard.sharers > 1:
        sum_sharers(wide, parameter, tp.axis)
    return wide.to(gradient.dtype)


def _overlap(p: Parameter) -> Fragment | None:
    """Stages 0 to 2 cut a group's flat buffer: the part of a parameter that fell to this rank."""
    mapping = p._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return None
    at = mapping.lp_fragment_address
    tensors = {"weight": mapping.hp_fragment.detach()}
    tensors |= {name: mapping.get_optim_state_fragment(name) for name in _MOMENTS}
    return Fragment(p, at.start, at.numel, tensors)


def _check(stage: int, mesh: ParallelMesh, chunks: nn.ModuleList, owned: Sequence[Parameter]) -> torch.dtype:
    """The one precision of the weights; UserError for what DeepSpeed does not compute."""
    if stage > 1 and mesh.pp.size > 1:
        raise UserError(f"ZeRO {stage} does not work with pipeline = {mesh.pp.size}; use stage 0 or 1, or pipeline = 1")
    dtypes = {p.dtype for p in owned}
    assert len(dtypes) == 1 and (stage < 3 or len(chunks) == 1)
    return dtypes.pop()
