"""The passes of a layer, of the model's ends and of whole chunks, worked out once each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from megapt.model.recompute import Policy
from megapt.plan.working import ITEMS, Ends, Layer, Place, Tape

PassKind = Literal["forward", "backward", "backward_input", "backward_weight"]


@dataclass(frozen=True)
class Pass:
    """Bytes by item (in the order of `ITEMS`), against those before: at its end, and at the moment with the most."""

    end: npt.NDArray[np.int64]
    top: npt.NDArray[np.int64]


def _pass(tape: Tape) -> Pass:
    return Pass(*(np.array([items[item] for item in ITEMS], dtype=np.int64) for items in (tape.items, tape.at_peak)))


@lru_cache(maxsize=4096)
def _of_layer(place: Place, policy: Policy, kind: PassKind) -> Pass:
    layer, tape = Layer(place), Tape()
    if kind == "forward":
        layer.forward(tape, policy)
    elif kind == "backward_weight":
        layer.weights(tape)
    else:
        layer.backward(tape, policy, kind == "backward_input")
    return _pass(tape)


@lru_cache(maxsize=512)
def _of_end(place: Place, end: Literal["embedding", "head", "stream"], kind: PassKind) -> Pass:
    """stream: what comes from, or goes to, another stage."""
    ends, tape = Ends(place), Tape()
    match end, kind:
        case _, "backward_weight":
            pass
        case "embedding", "forward":
            ends.embed(tape)
        case "embedding", _:
            ends.embed_backward(tape)
        case "head", "forward":
            ends.loss(tape)
        case "head", _:
            ends.loss_backward(tape)
        case "stream", "forward":
            tape.make(ends.stream, item=ITEMS[0])
        case _:
            tape.make(ends.stream)
    return _pass(tape)


def chunk_parts(
    place: Place, policies: Sequence[Policy], first: bool, last: bool, kind: PassKind
) -> list[tuple[Pass, str]]:
    """Of a model chunk with these layers, in the order in which they run, and what each is: `layer`, `head`,
    `embedding` or the `stream` of another stage."""
    start: Literal["embedding", "stream"] = "embedding" if first else "stream"
    layers = [(_of_layer(place, policy, kind), "layer") for policy in policies]
    begin = (_of_end(place, start, kind), start)
    if kind == "forward":
        return [begin, *layers, *([(_of_end(place, "head", kind), "head")] if last else [])]
    end: Literal["head", "stream"] = "head" if last else "stream"
    return [(_of_end(place, end, kind), end), *reversed(layers), *([begin] if first else [])]


@lru_cache(maxsize=4096)
def chunk_pass(place: Place, policies: tuple[Policy, ...], first: bool, last: bool, kind: PassKind) -> Pass:
    """All of a chunk; the stream that it is given or gives counts as its own."""
    level = np.zeros(len(ITEMS), dtype=np.int64)
    top = level
    for part, _ in chunk_parts(place, policies, first, last, kind):
        at = level + part.top
        top = at if at.sum() > top.sum() else top
        level = level + part.end
    return Pass(level, top)
