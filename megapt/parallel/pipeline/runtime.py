"""Executes a schedule: the actions of this rank in order, with asynchronous point-to-point transfers.

Receives are posted ahead of their use as the schedule says, sends overlap with what follows, and a compute action
waits only for its own input. Activations have one static shape, [T, hidden] with T this rank's tokens of a
micro-batch. On a GPU the host waits for nothing within a step.
"""

from __future__ import annotations

import itertools
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from time import perf_counter

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megapt.batch import MicroBatch
from megapt.mesh import ParallelMesh, receive, send
from megapt.operations import OPERATIONS, Issued
from megapt.parallel.pipeline.actions import Action, Channel, Direction, Kind, Message, Placement
from megapt.parallel.pipeline.check import check, resolve
from megapt.parallel.pipeline.schedules import forward_schedule, placement, schedule
from megapt.parallel.pipeline.timeline import Span, Timeline
from megapt.parallel.tensor import TensorParallel
from megapt.parallel.weight_gradients import Queue, compute

# Tensors of one channel on their way at once: a rank that runs ahead must not pile up what it has made.
_OUTSTANDING = 2


@dataclass(frozen=True)
class Item:
    """An action of one rank, and what is known of it before the step.

    message: what a send or receive moves, or a compute action waits for; text: its place in the list, in words;
    content: what a send or receive moves, in the words of both its ends.
    """

    action: Action
    message: Message | None
    text: str
    content: str


@lru_cache(maxsize=16)
def checked(name: str, where: Placement, micro_batches: int, rank: int) -> list[Item]:
    """One rank's list of a schedule that was proven to be complete, matched and free of deadlock."""
    if name == "forward":
        made = forward_schedule(where, micro_batches)
    else:
        made = schedule(name, where.stages, where.chunks, micro_batches)
    check(made, _OUTSTANDING)
    actions = made.actions[rank]
    return [
        Item(action, message, _words(action, number, len(actions)), _content(message))
        for number, (action, message) in enumerate(zip(actions, resolve(made)[rank], strict=True), 1)
    ]


_DOES = {
    Kind.FORWARD: "forward",
    Kind.BACKWARD: "backward",
    Kind.BACKWARD_INPUT: "backward (input)",
    Kind.BACKWARD_WEIGHT: "backward (weights)",
    Kind.SEND_FORWARD: "send of the activation",
    Kind.RECV_FORWARD: "receive of the activation",
    Kind.SEND_BACKWARD: "send of the gradient",
    Kind.RECV_BACKWARD: "receive of the gradient",
}


def _words(action: Action, number: int, count: int) -> str:
    what = f"{_DOES[action.kind]} of micro-batch {action.micro_batch}, chunk {action.chunk}"
    return f"{what} ({action}, action {number} of {count})"


def _content(message: Message | None) -> str:
    if message is None:
        return ""
    kind = "activation" if message.channel.direction is Direction.FORWARD else "gradient"
    return f"{kind} of micro-batch {message.micro_batch} for stage {message.virtual}"


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
        self._sends: dict[Channel, deque[tuple[Issued, Tensor]]] = defaultdict(deque)
        columns = mesh.dp.size * mesh.tp.size
        for channel, column in itertools.product(placement.channels(), range(columns)):
            ends = [stage * columns + column for stage in (channel.source, channel.destination)]
            group = dist.new_group(ends)
            if mesh.rank in ends:
                self._groups[channel] = group
                OPERATIONS.name(group, f"channel {channel}, ranks")
        for channel in self._groups:
            token = torch.zeros(1, device=mesh.device)
            if self.axis.rank == channel.source:
                self.send(channel, token, "first message")
                self.flush()
            else:
                self.receive(channel, token, "first message").wait()

    def send(self, channel: Channel, tensor: Tensor, content: str) -> None:
        """Returns at once, unless earlier tensors of the channel are still on their way: on a GPU the stream waits."""
        on_their_way = self._sends[channel]
        while len(on_their_way) >= _OUTSTANDING:
            on_their_way.popleft()[0].wait()
        sent = send(tensor, self.axis.global_rank(channel.destination), self._groups[channel], content)
        on_their_way.append((sent, tensor))

    def receive(self, channel: Channel, buffer: Tensor, content: str) -> Issued:
        return receive(buffer, self.axis.global_rank(channel.source), self._groups[channel], content)

    def flush(self) -> None:
        """Wait until everything sent has left."""
        for on_their_way in self._sends.values():
            while on_their_way:
                on_their_way.popleft()[0].wait()


class Pipeline:
    """This rank's part of the pipeline: its chunks, driven by a schedule's actions.

    last_rank: the pipeline rank that holds the end of the model, with the loss and the logits. spans: of the step that
    was recorded last. Collective over the world.
    """

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
        self.placement = placement(schedule, mesh.pp.size, len(chunks))
        self.channels = Channels(mesh, self.placement)
        self.last_rank = self.placement.rank(self.placement.virtual_stages - 1)
        self.spans: list[Span] = []

    def train(self, batches: Sequence[MicroBatch], scale: float | Tensor, record: bool = False) -> Tensor:
        """Forward and backward of all micro-batches; gradients are those of scale x (sum of the losses).

        scale: a number, or a scalar on the device. With `record`, `timeline()` can be asked for afterwards.
        Returns the sum of the losses over this rank's micro-batches: a scalar on the device, zero except on
        `last_rank`.
        """
        OPERATIONS.begin("training step")
        items = checked(self.schedule, self.placement, len(batches), self.mesh.pp.rank)
        if record and self.mesh.pp.size > 1:
            dist.barrier(group=self.mesh.pp.group)  # so that the ranks' clocks start together
        clock = _Clock(self.mesh.device) if record else None
        total = _Run(self, items, batches, scale, clock).execute()
        if clock is not None:
            self.spans = clock.spans()
        return total

    @torch.no_grad()
    def evaluate(self, batches: Sequence[MicroBatch]) -> Tensor:
        """The sum of the losses without a backward; zero except on `last_rank`."""
        OPERATIONS.begin("evaluation")
        items = checked("forward", self.placement, len(batches), self.mesh.pp.rank)
        return _Run(self, items, batches, None).execute()

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor | None:
        """Logits [B, S, vocabulary] of tokens [B, S] on `last_rank`, None elsewhere."""
        OPERATIONS.begin("generation")
        items = checked("forward", self.placement, 1, self.mesh.pp.rank)
        run = _Run(self, items, [MicroBatch(tokens, None)], None)
        run.execute()
        return None if run.logits is None else run.logits.view(*tokens.shape, -1)

    def timeline(self) -> Timeline | None:
        """What the ranks of this pipeline computed when in the recorded step, on its first rank; None on the others.

        Seconds count from the step's start, for which the ranks waited for each other. Collective over the pipeline.
        """
        if self.mesh.pp.size == 1:
            return Timeline([self.spans])
        mine = [(str(action), start, end) for action, start, end in self.spans]
        every: list[list[tuple[str, float, float]]] | None = None
        if self.mesh.pp.rank == 0:
            every = [[] for _ in range(self.mesh.pp.size)]
        dist.gather_object(mine, every, self.mesh.pp.global_rank(0), group=self.mesh.pp.group)
        if every is None:
            return None
        return Timeline([[Span(Action.parse(a), start, end) for a, start, end in spans] for spans in every])


class _Clock:
    """Times compute actions: by the host's clock, or on a GPU by events that are read after the step."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._origin = self._now()
        self._marks: list[tuple[Action, float | torch.cuda.Event, float | torch.cuda.Event]] = []

    @contextmanager
    def measure(self, action: Action) -> Iterator[None]:
        start = self._now()
        yield
        self._marks.append((action, start, self._now()))

    def spans(self) -> list[Span]:
        """In seconds from when the clock was made; waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return [Span(action, self._since(start), self._since(end)) for action, start, end in self._marks]

    def _now(self) -> float | torch.cuda.Event:
        if self.device.type != "cuda":
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _since(self, mark: float | torch.cuda.Event) -> float:
        if isinstance(mark, float):
            assert isinstance(self._origin, float)
            return mark - self._origin
        assert isinstance(self._origin, torch.cuda.Event)
        return self._origin.elapsed_time(mark) / 1e3


@dataclass(frozen=True)
class _Pending:
    """A forward that waits for its backward: its input, where it has one, and the end of its graph.

    Of its output only the graph is kept. The data goes as soon as it was sent: the backward does not need it.
    """

    received: Tensor | None
    output: GradientEdge


class _Run:
    """One pass over a rank's actions: what is on its way, and what waits for its backward.

    scale: None where nothing is trained.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        items: list[Item],
        batches: Sequence[MicroBatch],
        scale: float | Tensor | None,
        clock: _Clock | None = None,
    ) -> None:
        self.pipeline, self.items, self.batches, self.scale, self.clock = pipeline, items, batches, scale, clock
        self.rank = pipeline.mesh.pp.rank
        self.total = torch.zeros((), dtype=torch.float64, device=pipeline.mesh.device)
        self.logits: Tensor | None = None
        # Keyed by the receive that brings a tensor, the send that takes it away, or the forward that waits.
        self.arriving: dict[Action, tuple[Issued | None, Tensor]] = {}
        self.leaving: dict[Action, Tensor] = {}
        self.pending: dict[Action, _Pending] = {}
        self.weights: dict[Action, Queue] = {}

    def execute(self) -> Tensor:
        pipeline = self.pipeline
        for item in self.items:
            action, OPERATIONS.action = item.action, item.text
            if action.kind.is_recv:
                self._receive(item)
            elif action.kind.is_send:
                assert item.message is not None
                pipeline.channels.send(item.message.channel, self.leaving.pop(action), item.content)
            else:
                self._compute(action)
        OPERATIONS.action = "end of the pipeline's actions"
        pipeline.channels.flush()
        return self.total

    def _receive(self, item: Item) -> None:
        assert item.message is not None
        pipeline, tokens = self.pipeline, self.batches[item.action.micro_batch].tokens
        count = tokens.numel() // (pipeline.tp.axis.size if pipeline.tp.sequence else 1)
        buffer = torch.empty(count, pipeline.hidden, dtype=pipeline.dtype, device=pipeline.mesh.device)
        self.arriving[item.action] = pipeline.channels.receive(item.message.channel, buffer, item.content), buffer

    def _compute(self, action: Action) -> None:
        given = self._input(action)
        if self.clock is None:
            self._dispatch(action, given)
            return
        with self.clock.measure(action):
            self._dispatch(action, given)

    def _dispatch(self, action: Action, given: Tensor | None) -> None:
        if action.kind is Kind.FORWARD:
            self._forward(action, given)
        elif action.kind is Kind.BACKWARD:
            self._backward(action, given)
        elif action.kind is Kind.BACKWARD_INPUT:
            with self.pipeline.tp.weight_gradients.deferring() as queue:
                self._backward(action, given)
            self.weights[action] = queue
        else:
            compute(self.weights.pop(Action(Kind.BACKWARD_INPUT, action.micro_batch, action.chunk)))

    def _input(self, action: Action) -> Tensor | None:
        """What the compute action needs from its neighbour, once it has arrived; None at an end of the model."""
        if self.pipeline.placement.source(self.rank, action) is None:
            return None
        work, tensor = self.arriving.pop(action.recv())
        if work is not None:
            work.wait()
        return tensor

    def _output(self, action: Action, tensor: Tensor) -> None:
        """What the compute action gives its neighbour: to be sent, or handed over to another chunk of this rank."""
        where = self.pipeline.placement
        target = (where.next if action.kind is Kind.FORWARD else where.previous)(self.rank, action.chunk)
        assert target is not None
        if target[0] == self.rank:
            self.arriving[Action(action.recv().kind, action.micro_batch, target[1])] = (None, tensor)
        else:
            self.leaving[action.send()] = tensor

    def _forward(self, action: Action, received: Tensor | None) -> None:
        batch = self.batches[action.micro_batch]
        if received is not None and self.scale is not None:
            received.requires_grad_()
        chunk = self.pipeline.chunks[action.chunk]
        output = chunk(received, batch)
        if chunk.last and batch.labels is None:
            self.logits = output
        elif chunk.last:
            self.total += output.detach()
        else:
            self._output(action, output.detach())
        if self.scale is not None:
            self.pending[action] = _Pending(received, get_gradient_edge(output))

    def _backward(self, action: Action, gradient: Tensor | None) -> None:
        pending = self.pending.pop(Action(Kind.FORWARD, action.micro_batch, action.chunk))
        if gradient is None:
            gradient = self._scale()
        torch.autograd.backward(pending.output, gradient)
        if pending.received is not None:
            assert pending.received.grad is not None
            self._output(action, pending.received.grad)

    def _scale(self) -> Tensor:
        """The gradient of what is trained by a micro-batch's loss, in the loss's precision."""
        wide = torch.promote_types(self.pipeline.dtype, torch.float32)
        if isinstance(self.scale, Tensor):
            return self.scale.to(wide)
        assert self.scale is not None
        return torch.full((), self.scale, dtype=wide, device=self.pipeline.mesh.device)
