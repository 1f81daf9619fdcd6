"""The traces of all ranks of a layout as one: whole activations and gradients, and who holds which part of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megapt.parameters import ParameterTable
from megapt.prove.compare import Table, located
from megapt.prove.probe import Seen, Trace
from megapt.prove.trainer import Piece

Place = tuple[int, int, int]
"""Coordinates pp, dp, tp."""


class View:
    """What a layout computed in a step."""

    def __init__(self, traces: Sequence[Trace], table: ParameterTable, betas: Sequence[float]) -> None:
        self.traces, self.parameters = traces, table
        self.activations: dict[tuple[str, bool], list[tuple[Place, Seen]]] = defaultdict(list)
        self.parts: dict[tuple[str, bool], list[tuple[Place, Seen]]] = defaultdict(list)
        for trace in traces:
            for seen in trace.seen:
                self.activations[seen.operation, seen.backward].append((trace.place, seen))
            for seen in trace.parts:
                self.parts[seen.operation, seen.backward].append((trace.place, seen))
        self.pieces: dict[tuple[str, str], list[tuple[Place, Piece]]] = defaultdict(list)
        for trace in traces:
            for piece in trace.report.pieces:
                self.pieces[piece.quantity, piece.name].append((trace.place, piece))
        self.norm = traces[0].report.numbers["norm", ""]
        self.tokens = sum(t.loss_tokens for t in traces if t.place[0] == 0 and t.place[2] == 0)
        self.beta = betas[0]

    def owned(self) -> Iterator[str]:
        """Names of all parameters, tied ones once, in the order in which a backward meets them."""
        return (name for name, spec in reversed(self.parameters.items()) if spec.tied_to is None)

    def activation(self, operation: str, backward: bool) -> Tensor:
        """Whole, [tokens, width]; for the loss, which is a sum, [1, 1]."""
        pieces = self.activations[operation, backward]
        if operation == "loss":
            return torch.stack([s.values.double() for place, s in pieces if place[2] == 0]).sum(0, keepdim=False)
        rows = max(s.rows[1] for _, s in pieces)
        whole = torch.full((rows, max(s.columns[1] for _, s in pieces)), float("nan"), dtype=torch.float64)
        for _, s in pieces:
            whole[slice(*s.rows), slice(*s.columns)] = s.values.double()
        return whole

    def local_sum(self, name: str) -> Tensor:
        """A parameter's gradient as the sum of what all ranks computed for it, tied copies included."""
        spec = self.parameters[name]
        whole = torch.zeros(spec.shape, dtype=torch.float64)
        holders = [name, *(other for other, row in self.parameters.items() if row.tied_to == name)]
        for trace in self.traces:
            for piece in trace.report.pieces:
                if piece.quantity == "local" and piece.name in holders:
                    if piece.shard.primary or piece.name in trace.partial:
                        positions, values = located(piece)
                        whole.view(-1)[positions] += values
        return whole

    def copies(self, quantity: str, name: str, summed: bool = True) -> dict[Place, Tensor]:
        """What each place (with dp 0) holds of a parameter, NaN elsewhere: the sum over dp, or of dp 0 alone."""
        found: dict[Place, Tensor] = {}
        for (pp, dp, tp), piece in self.pieces[quantity, name]:
            if dp and not summed:
                continue
            spec = self.parameters[name]
            if (pp, 0, tp) not in found:
                found[pp, 0, tp] = torch.full(spec.shape, float("nan"), dtype=torch.float64)
            positions, values = located(piece)
            flat = found[pp, 0, tp].view(-1)
            flat[positions] = torch.where(flat[positions].isnan(), values, flat[positions] + values)
        return found

    def state(self, quantity: str, name: str) -> Tensor:
        """A master or moment, whole."""
        whole = torch.full(self.parameters[name].shape, float("nan"), dtype=torch.float64)
        for _, piece in self.pieces[quantity, name]:
            positions, values = located(piece)
            whole.view(-1)[positions] = values
        return whole

    def applied(self, name: str) -> Tensor | None:
        """The gradient that AdamW was given, before clipping, as its first moment tells; None for other optimizers."""
        if ("exp_avg", name) not in self.pieces:
            return None
        return self.state("exp_avg", name) / (1 - self.beta) * self.traces[0].clipped_by

    def table(self) -> Table:
        """All that can be held against another layout, by (phase, operation)."""
        found: Table = {}
        for operation, backward in self.activations:
            if operation == "loss" and backward:
                found["backward", "loss"] = self.activations["loss", True][0][1].values.double()
            else:
                phase = "backward" if backward else "forward"
                found[phase, operation] = self.activation(operation, backward)
        for name in self.owned():
            found["local", name] = self.local_sum(name)
            # A place's own sum: where the reference has several, they agree.
            found["finalized", name] = _any(self.copies("finalized", name))
            applied = self.applied(name)
            if applied is not None:
                found["applied", name] = applied
            found["weight", name] = self.state("weight", name)
        found["norm", ""] = torch.tensor(self.norm, dtype=torch.float64)
        return found


def _any(copies: dict[Place, Tensor]) -> Tensor:
    whole = next(iter(copies.values())).clone()
    for other in copies.values():
        whole = torch.where(whole.isnan(), other, whole)
    return whole
