"""What can be wrong with an operation, told from numbers: each candidate is computed and must explain the difference.

A candidate counts if it leaves less than a thousandth of the difference unexplained.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megapt.batch import IGNORE
from megapt.config import Config
from megapt.prove.compare import located
from megapt.prove.probe import Seen
from megapt.prove.trainer import global_batch
from megapt.prove.view import Place, View


def find(phase: str, operation: str, a: View, b: View, config: Config) -> list[str]:
    """Every cause that explains why `operation` of `b` is not what it is in `a`. config: that of `b`."""
    search = {
        "forward": _forward,
        "backward": _backward,
        "local": _local,
        "finalized": _finalized,
        "applied": _applied,
        "norm": _norm,
        "weight": _weight,
        "copy": _copy,
    }[phase]
    return list(search(operation, a, b, config))


def _explains(candidate: Tensor, found: Tensor, reference: Tensor) -> bool:
    """Whether `found` is the candidate, as far as it is not the reference."""
    deviation = float((found - reference).abs().max())
    return float((candidate - found).abs().max()) <= 1e-3 * deviation


def _factor(found: Tensor, reference: Tensor) -> float | None:
    """k, if found = k x reference."""
    norm = float((reference * reference).sum())
    if norm == 0:
        return None
    k = float((found * reference).sum()) / norm
    return k if _explains(k * reference, found, reference) else None


def _times(k: float, b: View, what: str = "it") -> str:
    sizes = {"dp": _size(b, 1), "tp": _size(b, 2), "pp": _size(b, 0)}
    for axis, size in sizes.items():
        if size > 1 and abs(k - size) < 1e-6:
            return f"{what} is {size} times the reference: summed over {axis}, though every rank had the whole"
        if size > 1 and abs(k - 1 / size) < 1e-6:
            return f"{what} is 1/{size} of the reference: averaged over {axis} where it must be summed"
    return f"{what} is {k:.6g} times the reference: a wrong scale"


def _size(b: View, axis: int) -> int:
    return 1 + max(trace.place[axis] for trace in b.traces)


def _block(seen: Seen, whole: Tensor) -> Tensor:
    return whole[slice(*seen.rows), slice(*seen.columns)]


def _forward(operation: str, a: View, b: View, config: Config) -> Iterator[str]:
    if operation == "loss":
        yield from _loss(a, b, config)
        return
    reference = a.activation(operation, False)
    yield from _activation(operation, False, reference, b)


def _activation(operation: str, backward: bool, reference: Tensor, b: View) -> Iterator[str]:
    unsummed = list(_unsummed(operation, backward, reference, b))
    yield from unsummed or _blocks(operation, backward, reference, b)


def _unsummed(operation: str, backward: bool, reference: Tensor, b: View) -> Iterator[str]:
    """A product whose terms were not added up."""
    terms = {(place, s.rows): s for place, s in b.parts[operation, backward]}
    if _size(b, 2) == 1 or not terms:
        return
    alone, some = True, False
    for place, seen in b.activations[operation, backward]:
        over = next(s for (p, rows), s in terms.items() if p == place and rows[0] <= seen.rows[0] < rows[1])
        local = over.values.double()[seen.rows[0] - over.rows[0] : seen.rows[1] - over.rows[0]]
        found, right = seen.values.double(), _block(seen, reference)
        if float((found - right).abs().max()) == 0:
            continue
        bias = (found - local).mean(0, keepdim=True)  # what is added to every row, if anything is
        alone &= _explains(local + bias, found, right)
        some = True
    if some and alone:
        yield "missing reduction over tp: each rank holds its own term of the sum alone"


def _blocks(operation: str, backward: bool, reference: Tensor, b: View) -> Iterator[str]:
    """Causes that show in the blocks that ranks hold of one tensor."""
    pieces = b.activations[operation, backward]
    by_block: dict[tuple[int, tuple[int, int], tuple[int, int]], list[tuple[Place, Seen]]] = {}
    for place, seen in pieces:
        by_block.setdefault((place[1], seen.rows, seen.columns), []).append((place, seen))
    holders = [group for group in by_block.values() if len(group) > 1]
    if holders:
        differ = any(not torch.allclose(g[0][1].values, s.values, rtol=1e-6) for g in holders for _, s in g[1:])
        summed = all(
            _explains(torch.stack([s.values.double() for _, s in g]).sum(0), _block(g[0][1], reference), g[0][1].values)
            for g in holders
        )
        if summed and differ:
            yield "missing reduction over tp: it equals the reference once summed over tp"
        elif differ:
            yield "copies differ: tensor ranks that hold the same tokens hold different numbers"
    yield from _scales(pieces, reference, b)
    for place, seen in pieces:
        right = _block(seen, reference)
        height = right.shape[0]
        for start in range(0, reference.shape[0] - height + 1, height):
            other = reference[start : start + height, slice(*seen.columns)]
            if start != seen.rows[0] and _explains(other, seen.values.double(), right):
                yield (
                    f"misplaced tokens: rank pp {place[0]}, dp {place[1]}, tp {place[2]} holds tokens {start} to "
                    f"{start + height - 1} where {seen.rows[0]} to {seen.rows[1] - 1} belong"
                )
                return


def _scales(pieces: list[tuple[Place, Seen]], reference: Tensor, b: View) -> Iterator[str]:
    factors: dict[int, set[float]] = {}
    for place, seen in pieces:
        right = reference if reference.numel() == 1 else _block(seen, reference)
        k = _factor(seen.values.double(), right)
        if k is None:
            return
        factors.setdefault(place[1], set()).add(round(k, 9))
    each = {dp: k.pop() for dp, k in sorted(factors.items()) if len(k) == 1}
    if len(each) != len(factors):
        return
    own = {t.place[1]: t.loss_tokens for t in b.traces}
    if _size(b, 1) > 1 and all(abs(k * own[dp] / b.tokens - 1) < 1e-6 for dp, k in each.items()):
        counts = ", ".join(f"dp {dp}: {own[dp]}" for dp in each)
        yield (
            f"wrong loss scale: the loss is divided by each rank's own tokens with loss ({counts}), not by the "
            f"{b.tokens} of the global batch"
        )
    elif len(set(each.values())) == 1:
        yield _times(next(iter(each.values())), b)
    else:
        yield "wrong scales: " + ", ".join(f"{k:.6g} times the reference on dp {dp}" for dp, k in each.items())


def _loss(a: View, b: View, config: Config) -> Iterator[str]:
    found, reference = b.activation("loss", False), a.activation("loss", False)
    padding = sum(t.padding for t in {t.place[2]: t for t in b.traces}.values())
    logits = _logits(a)
    labels = global_batch(0, config)[1].flatten()
    counted = labels != IGNORE
    if padding:
        beside = torch.cat([logits, logits.new_zeros(len(logits), padding)], 1)  # padded rows are zero
        with_padding = torch.nn.functional.cross_entropy(beside[counted], labels[counted], reduction="sum")
        if _explains(with_padding, found, reference):
            yield f"padded vocabulary takes part: the softmax runs over {padding} rows beyond the {logits.shape[1]}"
    k = float(found / reference)  # a number is always a multiple of another: only telling ones count
    if any(abs(k - size) < 1e-6 for size in (_size(b, 0), _size(b, 1), _size(b, 2)) if size > 1):
        yield _times(k, b)


def _logits(view: View) -> Tensor:
    pieces = [s for trace in view.traces for s in trace.logits if trace.place[2] == 0]
    whole = torch.empty(max(s.rows[1] for s in pieces), pieces[0].columns[1], dtype=torch.float64)
    for s in pieces:
        whole[slice(*s.rows)] = s.values.double()
    return whole


def _backward(operation: str, a: View, b: View, config: Config) -> Iterator[str]:
    if operation == "loss":
        reference = a.activations["loss", True][0][1].values.double()
        yield from _scales(b.activations["loss", True], reference, b)
        return
    if not b.activations[operation, True]:
        yield "no gradient reached it"
        return
    yield from _activation(operation, True, a.activation(operation, True), b)


def _local(name: str, a: View, b: View, config: Config) -> Iterator[str]:
    """The gradient of a weight, summed over all that computed it, while all activations and their gradients agree."""
    wrong = {
        trace.place: times
        for trace in b.traces
        if (times := trace.computed.get(name)) is not None and times != trace.micro_batches
    }
    if wrong and b.parameters[name].has_copy is False:
        place, times = next(iter(wrong.items()))
        count = next(t.micro_batches for t in b.traces if t.place == place)
        yield (
            f"its weight part of the backward ran {times} times for {count} micro-batches on rank pp {place[0]}, "
            f"dp {place[1]}, tp {place[2]}"
        )
    if not any(trace.computed.get(name) for trace in b.traces):
        yield "its weight part of the backward never ran"
    k = _factor(b.local_sum(name), a.local_sum(name))
    if k is not None:
        yield _times(k, b)


def _finalized(name: str, a: View, b: View, config: Config) -> Iterator[str]:
    """What `finalize` did to a gradient whose terms are right."""
    reference = a.table()["finalized", name]
    before, after = b.copies("local", name), b.copies("finalized", name)
    unchanged = all(torch.equal(torch.nan_to_num(before[p]), torch.nan_to_num(after[p])) for p in after)
    partial = any(name in trace.partial for trace in b.traces)
    tied = [other for other, spec in b.parameters.items() if spec.tied_to == name]
    for copy in tied:
        # All but what the copy's stage computed.
        there = b.copies("local", copy)
        if there:
            missing = _merged(list(there.values()))
            if _explains(reference - missing, _merged(list(after.values())), reference):
                yield f"the gradient of its tied copy {copy} (stage pp {_last(there)}) was not added to the owner's"
    if unchanged and partial:
        yield "missing sum over tp: each tensor rank kept the part of its own tokens or heads"
    elif not unchanged and not tied:
        k = _factor(_merged(list(after.values())), reference)
        if k is not None:
            yield _times(k, b)


def _last(places: dict[Place, Tensor]) -> int:
    return max(place[0] for place in places)


def _merged(copies: list[Tensor]) -> Tensor:
    whole = copies[0].clone()
    for other in copies[1:]:
        whole = torch.where(whole.isnan(), other, whole)
    return whole


def _applied(name: str, a: View, b: View, config: Config) -> Iterator[str]:
    """What the optimizer was given, where every rank's own gradient is right."""
    found, reference = b.applied(name), a.table()["applied", name]
    assert found is not None
    k = _factor(found, reference)
    if k is not None:
        yield _times(k, b)
    for dp in range(_size(b, 1) if _size(b, 1) > 1 else 0):
        pieces = [piece for place, piece in b.pieces["finalized", name] if place[1] == dp]
        own = torch.full(found.shape, float("nan"), dtype=torch.float64)
        for piece in pieces:
            positions, values = located(piece)
            own.view(-1)[positions] = values
        if pieces and _explains(own, found, reference):
            yield f"missing reduction over dp: it is the gradient of dp rank {dp}'s own samples"


def _norm(_: str, a: View, b: View, config: Config) -> Iterator[str]:
    """The norm, where every gradient is right: how often each was counted."""
    reference = a.table()
    squares = {name: float(reference["finalized", name].square().sum()) for name in a.owned()}
    excess = b.norm**2 - a.norm**2

    def explains(candidate: float) -> bool:
        return abs(candidate - excess) <= 1e-3 * abs(excess)

    tp = _size(b, 2)
    whole = [name for name in squares if b.parameters[name].split is None]
    if tp > 1 and explains((tp - 1) * sum(squares[name] for name in whole)):
        yield f"parameters that every tensor rank holds whole are counted {tp} times ({len(whole)}, as {whole[0]})"
    for name, square in squares.items():
        if explains(square):
            yield f"{name} is counted twice"
        elif explains(-square):
            yield f"{name} is left out"
        elif tp > 2 and explains((tp - 1) * square):
            yield f"{name}, which every tensor rank holds whole, is counted {tp} times"
    for axis, index in (("pp", 0), ("tp", 2)):
        for rank in range(_size(b, index) if _size(b, index) > 1 else 0):
            own = _own_square(b, index, rank)
            if explains(own - a.norm**2):
                yield f"missing reduction over {axis}: it is the norm of {axis} rank {rank}'s own gradients"
    k = b.norm / a.norm
    for size in {_size(b, 0), _size(b, 1), tp} - {1}:
        if min(abs(k - size), abs(k - 1 / size), abs(k - size**0.5), abs(k - size**-0.5)) < 1e-6:
            yield f"it is {k:.6g} times the reference: counted on {size} ranks, or averaged over them"


def _own_square(b: View, index: int, rank: int) -> float:
    total = 0.0
    for name in b.owned():
        for place, copy in b.copies("finalized", name).items():
            if place[index] == rank:
                total += float(torch.nan_to_num(copy).square().sum())
    return total


def _weight(name: str, a: View, b: View, config: Config) -> Iterator[str]:
    """The update, where gradients and norm are right."""
    start = _initial(a, name)
    found, reference = b.state("weight", name) - start, a.state("weight", name) - start
    if float(found.abs().max()) == 0:
        yield "it was not updated"
        return
    k = _factor(found, reference)
    if k is not None:
        yield f"the update is {k:.6g} times the reference's"
    section = config.optimizer
    decay = section.lr * section.weight_decay * start
    if _explains(reference + decay, found, reference):
        yield "weight decay is missing"
    if _explains(reference - decay, found, reference):
        yield "weight decay is applied where it must not be, or twice"


def _initial(view: View, name: str) -> Tensor:
    return _merged(list(view.copies("initial", name, summed=False).values()))


def _copy(name: str, a: View, b: View, config: Config) -> Iterator[str]:
    """The weights that ranks compute with, where the masters are right."""
    reference = a.state("weight", name)
    start = _initial(a, name)
    stale = [
        place
        for place, piece in b.pieces["copy", name]
        if torch.equal(located(piece)[1], start.view(-1)[located(piece)[0]])
        and not torch.equal(located(piece)[1], reference.view(-1)[located(piece)[0]])
    ]
    if stale:
        where = "; ".join(f"pp {p}, dp {d}, tp {t}" for p, d, t in stale)
        yield f"copies differ: still the value before the update on {where}"
