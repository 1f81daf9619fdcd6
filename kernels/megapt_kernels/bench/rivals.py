"""Who computes a case: the registry's implementations, plain PyTorch, torch.compile of it, other projects' kernels."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from megapt_kernels import registry
from megapt_kernels.bench.cases import Case, Inputs

Run = Callable[[Inputs], tuple[Tensor, ...]]
KINDS = ("cuda", "triton", "library", "reference", "eager", "compile")


@dataclass(frozen=True)
class Rival:
    """name: in the rows. kind: as an Implementation's, or "eager" or "compile". reason: inputs -> why it cannot run,
    None if it can. ours: its failure is a failure of this package's promises, such as running inside a CUDA graph."""

    name: str
    kind: str
    run: Run
    reason: Callable[[Inputs], str | None]
    ours: bool = False

    def wanted(self, asked: tuple[str, ...], device: torch.device) -> bool:
        if "all" in asked:
            # Under the emulator a kernel is some thousand times slower than any other way to compute on a CPU.
            return not (self.kind == "cuda" and device.type == "cpu")
        return self.name.lower() in asked or self.kind in asked


def rivals_of(case: Case, free: int | None) -> list[Rival]:
    """All of them, what is to be fast first. free: bytes of memory that plain PyTorch may take; None for no bound."""
    found = list(_registered(case))
    taken = " ".join(rival.name.lower() for rival in found)
    found += [rival for rival in _others(case) if rival.name.split()[0].lower() not in taken]

    def room(_: Inputs) -> str | None:
        if free is not None and case.plain_bytes > free:
            return f"needs about {case.plain_bytes / 1e9:.0f} GB beside its inputs, and {free / 1e9:.0f} GB are free"
        return None

    @cache
    def compiled() -> Run:
        torch.compiler.reset()  # or many cases in one process count as one function that keeps changing
        return torch.compile(case.plain, fullgraph=True, dynamic=False)

    found.append(Rival("torch.compile", "compile", lambda inputs: compiled()(inputs), room))
    found.append(Rival("torch eager", "eager", case.plain, room))
    return sorted(found, key=lambda rival: rival.kind == "reference")


def _registered(case: Case) -> Iterator[Rival]:
    for implementation in registry.operation(case.op).implementations:
        name = implementation.name

        def reason(inputs: Inputs, name: str = name) -> str | None:
            positional, keywords = case.whole_arguments(inputs)
            found = registry.explain(case.op, *positional, impl=name, **keywords)
            return None if found.chosen else dict(found.rejected)[name]

        def run(inputs: Inputs, name: str = name) -> tuple[Tensor, ...]:
            return case.run(inputs, name)

        yield Rival(name, implementation.kind, run, reason, ours=implementation.kind in ("cuda", "triton"))


# Other projects, called as their users call them


def _others(case: Case) -> Iterator[Rival]:
    for project, module, table in _PROJECTS:
        if (case.op, case.name) not in table:
            continue

        def reason(inputs: Inputs, module: str = module) -> str | None:
            if importlib.util.find_spec(module) is None:
                return f"{module} is not installed"
            device = next(v for v in inputs.values() if isinstance(v, Tensor)).device
            return None if device.type == "cuda" else f"runs on CUDA devices, not on {device.type}"

        yield Rival(project, "library", table[case.op, case.name], reason)


def _liger_rms_norm(i: Inputs) -> tuple[Tensor, ...]:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return (LigerRMSNormFunction.apply(i["x"], i["weight"], 1e-5, 0.0, "llama", False),)


def _liger_add_rms_norm(i: Inputs) -> tuple[Tensor, ...]:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    return tuple(LigerFusedAddRMSNormFunction.apply(i["x"], i["residual"], i["weight"], 1e-5, 0.0, "llama", False))


def _liger_layer_norm(i: Inputs) -> tuple[Tensor, ...]:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return (LigerLayerNormFunction.apply(i["x"], i["weight"], i["bias"], 1e-5),)


def _liger_swiglu(i: Inputs) -> tuple[Tensor, ...]:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    # It takes two tensors, as separate projections make them; cutting one in two is not timed apart.
    return (LigerSiLUMulFunction.apply(*i["xy"].chunk(2, -1)),)


def _liger_geglu(i: Inputs) -> tuple[Tensor, ...]:
    from liger_kernel.ops.geglu import LigerGELUMulFunction

    return (LigerGELUMulFunction.apply(*i["xy"].chunk(2, -1)),)


def _liger_cross_entropy(i: Inputs) -> tuple[Tensor, ...]:
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    # Its forward writes the gradient over the logits.
    return (LigerCrossEntropyFunction.apply(i["logits"], i["target"], None, -100, 0.0, 0.0, "none")[0],)


def _liger_linear_cross_entropy(i: Inputs) -> tuple[Tensor, ...]:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    made = LigerFusedLinearCrossEntropyFunction.apply(
        i["h"], i["weight"], i["target"], None, None, -100, 0.0, 0.0, "sum", None, False, torch.float32
    )
    return (made[0],)


def _quack_rms_norm(i: Inputs) -> tuple[Tensor, ...]:
    from quack import rmsnorm

    return (rmsnorm(i["x"], i["weight"], eps=1e-5),)


def _quack_add_rms_norm(i: Inputs) -> tuple[Tensor, ...]:
    from quack import rmsnorm

    return tuple(rmsnorm(i["x"], i["weight"], residual=i["residual"], eps=1e-5, prenorm=True))


def _quack_cross_entropy(i: Inputs) -> tuple[Tensor, ...]:
    from quack import cross_entropy

    return (cross_entropy(i["logits"], i["target"], ignore_index=-100, reduction="none"),)


def _apex_rms_norm(i: Inputs) -> tuple[Tensor, ...]:
    from apex.normalization.fused_layer_norm import fused_rms_norm_affine

    return (fused_rms_norm_affine(i["x"], i["weight"], i["weight"].shape, 1e-5),)


def _apex_layer_norm(i: Inputs) -> tuple[Tensor, ...]:
    from apex.normalization.fused_layer_norm import fused_layer_norm_affine

    return (fused_layer_norm_affine(i["x"], i["weight"], i["bias"], i["weight"].shape, 1e-5),)


_LIGER: dict[tuple[str, str], Run] = {
    ("rms_norm", ""): _liger_rms_norm,
    ("rms_norm", "residual"): _liger_add_rms_norm,
    ("layer_norm", ""): _liger_layer_norm,
    ("swiglu", ""): _liger_swiglu,
    ("geglu", ""): _liger_geglu,
    ("vocab_parallel_cross_entropy", ""): _liger_cross_entropy,
    ("linear_cross_entropy", ""): _liger_linear_cross_entropy,
}
_QUACK: dict[tuple[str, str], Run] = {
    ("rms_norm", ""): _quack_rms_norm,
    ("rms_norm", "residual"): _quack_add_rms_norm,
    ("vocab_parallel_cross_entropy", ""): _quack_cross_entropy,
}
_APEX: dict[tuple[str, str], Run] = {
    ("rms_norm", ""): _apex_rms_norm,
    ("layer_norm", ""): _apex_layer_norm,
}
_PROJECTS = (("Liger", "liger_kernel", _LIGER), ("QuACK", "quack", _QUACK), ("apex", "amp_C", _APEX))
