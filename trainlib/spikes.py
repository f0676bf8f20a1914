"""Which step is a spike: its loss or gradient norm stands far above those of the steps before it.

The rule of OLMo 2's SkipStepOptimizer (OLMo et al. 2024; OLMo-core), with one step between the
window and the step that it judges: a GPU's host learns of a step while the next one runs, and the
verdict must be the same there, on a CPU and after a resume.

A spike enters the window like any other step. So a loss that has risen for good is taken for
normal after four steps (a share p of the window at the new level is enough once 1 - p < 36 p), and
no run skips all of its steps.
"""

import math
from typing import NamedTuple

WINDOW = 128
SIGMAS = 6.0
_LAG = 2  # the newest step that counts for step k is k - 2

Recent = list[list[float]]
"""Step, loss and gradient norm of the newest finite steps, oldest first; plain data for JSON."""


class Level(NamedTuple):
    """Mean and standard deviation of one quantity over a window."""

    mean: float
    deviation: float

    @property
    def limit(self) -> float:
        """The largest value that is no spike; infinite where nothing varies."""
        return self.mean + SIGMAS * self.deviation if self.deviation > 0 else math.inf


def levels(recent: Recent, step: int) -> list[Level]:
    """The levels of loss and gradient norm that ``step`` is judged by; none before the window is
    full."""
    known = [values for when, *values in recent if when <= step - _LAG][-WINDOW:]
    if len(known) < WINDOW:
        return []
    return [_level(column) for column in zip(*known, strict=True)]


def remember(recent: Recent, step: int, loss: float, grad_norm: float) -> None:
    """Adds a finite step, and forgets what no later one needs."""
    recent.append([step, loss, grad_norm])
    del recent[: -(WINDOW + _LAG - 1)]


def _level(values: tuple[float, ...]) -> Level:
    # fsum: no rounding that a change of the window's order could show.
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return Level(mean, math.sqrt(variance))
