"""What the ranks of the tests of saving in the background do."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path

import torch

from megapt import checkpoint
from megapt.checkpoint import Saver
from megapt.checkpoint import plan as planning
from megapt.errors import UserError
from megapt.mesh import ParallelMesh
from megapt.model.table import parameter_table
from megapt.zero.base import Fragment
from tests.checkpoint.fakes import LLAMA, Layout, check_loaded, meta_of, of_rank

LAYOUTS = (
    Layout(tp=2, dp=2, cut="flat", padding=4),
    Layout(pp=2, dp=2, cut="each"),
    Layout(dp=4, cut="flat", dtype=torch.float64),
)


def train(fragments: list[Fragment]) -> None:
    """Nothing is left of what was."""
    for fragment in fragments:
        for tensor in fragment.tensors.values():
            tensor.fill_(float("nan"))


def check(path: Path, layout: Layout, mesh: ParallelMesh) -> None:
    target = of_rank(LLAMA, layout, mesh, fill=0.0)
    checkpoint.load(path, target, mesh, LLAMA)
    check_loaded(target)


def both_ways(rank: int, world: int, folder: str, piece_bytes: int) -> None:
    """Each layout saves in the foreground and in the background; training changes everything meanwhile. The second
    save has to wait for the first, and nothing is left beside the two checkpoints."""
    planning.PIECE_BYTES = piece_bytes
    table = parameter_table(LLAMA)
    for number, layout in enumerate(LAYOUTS):
        mesh = ParallelMesh.create(layout.pp, layout.dp, layout.tp, torch.device("cpu"))
        foreground, background = Path(folder) / f"{number}-foreground", Path(folder) / f"{number}-background"
        saver = Saver(mesh, table)
        saved = saver.save(foreground, 1, of_rank(LLAMA, layout, mesh), meta_of(LLAMA))
        assert saved is not None and saved.path == foreground / "step-00000001" and saved.stall == saved.write
        saver.reserve(of_rank(LLAMA, layout, mesh))
        for step in (1, 2):
            own = of_rank(LLAMA, layout, mesh)
            assert saver.save(background, step, own, meta_of(LLAMA), background=True) is None
            train(own)
        assert saver.writing_to == background and len(checkpoint.committed(background)) >= 1
        saved = saver.finish()
        assert (saved is None) == (rank > 0) and saver.finish() is None and saver.writing_to is None
        if saved is not None:
            assert saved.background and saved.path == background / "step-00000002" and saved.stall < 60
            assert saved.nbytes == sum(3 * spec.numel for spec in table.values()) * layout.dtype.itemsize
        saver.close()
        torch.distributed.barrier()
        for step in (1, 2):
            check(background / f"step-{step:08d}", layout, mesh)


def failing(rank: int, world: int, folder: str) -> list[str]:
    """What rank 1's writer does wrong, save after save, and what everyone says to it."""
    layout = Layout(dp=2, cut="flat")
    mesh = ParallelMesh.create(1, 2, 1, torch.device("cpu"))
    saver, said = Saver(mesh, parameter_table(LLAMA)), []

    def attempt(step: int) -> None:
        saver.save(folder, step, of_rank(LLAMA, layout, mesh), meta_of(LLAMA), background=True)

    def settle() -> None:
        torch.distributed.barrier()
        if rank == 1:
            while saver.failure is None:
                saver.hear()
        elif saver.failure is not None:
            said.append("rank 0 has heard of what only rank 1 can know")
        try:
            saver.finish()
        except UserError as error:
            said.append(str(error))
        assert [path.name for path in checkpoint.committed(folder)] == ["step-00000001"]

    attempt(1)
    saver.finish()
    if rank == 1:
        os.kill(_writer(saver), signal.SIGSTOP)
    attempt(2)
    if rank == 1:
        os.kill(_writer(saver), signal.SIGKILL)
    settle()
    saver.reserve(of_rank(LLAMA, layout, mesh))
    if rank == 1:
        resource.prlimit(_writer(saver), resource.RLIMIT_FSIZE, (6000, 6000))
    attempt(3)
    settle()
    if rank == 1:
        os.kill(_writer(saver), signal.SIGKILL)  # between two saves: the next one gets another
    attempt(4)
    saver.finish()
    saver.close()
    torch.distributed.barrier()
    check(Path(folder) / "step-00000004", layout, mesh)
    return said


def _writer(saver: Saver) -> int:
    assert saver._writer is not None
    return saver._writer.pid
