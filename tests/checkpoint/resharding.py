"""What the ranks of the resharding matrix do: real engines of every layout save, and load each other's checkpoints."""

from __future__ import annotations

import functools
import gc
from pathlib import Path

import torch
from torch import Tensor

from megapt import checkpoint
from megapt.checkpoint.plain import Checkpoint
from megapt.prove.layout import Layout
from megapt.prove.small import built_in
from megapt.prove.trainer import Trainer

KINDS = ("weight", "exp_avg", "exp_avg_sq")
SHAPES = {shape.name: shape for shape in built_in() if shape.name in ("llama", "gpt2")}

Case = tuple[str, str]  # shape, layout


def trainer(case: Case) -> Trainer:
    shape, layout = case
    parsed = Layout.parse(layout)
    return Trainer(parsed.config(SHAPES[shape], "fp32", layers=4), parsed.world)


def folder_of(root: str, case: Case) -> Path:
    return Path(root) / case[0] / (case[1].replace("/", "_") or "source")


def train_source(rank: int, world: int, root: str) -> None:
    """One process trains each model for two steps: what every layout must hold bit for bit."""
    for shape in SHAPES:
        one = trainer((shape, ""))
        for step in range(2):
            one.step(step)
        one.save(str(folder_of(root, (shape, ""))))


def copy_source(rank: int, world: int, root: str, cases: list[Case]) -> int:
    """Load the source in each layout and save it from there; returns the elements compared here."""
    count = 0
    for case in cases:
        one = trainer(case)
        one.resume(str(folder_of(root, (case[0], ""))))
        count += compare(one, root, case)
        one.save(str(folder_of(root, case)))
        del one
        gc.collect()
    return count


def load_all(rank: int, world: int, root: str, cases: list[Case], saved: list[Case]) -> int:
    """Load in each layout what every other layout saved; returns the elements compared here."""
    count = 0
    for case in cases:
        one = trainer(case)
        for other in saved:
            if other[0] == case[0] and other != case:
                one.resume(str(folder_of(root, other)))
                count += compare(one, root, case)
        del one
        gc.collect()
    return count


@functools.cache
def source(root: str, shape: str) -> dict[tuple[str, str], Tensor]:
    """All tensors of the source, by the reader that knows no layouts."""
    plain = Checkpoint(checkpoint.resolve(folder_of(root, (shape, ""))))
    return {(name, kind): torch.from_numpy(plain.read(name, kind)) for kind in KINDS for name in plain.names(kind)}


def compare(one: Trainer, root: str, case: Case) -> int:
    """Every element that this rank keeps, after the backend took it over, is the source's bit for bit."""
    whole = source(root, case[0])
    count = 0
    for fragment in one.backend.fragments():
        parameter = fragment.parameter
        spec, shard = parameter.spec, parameter.shard
        for kind in KINDS:
            local = torch.zeros(shard.shape)
            shard.valid(local).copy_(whole[spec.tied_to or spec.name, kind][shard.slices()])
            expected = local.flatten()[fragment.start : fragment.start + fragment.numel]
            found = fragment.tensors[kind].detach()
            assert torch.equal(found.view(torch.int32), expected.view(torch.int32)), f"{case}: {kind} of {spec.name}"
            count += found.numel()
    return count
