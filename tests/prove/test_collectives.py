"""Recorded operations: equal to what real ranks issue, complete in every layout, and wrong where a fault is planted."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from typer.testing import CliRunner

from megapt import cli
from megapt.config import Config, from_tree
from megapt.errors import UserError
from megapt.operations import OPERATIONS, Noted
from megapt.parallel.pipeline import runtime
from megapt.parallel.pipeline.runtime import Pipeline
from megapt.parallel.tensor import TensorParallel
from megapt.prove import collectives
from megapt.prove.collectives import Group, Operation, Recorder, mismatches, record, small, take_steps
from megapt.prove.ranks import run_ranks
from megapt.zero.native import NativeBackend

SIZES = {"layers": 8, "hidden": 64, "heads": 4, "kv_heads": 2, "ffn": 128, "vocabulary": 100}


def config(
    tp: int = 2, pp: int = 2, zero: str = "native-1", tied: bool = False, kind: str = "adamw", **parallel: Any
) -> Config:
    backend, _, stage = zero.partition("-")
    tree = {
        "precision": "fp32",
        "model": SIZES | {"tied_embeddings": tied},
        "parallel": {"tensor": tp, "pipeline": pp, **parallel},
        "zero": {"backend": backend, "stage": int(stage)},
        "data": {"train": "unused"},
        "batch": {"sequence": 64, "samples": 64},
        "optimizer": {"kind": kind},
        "train": {"steps": 5},
    }
    return from_tree(tree).config


def zb_v(**more: Any) -> Config:
    return config(schedule="zb-v", chunks=2, **more)


# The record against real ranks: what reached torch.distributed, and what each rank noted of it.

REAL = [
    config(tied=True),
    config(pp=1, tp=2, zero="native-2", kind="muon"),
    zb_v(zero="native-0", tied=True, sequence=False),
    config(pp=4, tp=1, zero="native-0", schedule="interleaved", chunks=2),
]


def _really(rank: int, world: int) -> list[tuple[list[Operation], list[Noted]]]:
    found = []
    for chosen in REAL:
        noted: list[Noted] = []
        begin = OPERATIONS.begin

        def kept(name: str, noted: list[Noted] = noted, begin: Callable[[str], None] = begin) -> None:
            noted += OPERATIONS.noted()
            begin(name)

        OPERATIONS.begin = kept  # type: ignore[method-assign]
        with Recorder() as recorder:
            take_steps(small(chosen, world), world, 2)
        OPERATIONS.begin = begin  # type: ignore[method-assign]
        found.append((recorder.operations, noted + OPERATIONS.noted()))
    return found


def plain(operation: Operation) -> tuple[Any, ...]:
    """An operation without its group's name, which counts the groups that this process has ever made."""
    return replace(operation, group=Group("", operation.group.ranks)), operation.action


def as_noted(operation: Operation) -> Noted:
    """An operation as `Operations.note` sees it: of an output and its input, the input."""
    ranks, given = operation.group.ranks, operation.shapes[-1]
    return Noted(operation.kind, ranks, given, operation.dtype, operation.peer, operation.content)


def test_the_record_is_what_real_ranks_issue_and_note() -> None:
    everybody = tuple(range(4))
    real = run_ranks(4, _really)
    for number, chosen in enumerate(REAL):
        recorded = record(chosen, 4)
        assert mismatches(recorded) == []
        for rank, operations in enumerate(recorded):
            issued, noted = real[rank][number]
            assert len(operations) > 40
            assert [plain(a) for a in operations] == [plain(b) for b in issued]
            expected = [as_noted(a) for a in operations]
            assert [n if n.ranks else n._replace(ranks=everybody) for n in noted] == expected


SCHEDULES = [("gpipe", 1), ("1f1b", 1), ("interleaved", 3), ("zb-h1", 1), ("zb-v", 2)]


@pytest.mark.parametrize(("schedule", "chunks"), SCHEDULES)
def test_every_schedule_meets(schedule: str, chunks: int) -> None:
    for tied, zero, sequence in ((True, "native-1", False), (False, "deepspeed-1", True)):
        chosen = config(tied=tied, zero=zero, schedule=schedule, chunks=chunks, sequence=sequence)
        records = record(chosen, 4, steps=1)
        assert mismatches(records) == []
        moved = sum(op.content.startswith("activation") for op in records[0] if op.kind == "send")
        assert moved == 4 * (chunks if schedule == "interleaved" else 1)  # of four micro-batches


@pytest.mark.parametrize("zero", ["native-2", "deepspeed-0", "deepspeed-2"])
def test_layouts_without_a_pipeline_meet(zero: str) -> None:
    assert mismatches(record(config(pp=1, zero=zero), 4, steps=1)) == []


def test_what_ranks_tell_each_other_at_the_start_is_taken_into_account() -> None:
    """DeepSpeed's groups of parameters are those of all stages, which tell each other in pickled objects."""
    tree = config(pp=4, tp=1, zero="deepspeed-1").model_dump()
    tree["optimizer"]["lr_scale"] = {"embedding": 2.0, "head": 0.5}
    assert mismatches(record(from_tree(tree).config, 4, steps=1)) == []


# Faults planted in one rank of an otherwise sound run.


def only(rank: int, monkeypatch: pytest.MonkeyPatch, where: Any, name: str, broken: Callable[..., Any]) -> None:
    """Put `broken(original, *arguments)` in a function's place while this rank is recorded."""
    original = getattr(where, name)

    def chosen(*given: Any, **more: Any) -> Any:
        if dist.get_rank() == rank:
            return broken(original, *given, **more)
        return original(*given, **more)

    monkeypatch.setattr(where, name, chosen)


def faults(chosen: Config) -> str:
    return "\n".join(mismatches(record(chosen, 4, steps=1)))


def test_an_all_reduce_that_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    def skipping(original: Any, tp: TensorParallel, x: Tensor) -> Any:
        if OPERATIONS.action.startswith("backward of micro-batch 3,"):
            return x, lambda: None
        return original(tp, x)

    only(3, monkeypatch, TensorParallel, "start_reduce", skipping)
    found = faults(config(sequence=False, zero="native-0"))
    assert (
        "[2, 3], operation" in found
        and "rank 2 issues all-reduce of [4, 8] float32 in backward of micro-batch 3" in found
    )


@pytest.mark.parametrize("how", [lambda x: x[:-1], lambda x: x.double()], ids=["shape", "dtype"])
def test_another_shape_or_dtype(monkeypatch: pytest.MonkeyPatch, how: Callable[[Tensor], Tensor]) -> None:
    def other(original: Any, tp: TensorParallel, x: Tensor) -> Any:
        original(tp, how(x))
        return x, lambda: None

    only(1, monkeypatch, TensorParallel, "start_reduce", other)
    found = faults(config(sequence=False, zero="native-0"))
    assert "[0, 1], operation 0: rank 0 issues all-reduce of [4, 8] float32" in found
    assert ("rank 1 all-reduce of [3, 8] float32" in found) or ("rank 1 all-reduce of [4, 8] float64" in found)


def test_groups_in_opposite_order_are_a_circle(monkeypatch: pytest.MonkeyPatch) -> None:
    def first(original: Any, backend: NativeBackend) -> Any:
        mesh = backend.mesh
        # One rank alone would wait a while; two in opposite corners close the circle.
        for axis in (mesh.dp, mesh.tp) if mesh.rank in (0, 3) else (mesh.tp, mesh.dp):
            axis.all_reduce(torch.zeros(1))
        return original(backend)

    for rank in range(4):
        only(rank, monkeypatch, NativeBackend, "_norm", first)
    assert faults(config(pp=1)).startswith("4 ranks would wait for each other for ever: rank 0 in all-reduce of [1]")


def test_a_send_that_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Done:
        def wait(self) -> None: ...

    def silent(original: Any, tensor: Tensor, peer: int, group: Any, content: str) -> Any:
        return Done() if content.startswith("activation of micro-batch 1") else original(tensor, peer, group, content)

    only(0, monkeypatch, runtime, "send", silent)
    found = faults(config())
    assert "from rank 0 to rank 2: send of [2, 8] float32, activation of micro-batch 2 for stage 1" in found
    assert "receive of [2, 8] float32, activation of micro-batch 1 for stage 1" in found


def test_sends_that_are_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their shapes are the same: what they hold is not."""
    contents = {"activation of micro-batch 1 for stage 1": "activation of micro-batch 2 for stage 1"}
    contents |= {b: a for a, b in contents.items()}

    def swapped(original: Any, tensor: Tensor, peer: int, group: Any, content: str) -> Any:
        return original(tensor, peer, group, contents.get(content, content))

    only(1, monkeypatch, runtime, "send", swapped)
    assert "transfer 2 from rank 1 to rank 3: send of [2, 8] float32, activation of micro-batch 2" in faults(config())


def test_another_order_of_groups_when_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch numbers groups as they are made: a rank that makes one more is in other groups from there on."""

    def one_more(original: Any, pipeline: Pipeline, *given: Any, **more: Any) -> None:
        dist.new_group([0, 1, 2, 3])
        original(pipeline, *given, **more)

    only(2, monkeypatch, Pipeline, "__init__", one_more)
    assert "nothing is received" in faults(config())


# Records made by hand.

PAIR, ALL = Group("1", (0, 1)), Group("0", (0, 1, 2))


def op(kind: str, group: Group = PAIR, *shape: int, **more: Any) -> Operation:
    return Operation(kind, group, (shape,), "float32", **more)


def test_empty_records_and_equal_ones_meet() -> None:
    assert mismatches([[], []]) == []
    assert mismatches([[op("all-reduce", PAIR, 3)], [op("all-reduce", PAIR, 3, action="elsewhere")]]) == []


def test_a_member_that_issues_less_or_something_else_is_named() -> None:
    reduce = op("all-reduce", PAIR, 3)
    (line,) = mismatches([[reduce, reduce], [reduce]])
    assert line == "group 1 [0, 1], operation 1: rank 0 issues all-reduce of [3] float32, rank 1 nothing"
    (line,) = mismatches([[reduce], [replace(reduce, kind="all-gather")]])
    assert "rank 1 all-gather of [3] float32" in line
    (line,) = mismatches([[op("broadcast", PAIR, 3, root=0)], [op("broadcast", PAIR, 3, root=1)]])
    assert "with root 0, rank 1 broadcast of [3] float32 with root 1" in line
    (line,) = mismatches([[], [], [op("barrier", ALL)]])
    assert "rank 0 issues nothing, rank 2 barrier" in line


def test_an_all_to_all_must_agree_on_what_goes_where() -> None:
    def exchange(received: tuple[int, int], sent: tuple[int, int]) -> Operation:
        return op("all-to-all", PAIR, sum(received), splits=(received, sent))

    assert mismatches([[exchange((1, 2), (1, 3))], [exchange((3, 4), (2, 4))]]) == []
    (line,) = mismatches([[exchange((1, 2), (1, 3))], [exchange((3, 4), (5, 4))]])
    assert line == "group 1 [0, 1], operation 0: rank 1 and rank 0 disagree on what goes from one to the other"


def test_transfers_are_matched_by_group_direction_and_content() -> None:
    send, receive = op("send", PAIR, 3, peer=1), op("receive", PAIR, 3, peer=0)
    assert mismatches([[send], [receive]]) == []
    other = Group("2", (0, 1))
    # Two channels between the same ranks: each in its own order.
    there = [send, replace(send, group=other, content="b")]
    assert mismatches([there, [replace(receive, group=other, content="b"), receive]]) == []
    for received in ([], [replace(receive, group=other)], [replace(receive, content="b")], [replace(receive, peer=2)]):
        assert mismatches([[send], received])


def test_a_circle_over_three_ranks_is_found() -> None:
    groups = [Group(str(i), tuple(sorted((i, (i + 1) % 3)))) for i in range(3)]
    sound = [[op("barrier", groups[i]) for i in range(3) if rank in groups[i].ranks] for rank in range(3)]
    assert mismatches(sound) == []
    circle = [[op("barrier", groups[rank]), op("barrier", groups[rank - 1])] for rank in range(3)]
    (line,) = mismatches(circle)
    assert line.startswith("3 ranks would wait for each other for ever: rank 0 in barrier")


# The command.


def write(path: Path) -> Path:
    path.write_text(json.dumps(config().model_dump(exclude_defaults=True)))
    return path


def test_the_command_writes_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, out, summary = write(tmp_path / "c.yaml"), tmp_path / "ops.jsonl", tmp_path / "summary.json"
    words = ["collectives", str(file), "parallel.schedule=zb-h1", "--world", "4"]
    result = CliRunner().invoke(cli.app, [*words, "--out", str(out), "--summary", str(summary)])
    assert result.exit_code == 0, result.output
    assert "every send meets its receive" in result.output
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert {line["rank"] for line in lines} == {0, 1, 2, 3}
    report = json.loads(summary.read_text())
    assert sum(report["operations"].values()) == len(lines)
    assert (report["layout"], report["mismatches"]) == ("tensor 2 x pipeline 2 x data 1", [])
    monkeypatch.setattr(collectives, "mismatches", lambda records: ["rank 3 is odd"])
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == 1 and "MISMATCH rank 3 is odd" in result.output and "meets" not in result.output


@pytest.mark.parametrize(
    ("overrides", "world", "words"),
    [
        ((), 6, r"world of 6 ranks is not divisible by tensor x pipeline = 2 x 2 = 4\. Layouts .* tensor=1 pipeline=1"),
        ((), 2, "start 4 ranks"),
        (("parallel.pipeline=1", "zero.stage=3", "zero.backend=deepspeed"), 4, "record zero.stage 0, 1 or 2"),
        (("parallel.data=3",), 4, "parallel.data is 3"),
    ],
)
def test_what_cannot_be_recorded_is_refused(tmp_path: Path, overrides: tuple[str, ...], world: int, words: str) -> None:
    from megapt.config import load

    with pytest.raises(UserError, match=words):
        record(load(write(tmp_path / "c.yaml"), overrides).config, world)


def test_files_that_cannot_be_written_are_refused_first(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.app, ["collectives", "none.yaml", "--out", str(tmp_path / "no" / "ops.jsonl")])
    assert isinstance(result.exception, UserError) and "is no folder" in str(result.exception)
