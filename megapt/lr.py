"""The learning rate as a pure function of the step: warm-up, then one of four shapes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megapt.errors import UserError

KINDS = ("cosine", "linear", "constant", "wsd")


@dataclass(frozen=True)
class LearningRate:
    """Learning rate of every step of a run; it holds no state, so resuming needs the step alone.

    Steps count from 0. A warm-up of ``w`` steps is linear: step ``s < w`` gives ``peak * (s + 1) / w``, so
    step 0 already trains and step ``w - 1`` is at the peak. From that step (step 0 without a warm-up) on:

    - ``cosine``: half a cosine from the peak to ``minimum`` (Loshchilov and Hutter, 2017);
    - ``linear``: a straight line from the peak to ``minimum``;
    - ``constant``: the peak;
    - ``wsd``: warm-up, stable, decay (Hu et al., 2024, "MiniCPM"): the peak until the last ``decay_steps``
      steps, which fall on a straight line to ``minimum`` (the shape 1 - sqrt of Haegele et al., 2024, is not
      offered).

    A decay arrives at ``minimum`` at step ``steps``, one after the last: with ``minimum`` 0 no step of the
    run is spent on a rate of 0. Steps past the end stay at ``minimum`` (``constant``: at the peak).

    Args:
        peak: highest learning rate, above 0.
        steps: number of steps of the whole run.
        warmup_steps: length of the warm-up, 0 to ``steps``.
        kind: one of ``KINDS``.
        minimum: learning rate the decay ends at, 0 to ``peak``; ``constant`` takes only 0 or ``peak``.
        decay_steps: length of the decay of ``wsd``, 1 to ``steps - warmup_steps``; ``None`` for the other
        kinds.

    Raises:
        UserError: a value outside these bounds.
    """

    peak: float
    steps: int
    warmup_steps: int
    kind: str
    minimum: float
    decay_steps: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"learning rate: kind must be one of {', '.join(KINDS)}; given {self.kind!r}.")
        if not (math.isfinite(self.peak) and self.peak > 0):
            raise UserError(f"learning rate: the peak must be a finite number above 0; given {self.peak}.")
        if not 0 <= self.minimum <= self.peak:
            raise UserError(
                f"learning rate: the minimum must lie between 0 and the peak {self.peak}; "
                f"given {self.minimum}."
            )
        if self.steps < 1:
            raise UserError(f"learning rate: a run has at least 1 step; given {self.steps}.")
        if not 0 <= self.warmup_steps <= self.steps:
            raise UserError(
                f"learning rate: the warm-up must be 0 to {self.steps} steps long, the length of the run; "
                f"given {self.warmup_steps}."
            )
        if self.kind == "constant" and self.minimum not in (0, self.peak):
            raise UserError(
                f"learning rate: kind constant never decays, so a minimum of {self.minimum} would have no "
                f"effect; give 0, or choose one of the kinds cosine, linear, wsd."
            )
        self._check_decay_steps()

    def _check_decay_steps(self) -> None:
        if self.kind != "wsd":
            if self.decay_steps is not None:
                raise UserError(
                    f"learning rate: decay_steps belongs to kind wsd; kind {self.kind} was given "
                    f"{self.decay_steps}. Leave it out or choose kind wsd."
                )
            return
        longest = self.steps - self.warmup_steps
        if longest < 1:
            raise UserError(
                f"learning rate: kind wsd needs at least 1 step of decay after the warm-up, but the warm-up "
                f"takes all {self.steps} steps; shorten it to {self.steps - 1} at most."
            )
        if self.decay_steps is None:
            raise UserError(
                f"learning rate: kind wsd needs decay_steps, 1 to {longest}; a fifth of the run, "
                f"{min(longest, max(1, self.steps // 5))}, is usual."
            )
        if not 1 <= self.decay_steps <= longest:
            raise UserError(
                f"learning rate: decay_steps must be 1 to {longest} (steps {self.steps} less the warm-up "
                f"{self.warmup_steps}); given {self.decay_steps}."
            )

    def __call__(self, step: int) -> float:
        """Learning rate of ``step``, counted from 0.

        Raises:
            UserError: a negative step.
        """
        if step < 0:
            raise UserError(f"learning rate: steps count from 0; given {step}.")
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if self.kind == "constant":
            return self.peak
        # The last step at the peak: the decay is a straight piece (or half cosine) from here to step `steps`.
        last_peak = max(self.warmup_steps - 1, 0)
        if self.decay_steps is not None:
            last_peak = max(self.steps - self.decay_steps - 1, 0)
        if step <= last_peak:
            return self.peak
        progress = min((step - last_peak) / (self.steps - last_peak), 1.0)
        share = 0.5 * (1.0 + math.cos(math.pi * progress)) if self.kind == "cosine" else 1.0 - progress
        return self.minimum + (self.peak - self.minimum) * share
