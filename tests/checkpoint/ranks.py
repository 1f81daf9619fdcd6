"""What the ranks of the distributed tests do."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

import torch

from megapt import checkpoint
from megapt.checkpoint import choice
from megapt.errors import UserError
from megapt.mesh import ParallelMesh
from megapt.model.table import parameter_table
from tests.checkpoint.fakes import GPT2, LLAMA, Layout, check_loaded, fragments, meta_of, of_rank

LAYOUTS = (
    Layout(tp=2, dp=2, cut="flat", padding=4),
    Layout(tp=4, padding=8),
    Layout(tp=2, pp=2),
    Layout(pp=2, dp=2, cut="each"),
    Layout(dp=4, cut="whole"),
)


def every_layout_to_every_layout(rank: int, world: int, folder: str) -> int:
    count = 0
    meshes = {
        layout: ParallelMesh.create(layout.pp, layout.dp, layout.tp, torch.device("cpu"))
        for layout in LAYOUTS
    }
    for name, model in (("llama", LLAMA), ("gpt2", GPT2)):
        table = parameter_table(model)
        for step, saved in enumerate(LAYOUTS):
            mesh = meshes[saved]
            meta = {"model": name, "rank": mesh.rank, **meta_of(model)}
            path = checkpoint.save(Path(folder) / name, step, of_rank(model, saved, mesh), mesh, meta, table)
            for loaded, other in meshes.items():
                target = of_rank(model, loaded, other, fill=float("nan"))
                assert checkpoint.load(path, target, other, model) == meta | {"rank": 0}
                count += check_loaded(target)
    return count


def one_rank_cannot_write(rank: int, world: int, folder: str) -> list[str]:
    """The messages seen here: of a save in which rank 1's files may not grow, and of one onto a file."""
    layout = Layout(dp=2, cut="flat")
    mesh = ParallelMesh.create(1, 2, 1, torch.device("cpu"))
    table, messages = parameter_table(LLAMA), []

    def attempt(where: Path, step: int) -> None:
        try:
            checkpoint.save(where, step, of_rank(LLAMA, layout, mesh), mesh, meta_of(LLAMA), table)
        except UserError as error:
            messages.append(str(error))

    checkpoint.save(folder, 1, of_rank(LLAMA, layout, mesh), mesh, meta_of(LLAMA), table)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, limits[1]))
    attempt(Path(folder), 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    attempt(Path(folder) / "step-00000001" / "COMMITTED", 2)
    assert len(messages) == 2
    (path,) = checkpoint.committed(folder)
    target = of_rank(LLAMA, layout, mesh, fill=0.0)
    checkpoint.load(path, target, mesh, LLAMA)
    check_loaded(target)
    # One rank alone sees the damage; both must say so.
    target = [] if rank == 0 else fragments(LLAMA, layout, 0, 1, 0, fill=0.0)
    if rank == 0:
        for file in path.glob("*.safetensors"):
            data = bytearray(file.read_bytes())
            data[-1] ^= 1
            file.write_bytes(data)
    torch.distributed.barrier()
    try:
        checkpoint.load(path, target, mesh, LLAMA)
    except UserError as error:
        messages.append(str(error))
    return messages


def every_rank_has_its_own_folder(rank: int, world: int, folder: str) -> list[str]:
    """What `choose` says: rank 0's folder is `0`, rank 1's `1`, and rank 1 sees some things late or never."""
    mesh = ParallelMesh.create(1, 2, 1, torch.device("cpu"))
    choice.PATIENCE = 0.5
    own, marker = Path(folder) / str(rank), Path(folder) / "0" / "step-00000004" / "COMMITTED"
    really = choice.is_committed
    said = []

    def attempt(find: Callable[[], Path | None]) -> None:
        try:
            said.append(str(checkpoint.choose(mesh, find)))
        except checkpoint.AgreedError as error:
            said.append(str(error))

    attempt(lambda: checkpoint.find_latest(own))  # rank 1's folder does not exist
    if rank == 0:
        marker.parent.mkdir()
        marker.touch()
    else:
        looks = iter([False, False, True])
        choice.is_committed = lambda path: next(looks) and really(path)
    attempt(lambda: checkpoint.find_latest(own))
    if rank == 1:
        choice.is_committed = lambda path: False
    attempt(lambda: checkpoint.find_latest(own))
    attempt(lambda: checkpoint.find_latest(Path(folder) / ("nowhere" if rank == 0 else "0")))
    attempt(lambda: checkpoint.resolve("nowhere" if rank == 0 else folder))
    attempt(lambda: checkpoint.find_latest(Path(folder) / "nowhere"))
    return said
