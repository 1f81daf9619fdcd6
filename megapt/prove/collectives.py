"""Every rank's collectives and transfers, recorded by one process, and the proof that they meet.

Each rank of the world in turn is this process, under torch's fake process group: the real engine is built and takes
real steps with small tensors, while a dispatch mode writes down what reaches torch.distributed. Nothing is sent, so
that a world of hundreds of ranks fits a laptop. What would hang on a cluster is found here: members of a group that do
not issue the same operations in the same order with the same shapes, sends without receives, and groups that wait for
each other in a circle.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megapt.batch import IGNORE, MicroBatch, StepBatch
from megapt.config import Config, from_tree
from megapt.engine import Engine
from megapt.errors import UserError
from megapt.operations import OPERATIONS
from megapt.rules import check_world

_KINDS = {
    "allreduce_": "all-reduce",
    "_allgather_base_": "all-gather",
    "allgather_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_": "reduce-scatter",
    "broadcast_": "broadcast",
    "reduce_": "reduce",
    "gather_": "gather",
    "scatter_": "scatter",
    "alltoall_base_": "all-to-all",
    "barrier": "barrier",
    "send": "send",
    "recv_": "receive",
}
_POINT_TO_POINT = ("send", "receive")


@dataclass(frozen=True, slots=True)
class Group:
    """A process group: torch's name, the same on all members, and the world's ranks in it."""

    name: str
    ranks: tuple[int, ...]

    def __str__(self) -> str:
        names = ", ".join(map(str, self.ranks[:4])) + (f", ... {self.ranks[-1]}" if len(self.ranks) > 4 else "")
        return f"{self.name} [{names}]"


@dataclass(frozen=True, slots=True)
class Operation:
    """One collective or transfer of one rank.

    shapes: of the tensors given, an output before its input; peer: the rank at the other end of a transfer; root: of a
    broadcast and the like; splits: rows that an all-to-all brings from and takes to each member; content: what a
    transfer moves, in the words of both ends; action: what the rank was doing.
    """

    kind: str
    group: Group
    shapes: tuple[tuple[int, ...], ...]
    dtype: str
    peer: int | None = None
    root: int | None = None
    splits: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    content: str = ""
    action: str = field(default="", compare=False)

    def agrees(self, other: Operation) -> bool:
        """Whether two members of a group may issue these in the same place."""
        if self.splits is not None:  # members move different numbers of rows
            return (self.kind, self.dtype) == (other.kind, other.dtype)
        mine = self.kind, self.shapes, self.dtype, self.root
        return mine == (other.kind, other.shapes, other.dtype, other.root)

    def __str__(self) -> str:
        sizes = " and ".join(str(list(shape)) for shape in self.shapes)
        what = f"{self.kind} of {sizes} {self.dtype}" if sizes else self.kind
        content = f", {self.content}" if self.content else ""
        root = f" with root {self.root}" if self.root is not None else ""
        return f"{what}{content}{root}{f' in {self.action}' if self.action else ''}"


class Recorder(TorchDispatchMode):
    """While it is entered, writes down in `operations` what is dispatched to torch.distributed, whoever calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self._groups: dict[str, Group] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and the guard against it would cost as much as all the rest

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace != "c10d":
            return function(*args, **(kwargs or {}))
        operation = self._note(function._schema, args)
        result = function(*args, **(kwargs or {}))
        self._carried_out(operation, args)
        return result

    def _carried_out(self, operation: Operation, args: Sequence[Any]) -> None:
        """After torch was called; nothing is left to do where the ranks are real."""

    def _note(self, schema: Any, args: Sequence[Any]) -> Operation:
        name = schema.name.partition("::")[2]
        kind = _KINDS.get(name, name)
        named = {argument.name: value for argument, value in zip(schema.arguments, args, strict=False)}
        process_group = dist.ProcessGroup.unbox(named["process_group"])
        group = self._groups.get(process_group.group_name)
        if group is None:
            ranks = tuple(dist.get_process_group_ranks(process_group))
            group = self._groups[process_group.group_name] = Group(process_group.group_name, ranks)
        end, root = named.get("dst", named.get("src")), named.get("root_rank")
        # Only the root has outputs of a gather; a barrier's tensor only says where to run.
        given = named["input_tensors"] if kind in ("gather", "scatter") else args
        tensors = [] if kind == "barrier" else _tensors(given)
        splits = None
        if named.get("input_split_sizes"):
            splits = tuple(named["output_split_sizes"]), tuple(named["input_split_sizes"])
        operation = Operation(
            kind,
            group,
            tuple(tuple(t.shape) for t in tensors),
            str(tensors[0].dtype).removeprefix("torch.") if tensors else "",
            peer=None if end is None else group.ranks[end],
            root=None if root is None else group.ranks[root],
            splits=splits,
            content=OPERATIONS.content if end is not None else "",
            action=OPERATIONS.action,
        )
        self.operations.append(operation)
        return operation


@dataclass
class _Known:
    """What ranks that were recorded gave in the n-th broadcast (the root) and all-gather (each member) of a group."""

    broadcasts: dict[tuple[Group, int], Tensor] = field(default_factory=dict)
    gathers: dict[tuple[Group, int], dict[int, Tensor]] = field(default_factory=dict)

    def differ(self) -> bool:
        """Whether members gave different things to some all-gather."""
        each = ([*parts.values()] for parts in self.gathers.values())
        return any(not torch.equal(parts[0], part) for parts in each for part in parts[1:])


class _Rehearsal(Recorder):
    """Gives the fake group's results values, where it leaves what memory held before and an infinity there would look
    like an overflow.

    All ranks are taken to hold what this one does; but a root what was recorded of it, and members what they gave
    `before` where that is numbers or objects, which may decide what a rank does next.
    """

    def __init__(self, rank: int, known: _Known, before: _Known) -> None:
        super().__init__()
        self.rank, self.known, self.before = rank, known, before
        self._numbers: Counter[tuple[str, Group]] = Counter()

    def _carried_out(self, operation: Operation, args: Sequence[Any]) -> None:
        place = operation.group, self._numbers[operation.kind, operation.group]
        self._numbers[operation.kind, operation.group] += 1
        if operation.kind == "all-gather":
            self._gather(place, _tensors(args[1:2])[0].flatten().clone(), _tensors(args[:1]))
        elif operation.kind == "broadcast":
            (tensor,) = _tensors(args[:1])
            # Checks at the start of a run compare what they hold against the root's.
            tensor.copy_(self.known.broadcasts.setdefault(place, tensor.clone()))
        elif operation.kind in ("reduce-scatter", "all-to-all", "receive"):
            for tensor in _tensors(args[:1]):
                tensor.zero_()

    def _gather(self, place: tuple[Group, int], given: Tensor, out: list[Tensor]) -> None:
        others: dict[int, Tensor] = {}
        if not given.is_floating_point():
            self.known.gathers.setdefault(place, {})[self.rank] = given
            others = self.before.gathers.get(place, {})
        parts = [others.get(member, given) for member in place[0].ranks]
        # Objects are padded to the largest, which was not known before.
        parts = [torch.cat([part, part.new_zeros(len(given))])[: len(given)] for part in parts]
        for tensor, part in zip(out, parts if len(out) > 1 else [torch.cat(parts)], strict=True):
            tensor.view(-1).copy_(part)


def _tensors(given: Any) -> list[Tensor]:
    """All tensors in nested lists."""
    if isinstance(given, Tensor):
        return [given]
    return [tensor for one in given for tensor in _tensors(one)] if isinstance(given, list | tuple) else []


def small(config: Config, world: int) -> Config:
    """The configuration with its layout, schedule, ZeRO and number of heads, and everything else as small as it can be.

    One layer for each virtual stage, tensors of a few elements, several buckets, and two micro-batches for each stage:
    the pattern of operations stays. Raises UserError if the layout does not fit the world.
    """
    parallel, model = config.parallel, config.model
    data = max(world // (parallel.tensor * parallel.pipeline), 1)
    tree = config.model_dump()
    tree["batch"] |= {"tokens": None, "ramp": None, "samples": 2 * parallel.pipeline * config.batch.micro * data}
    check_world(from_tree(tree).config, world)
    tree["precision"] = "fp32" if config.precision == "fp64" else config.precision
    tree["model"] |= {"layers": parallel.virtual_stages, "hidden": 8, "head_dim": 2, "ffn": 2 * parallel.tensor}
    tree["model"] |= {"kv_heads": model.num_kv_heads, "vocabulary": 64, "max_sequence": 2 * parallel.tensor}
    tree["model"]["rotary_dim"] = None  # heads of two dimensions turn whole
    scaling = tree["model"]["rope_scaling"] or {}
    scaling |= {name: (1.0,) for name in ("short_factors", "long_factors") if scaling.get(name)}
    tree["parallel"] |= {"layers_per_stage": None, "layer_costs": None, "vocabulary_multiple": 1}
    tree["batch"] |= {"sequence": 2 * parallel.tensor, "micro": 1, "samples": 2 * parallel.pipeline * data}
    tree["zero"]["bucket"] = 256
    if config.recompute.policy == "budget":
        tree["recompute"] = {"policy": "none"}  # which layers it chooses changes no operation between ranks
    tree["train"] |= {"steps": 2, "tokens": None}
    return from_tree(tree).config


def record(
    config: Config, world: int, steps: int = 2, progress: Callable[[int], object] | None = None
) -> list[list[Operation]]:
    """The operations of all ranks of a world, from building the engine to the end of `steps` steps of `small(config)`.

    progress: called with the number of ranks done. Raises UserError if the layout does not fit the world, or cannot be
    recorded.
    """
    if dist.is_initialized():
        raise UserError("a world cannot be recorded inside of another: no process group may exist")
    if config.zero.backend == "deepspeed" and config.zero.stage == 3:
        raise UserError(
            "DeepSpeed's ZeRO 3 numbers modules by process and compares the numbers over ranks, so one process cannot "
            "be all of them: record zero.stage 0, 1 or 2"
        )
    config = small(config, world)
    known = _Known()
    for _ in range(2):
        records, before, known = [], known, _Known()
        for rank in range(world):
            records.append(_record_rank(config, rank, world, steps, known, before))
            if progress is not None:
                progress(rank + 1)
        if not known.differ():
            break  # each rank took the others to give what they gave
    return records


def _record_rank(config: Config, rank: int, world: int, steps: int, known: _Known, before: _Known) -> list[Operation]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        with _Rehearsal(rank, known, before) as recorder:
            take_steps(config, world, steps)
        return recorder.operations
    finally:
        dist.destroy_process_group()


def take_steps(config: Config, world: int, steps: int) -> None:
    """Build this rank's engine and train it for some steps on the CPU, on tokens that are all the same. Collective."""
    engine = Engine(config, world, torch.device("cpu"))
    count = config.batch.global_samples // (config.batch.micro * engine.mesh.dp.size)
    tokens = torch.zeros(config.batch.micro, config.batch.sequence, dtype=torch.int64)
    labels = torch.full_like(tokens, IGNORE)  # no rank has the logits of others, where those of a label would be
    batch = StepBatch([MicroBatch(tokens, labels)] * count, np.zeros(1, np.int64), tokens.numel())
    for _ in range(steps):
        engine.train_step(batch, 1e-3)


def mismatches(records: Sequence[Sequence[Operation]]) -> list[str]:
    """Every group whose members disagree, every transfer with one end, and a circle of waiting if there is one.

    Empty if the operations of all ranks meet.
    """
    found = [*_groups(records), *_transfers(records)]
    return found or _execute(records)


def _groups(records: Sequence[Sequence[Operation]]) -> list[str]:
    """The first operation of each group on which members disagree."""
    issued: dict[Group, dict[int, list[Operation]]] = defaultdict(dict)
    for rank, operations in enumerate(records):
        for operation in operations:
            if operation.kind not in _POINT_TO_POINT:
                issued[operation.group].setdefault(rank, []).append(operation)
    found = []
    for group, lists in issued.items():
        disagreement = next(filter(None, (_disagreement(group, lists, rank) for rank in group.ranks)), None)
        found += [disagreement or _splits(group, lists)]
    return [line for line in found if line]


def _disagreement(group: Group, lists: dict[int, list[Operation]], rank: int) -> str:
    """Where `rank` leaves what the group's first member issues; empty if nowhere."""
    first, other = lists.get(group.ranks[0], []), lists.get(rank, [])
    pairs = enumerate(zip(first, other, strict=False))
    place = next((i for i, (a, b) in pairs if a is not b and not a.agrees(b)), None)
    if place is None:
        if len(first) == len(other):
            return ""
        place = min(len(first), len(other))
    mine, theirs = (str(x[place]) if place < len(x) else "nothing" for x in (first, other))
    return f"group {group}, operation {place}: rank {group.ranks[0]} issues {mine}, rank {rank} {theirs}"


def _splits(group: Group, lists: dict[int, list[Operation]]) -> str:
    """The first all-to-all in which a member takes another number of rows than its peer gives."""
    for place, operations in enumerate(zip(*(lists[rank] for rank in group.ranks), strict=True)):
        if operations[0].splits is None:
            continue
        for i, giver in enumerate(operations):
            for j, taker in enumerate(operations):
                assert giver.splits is not None and taker.splits is not None
                if giver.splits[1][j : j + 1] != taker.splits[0][i : i + 1]:
                    ranks = f"rank {group.ranks[i]} and rank {group.ranks[j]}"
                    return f"group {group}, operation {place}: {ranks} disagree on what goes from one to the other"
    return ""


def _transfers(records: Sequence[Sequence[Operation]]) -> list[str]:
    """The first transfer of each group from one rank to another that has one end or two different ones."""
    ends: dict[tuple[Group, int, int], tuple[list[Operation], list[Operation]]] = {}
    for rank, operations in enumerate(records):
        for operation in operations:
            if operation.kind in _POINT_TO_POINT:
                assert operation.peer is not None
                sends = operation.kind == "send"
                way = (rank, operation.peer) if sends else (operation.peer, rank)
                ends.setdefault((operation.group, *way), ([], []))[not sends].append(operation)
    found = []
    for (_, source, destination), (sent, received) in ends.items():
        for place in range(max(len(sent), len(received))):
            out, into = (x[place] if place < len(x) else None for x in (sent, received))
            if out is None or into is None or _moved(out) != _moved(into):
                found.append(
                    f"transfer {place} from rank {source} to rank {destination}: {out or 'nothing is sent'}, "
                    f"{into or 'nothing is received'}"
                )
                break
    return found


def _moved(operation: Operation) -> tuple[object, ...]:
    """What both ends of a transfer must agree on."""
    return operation.shapes, operation.dtype, operation.content


def _execute(records: Sequence[Sequence[Operation]]) -> list[str]:
    """All ranks together as far as they get, every collective waiting for all its members; [] if that is to the end.

    Transfers wait for nobody here: the pipeline's schedule has a proof of its own.
    """
    collective = [[op for op in operations if op.kind not in _POINT_TO_POINT] for operations in records]
    at = [0] * len(records)
    waiting: Counter[Group] = Counter()
    ready = list(range(len(records)))
    while ready:
        rank = ready.pop()
        if at[rank] == len(collective[rank]):
            continue
        group = collective[rank][at[rank]].group
        waiting[group] += 1
        if waiting[group] == len(group.ranks):
            del waiting[group]
            for member in group.ranks:
                at[member] += 1
            ready.extend(group.ranks)
    stuck = [rank for rank, operations in enumerate(collective) if at[rank] < len(operations)]
    if not stuck:
        return []
    first = (collective[rank][at[rank]] for rank in stuck[:8])
    shown = "; ".join(f"rank {rank} in {op} over group {op.group}" for rank, op in zip(stuck, first, strict=False))
    return [f"{len(stuck)} ranks would wait for each other for ever: {shown}"]


def summary(records: Sequence[Sequence[Operation]]) -> list[tuple[str, int]]:
    """Kinds of operations with their group's size, and how many all ranks issue; the commonest first."""
    count = Counter(
        op.kind if op.peer is not None else f"{op.kind} over {len(op.group.ranks)}"
        for operations in records
        for op in operations
    )
    return count.most_common()
