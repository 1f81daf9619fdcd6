"""Work that every rank does by itself and that counts only if it worked on all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from megapt.errors import UserError
from megapt.mesh import ParallelMesh, all_reduce

T = TypeVar("T")


class AgreedError(UserError):
    """Raised at the same place with the same message on every rank: one of them may say it for all."""


class Together:
    """Keeps a rank's first failure until all ranks agree on what happened.

    Between `run` and `agree` a rank that failed still takes part in every collective, so that no peer waits
    forever.
    """

    def __init__(self, mesh: ParallelMesh, what: str = "") -> None:
        self.mesh = mesh
        self.what = what
        self.error: Exception | None = None

    def run(self, work: Callable[[], T]) -> T | None:
        """Do local work; None if it fails now or if something failed before."""
        if self.error is not None:
            return None
        try:
            return work()
        except Exception as error:  # noqa: BLE001 (kept, and raised by agree)
            self.error = error
            return None

    def agree(self) -> None:
        """Collective. If any rank failed, every rank raises the same AgreedError, which names up to three.

        A rank whose failure is a defect raises that instead.
        """
        if self.error is not None and not isinstance(self.error, (UserError, OSError)):
            own: Exception | None = self.error  # a defect, not a condition: keep its type and traceback
        else:
            own = None
        text = None if self.error is None else str(self.error) or repr(self.error)
        message = text if self.mesh.world == 1 else self._collect(text)
        if own is not None:
            raise own
        if message is not None:
            raise AgreedError(self.what + message) from self.error

    def _collect(self, text: str | None) -> str | None:
        failed = torch.tensor([int(text is not None)], dtype=torch.int32, device=self.mesh.device)
        all_reduce(failed, dist.ReduceOp.MAX)
        if not failed.item():
            return None
        texts: list[str | None] = [None] * self.mesh.world
        dist.all_gather_object(texts, text)
        problems = [(rank, t) for rank, t in enumerate(texts) if t is not None]
        if len(problems) == self.mesh.world and len(set(texts)) == 1:
            return problems[0][1]
        shown = "; ".join(f"{self.mesh.describe(rank)}: {t}" for rank, t in problems[:3])
        return shown + (f"; and {len(problems) - 3} more ranks" if len(problems) > 3 else "")
