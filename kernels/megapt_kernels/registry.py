"""Which implementation of an operation runs, and why the others do not."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

KINDS = ("auto", "cuda", "triton", "library", "reference")
ENVIRONMENT = "MEGAPT_KERNELS"

# Where each operation is declared: `explain` and the benchmark find it by name.
_MODULES = {
    "rms_norm": "norms",
    "layer_norm": "norms",
    "rope_": "rope",
    "swiglu": "glu",
    "geglu": "glu",
    "vocab_parallel_cross_entropy": "cross_entropy",
    "linear_cross_entropy": "cross_entropy",
    "attention": "attention_dispatch",
    "adamw_step_": "adamw",
    "squared_norm": "adamw",
    "wgrad_accumulate_": "wgrad",
    "moe_permute": "moe",
    "moe_unpermute": "moe",
}


class Unsupported(ValueError):
    """No implementation that was allowed takes these arguments; or the arguments are wrong for the operation."""


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operation.

    kind: `cuda` (our CUDA C++), `triton` (ours), `library` (an installed package, or an operator of torch's own that is
    fused) or `reference`. name: in reports; of a library, whose: "flash-attn 3". supports: takes the operation's
    arguments and returns None, or why it cannot run them; it must be quick, touch no data, and read of tensors no more
    than device, dtype, shape, strides and address. run: takes the same arguments and computes.
    """

    kind: str
    name: str
    supports: Callable[..., str | None]
    run: Callable[..., Any]

    @property
    def only_operators(self) -> bool:
        """Whether it computes by PyTorch's operators alone, so that it runs on tensors without data as well."""
        return self.kind in ("cuda", "reference") or self.name.startswith("torch")


@dataclass(frozen=True)
class Explanation:
    """chosen: the implementation that would run, None if none would; rejected: (name, reason) of those before it."""

    operation: str
    chosen: Implementation | None
    rejected: tuple[tuple[str, str], ...]
    later: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.operation}: {'none' if self.chosen is None else self.chosen.name}"]
        lines += [f"  not {name}: {reason}" for name, reason in self.rejected]
        lines += [f"  not asked: {name}" for name in self.later]
        return "\n".join(lines)


class Operation:
    """An operation and its implementations, the preferred ones first.

    check: raises Unsupported, naming operation and argument, where the arguments are wrong for every implementation.
    fill: what the public function makes of the keywords that it is given, where it adds to them.
    """

    def __init__(
        self,
        name: str,
        check: Callable[..., None],
        implementations: Sequence[Implementation],
        fill: Callable[..., dict[str, Any]] | None = None,
    ) -> None:
        self.name, self.check, self.implementations, self.fill = name, check, tuple(implementations), fill

    def explain(self, *arguments: Any, impl: str = "auto", **keywords: Any) -> Explanation:
        _check_transforms(self.name)
        self.check(*arguments, **keywords)
        wanted = self._wanted(impl)
        rejected = []
        for position, candidate in enumerate(self.implementations):
            if wanted not in ("auto", candidate.kind, candidate.name):
                rejected.append((candidate.name, f"{wanted} was asked for"))
                continue
            if wanted == "auto" and candidate.kind == "cuda" and _emulated():
                rejected.append((candidate.name, "under the emulator it runs only where impl='cuda' asks for it"))
                continue
            if not candidate.only_operators and without_data(arguments):
                rejected.append((candidate.name, "these tensors have no data, and it launches kernels itself"))
                continue
            reason = candidate.supports(*arguments, **keywords)
            if reason is None:
                later = tuple(i.name for i in self.implementations[position + 1 :])
                return Explanation(self.name, candidate, tuple(rejected), later)
            rejected.append((candidate.name, reason))
        return Explanation(self.name, None, tuple(rejected))

    def choose(self, *arguments: Any, impl: str = "auto", **keywords: Any) -> Implementation:
        """The first implementation that is wanted and supports the arguments; Unsupported if there is none."""
        explanation = self.explain(*arguments, impl=impl, **keywords)
        if explanation.chosen is None:
            wanted = self._wanted(impl)
            asked = [f"{name}: {reason}" for name, reason in explanation.rejected if "was asked for" not in reason]
            raise Unsupported(f"{self.name}: no implementation for impl={wanted!r}. {'; '.join(asked)}")
        return explanation.chosen

    def __call__(self, *arguments: Any, impl: str = "auto", **keywords: Any) -> Any:
        run = self.choose(*arguments, impl=impl, **keywords).run
        with without_autocast():
            return run(*arguments, **keywords)

    def _wanted(self, impl: str) -> str:
        if isinstance(impl, str) and impl == "auto":
            impl = _wanted_everywhere
            if impl not in KINDS:
                raise Unsupported(f"{self.name}: {ENVIRONMENT} is one of {', '.join(KINDS)}, not {impl!r}")
        names = [i.name for i in self.implementations]
        if not isinstance(impl, str) or (impl not in KINDS and impl not in names):
            raise Unsupported(f"{self.name}: impl is one of {', '.join([*KINDS, *names])}, not {impl!r}")
        return impl


def without_data(arguments: Sequence[Any]) -> bool:
    """Whether some tensor has none, being on `meta` or fake: what it holds cannot be asked."""
    from torch import Tensor
    from torch._subclasses.fake_tensor import FakeTensor

    return any(isinstance(one, Tensor) and (one.is_meta or isinstance(one, FakeTensor)) for one in arguments)


def _emulated() -> bool:
    from megapt_kernels.library import loaded

    library = loaded()
    return library is not None and library.kind == "emulated"


@contextmanager
def _no_autocast() -> Iterator[None]:
    import torch

    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


def without_autocast() -> AbstractContextManager[None]:
    """Within it, what is computed in fp32 is not rounded to 16 bits by `torch.autocast` around the call."""
    import torch

    on = torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
    return _no_autocast() if on else nullcontext()


def _check_transforms(name: str) -> None:
    """Operators of ours have no forward derivative, for which torch takes zero without a word."""
    import torch

    if torch.compiler.is_compiling():
        return
    if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
        raise Unsupported(
            f"{name}: torch.func's transforms (grad, vmap, jvp...) and forward-mode differentiation are not supported; "
            "autograd's backward passes are"
        )


_wanted_everywhere = os.environ.get(ENVIRONMENT) or "auto"


@contextmanager
def use(impl: str) -> Iterator[None]:
    """Within it, operations that are asked for `auto` take this kind of implementation instead: in all threads, for
    gradient checkpoints are computed again in others. Only one thread at a time may be within."""
    global _wanted_everywhere
    if impl not in KINDS:
        raise Unsupported(f"use: impl is one of {', '.join(KINDS)}, not {impl!r}")
    before, _wanted_everywhere = _wanted_everywhere, impl
    try:
        yield
    finally:
        _wanted_everywhere = before


def operations() -> tuple[str, ...]:
    """The names of all operations."""
    return tuple(_MODULES)


def operation(name: str) -> Operation:
    """The operation of that name; Unsupported if there is none."""
    if name not in _MODULES:
        raise Unsupported(f"there is no operation {name!r}; there are {', '.join(_MODULES)}")
    return importlib.import_module(f"megapt_kernels.{_MODULES[name]}").OPERATIONS[name]


def explain(op: str | Callable[..., Any], *arguments: Any, **keywords: Any) -> Explanation:
    """Which implementation `op` (its name or the function) would run with these arguments, and why not the others."""
    found = operation(op if isinstance(op, str) else op.__name__)
    if found.fill is not None:
        keywords = found.fill(*arguments, **keywords)
    return found.explain(*arguments, **keywords)
