"""A learning-rate range test while it runs: rates, stop rule, the loop over both.

What the finished curve says is ``lr_suggestion``'s.
"""

import math
import statistics
from collections.abc import Callable, Sequence

import numpy as np

LR_MIN, LR_MAX, NUM_STEPS = 1e-7, 10.0, 100  # of a sweep that is not asked for otherwise
MIN_STEPS = 20
_LARGEST_LEAP = 30  # from one rate to the next


def sweep_rates(
    lr_min: float = LR_MIN, lr_max: float = LR_MAX, num_steps: int = NUM_STEPS,
    spacing: str = "exponential",
) -> list[float]:
    """The learning rate of each step, both ends included exactly.

    Args:
        spacing: "exponential" (equal factors) or "linear" (equal differences).

    Raises:
        ValueError: ends that are not 0 < lr_min < lr_max, too few steps, no such spacing, or a
            linear sweep that leaps over decades.
    """
    if not 0 < lr_min < lr_max < math.inf:
        raise ValueError(f"a sweep goes from lr_min, above 0, up to lr_max, got {lr_min} and "
                         f"{lr_max}")
    if num_steps < MIN_STEPS:
        raise ValueError(f"a sweep has at least {MIN_STEPS} steps, got {num_steps}")
    if spacing not in ("exponential", "linear"):
        raise ValueError(f'the spacing is "exponential" or "linear", not {spacing!r}')
    between = np.geomspace if spacing == "exponential" else np.linspace
    rates = between(lr_min, lr_max, num_steps).tolist()
    if rates[1] > _LARGEST_LEAP * rates[0]:
        raise ValueError(f"a linear sweep from {lr_min:g} to {lr_max:g} leaps to {rates[1]:.2g} at "
                         "its second step, and the curve in between is not seen: give a larger "
                         "lr_min, or spacing exponential")
    return rates


class StopRule:
    """Says when a sweep has seen enough; processes that feed it the same losses stop alike.

    It stops where the smoothed loss is above ``best + k * (first - best)``, which has the same
    meaning for losses of any sign, and at a loss that is not finite. ``first`` is the median of
    the first tenth, in which only the latter stops. Until the loss has fallen the rule would stop
    at any noise, so the rise also has to be 5 times the mean change from step to step.
    """

    def __init__(self, num_steps: int = NUM_STEPS, k: float = 2.0):
        """The smoothing spans a tenth of ``num_steps``; with ``k = 1``, back at first is enough."""
        self.k = k
        self.beta = max(0.0, 1 - 10 / num_steps)
        self.num_first = max(3, num_steps // 10)
        self.losses: list[float] = []
        self._total = self._mean = self._changes = 0.0
        self._best = math.inf

    def update(self, loss: float) -> bool:
        """Takes the loss of one step; whether the sweep stops after it."""
        if not math.isfinite(loss):
            return True
        self._changes += abs(loss - self.losses[-1]) if self.losses else 0.0
        self.losses.append(loss)
        # The exponential mean, unbiased, which leaves a constant loss exactly as it is.
        self._total = self.beta * self._total + 1
        self._mean += (loss - self._mean) / self._total
        if len(self.losses) <= self.num_first:
            return False
        first = statistics.median(self.losses[: self.num_first])
        self._best = min(self._best, first, self._mean)
        mean_change = self._changes / (len(self.losses) - 1)
        needed = max(self.k * (first - self._best), 5 * mean_change)
        return self._mean - self._best > needed


def drive(
    step: Callable[[int, float], float | None], rates: Sequence[float], stop_rule: StopRule
) -> tuple[list[float], list[float]]:
    """Runs a sweep: one call of ``step`` a rate, until the rule stops it.

    ``step(number, lr)`` returns the loss before its update, or None where the update was skipped.

    Returns:
        The rates and losses of the steps that were not skipped. A last loss that is not finite is
        kept, and stands for last steps that were skipped: it tells ``suggest`` that the sweep did
        not merely run out of rates.
    """
    lrs, losses = [], []
    for number, lr in enumerate(rates):
        loss = step(number, lr)
        if loss is None and number == len(rates) - 1:
            loss = math.nan
        if loss is None:
            continue
        lrs.append(lr)
        losses.append(loss)
        if stop_rule.update(loss):
            break
    return lrs, losses
