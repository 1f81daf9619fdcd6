"""What a step computes on: micro-batches, and where documents lie in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch
    from torch import Tensor

IGNORE = -100  # label of a token without loss


@dataclass(frozen=True)
class Documents:
    """Where documents lie in the T = B x S tokens of a micro-batch, rows one after the other.

    Attention stays inside a document and positions restart with each one. No document reaches over the end of a row.

    lengths: tokens of each document, in order, on the host; they sum to T. cu_seqlens: int32 [documents + 1], their
    running sum from 0 to T. positions: int64 [T], each token's place in its document.
    """

    lengths: tuple[int, ...]
    cu_seqlens: Tensor
    positions: Tensor


@dataclass(frozen=True)
class MicroBatch:
    """tokens: int64 [B, S]. labels: int64 [B, S], what the model should answer at each token, IGNORE where there is no
    loss; None where logits are wanted instead. documents: None where a row is one document."""

    tokens: Tensor
    labels: Tensor | None
    documents: Documents | None = None

    def to(self, device: torch.device) -> MicroBatch:
        """On `device`, without waiting for the copies."""
        if device.type == "cpu":
            return self
        documents = self.documents
        if documents is not None:
            documents = Documents(
                documents.lengths,
                documents.cu_seqlens.to(device, non_blocking=True),
                documents.positions.to(device, non_blocking=True),
            )
        labels = None if self.labels is None else self.labels.to(device, non_blocking=True)
        return MicroBatch(self.tokens.to(device, non_blocking=True), labels, documents)


@dataclass(frozen=True)
class StepBatch:
    """This rank's micro-batches of one step, with the ids [global batch] and the number of labels with loss of the
    WHOLE global batch, over all data-parallel ranks: the divisor of the summed loss."""

    micro_batches: list[MicroBatch]
    sample_ids: npt.NDArray[np.integer[Any]]
    loss_tokens: int
