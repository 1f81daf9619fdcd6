"""One checkpoint for all ranks: each would find its own, and file systems show new folders late to some machines."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megapt.checkpoint.folders import is_committed
from megapt.checkpoint.together import Together
from megapt.errors import UserError
from megapt.mesh import ParallelMesh

PATIENCE = 5.0  # seconds until a rank must see what rank 0 sees
_AGAIN = 0.1


def choose(mesh: ParallelMesh, find: Callable[[], Path | None]) -> Path | None:
    """Collective: the committed checkpoint that `find` names on rank 0, None if there is none.

    Raises AgreedError where `find` fails, where a rank does not see the checkpoint committed within `PATIENCE`
    seconds, and where rank 0 finds none but another rank does: no rank starts afresh beside a checkpoint.
    """
    together = Together(mesh)
    leader = mesh.rank == 0
    chosen = together.run(find) if leader else None
    together.agree()
    if mesh.world == 1:
        return chosen
    name: list[Any] = [None if chosen is None else str(chosen)]
    dist.broadcast_object_list(name, src=0, device=mesh.device)
    path = None if name[0] is None else Path(name[0])
    if path is not None:
        together.run(functools.partial(_check_seen, path))
    elif not leader:
        together.run(lambda: _check_none(find()))
    together.agree()
    return path


def _check_seen(path: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not is_committed(path):
        if time.monotonic() > deadline:
            raise UserError(
                f"{path}, chosen by rank 0, is not seen committed here after {PATIENCE:g} s; checkpoints must lie on "
                "a file system that all ranks share"
            )
        time.sleep(_AGAIN)


def _check_none(found: Path | None) -> None:
    if found is not None:
        raise UserError(
            f"{found} is seen here, but rank 0 sees no checkpoint; checkpoints must lie on a file system that all "
            "ranks share"
        )
