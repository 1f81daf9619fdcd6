"""What a layer, the embedding and the head allocate and free as they run, and the most of it at a time.

Each pass is written down as the model's code carries it out: what it makes and what it frees, in its order. A tensor
rank's bytes of one micro-batch; parts of a pass that keep nothing for a backward are left out where they are small.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from megapt.config import Config, ModelConfig
from megapt.model.recompute import Policy
from megapt.model.table import parameter_table
from megapt.parallel.pipeline.stages import DTYPES
from megapt_kernels.blocks import _ELEMENTS
from megapt_kernels.blockwise import _ELEMENTS as _SCORES
from megapt_kernels.blockwise import _QUERIES
from megapt_kernels.cross_entropy import block_tokens

_ACTIVATIONS, _DEFERRED, _GATHERS, _LOSS, _WORKING = ITEMS = ("activations", "deferred", "gathers", "loss", "working")
"""What a pass holds: what forwards keep, what waits for weights' gradients, whole sequences gathered from tensor ranks,
the loss's buffers and gradients, and everything else."""


@dataclass(frozen=True)
class Place:
    """Where and how a layer runs. width: bytes of a weight; tokens: of a micro-batch."""

    model: ModelConfig
    tensor: int
    sequence: bool
    tokens: int
    precision: str
    cpu: bool
    vocabulary_multiple: int
    sequence_length: int

    @staticmethod
    def of(config: Config, cpu: bool) -> Place:
        parallel, batch = config.parallel, config.batch
        tensor, multiple = parallel.tensor, parallel.vocabulary_multiple
        sequence = parallel.sequence_parallel and tensor > 1
        tokens = batch.micro * batch.sequence
        return Place(config.model, tensor, sequence, tokens, config.precision, cpu, multiple, batch.sequence)

    @property
    def stream(self) -> int:
        """Bytes of a tensor between tensor-parallel regions, such as the residual stream."""
        between = self.tensor if self.sequence else 1
        return self.tokens // between * self.model.hidden * DTYPES[self.precision].itemsize


class Tape:
    """Bytes in use by item as a pass goes on, from what was there before, and those of the moment with the most."""

    def __init__(self) -> None:
        self.items: Counter[str] = Counter()
        self.now = self.peak = 0
        self.at_peak: Counter[str] = Counter()

    def make(self, *sizes: int, item: str = _WORKING) -> None:
        for size in sizes:
            self.items[item] += size
            self.now += size
            if self.now > self.peak:
                self.peak, self.at_peak = self.now, self.items.copy()

    def free(self, *sizes: int, item: str = _WORKING) -> None:
        self.items[item] -= sum(sizes)
        self.now -= sum(sizes)

    def move(self, size: int, item: str) -> None:
        """What was working memory is `item` from now on."""
        self.items[_WORKING] -= size
        self.items[item] += size

    def pass_by(self, *sizes: int, item: str = _WORKING) -> None:
        """Made, and freed at once."""
        self.make(*sizes, item=item)
        self.free(*sizes, item=item)


class Layer:
    """The passes of one layer. kept items count as `activations`, gathered tokens as `gathers`, else as `working`."""

    def __init__(self, place: Place) -> None:
        model, tensor = place.model, place.tensor
        self.place, self.model = place, model
        self.width = DTYPES[place.precision].itemsize
        self.wide = max(self.width, 4)
        tokens, width = place.tokens, self.width
        self.stream = place.stream
        self.gathered = tokens * model.hidden * width if place.sequence else 0
        self.out = tokens * model.hidden * width  # of a row-parallel product, before it is scattered
        heads, kv_heads = model.heads // tensor, max(1, model.num_kv_heads // tensor)
        self.grouped = heads != kv_heads
        self.queries, self.keys = (tokens * n * model.head_width * width for n in (heads, kv_heads))
        self.projection = self.queries + 2 * self.keys
        self.sums = tokens * heads * self.wide  # logs of the softmax's denominators
        inner = model.ffn // tensor
        self.down = tokens * inner * width
        self.up = (2 if model.gated else 1) * self.down
        rows = (heads + 2 * kv_heads) * model.head_width
        # Gradients of weights as autograd gives them.
        self.qkv_weight = rows * model.hidden * width
        self.out_weight = model.hidden * heads * model.head_width * width
        self.up_weight = (2 if model.gated else 1) * inner * model.hidden * width
        self.down_weight = inner * model.hidden * width
        per_token = self.wide if model.norm == "rms_norm" else 2 * (width if place.cpu else self.wide)
        self.statistics = per_token * self.stream // (model.hidden * width)
        self.rotary = model.position == "rope"
        # Without a flash kernel; a GPU has one for windows, in 16 bits.
        windowed = model.window is not None and model.window < place.sequence_length
        self.blockwise = model.attention_softcap is not None or windowed and not place.cpu and width > 2
        self.qk_statistics = tokens * (heads + kv_heads) * self.wide

    def block(self, size: int) -> int:
        """Of a tensor of `size` bytes, those that a chain of cheap operations works on at a time."""
        return min(size, _ELEMENTS * self.width) if self.place.cpu else size

    def _norm_block(self, backward: bool) -> int:
        """What a norm works in beside its result."""
        own = self.model.norm == "rms_norm" and (self.place.cpu or self.model.norm_offset)
        if not own:
            return 0
        casts = (2 if backward else 1) * (self.width < self.wide)
        return self.block(self.stream) // self.width * self.wide * (1 + casts)

    def _turn_block(self, size: int) -> int:
        """What turning queries or keys works in: their numbers in full precision, and the product with one angle."""
        return self.block(size) // self.width * self.wide * (2 * (self.width < self.wide) + 1) // 2

    def forward(self, tape: Tape, policy: Policy) -> None:
        """From the input, which is there, to the result; what is kept, the result too, are `activations`.

        With `full` nothing but the result is left.
        """
        model, stream = self.model, self.stream
        before, after = model.norm_placement != "after", model.norm_placement != "before"
        kept = _ACTIVATIONS if policy == "none" else _WORKING
        graph = _WORKING if policy == "full" else _ACTIVATIONS
        self._column(tape, before, kept, graph, self.projection, graph if policy == "selective" else _WORKING)
        self.core(tape, policy)
        if policy == "none":
            tape.move(self.core_kept(), _ACTIVATIONS)
            tape.free(self.core_made(policy) + self.projection - self.core_kept())
        else:
            tape.free(self.core_made(policy) - self.queries)
            if policy == "full":
                tape.free(self.projection)
        self._row(tape)
        if policy != "none":
            tape.free(self.queries)
        self._norm_after(tape, after, graph)
        tape.make(stream, item=_WORKING if model.parallel_residual else graph)
        self._column(tape, before, kept, graph, self.up, graph)
        if before and policy != "none":
            tape.free(stream)  # what the first norm made, which lives until the second has
        tape.make(self.down, item=kept)
        tape.pass_by(self.block(self.down) if model.gated else 0)
        if policy == "full":
            tape.free(self.up)
        self._row(tape)
        if policy != "none":
            tape.free(self.down)
        self._norm_after(tape, after, graph)
        tape.make(stream, item=_ACTIVATIONS)
        tape.free(2 * stream)  # what attention and MLP gave
        tape.free(stream if before and policy != "none" else 0)
        if policy == "full" or model.parallel_residual:
            tape.free(stream)

    def _column(self, tape: Tape, norm: bool, kept: str, graph: str, size: int, item: str) -> None:
        """A norm and the projection behind it."""
        if norm:
            tape.make(self.stream, item=kept)
            if graph == _ACTIVATIONS:
                tape.make(self.statistics, item=graph)
            tape.pass_by(self._norm_block(backward=False))
        tape.make(self.gathered, item=_GATHERS)
        tape.make(size, item=item)
        tape.free(self.gathered, item=_GATHERS)

    def _row(self, tape: Tape) -> None:
        tape.make(self.out)
        if self.gathered:
            tape.make(self.stream)
            tape.free(self.out)
        tape.pass_by(self.stream if self.model.bias == "all" else 0)

    def _norm_after(self, tape: Tape, there: bool, graph: str) -> None:
        if there:
            tape.make(self.stream)
            tape.pass_by(self._norm_block(backward=False))
            tape.free(self.stream)
            if graph == _ACTIVATIONS:
                tape.make(self.stream, self.statistics, item=graph)

    # The attention core, from the projection (which is there) to the weighted values.

    def _turned(self, policy: Policy) -> int:
        """Bytes beside the projection with queries and keys turned: on a GPU they are turned where they are, unless the
        backward starts from them as they were."""
        copied = self.place.cpu or (policy == "selective" and self.model.qk_norm == "none")
        return self.projection if self.rotary and copied else 0

    def core(self, tape: Tape, policy: Policy) -> None:
        if self.model.qk_norm != "none":
            tape.make(self.projection, self.qk_statistics)
        if self.rotary:
            tape.make(self._turned(policy))
            tape.pass_by(self._turn_block(self.queries if self.place.cpu else self.queries + self.keys))
        if self.blockwise:
            block, operands, _ = self._blocks()
            # Probabilities, and as operands of the product; the result by pairs of queries and keys.
            tape.pass_by(block, block * self.width // self.wide, operands, self.queries, self.sums)
        tape.make(self._repeated(), self.queries, self.sums)

    def _blocks(self) -> tuple[int, int, int]:
        """Of attention block by block: the scores of one in full precision; queries, keys and values to multiply with;
        their gradients in full precision."""
        model, gpu, length = self.model, not self.place.cpu, self.place.sequence_length
        queries = min(_QUERIES[gpu], length)
        group = self.queries // self.keys
        seen = min(length, (model.window or length) + queries - 1)
        pairs = self.place.tokens // length * self.keys // (self.place.tokens * model.head_width * self.width)
        scores = group * queries * seen
        block = min(max(1, _SCORES[gpu] // scores), pairs) * scores * self.wide
        gradients = self.projection // self.width * self.wide
        return block, self.projection if gpu else gradients, gradients

    def _repeated(self) -> int:
        """Keys and values for every query head: a GPU's kernel for fp32 wants them."""
        wanted = not (self.place.cpu or self.blockwise) and self.grouped and self.width == 4
        return 2 * self.queries if wanted else 0

    def core_made(self, policy: Policy) -> int:
        """Bytes that `core` makes."""
        normed = self.projection + self.qk_statistics if self.model.qk_norm != "none" else 0
        return normed + self._turned(policy) + self._repeated() + self.queries + self.sums

    def core_kept(self) -> int:
        """Bytes of the projection and of what `core` makes that its backward needs."""
        made = self.core_made("none") + self.projection
        if self.rotary and self.place.cpu:
            made -= self.projection  # as it was before turning
        return made

    # Backward, from the gradient of the result (which is there) to that of the input.

    def backward(self, tape: Tape, policy: Policy, deferred: bool) -> None:
        """deferred: gradients of weights are put off; what they need stays, as `deferred`."""
        if policy == "full":
            self.forward(tape, "none")
            self._backward(tape, "none", deferred)
            tape.free(self.stream, item=_ACTIVATIONS)  # the result
        else:
            self._backward(tape, policy, deferred)

    def _backward(self, tape: Tape, policy: Policy, deferred: bool) -> None:
        model, stream = self.model, self.stream
        after = model.norm_placement != "before"
        # MLP
        self._through_norm_after(tape, after)
        if policy == "selective":
            tape.make(self.down)
            tape.pass_by(self.block(self.down) if model.gated else 0)
        self._through_row(tape, self.down, self.down_weight, policy, deferred)
        tape.free(stream if after else 0)
        tape.make(self.up)
        tape.pass_by(self.block(self.down) if model.gated else 0)
        tape.free(self.down)
        tape.free(self.up, item=_ACTIVATIONS)
        self._through_column(tape, self.up, self.up_weight, policy, deferred, first=False)
        # Attention
        self._through_norm_after(tape, after)
        if policy == "selective":
            self.core(tape, policy)
        self._through_row(tape, self.queries, self.out_weight, policy, deferred, again=True)
        tape.free(stream if after else 0)
        self._through_core(tape, policy, deferred)
        self._through_column(tape, self.projection, self.qkv_weight, policy, deferred, first=True)

    def _through_norm_after(self, tape: Tape, there: bool) -> None:
        if there:
            tape.make(self.stream)
            tape.pass_by(self._norm_block(backward=True))
            tape.free(self.stream, self.statistics, item=_ACTIVATIONS)

    def _through_row(
        self, tape: Tape, size: int, weight: int, policy: Policy, deferred: bool, again: bool = False
    ) -> None:
        """size: of the input, kept or made again, of which attention (`again`) frees its own."""
        tape.make(self.gathered, item=_GATHERS)
        tape.make(size)
        if not deferred:
            tape.pass_by(weight)
        tape.free(self.gathered, item=_GATHERS)
        if not again:
            tape.free(size, item=_ACTIVATIONS if policy == "none" else _WORKING)
        if deferred:
            tape.make(size if not again else 0, self.stream, item=_DEFERRED)

    def _through_core(self, tape: Tape, policy: Policy, deferred: bool) -> None:
        tape.make(self.projection, self._repeated())
        if self.blockwise:
            # Probabilities, the cap's derivative, the scores' gradient, and one of them as an operand.
            block, operands, gradients = self._blocks()
            operand = block if self.place.cpu else block * self.width // self.wide
            tape.pass_by(3 * block + operand, operands, self.queries * (operands // self.projection), gradients)
        elif not self.place.cpu:
            wide = self.queries // self.width * 4
            tape.pass_by(wide, self.sums, 2 * self.queries if self.grouped else 0)
        tape.make(self.projection)
        tape.pass_by(self._turn_block(self.queries) if self.rotary else 0)
        tape.free(self.projection, self._repeated(), self.queries)
        if deferred:
            tape.make(self.queries, item=_DEFERRED)
        if policy == "none":
            tape.free(self.core_kept(), item=_ACTIVATIONS)
        else:
            tape.free(self.core_made(policy))
            tape.free(self.projection, item=_ACTIVATIONS)
        if self.model.qk_norm != "none":
            tape.pass_by(self.projection)

    def _through_column(self, tape: Tape, size: int, weight: int, policy: Policy, deferred: bool, first: bool) -> None:
        """size: of the output's gradient."""
        model, stream = self.model, self.stream
        before = model.norm_placement != "after"
        if before and policy == "selective":
            tape.make(stream)
            tape.pass_by(self._norm_block(backward=False))
        if not deferred:
            tape.make(self.gathered, item=_GATHERS)
        tape.make(self.out)
        if self.gathered:
            tape.make(stream)
            tape.free(self.out)
        if not deferred:
            tape.pass_by(weight)
            tape.free(self.gathered, item=_GATHERS)
        tape.free(size)
        if before:
            tape.free(stream, item=_ACTIVATIONS if policy == "none" else _WORKING)  # what the norm made
        if deferred:
            tape.make(stream, size, item=_DEFERRED)
        if before:
            tape.make(stream)
            tape.pass_by(self._norm_block(backward=True))
            tape.free(stream)
            tape.free(self.statistics, item=_ACTIVATIONS)
        if first or not model.parallel_residual:
            tape.free(stream, item=_ACTIVATIONS)
        # The sum with the gradient that came around.
        tape.make(stream)
        tape.free(2 * stream)

    def weights(self, tape: Tape) -> None:
        """Gradients of weights that were put off; the next one's tokens are gathered meanwhile."""
        queue = (
            (self.down_weight, self.down + self.stream),
            (self.up_weight, self.up + self.stream),
            (self.out_weight, self.queries + self.stream),
            (self.qkv_weight, self.projection + self.stream),
        )
        tape.make(self.gathered, item=_GATHERS)
        for weight, held in queue:
            tape.pass_by(weight, self.gathered)
            tape.free(held, item=_DEFERRED)
        tape.free(self.gathered, item=_GATHERS)


class Ends(Layer):
    """The embedding, and the norm, output projection and loss at the model's other end."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        head = parameter_table(place.model)["head.weight"]
        self.rows, hidden = head.shard(0, place.tensor, place.vocabulary_multiple).shape
        self.head = self.rows * hidden * self.wide  # the projection's gradient in full precision
        self.table = self.rows * hidden * self.width
        learned = self.model.position == "learned"
        self.positions = self.model.max_sequence * hidden * self.width if learned else 0

    def embed(self, tape: Tape) -> None:
        """From tokens to the stream."""
        self._row(tape) if self.place.tensor == 1 else self._masked(tape)
        tape.pass_by(self.stream if self.model.embedding_scale is not None else 0)
        tape.pass_by(2 * self.stream if self.positions else 0)
        tape.move(self.stream, _ACTIVATIONS)

    def _masked(self, tape: Tape) -> None:
        tape.make(self.out)
        self._row(tape)
        tape.free(self.out)

    def embed_backward(self, tape: Tape) -> None:
        tape.pass_by(self.positions)
        if self.place.tensor > 1:
            tape.make(self.out)
            tape.pass_by(self.gathered, item=_GATHERS)
        tape.pass_by(self.table)
        tape.free(self.out if self.place.tensor > 1 else 0)
        tape.free(self.stream)

    def loss(self, tape: Tape) -> None:
        """Forward of the head: its projection's gradients are made at once, block by block."""
        rows, tokens, width, wide = self.rows, self.place.tokens, self.width, self.wide
        block = block_tokens(tokens, rows, gpu=not self.place.cpu)
        narrow = width < wide
        tape.make(self.stream)
        tape.make(self.statistics, item=_ACTIVATIONS)
        tape.pass_by(self._norm_block(backward=False))
        tape.make(self.gathered, item=_GATHERS)
        buffers = block * rows * (width + wide * (narrow + (self.model.logit_softcap is not None)))
        tape.make(self.out, buffers, item=_LOSS)
        casts = 0
        if narrow and self.place.cpu:
            half = self.place.precision == "fp16"
            casts = block * (rows + self.model.hidden) * wide if half else self.table
        # The sum so far, and on a CPU the product that is added to it.
        tape.pass_by(casts, *[self.head] * min(-(-tokens // block), 2 if self.place.cpu else 1), item=_LOSS)
        tape.make(self.head, item=_LOSS)
        if self.gathered:
            tape.make(self.stream, item=_LOSS)
            tape.free(self.out, item=_LOSS)
        tape.free(buffers, item=_LOSS)
        tape.free(self.gathered, item=_GATHERS)
        tape.free(self.stream)

    def loss_backward(self, tape: Tape) -> None:
        """Ends with the gradient of the stream."""
        if self.width < self.wide:
            wide = self.stream // self.width * self.wide
            tape.pass_by(wide, wide)
            tape.pass_by(wide, self.stream)
        tape.make(self.stream)
        tape.pass_by(self.head, self.table if self.width < self.wide else 0)
        tape.free(self.stream, self.head, item=_LOSS)
        tape.make(self.stream)
        tape.pass_by(self._norm_block(backward=True))
        tape.free(self.stream)
        tape.free(self.stream, self.statistics, item=_ACTIVATIONS)
