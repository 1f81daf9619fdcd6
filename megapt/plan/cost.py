"""What one layer, the embedding and the head cost a rank, kernel by kernel, from shapes and a device's figures."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from megapt.config import ModelConfig
from megapt.model.recompute import Policy
from megapt.plan import communication
from megapt.plan.flops import attended, not_again
from megapt.plan.hardware import Hardware

WIDTH = {"fp32": 4, "bf16": 2, "fp16": 2, "fp64": 8}


@dataclass(frozen=True)
class Software:
    """How a training system runs what a config says, where systems differ. The defaults are this project's.

    hidden: share of tensor parallelism's collectives that runs beside products cut in pieces. fused: elementwise chains
    are one kernel each (None: as `compile` says). accumulates: products add to fp32 gradients themselves. flash:
    attention without a matrix of scores. overlaps_gradients: data-parallel collectives run beside the backward and the
    next forward. overlaps_sends: of the pipeline. skips_last: full recomputation leaves out the layer's last product.
    scatters_sends: tensor ranks each send a part of what all hold, and gather it (arXiv 2104.04473, section 4.1).
    gradient_width: bytes of a gradient on its way; default: full precision. selective: what that policy computes again:
    the attention core, norms and activation; or only the core (arXiv 2205.05198); or norms, activation and half of the
    products, but no attention (torchtitan).
    """

    name: str = "megapt"
    hidden: float = 0.0
    fused: bool | None = None
    accumulates: bool = False
    flash: bool = True
    overlaps_gradients: bool = True
    overlaps_sends: bool = True
    skips_last: bool = True
    scatters_sends: bool = False
    gradient_width: int | None = None
    selective: Literal["cheap", "scores", "products"] = "cheap"


MEGAPT = Software()


@dataclass(frozen=True)
class Rates:
    """A device in one dtype, per second: FLOPs of products' tiles and of attention, bytes."""

    flops: float
    attention_forward: float
    attention_backward: float
    bytes: float
    units: int
    depth: float
    half_at: float
    launch: float
    width: int


@lru_cache(maxsize=256)
def rates(hardware: Hardware, precision: str) -> Rates:
    """Raises UserError where the hardware states no peak for the precision."""
    gemm, attention = hardware.gemm, hardware.attention
    peak = hardware.peak_flops(precision) * hardware.in_step
    return Rates(
        flops=peak * gemm.share * gemm.sustained,
        attention_forward=peak * attention.forward * gemm.sustained,
        attention_backward=peak * attention.backward * gemm.sustained,
        bytes=hardware.copy_rate * hardware.in_step,
        units=gemm.units,
        depth=gemm.depth,
        half_at=attention.half_at,
        launch=hardware.launch,
        width=WIDTH[precision],
    )


# Tiles that libraries cut products into, and how fast one is beside the largest: smaller ones read more per FLOP.
_TILES = ((256, 128, 1.0), (128, 256, 1.0), (128, 128, 0.93), (128, 64, 0.8), (64, 64, 0.6))
_SPLITS = (1, 2, 4)


def product(device: Rates, m: int, n: int, k: int, batch: int = 1, added: int = 0) -> float:
    """Seconds of `batch` products [m, k] x [k, n]: tiles in whole waves over the units, or reading and writing memory,
    whichever takes longer. added: bytes per element of the result that are read and written beside it."""
    traffic = batch * ((m * k + k * n + m * n) * device.width + m * n * added) / device.bytes
    if device.units == 1:
        return max(2.0 * batch * m * n * (k + device.depth) / device.flops, traffic)
    best = math.inf
    for rows, columns, speed in _TILES:
        tiles = batch * -(-m // rows) * -(-n // columns)
        tile = 2.0 * rows * columns * device.units / (device.flops * speed)
        for splits in _SPLITS:
            waves = -(-tiles * splits // device.units)
            # Parts of a sum are written and read once more in fp32.
            seconds = waves * tile * (k / splits + device.depth) + (splits - 1) * 8 * batch * m * n / device.bytes
            best = min(best, seconds)
    return max(best, traffic)


def attention_seconds(device: Rates, pairs: float, width: int, reach: float) -> tuple[float, float]:
    """Forward and backward of a fused kernel. pairs: of a query and a key that meet, over all heads; width: of a head;
    reach: tokens of the sequence or window. Its backward computes the scores again: 2.5 times the FLOPs."""
    # Short sequences leave units idle; with few dimensions exponentials take as long as products (arXiv 2407.08608).
    speed = reach / (reach + device.half_at) * min(1.0, width / 128) ** 0.35
    work = 4.0 * pairs * width
    return work / (device.attention_forward * speed), 2.5 * work / (device.attention_backward * speed)


@dataclass(frozen=True)
class Passes:
    """Bytes of elementwise work over the bytes of what it works on, forward and backward; kernels per layer.

    norm, residual: of the residual stream; turn: of queries and keys; activation: of the MLP's width; copy: of queries,
    keys and values together, whose gradients are made apart.
    """

    norm: tuple[float, float]
    residual: tuple[float, float]
    turn: tuple[float, float]
    gated: tuple[float, float]
    plain: tuple[float, float]
    copy: tuple[float, float]
    kernels: tuple[int, int]


# Counted in the operations of `model/`: reads and writes of each, in tensors of the result's size.
EAGER = Passes(
    norm=(2, 4), residual=(3, 3), turn=(14, 14), gated=(5, 11), plain=(2, 3), copy=(0, 2), kernels=(28, 60)
)
FUSED = Passes(norm=(2, 3), residual=(3, 3), turn=(2, 2), gated=(3, 5), plain=(2, 3), copy=(0, 2), kernels=(14, 36))
_ACCUMULATE = 10  # bytes per weight: a 16-bit gradient is read and added to an fp32 sum, behind its product


@dataclass(frozen=True)
class Shape:
    """What decides the cost of a layer beside model and device."""

    tensor: int
    sequence_parallel: bool
    micro: int
    sequence: int
    precision: str
    fused: bool

    @property
    def tokens(self) -> int:
        return self.micro * self.sequence

    @property
    def local_tokens(self) -> int:
        """Between tensor-parallel regions."""
        return self.tokens // self.tensor if self.sequence_parallel else self.tokens


@dataclass(frozen=True)
class Cost:
    """Seconds of one micro-batch in a part of the model, on one rank.

    The backward of input and weights is `input + weight`, and `again` what it computes again before. The collectives of
    tensor parallelism that computing waits for come beside: in the forward, in an undivided backward (`joined`), in its
    two halves where a schedule divides it (`apart`), and in what is computed again. products, attention and elementwise
    are what forward, input and weight consist of.
    """

    forward: float = 0.0
    input: float = 0.0
    weight: float = 0.0
    again: float = 0.0
    forward_waits: float = 0.0
    joined_waits: float = 0.0
    apart_waits: tuple[float, float] = (0.0, 0.0)
    again_waits: float = 0.0
    products: float = 0.0
    attention: float = 0.0
    elementwise: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return self.sum(((self, 1), (other, 1)))

    @staticmethod
    def sum(parts: tuple[tuple[Cost, int], ...]) -> Cost:
        """Of costs as often as the number beside each says."""
        names = [name for name in Cost.__dataclass_fields__ if name != "apart_waits"]
        made = {name: sum(getattr(cost, name) * n for cost, n in parts) for name in names}
        apart = tuple(sum(cost.apart_waits[half] * n for cost, n in parts) for half in (0, 1))
        return Cost(**made, apart_waits=apart)  # type: ignore[arg-type]


@lru_cache(maxsize=4096)
def layer_cost(
    model: ModelConfig, window: int | None, policy: Policy, shape: Shape, hardware: Hardware, software: Software
) -> Cost:
    """Of one layer that has this window and computes this again."""
    device = rates(hardware, shape.precision)
    products = _LayerProducts(model, shape, device, software)
    core = _attention_core(model, window, shape, device, software)
    passes = FUSED if shape.fused else EAGER
    cheap = _Elementwise(model, shape, passes, device)
    kernels = passes.kernels
    forward = max(sum(products.forward) + core[0] + cheap.forward, kernels[0] * device.launch)
    backward = sum(products.input) + core[1] + cheap.backward
    weight = sum(products.weight)
    missing = kernels[1] * device.launch - backward - weight
    cost = Cost(
        forward=forward,
        input=backward + max(0.0, missing),
        weight=weight,
        products=sum(products.forward) + sum(products.input) + weight,
        attention=core[0] + core[1],
        elementwise=cheap.forward + cheap.backward,
    )
    cost = _with_collectives(cost, products, model, shape, hardware, software)
    return _with_recomputation(cost, policy, products, core[0], cheap, shape, model, hardware, software)


class _LayerProducts:
    """Seconds of queries-keys-values, attention's output, the MLP's first and second product, in each pass."""

    def __init__(self, model: ModelConfig, shape: Shape, device: Rates, software: Software) -> None:
        tokens, hidden = shape.tokens, model.hidden
        heads, kv_heads = model.heads // shape.tensor, max(1, model.num_kv_heads // shape.tensor)
        query, qkv = heads * model.head_width, (heads + 2 * kv_heads) * model.head_width
        inner = model.ffn // shape.tensor
        up = inner * (2 if model.gated else 1)
        sizes = ((qkv, hidden), (hidden, query), (up, hidden), (hidden, inner))
        # fp32 sums are read and written by the product itself, or by a pass behind it.
        added = 8 - device.width if software.accumulates else 0
        self.forward = [product(device, tokens, out, into) for out, into in sizes]
        self.input = [product(device, tokens, into, out) for out, into in sizes]
        self.weight = [
            product(device, out, into, tokens, added=added)
            + (0 if software.accumulates else out * into * _ACCUMULATE / device.bytes)
            for out, into in sizes
        ]


def _attention_core(
    model: ModelConfig, window: int | None, shape: Shape, device: Rates, software: Software
) -> tuple[float, float]:
    """Forward and backward of scores, softmax and values."""
    heads, sequence = model.heads // shape.tensor, shape.sequence
    if not software.flash:
        count = heads * shape.micro
        scores = product(device, sequence, sequence, model.head_width, batch=count)
        values = product(device, sequence, model.head_width, sequence, batch=count)
        elements = count * sequence * sequence
        # Masked softmax and dropout with its mask, each read and written whole.
        softmax, backward = elements * (2 * device.width + 5), elements * (3 * device.width + 5)
        return scores + values + softmax / device.bytes, 2 * (scores + values) + backward / device.bytes
    reach = min(window or sequence, sequence)
    pairs = shape.tokens * heads * attended(model, sequence, window)
    return attention_seconds(device, pairs, model.head_width, reach)


class _Elementwise:
    """Seconds of norms, rotary positions, activations and additions of one layer."""

    def __init__(self, model: ModelConfig, shape: Shape, passes: Passes, device: Rates) -> None:
        byte = device.width / device.bytes
        stream = shape.local_tokens * model.hidden * byte
        heads, kv_heads = model.heads // shape.tensor, max(1, model.num_kv_heads // shape.tensor)
        turned = shape.tokens * (heads + kv_heads) * model.head_width * byte
        qkv = shape.tokens * (heads + 2 * kv_heads) * model.head_width * byte
        inner = shape.tokens * model.ffn // shape.tensor * byte
        before, after = 2 * (model.norm_placement != "after"), 2 * (model.norm_placement != "before")
        activation = passes.gated if model.gated else passes.plain

        def of(way: int) -> tuple[float, float]:
            norm = before * passes.norm[way] * stream
            norm += passes.norm[way] * turned if model.qk_norm != "none" else 0
            turn = passes.turn[way] * turned if model.position == "rope" else 0
            rest = (2 * passes.residual[way] + after * passes.norm[way]) * stream + passes.copy[way] * qkv
            return norm + turn + activation[way] * inner, rest

        self.cheap, rest = of(0)
        """What selective recomputation makes again."""
        self.forward = self.cheap + rest
        self.backward = sum(of(1))


def _with_collectives(
    cost: Cost, products: _LayerProducts, model: ModelConfig, shape: Shape, hardware: Hardware, software: Software
) -> Cost:
    """What is waited for, as `parallel/tensor.py` overlaps it: gathers and reductions around the two column-parallel
    products run beside the gradients of weights and inputs, the others do not."""
    if shape.tensor == 1:
        return cost
    shown = 1 - software.hidden
    among = communication.group(hardware, shape.tensor, 1)
    size = shape.tokens * model.hidden * WIDTH[shape.precision]
    columns = [(products.input[i], products.weight[i]) for i in (0, 2)]
    if not shape.sequence_parallel:
        once = communication.all_reduce(hardware, among, size)
        joined = sum(max(0.0, once - weight) for _, weight in columns)
        return replace(
            cost, forward_waits=2 * once * shown, joined_waits=joined * shown, apart_waits=(2 * once * shown, 0.0)
        )
    once = communication.all_gather(hardware, among, size)
    joined = 2 * once + sum(max(0.0, once - into) + max(0.0, once - weight) for into, weight in columns)
    # Put off, weights wait for gathers that run beside the product before theirs.
    weights = sum(max(0.0, once - weight) for weight in products.weight)
    return replace(
        cost,
        forward_waits=4 * once * shown,
        joined_waits=joined * shown,
        apart_waits=(4 * once * shown, weights * shown),
    )


def _with_recomputation(
    cost: Cost,
    policy: Policy,
    products: _LayerProducts,
    core: float,
    cheap: _Elementwise,
    shape: Shape,
    model: ModelConfig,
    hardware: Hardware,
    software: Software,
) -> Cost:
    if policy == "none":
        return cost
    if policy == "selective":
        again = {
            "cheap": core + cheap.cheap,
            "scores": core,
            "products": cheap.cheap + sum(products.forward) / 2,
        }[software.selective]
        return replace(cost, again=again)
    if not software.skips_last:
        return replace(cost, again=cost.forward, again_waits=cost.forward_waits)
    skipped = [products.forward[i] for i, left_out in zip((1, 3), not_again(model), strict=True) if left_out]
    # Each ends in one of the forward's collectives.
    waits = cost.forward_waits * (1 - len(skipped) / (4 if shape.sequence_parallel else 2))
    return replace(cost, again=cost.forward - sum(skipped), again_waits=waits)


@lru_cache(maxsize=1024)
def embedding_cost(model: ModelConfig, shape: Shape, rows: int, hardware: Hardware, software: Software) -> Cost:
    """Looking tokens up, and the gradient: a matrix of this rank's `rows` of the vocabulary, filled and added up."""
    device = rates(hardware, shape.precision)
    byte = device.width / device.bytes
    looked_up = shape.tokens * model.hidden * byte
    weight = rows * model.hidden * (device.width + _ACCUMULATE) / device.bytes + 3 * looked_up
    waits = back = 0.0
    if shape.tensor > 1:
        among = communication.group(hardware, shape.tensor, 1)
        size = shape.tokens * model.hidden * device.width
        if shape.sequence_parallel:
            waits = back = communication.all_gather(hardware, among, size)
        else:
            waits = communication.all_reduce(hardware, among, size)
    return Cost(
        forward=2 * looked_up,
        input=weight,
        forward_waits=waits,
        joined_waits=back,
        apart_waits=(back, 0.0),
        elementwise=2 * looked_up + weight,
    )


# Bytes per logit between the products, in fp32 beside 16-bit logits: copied, reduced, shifted, exponentiated, summed,
# scaled and copied back (`parallel/loss.py`).
_LOSS_BYTES = 44


@lru_cache(maxsize=1024)
def head_cost(model: ModelConfig, shape: Shape, rows: int, hardware: Hardware, software: Software) -> Cost:
    """The last norm, the output projection over this rank's `rows` of the vocabulary and the loss.

    The forward computes the gradients as well (`parallel/loss.py`), so that the backward only scales them.
    """
    device = rates(hardware, shape.precision)
    tokens, hidden, width = shape.tokens, model.hidden, device.width
    products = product(device, tokens, rows, hidden) + product(device, tokens, hidden, rows)
    products += product(device, rows, hidden, tokens, added=8 - width)
    logits = tokens * rows * _LOSS_BYTES / device.bytes
    stream = shape.local_tokens * hidden * width / device.bytes
    norm = FUSED.norm if shape.fused else EAGER.norm
    scaled = (2 * stream + rows * hidden * (4 + width + _ACCUMULATE) / device.bytes) + norm[1] * stream
    waits = 0.0
    if shape.tensor > 1:
        among = communication.group(hardware, shape.tensor, 1)
        size = tokens * hidden * width
        if shape.sequence_parallel:
            waits = 2 * communication.all_gather(hardware, among, size)
        else:
            waits = communication.all_reduce(hardware, among, size)
        waits += communication.all_gather(hardware, among, 12.0 * tokens * shape.tensor)
    forward = products + logits + norm[0] * stream
    return Cost(
        forward=forward,
        input=scaled,
        forward_waits=waits,
        products=products,
        elementwise=forward - products + scaled,
    )
