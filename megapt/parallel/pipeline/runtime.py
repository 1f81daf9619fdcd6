"""Executes a schedule: the actions of this rank in order, with asynchronous point-to-point transfers.

Receives are posted ahead of their use as the schedule says, sends never wait, and a compute action waits only for
its own input. Activations have one static shape, [T, hidden] with T this rank's tokens of a micro-batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megapt.batch import MicroBatch
from megapt.mesh import ParallelMesh
from megapt.parallel.pipeline.actions import Action, Channel, Kind, Placement
from megapt.parallel.pipeline.check import check
from megapt.parallel.pipeline.schedules import Schedule, schedule
from megapt.parallel.tensor import TensorParallel


@lru_cache(maxsize=16)
def checked_schedule(name: str, stages: int, chunks: int, micro_batches: int) -> Schedule:
    """A schedule, proven to be complete, matched and free of deadlock."""
    made = schedule(name, stages, chunks, micro_batches)
    check(made)
    return made


class Channels:
    """A communicator of two ranks for each channel, used in one direction only.

    Operations of one NCCL communicator run in the order in which they were queued, so a receive posted early would hold
    up every later transfer on it; on a channel's own communicator there is nothing else, and what the deadlock check
    assumes of channels holds. A communicator comes to life at its first transfer, for which both ranks must meet:
    that happens here, channel by channel in the same order on all ranks, and never in the middle of a step.

    Collective over the world: torch names groups by how many were made, so all ranks make those of all pipelines.
    """

    def __init__(self, mesh: ParallelMesh, placement: Placement) -> None:
        self.axis = mesh.pp
        self._groups: dict[Channel, dist.ProcessGroup] = {}
        self._sends: list[tuple[dist.Work, Tensor]] = []
        columns = mesh.dp.size * mesh.tp.size
        for channel, column in itertools.product(placement.channels(), range(columns)):
            ends = [stage * columns + column for stage in (channel.source, channel.destination)]
            group = dist.new_group(ends)
            if mesh.rank in ends:
                self._groups[channel] = group
        for channel in self._groups:
            token = torch.zeros(1, device=mesh.device)
            if self.axis.rank == channel.source:
                self.send(channel, token)
                self.flush()
            else:
                self.receive(channel, token).wait()

    def send(self, channel: Channel, tensor: Tensor) -> None:
        work = dist.isend(tensor, self.axis.global_rank(channel.destination), group=self._groups[channel])
        assert work is not None
        self._sends = [(w, t) for w, t in self._sends if not w.is_completed()]
        self._sends.append((work, tensor))

    def receive(self, channel: Channel, buffer: Tensor) -> dist.Work:
        work = dist.irecv(buffer, self.axis.global_rank(channel.source), group=self._groups[channel])
        assert work is not None
        return work

    def flush(self) -> None:
        """Wait until everything sent has left."""
        for work, _ in self._sends:
            work.wait()
        self._sends.clear()


class Pipeline:
    """This rank's part of the pipeline: its chunks, driven by a schedule's actions."""

    def __init__(
        self,
        chunks: nn.ModuleList,
        mesh: ParallelMesh,
        tp: TensorParallel,
        schedule: str,
        hidden: int,
        dtype: torch.dtype,
    ) -> None:
        self.chunks, self.mesh, self.tp = chunks, mesh, tp
        self.schedule, self.hidden, self.dtype = schedule, hidden, dtype
        self.placement = Placement(mesh.pp.size, len(chunks))
        self.channels = Channels(mesh, self.placement)
        self.is_last = mesh.pp.rank == mesh.pp.size - 1

    def train(self, batches: Sequence[MicroBatch], scale: float) -> Tensor:
        """Forward and backward of all micro-batches; gradients are those of scale x (sum of the losses).

        Returns the sum of the losses over this rank's micro-batches: a scalar on the device, zero except on the
        last stage.
        """
        made = checked_schedule(self.schedule, self.mesh.pp.size, len(self.chunks), len(batches))
        return _Run(self, made, batches, scale).execute()

    @torch.no_grad()
    def evaluate(self, batches: Sequence[MicroBatch]) -> Tensor:
        """The sum of the losses without a backward; zero except on the last stage."""
        made = checked_schedule("forward", self.mesh.pp.size, len(self.chunks), len(batches))
        return _Run(self, made, batches, 1.0).execute()

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor | None:
        """Logits [B, S, vocabulary] of tokens [B, S] on the last stage, None elsewhere."""
        made = checked_schedule("forward", self.mesh.pp.size, len(self.chunks), 1)
        run = _Run(self, made, [MicroBatch(tokens, None)], 1.0)
        run.execute()
        return None if run.logits is None else run.logits.view(*tokens.shape, -1)


class _Run:
    """One pass over a schedule's actions: what is on its way, and what waits for its backward."""

    def __init__(
        self, pipeline: Pipeline, made: Schedule, batches: Sequence[MicroBatch], scale: float
    ) -> None:
        self.pipeline, self.made, self.batches, self.scale = pipeline, made, batches, scale
        self.rank = pipeline.mesh.pp.rank
        self.total = torch.zeros((), dtype=torch.float64, device=pipeline.mesh.device)
        self.logits: Tensor | None = None
        # All keyed by the compute action that they belong to.
        self.arriving: dict[Action, tuple[dist.Work, Tensor]] = {}
        self.leaving: dict[Action, Tensor] = {}
        self.pending: dict[Action, tuple[Tensor | None, Tensor]] = {}

    def execute(self) -> Tensor:
        for action in self.made.actions[self.rank]:
            if action.kind.is_recv:
                self._receive(action)
            elif action.kind.is_send:
                self._send(action)
            elif action.kind is Kind.FORWARD:
                self._forward(action)
            else:
                self._backward(action)
        self.pipeline.channels.flush()
        return self.total

    def _receive(self, action: Action) -> None:
        message = self.made.placement.message(self.rank, action)
        assert message is not None
        pipeline, tokens = self.pipeline, self.batches[action.micro_batch].tokens
        shape = pipeline.tp.local_tokens(tokens.flatten()).shape
        buffer = torch.empty(*shape, pipeline.hidden, dtype=pipeline.dtype, device=pipeline.mesh.device)
        self.arriving[action] = (pipeline.channels.receive(message.channel, buffer), buffer)

    def _send(self, action: Action) -> None:
        message = self.made.placement.message(self.rank, action)
        assert message is not None
        self.pipeline.channels.send(message.channel, self.leaving.pop(action))

    def _input(self, action: Action) -> Tensor | None:
        """What the compute action needs from its neighbour, once it has arrived; None at an end of the model."""
        if self.made.placement.source(self.rank, action) is None:
            return None
        work, buffer = self.arriving.pop(action.recv())
        work.wait()
        return buffer

    def _forward(self, action: Action) -> None:
        batch = self.batches[action.micro_batch]
        received = self._input(action)
        if received is not None and self.made.has_backward:
            received.requires_grad_()
        chunk = self.pipeline.chunks[action.chunk]
        output = chunk(received, batch)
        if chunk.last and batch.labels is None:
            self.logits = output
        elif chunk.last:
            self.total += output.detach()
        else:
            self.leaving[action.send()] = output.detach()
        if self.made.has_backward:
            self.pending[action] = (received, output * self.scale if chunk.last else output)

    def _backward(self, action: Action) -> None:
        gradient = self._input(action)
        forward = Action(Kind.FORWARD, action.micro_batch, action.chunk)
        received, output = self.pending.pop(forward)
        torch.autograd.backward(output, gradient)
        if received is not None:
            assert received.grad is not None
            self.leaving[action.send()] = received.grad
