"""Learning-rate multipliers and durations: pure functions of the step.

A multiplier is never 0 at a step that is taken: warm-up starts above it and every decay reaches
its end one step after the last. Nothing here has state, so nothing needs restoring.
"""

import math
import re
from collections.abc import Callable

_DURATION = re.compile(
    r"\s*([0-9]+(?:\.[0-9]*)?(?:e[-+]?[0-9]+)?)\s*(epochs?|steps?|%)\s*", re.IGNORECASE
)

# Each shape maps progress in [0, 1) after warm-up to a factor that falls from 1 towards 0.
SHAPES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    # Loshchilov & Hutter 2017 (SGDR), equation 5, one cycle: (1 + cos(pi p)) / 2, in the form
    # that keeps its digits near the end.
    "cosine": lambda progress: math.sin(math.pi / 2 * (1.0 - progress)) ** 2,
}


def lr_multiplier(
    name: str, step: int, total_steps: int, warmup_steps: int = 0, final_fraction: float = 0.0
) -> float:
    """The factor on the peak learning rate at one step.

    Args:
        name: one of ``SHAPES``.
        step: 0 for the first; steps past the end are clamped to the last.
        total_steps: steps of the run, >= 1.
        warmup_steps: linear rise, (step + 1) / (warmup_steps + 1), as torch's LinearLR with
            ``start_factor=1 / (warmup_steps + 1)`` and ``total_iters=warmup_steps``.
        final_fraction: the factor that the shape falls to just after the last step.

    Returns:
        In (0, 1].
    """
    step = min(step, total_steps - 1)
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return final_fraction + (1.0 - final_fraction) * SHAPES[name](progress)


def check_duration(text: str) -> str:
    """``text`` itself if it reads like ``"20 epochs"``, ``"500 steps"`` or ``"5%"``.

    Raises:
        ValueError: it does not.
    """
    match = _DURATION.fullmatch(text)
    if match is None or not float(match[1]) < 1e15:
        raise ValueError('a duration reads like "20 epochs", "500 steps" or "5%"')
    return text


def duration_steps(
    text: str, num_samples: int, global_size: int, total_steps: int | None = None
) -> int:
    """The steps that a duration means.

    Args:
        text: "E epochs" is ceil(E * num_samples / global_size) steps; "P%" is that share of
            ``total_steps``, rounded.
        total_steps: needed for a percentage only.

    Raises:
        ValueError: no duration, or a percentage where the run's own length is meant.
    """
    match = _DURATION.fullmatch(check_duration(text))
    number, unit = float(match[1]), match[2].lower()
    if unit == "%":
        if total_steps is None:
            raise ValueError(f"{text!r}: the run's own length cannot be a percentage of itself")
        return round(number / 100 * total_steps)
    if unit.startswith("step"):
        return math.ceil(number)
    return math.ceil(number * num_samples / global_size - 1e-9)


def is_time(step: int, every_steps: int, total_steps: int) -> bool:
    """Whether what is due every ``every_steps`` is due after ``step`` steps; always at the end."""
    return step == total_steps or (every_steps > 0 and step % every_steps == 0)
