"""The record of one process: what it notes, and where it says that the process is."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megapt.mesh import ParallelMesh, all_gather, all_reduce, receive, reduce_scatter, send
from megapt.operations import OPERATIONS, Blocked, Noted, Operations, Place, brief
from megapt.prove.ranks import run_ranks


class Work:
    """Stands for torch's: looks at the record while it is waited for."""

    def __init__(self, record: Operations) -> None:
        self.record = record
        self.seen: list[Place] = []

    def wait(self) -> None:
        self.seen.append(self.record.place())

    def is_completed(self) -> bool:
        return bool(self.seen)


def test_a_step_is_the_script_of_the_next() -> None:
    record, tensor = Operations(), torch.zeros(2, 3)

    def step(operations: int) -> None:
        record.begin("training step")
        for number in range(operations):
            record.action = f"action {number}"
            record.note("all-reduce", None, tensor[number:]).issued(None)

    step(2)
    assert record.place().of == 0 and record.place().next == ""
    step(1)
    here = record.place()
    assert (here.action, here.index, here.of, here.issued) == ("action 0", 1, 2, {"the world": 3})
    assert here.operation == "all-reduce of [2, 3] float32 over the world"
    assert here.next == "all-reduce of [1, 3] float32 over the world in action 1"
    # Passes of other names have scripts of their own, and nothing of them stays but the last one.
    for _ in range(3):
        record.begin("evaluation")
        assert record.place().of in (0, 5)
        for _ in range(5):
            record.note("broadcast", None, tensor).issued(None)
    step(0)
    assert record.place().of == 1 and len(record._complete) == 3


def test_one_who_waits_is_seen_to_wait_and_for_what() -> None:
    record, tensor = Operations(), torch.zeros(4, dtype=torch.bfloat16)
    record.forget(rank=2)
    work = Work(record)
    issued = record.note("receive", None, tensor, peer=0)
    # Even while it is being issued: NCCL makes its communicators there.
    assert record.place().blocked == Blocked("the world, 0 to 2", 1, "receive", "[4] bfloat16", 0)
    issued.issued(work)  # type: ignore[arg-type]
    assert record.place().blocked is None and not issued.is_completed()
    record.note("receive", None, tensor, peer=0).issued(None)
    record.note("send", None, tensor, peer=0).issued(None)
    issued.wait()
    (seen,) = work.seen
    assert seen.blocked == Blocked("the world, 0 to 2", 1, "receive", "[4] bfloat16", 0)
    assert seen.issued == {"the world": 0, "the world, 0 to 2": 2, "the world, 2 to 0": 1}
    assert record.place().blocked is None and issued.is_completed()


def test_places_travel_as_plain_values() -> None:
    for blocked in (None, Blocked("tp ranks 0, 1", 7, "all-gather", "[2, 3] float32")):
        place = Place("forward", "send", 3, 9, "receive", {"tp ranks 0, 1": 6}, blocked)
        assert Place.from_dict(place.to_dict()) == place


def test_many_ranks_are_few_words() -> None:
    assert brief([0, 8]) == "0, 8"
    assert brief(range(0, 1024, 8)) == "0, 8, 16 ... 1016 (128 ranks)"


def _talk(rank: int, world: int) -> dict[str, Any]:
    mesh = ParallelMesh.create(world, 1, 1, torch.device("cpu"))
    group, mine = mesh.pp.group, torch.full((2, 1), float(rank + 1))
    own = dist.new_group(list(range(world)))
    OPERATIONS.begin("training step")
    out = torch.empty(2 * world, 1)
    all_gather(out, mine, group)
    part = torch.empty(1, 1)
    reduce_scatter(part, mine, group, async_op=True).wait()
    all_reduce(mine.clone(), group=own)
    passed = torch.zeros(2, 1)
    sent = send(mine, (rank + 1) % world, group, f"token of {rank}")
    receive(passed, (rank - 1) % world, group, f"token of {(rank - 1) % world}").wait()
    sent.wait()
    values = {"out": out.flatten().tolist(), "part": part.tolist(), "passed": passed.flatten().tolist()}
    return values | {"noted": OPERATIONS.noted(), "place": OPERATIONS.place()}


def test_what_goes_through_the_mesh_is_noted() -> None:
    for rank, found in enumerate(run_ranks(2, _talk)):
        assert (found["out"], found["part"]) == ([1, 1, 2, 2], [[3]])
        assert found["passed"] == [2 - rank] * 2
        other = 1 - rank
        token = Noted("all-gather", (0, 1), (2, 1), "float32", None, "")
        assert found["noted"] == [
            token,
            token._replace(kind="reduce-scatter"),
            token._replace(kind="all-reduce"),
            token._replace(kind="send", peer=other, content=f"token of {rank}"),
            token._replace(kind="receive", peer=other, content=f"token of {other}"),
        ]
        issued = found["place"].issued
        assert issued["ranks 0, 1"] == 1  # a group that nobody named
        assert sorted(name[-6:] for name in issued if " to " in name) == ["0 to 1", "1 to 0"]
