"""How many layers each virtual stage gets, balanced by cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import product

from megapt.errors import UserError
from megapt.parallel.pipeline.actions import Placement


def balance(
    layer_costs: Sequence[float],
    stages: int,
    first_cost: float = 0.0,
    last_cost: float = 0.0,
    placement: Placement | None = None,
) -> list[int]:
    """The number of consecutive layers of each of `stages` virtual stages, at least one each.

    `layer_costs` holds each layer's cost, `first_cost` what the first stage computes beside its layers (the
    embedding), `last_cost` what the last one does (head and loss); any unit, none negative. The most expensive
    virtual stage is as cheap as can be, exactly. Among such splits, with a `placement` of several chunks per rank, the
    most expensive rank is as cheap as exchanging single layers can make it, which is exact where all layers cost the
    same. What is still free goes to an even spread (least squares), and then to later stages, since earlier ones hold
    the activations of more micro-batches.

    Raises UserError where there are fewer layers than stages.
    """
    if stages < 1 or len(layer_costs) < stages:
        raise UserError(
            f"each virtual stage needs at least one layer, got {len(layer_costs)} layers for {stages} virtual stages; "
            f"nearest legal: {stages} layers, or {max(len(layer_costs), 1)} virtual stages"
        )
    assert placement is None or placement.virtual_stages == stages, f"{placement} has not {stages} virtual stages"
    split = _Split(layer_costs, stages, first_cost, last_cost)
    counts = split.most_even(split.least_maximum())
    if placement is not None and placement.chunks > 1:
        counts = split.even_ranks(counts, placement)
    return counts


class _Split:
    """Costs as whole numbers of one common unit, so that sums are exact and ties are ties."""

    def __init__(self, layer_costs: Sequence[float], stages: int, first_cost: float, last_cost: float) -> None:
        exact = [Fraction(cost) for cost in (*layer_costs, first_cost, last_cost)]
        unit = math.lcm(*(cost.denominator for cost in exact))
        *layers, first, last = (int(cost * unit) for cost in exact)
        assert min(*layers, first, last) >= 0, "costs must not be negative"
        self.layers, self.stages = len(layers), stages
        self.before = [0]
        for cost in layers:
            self.before.append(self.before[-1] + cost)
        self.extra = [0] * stages
        self.extra[0] += first
        self.extra[-1] += last

    def cost(self, stage: int, start: int, end: int) -> int:
        """Of a virtual stage with layers start..end-1."""
        return self.extra[stage] + self.before[end] - self.before[start]

    def costs(self, counts: list[int]) -> list[int]:
        """Of all virtual stages."""
        found, start = [], 0
        for stage, count in enumerate(counts):
            found.append(self.cost(stage, start, start + count))
            start += count
        return found

    def least_maximum(self) -> int:
        """The least cost of the most expensive virtual stage, by bisection."""
        low, high = 0, self.before[-1] + sum(self.extra)
        while low < high:
            middle = (low + high) // 2
            if self._fits(middle):
                high = middle
            else:
                low = middle + 1
        return low

    def _fits(self, limit: int) -> bool:
        """Whether a split exists whose stages all cost at most `limit`.

        Each takes as many layers as it can, but leaves one for every stage after it.
        """
        end = 0
        for stage in range(self.stages):
            start, left = end, self.stages - 1 - stage
            while end < self.layers - left and self.cost(stage, start, end + 1) <= limit:
                end += 1
            if end == start:
                return False
        return end == self.layers

    def most_even(self, limit: int) -> list[int]:
        """The split with the least sum of squared costs among those within `limit`; later stages get what is free."""
        # best[stage][start]: the least sum over the stages from `stage` on, which hold the layers from `start` on.
        best: list[dict[int, int]] = [{} for _ in range(self.stages)] + [{self.layers: 0}]
        choice: list[dict[int, int]] = [{} for _ in range(self.stages)]
        for stage in reversed(range(self.stages)):
            for start in range(stage, self.layers):
                for end in range(start + 1, self.layers + 1):
                    cost = self.cost(stage, start, end)
                    if cost > limit:
                        break
                    if end not in best[stage + 1]:
                        continue
                    total = cost * cost + best[stage + 1][end]
                    if start not in best[stage] or total < best[stage][start]:
                        best[stage][start], choice[stage][start] = total, end - start
        counts: list[int] = []
        for stage in range(self.stages):
            counts.append(choice[stage][sum(counts)])
        return counts

    def even_ranks(self, counts: list[int], placement: Placement) -> list[int]:
        """Exchange single layers while that makes the most expensive ranks cheaper and no stage dearer than it was."""
        limit = max(self.costs(counts))

        def ranks(costs: list[int]) -> list[int]:
            loads = [0] * placement.stages
            for stage, cost in enumerate(costs):
                loads[placement.rank(stage)] += cost
            return loads

        def key(candidate: list[int]) -> tuple[bool, list[int], int]:
            costs = self.costs(candidate)
            return max(costs) > limit, sorted(ranks(costs), reverse=True), sum(cost * cost for cost in costs)

        while True:
            loads = ranks(self.costs(counts))
            top, best, best_key = max(loads), counts, key(counts)
            if top == min(loads):
                return counts
            givers = [s for s in range(self.stages) if loads[placement.rank(s)] == top and counts[s] > 1]
            takers = [s for s in range(self.stages) if loads[placement.rank(s)] < top]
            for giver, taker in product(givers, takers):
                moved = list(counts)
                moved[giver] -= 1
                moved[taker] += 1
                moved_key = key(moved)
                if moved_key < best_key:
                    best, best_key = moved, moved_key
            if best is counts:
                return counts
            counts = best
