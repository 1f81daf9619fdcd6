"""The global batch as a step function of the samples consumed."""

from __future__ import annotations

from bisect import bisect_right
from typing import NamedTuple

from megapt.errors import UserError


class _Level(NamedTuple):
    first_step: int
    first_sample: int
    size: int


class BatchSchedule:
    """Samples per step: `global_batch`, or a ramp (start, increment, samples) up to it.

    The ramp is Megatron's rampup-batch-size in whole numbers: with k = (global_batch - start) / increment,
    the step that begins after c < samples samples takes start + increment * floor(c * k / samples) of them,
    and global_batch from then on. All questions are answered from a table of at most k + 1 levels.

    UserError if the increments do not lead from start to global_batch exactly.
    """

    def __init__(self, global_batch: int, ramp: tuple[int, int, int] | None = None) -> None:
        if global_batch < 1:
            raise UserError(f"a global batch of {global_batch} samples is not possible; it must be 1 or more")
        self.global_batch, self.ramp = global_batch, ramp
        self._levels = [_Level(0, 0, global_batch)] if ramp is None else _ramp_levels(global_batch, *ramp)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Every batch size that occurs, in order."""
        return tuple(level.size for level in self._levels)

    def size(self, step: int) -> int:
        """Samples in step `step` (from 0)."""
        return self._at_step(step).size

    def first_sample(self, step: int) -> int:
        """Samples consumed before step `step`; the step takes [first_sample, first_sample + size)."""
        level = self._at_step(step)
        return level.first_sample + (step - level.first_step) * level.size

    def _at_step(self, step: int) -> _Level:
        if step < 0:
            raise ValueError(f"steps are counted from 0, not {step}")
        return self._levels[bisect_right(self._levels, step, key=lambda level: level.first_step) - 1]


def _ramp_levels(global_batch: int, start: int, increment: int, samples: int) -> list[_Level]:
    if start < 1 or increment < 1 or samples < 1:
        raise UserError(f"a batch ramp (start {start}, increment {increment}, samples {samples}) needs all "
                        "three to be 1 or more")
    if start >= global_batch:
        raise UserError(f"a batch ramp must start below the global batch of {global_batch}, not at {start}; "
                        "leave the ramp out for a constant batch")
    steps, rest = divmod(global_batch - start, increment)
    if rest:
        reached = start + steps * increment
        divisors = [d for d in range(1, global_batch - start + 1) if (global_batch - start) % d == 0]
        nearest = sorted(sorted(divisors, key=lambda d: abs(d - increment))[:2])
        raise UserError(f"a batch ramp from {start} by {increment} does not reach the global batch of "
                        f"{global_batch} exactly ({reached}, then {reached + increment}); with this start, "
                        f"an increment of {' or '.join(map(str, nearest))} does")
    levels: list[_Level] = []
    step = consumed = 0
    for j in range(steps):
        size, until = start + j * increment, -(-(j + 1) * samples // steps)
        if consumed < until:  # a level is passed over where the one before it ran past its end
            levels.append(_Level(step, consumed, size))
            taken = -(-(until - consumed) // size)
            step, consumed = step + taken, consumed + taken * size
    levels.append(_Level(step, consumed, global_batch))
    return levels
