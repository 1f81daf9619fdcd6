"""One small optimization problem for every backend, layout and precision, and its solution by one process.

Every parameter p of a global table has the loss sum_s <X_s, p> + 1/2 <Y_s, p * p> over the samples s of the global
batch. Its gradient sum_s X_s + Y_s * p is known, depends on the weights, and can be split over ranks at will.
"""

from __future__ import annotations

import functools
import gc
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megapt.config import LossScaleConfig, LrScale, MuonConfig, OptimizerConfig, ZeroConfig
from megapt.mesh import ParallelMesh
from megapt.parallel.gradients import TiedWeights, is_partial
from megapt.parallel.tensor import ParameterFactory, TensorParallel
from megapt.parameters import Parameter, ParameterSpec, ParameterTable, Partial, Split, initialise_
from megapt.zero import make_backend
from megapt.zero.base import StepResult, ZeroBackend

SAMPLES, STEPS, SEED = 24, 3, 7
# Steps 0 and 2 are clipped, step 1 is not: an error in the gradients' scale shows in norms, weights or both.
SIZES = (1.0, 0.02, 3.0)
OPTIMIZER = OptimizerConfig(lr=1e-2, eps=1e-2, weight_decay=0.1, clip=10.0)
_SCALES = LrScale(embedding=0.5, head=0.25, matrix=2.0, vector=1.5)
OPTIMIZERS = {
    "adamw": OPTIMIZER,
    "muon": OPTIMIZER.model_copy(update={"kind": "muon", "lr_scale": _SCALES}),
    "heavy": OPTIMIZER.model_copy(update={"kind": "muon", "muon": MuonConfig(nesterov=False, momentum=0.4)}),
    "scaled": OPTIMIZER.model_copy(update={"lr_scale": _SCALES}),
    "rounding": OPTIMIZER.model_copy(update={"stochastic_rounding": True}),
}
LOSS_SCALE = LossScaleConfig(initial=256.0, window=2, smallest=64.0)
LRS = (1e-2, 2e-2, 5e-3)


def _spec(name: str, shape: tuple[int, ...], split: Split | None = None, **more: Any) -> ParameterSpec:
    return ParameterSpec(name, shape, split, std=1.0, **more)


# Stage 0 of two has no parameter without decay; the last stage has a copy of the embedding.
STAGES = (
    (
        _spec("embedding.weight", (11, 4), Split(0, padded=True), lookup=True),
        _spec("mid.weight", (6, 10), Split(1)),
        _spec("kv.weight", (3, 5), Split(0, unit=3)),
    ),
    (
        _spec("solo.weight", (5, 3)),
        _spec("norm.weight", (7,), decay=False, partial=Partial.SEQUENCE),
        _spec("scale.weight", (5,), decay=False, partial=Partial.ALWAYS),
        _spec("head.weight", (11, 4), Split(0, padded=True), tied_to="embedding.weight", end="last"),
    ),
)
TABLE = ParameterTable(spec for stage in STAGES for spec in stage)


@dataclass(frozen=True)
class Case:
    """A backend, a layout (world = pp x dp x tp), a precision, and the micro-batches per step on each rank."""

    backend: str
    stage: int
    pp: int = 1
    dp: int = 1
    tp: int = 1
    micro: int = 2
    dtype: torch.dtype = torch.float32
    sequence: bool = True
    model: str = ""  # a real decoder instead of the problem below
    bucket: int = 50_000_000
    optimizer: str = "adamw"
    offload: bool = False

    @property
    def id(self) -> str:
        kind = str(self.dtype).removeprefix("torch.") + ("" if self.sequence else "-whole") + self.model
        kind += f"-b{self.bucket}" if self.bucket < 1000 else ""
        kind += f"-{self.optimizer}" if self.optimizer != "adamw" else ""
        kind += "-offload" if self.offload else ""
        return f"{self.backend}{self.stage}-pp{self.pp}dp{self.dp}tp{self.tp}-m{self.micro}-{kind}"


Job = tuple[str, Case]


@functools.cache
def data(name: str, step: int, sample: int) -> tuple[Tensor, Tensor]:
    """X and Y of one sample for one parameter, fp64."""
    seed = hash((tuple(name.encode()), step, sample)) % 2**31  # hashes of tuples of numbers do not change
    generator = torch.Generator().manual_seed(seed)
    shape = TABLE[name].shape
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * SIZES[step % len(SIZES)]
    return x, torch.rand(shape, generator=generator, dtype=torch.float64) * 0.02


def summed(name: str, step: int, samples: range) -> tuple[Tensor, Tensor]:
    xs, ys = zip(*(data(name, step, s) for s in samples), strict=True)
    return torch.stack(xs).sum(0), torch.stack(ys).sum(0)


class Term(nn.Module):
    """One parameter and its part of the loss. `share` is this tensor rank's part of a gradient computed in parts."""

    def __init__(self, factory: ParameterFactory, name: str) -> None:
        super().__init__()
        (self.weight,) = factory(name)
        self.name, tp = name, factory.tp
        self.split = TABLE[name].shard(tp.axis.rank, tp.axis.size)
        weight: Parameter = self.weight
        parts = is_partial(weight, tp) or self.split.sharers > 1
        self.share = (1 + tp.axis.rank) / sum(range(1, tp.axis.size + 1)) if parts else 1.0

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        weight = self.weight
        x, y = (self.local(t, weight.dtype) for t in (x, y))
        return (x * weight + 0.5 * y * weight * weight).sum()

    def local(self, whole: Tensor, dtype: torch.dtype) -> Tensor:
        part = torch.zeros(self.split.shape, dtype=dtype)
        self.split.valid(part).copy_(whole[self.split.slices()] * self.share)
        return part


class Chunk(nn.Module):
    def __init__(self, factory: ParameterFactory, names: list[str]) -> None:
        super().__init__()
        self.terms = nn.ModuleList(Term(factory, name) for name in names)

    def forward(self, values: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
        return torch.stack([term(*values[term.name]) for term in self.terms]).sum()


@dataclass
class Problem:
    """The problem on this rank, with a fresh backend; parameters drawn with `seed`."""

    case: Case
    mesh: ParallelMesh
    seed: int = SEED

    def __post_init__(self) -> None:
        case = self.case
        self.tp = TensorParallel(self.mesh.tp, case.sequence and case.tp > 1)
        factory = ParameterFactory(TABLE, self.tp, self.seed, case.dtype, torch.device("cpu"))
        per_rank = len(STAGES) // case.pp
        stages = STAGES[self.mesh.pp.rank * per_rank : (self.mesh.pp.rank + 1) * per_rank]
        names = [spec.name for stage in stages for spec in stage]
        self.chunks = nn.ModuleList([Chunk(factory, names)])
        self.parameters = list(factory.made.values())
        self.backend = make(case, self.chunks, self.parameters, self.mesh, self.tp)

    def step(self, step: int, spoil: bool = False) -> StepResult:
        """One step on this rank's samples; with `spoil` one of them is infinite on the last rank."""
        share = SAMPLES // self.case.dp
        mine = range(self.mesh.dp.rank * share, (self.mesh.dp.rank + 1) * share)
        width = share // self.case.micro
        batches = []
        for m in range(self.case.micro):
            samples = mine[m * width : (m + 1) * width]
            batches.append({name: summed(name, step, samples) for name in TABLE})
        if spoil and self.mesh.rank == self.mesh.world - 1:
            batches[-1] = {name: (torch.full_like(x, math.inf), y) for name, (x, y) in batches[-1].items()}
        return self.run(batches, LRS[step % len(LRS)])

    def run(self, batches: list[dict[str, tuple[Tensor, Tensor]]], lr: float) -> StepResult:
        """One step on micro-batches of given X and Y for each parameter."""
        self.backend.zero_grad(len(batches))
        for values in batches:
            torch.autograd.backward(self.chunks[0](values) * self.backend.loss_scale)
        return self.backend.step(lr)


def make(
    case: Case, chunks: nn.ModuleList, parameters: list[Parameter], mesh: ParallelMesh, tp: TensorParallel
) -> ZeroBackend:
    ties = TiedWeights(parameters, mesh.pp, tied=True)
    config = ZeroConfig(stage=case.stage, backend=case.backend, bucket=case.bucket, offload=case.offload)  # type: ignore[arg-type]
    scaling = LOSS_SCALE if case.dtype == torch.float16 else None
    optimizer = OPTIMIZERS[case.optimizer]
    return make_backend(config, chunks, parameters, mesh, tp, ties, optimizer, scaling, SEED)


Pieces = list[tuple[str, int, int, dict[str, Tensor]]]  # parameter, tensor rank, start, tensors


def pieces(backend: ZeroBackend, tp_rank: int) -> Pieces:
    """Copies of this rank's fragments, as they would go to a checkpoint; beside them the weights of the next forward
    pass, where they are drawn."""
    found = []
    for f in backend.fragments():
        tensors = dict(f.tensors)
        if backend.optimizer.stochastic_rounding:
            tensors["rounded"] = f.parameter.data.flatten()[f.start : f.start + f.numel]
        found.append((f.parameter.spec.name, tp_rank, f.start, {n: t.clone() for n, t in tensors.items()}))
    return found


def restore(backend: ZeroBackend, saved: Pieces, updates: int, scalars: dict[str, float]) -> None:
    for fragment, (name, _, start, tensors) in zip(backend.fragments(), saved, strict=True):
        assert (fragment.parameter.spec.name, fragment.start) == (name, start)
        for key, tensor in fragment.tensors.items():
            tensor.copy_(tensors[key])
    backend.loaded(updates, scalars)


def assemble(
    ranks: list[Pieces], tp: int, table: ParameterTable = TABLE, copies: int = 1
) -> dict[str, dict[str, Tensor]]:
    """Global tensors from all ranks' fragments: {parameter: {tensor: values}}.

    Every element of every shard must be there: exactly once, or in `copies` equal copies.
    """
    found: dict[tuple[str, int], list[tuple[int, dict[str, Tensor]]]] = {}
    for rank in ranks:
        for name, tp_rank, start, tensors in rank:
            found.setdefault((name, tp_rank), []).append((start, tensors))
    out: dict[str, dict[str, Tensor]] = {}
    for (name, tp_rank), parts in found.items():
        shard = table[name].shard(tp_rank, tp)
        numel, dtype = math.prod(shard.shape), parts[0][1]["weight"].dtype
        count = torch.zeros(numel, dtype=torch.int64)
        keys = list(parts[0][1])
        for key in keys:
            local = torch.full((numel,), math.nan, dtype=dtype)
            for start, tensors in parts:
                piece = slice(start, start + tensors[key].numel())
                seen = ~local[piece].isnan()
                assert torch.equal(local[piece][seen], tensors[key][seen]), f"{name}: copies of {key} differ"
                local[piece] = tensors[key]
                count[piece] += 1
            whole = out.setdefault(name, {}).setdefault(key, torch.full(table[name].shape, math.nan, dtype=dtype))
            whole[shard.slices()] = shard.valid(local.view(shard.shape))
        assert (count == len(keys) * copies).all(), f"{name}: elements missing or held twice"
    for name, tensors in out.items():
        assert not any(t.isnan().any() for t in tensors.values()), f"{name}: holes"
    return out


@dataclass
class Solution:
    norms: list[float]
    state: dict[str, dict[str, Tensor]]


def solve(
    dtype: torch.dtype = torch.float64,
    steps: int = STEPS,
    compute: torch.dtype | None = None,
    optimizer: str = "adamw",
) -> Solution:
    """One process, masters in `dtype`, gradients at weights in `compute`."""
    owned = [spec for spec in TABLE.values() if spec.tied_to is None]
    weights = {s.name: nn.Parameter(torch.zeros(s.shape, dtype=dtype)) for s in owned}
    for s in owned:
        initialise_(weights[s.name].data, s, s.shard(0, 1), SEED)
        if compute is not None:
            weights[s.name].data = weights[s.name].data.to(compute).to(dtype)
    reference = Reference([(weights[s.name], s) for s in owned], OPTIMIZERS[optimizer])
    norms = []
    for step in range(steps):
        for spec in TABLE.values():
            weight = weights[spec.tied_to or spec.name]
            at = weight.detach() if compute is None else weight.detach().to(compute).to(dtype)
            x, y = summed(spec.name, step, range(SAMPLES))
            gradient = x.to(dtype) + y.to(dtype) * at
            weight.grad = gradient if weight.grad is None else weight.grad + gradient
        norms.append(reference.step(LRS[step]))
    return Solution(norms, {n: {"weight": w.detach(), **reference.state(w)} for n, w in weights.items()})


class Reference:
    """One process: clip_grad_norm_, torch.optim.AdamW, and a plain Muon for matrices where it is asked for."""

    def __init__(self, members: list[tuple[nn.Parameter, ParameterSpec]], optimizer: OptimizerConfig) -> None:
        self.config, self.members = optimizer, members
        muon = optimizer.kind == "muon"
        self.matrices = {w: torch.zeros_like(w) for w, s in members if muon and s.role == "matrix"}
        self.specs = dict(members)
        groups = [
            {
                "params": [w],
                "weight_decay": optimizer.weight_decay if s.decay else 0.0,
                "factor": getattr(optimizer.lr_scale, s.role),
            }
            for w, s in members
            if w not in self.matrices
        ]
        betas = (optimizer.betas[0], optimizer.betas[1])
        self.adamw = torch.optim.AdamW(groups, betas=betas, eps=optimizer.eps, fused=False)

    def step(self, lr: float) -> float:
        norm = nn.utils.clip_grad_norm_([w for w, _ in self.members], self.config.clip)
        for group in self.adamw.param_groups:
            group["lr"] = lr * group["factor"]
        self.adamw.step()
        for weight, momentum in self.matrices.items():
            scaled = lr * getattr(self.config.lr_scale, self.specs[weight].role)
            plain_muon(weight, momentum, scaled, self.config)
        for weight, _ in self.members:
            weight.grad = None
        return float(norm)

    def state(self, weight: nn.Parameter) -> dict[str, Tensor]:
        if weight in self.matrices:
            return {"momentum": self.matrices[weight]}
        return {name: self.adamw.state[weight][name] for name in ("exp_avg", "exp_avg_sq")}


@torch.no_grad()
def plain_muon(weight: Tensor, momentum: Tensor, lr: float, optimizer: OptimizerConfig) -> None:
    """Keller Jordan's Muon with the scale and the weight decay of arXiv 2502.16982, as it is written there."""
    config, gradient = optimizer.muon, weight.grad
    assert gradient is not None
    momentum.mul_(config.momentum).add_(gradient, alpha=1 - config.momentum)
    update = (1 - config.momentum) * gradient + config.momentum * momentum if config.nesterov else momentum
    x = update / update.square().sum().sqrt()
    for _ in range(config.iterations):
        gram = x.T @ x
        x = 3.4445 * x - 4.7750 * x @ gram + 2.0315 * x @ gram @ gram
    weight.mul_(1 - lr * optimizer.weight_decay)
    weight.sub_(lr * config.rms * max(weight.shape) ** 0.5 * x)


@dataclass(frozen=True)
class Tolerance:
    """Relative: of norms; of moments, to each tensor's largest element (of a gradient that is
    zero but for rounding, to 1e-3). Absolute: of masters, whose size is about 1."""

    norm: float
    weight: float
    moment: float


# Gradients rounded to bf16 shift an update of 0.035 in three steps by half a percent at most. Masters kept in bf16
# would be off by 4e-3.
TOLERANCES = {
    torch.float64: Tolerance(1e-12, 1e-12, 1e-12),
    torch.float16: Tolerance(5e-4, 2e-4, 2e-3),
    torch.float32: Tolerance(2e-6, 2e-6, 3e-6),
    torch.bfloat16: Tolerance(2e-3, 1e-3, 1e-2),
}


def assert_close(found: Solution, expected: Solution, limit: Tolerance) -> None:
    """Norms, masters and moments, compared in fp64."""
    assert len(found.norms) == len(expected.norms) and found.state.keys() == expected.state.keys()
    for step, (a, b) in enumerate(zip(found.norms, expected.norms, strict=True)):
        assert abs(a - b) <= limit.norm * abs(b), f"step {step}: norm {a} instead of {b}"
    for name, tensors in expected.state.items():
        for key, y in tensors.items():
            off = float((found.state[name][key].double() - y.double()).abs().max())
            allowed = limit.weight if key == "weight" else limit.moment * max(float(y.abs().max()), 1e-3)
            assert off <= allowed, f"{name}: {key} off by {off}"


def in_turn(jobs: list[Job], run: dict[str, Callable[[Case, ParallelMesh], Any]]) -> dict[tuple[str, str], Any]:
    """Jobs (what, case) one after the other in the same ranks: {(what, case id): result}. A failure names its job."""
    meshes: dict[tuple[int, int, int], ParallelMesh] = {}
    results = {}
    for what, case in jobs:
        layout = (case.pp, case.dp, case.tp)
        if layout not in meshes:
            meshes[layout] = ParallelMesh.create(*layout, torch.device("cpu"))
        try:
            results[what, case.id] = run[what](case, meshes[layout])
        except Exception as error:
            error.add_note(f"in {what} {case.id}")
            raise
        gc.collect()
        if len(results) == 1:
            gc.freeze()  # DeepSpeed collects garbage at every start: not what was imported
    return results
