"""Bytes that ranks give each other: counted call by call as a step runs, and worked out from the parameter table."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megapt.parameters import Parameter
from megapt.zero.base import accumulation_dtype


@dataclass
class Volume:
    """calls: of collectives and sends; sent: bytes that this rank must at least send for them."""

    calls: int = 0
    sent: float = 0.0


class Traffic(TorchDispatchMode):
    """Counts what passes through torch.distributed while it is entered, whoever calls it.

    by_group: {process group: {kind: Volume}}, with groups under the names given (`groups`: name -> group), else as
    `ranks 0-1`. A collective counts as what the best algorithm sends per rank, among n ranks with b bytes: all-reduce
    2 b (n - 1) / n; all-gather and reduce-scatter b (n - 1) / n of the whole tensor, as broadcast and reduce;
    all-to-all what goes to others; a send b, and a receive nothing. Pickled objects count as the tensors that they
    travel in.
    """

    def __init__(self, groups: Mapping[str, dist.ProcessGroup | None] | None = None) -> None:
        super().__init__()
        self._names = {group.group_name: name for name, group in (groups or {}).items() if group is not None}
        self.by_group: dict[str, dict[str, Volume]] = defaultdict(lambda: defaultdict(Volume))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            self._count(func._schema, args)
        return func(*args, **(kwargs or {}))

    def _count(self, schema: Any, args: tuple[Any, ...]) -> None:
        operation = schema.name.removeprefix("c10d::")
        if operation in _SILENT:
            return
        place = next(i for i, argument in enumerate(schema.arguments) if argument.name == "process_group")
        group = dist.ProcessGroup.unbox(args[place])
        kind, which = _KINDS[operation]
        ranks = group.size()
        share = (ranks - 1) / ranks
        volume = self.by_group[self._name(group)][kind]
        volume.calls += 1
        if operation == "alltoall_base_" and args[4]:
            share = 1 - args[4][group.rank()] / max(sum(args[4]), 1)
        elif operation == "send":
            share = 1.0
        elif kind == "all-reduce":
            share *= 2
        volume.sent += share * sum(t.nbytes for t in _tensors(args[which]))

    def _name(self, group: dist.ProcessGroup) -> str:
        ranks = "-".join(map(str, dist.get_process_group_ranks(group)))
        return self._names.get(group.group_name, f"ranks {ranks}")


# What an operation counts as, and which of its arguments is the whole of what is moved.
_KINDS = {
    "allreduce_": ("all-reduce", 0),
    "allreduce_coalesced_": ("all-reduce", 0),
    "_allgather_base_": ("all-gather", 0),
    "allgather_": ("all-gather", 0),
    "allgather_into_tensor_coalesced_": ("all-gather", 0),
    "_reduce_scatter_base_": ("reduce-scatter", 1),
    "reduce_scatter_": ("reduce-scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce-scatter", 1),
    "alltoall_base_": ("all-to-all", 1),
    "alltoall_": ("all-to-all", 1),
    "broadcast_": ("broadcast", 0),
    "reduce_": ("reduce", 0),
    "gather_": ("gather", 1),
    "scatter_": ("scatter", 1),
    "send": ("send", 0),
}
_SILENT = frozenset({"recv_", "recv_any_source_", "barrier", "monitored_barrier_"})


def _tensors(argument: Any) -> Iterator[Tensor]:
    if isinstance(argument, Tensor):
        yield argument
    else:
        for one in argument:
            yield from _tensors(one)


def needed(parameters: Sequence[Parameter], ranks: int, stage: int, micro_batches: int) -> dict[str, float]:
    """Bytes that each of `ranks` data-parallel ranks must send in a step of ZeRO `stage` (arXiv 1910.02054, section
    7), by kind: gradients in full precision, weights in theirs.

    parameters: of this rank; stage: 0, 1 or 2, whose gradients travel with every micro-batch.
    """
    owned = [p for p in parameters if p.owner]
    share = (ranks - 1) / ranks
    gradients = share * sum(p.numel() * accumulation_dtype(p.dtype).itemsize for p in owned)
    weights = share * sum(p.numel() * p.dtype.itemsize for p in owned)
    if stage == 0:
        return {"all-reduce": 2 * gradients}
    return {"reduce-scatter": gradients * (micro_batches if stage == 2 else 1), "all-gather": weights}
