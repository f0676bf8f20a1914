"""Learning-rate multipliers and durations: pure functions of the step.

Every decay reaches its end one step after the last, so no step that is taken has multiplier 0
(powers of ``factor`` may underflow in the end). Nothing here has state, so nothing needs restoring.
"""

import inspect
import math
import re
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

from pydantic import AfterValidator

_DURATION = re.compile(
    r"\s*([0-9]+(?:\.[0-9]*)?(?:e[-+]?[0-9]+)?)\s*(epochs?|steps?|%)\s*", re.IGNORECASE
)
_CLOCK_TIME = re.compile(
    r"\s*([0-9]+(?:\.[0-9]*)?(?:e[-+]?[0-9]+)?)\s*(second|minute|hour)s?\s*", re.IGNORECASE
)
_SECONDS = {"second": 1, "minute": 60, "hour": 3600}

# A fall from 1 towards 0, by the share (0, 1] of it that is left.
_FALLS: dict[str, Callable[[float], float]] = {
    "linear": lambda left: left,
    # Loshchilov & Hutter 2017 (SGDR), equation 5, one cycle: (1 + cos(pi p)) / 2, in the form
    # that keeps its digits near the end.
    "cosine": lambda left: math.sin(math.pi / 2 * left) ** 2,
    # Haegele et al. 2024 (arXiv 2405.18392), section 3: 1 - sqrt(p), likewise.
    "sqrt": lambda left: left / (1 + math.sqrt(1 - left)),
}


# A shape maps a step in [0, end) to [0, 1]; ``start`` is the first step after warm-up. Keywords are
# the user's ``args``; a default that is a duration is turned into steps by ``resolve_args``.
def _constant(step: int, start: int, end: int) -> float:
    return 1.0


def _linear(step: int, start: int, end: int) -> float:
    return (end - step) / (end - start)


def _cosine(step: int, start: int, end: int) -> float:
    return _FALLS["cosine"]((end - step) / (end - start))


def _polynomial(step: int, start: int, end: int, *, power: float = 2.0) -> float:
    """The share left to the power; 0.9 is the "poly" of Chen et al. 2016 (arXiv 1606.00915)."""
    return ((end - step) / (end - start)) ** power


def _exponential(
    step: int, start: int, end: int, *, factor: float = 0.95, every: int | str = "1 epoch"
) -> float:
    """Falls by ``factor`` each ``every`` after warm-up, a little at each step."""
    return factor ** ((step - start) / every)


def _step(
    step: int, start: int, end: int, *, factor: float = 0.1, every: int | str = "30%"
) -> float:
    """Drops by ``factor`` each ``every`` of the run, warm-up included."""
    return factor ** (step // every)


def _multistep(
    step: int, start: int, end: int, *, factor: float = 0.1,
    at: Sequence[int | str] = ("50%", "75%"),
) -> float:
    """Drops by ``factor`` at each of these times of the run, warm-up included."""
    return factor ** bisect_right(at, step)


def _one_cycle(step: int, start: int, end: int, *, start_fraction: float = 0.04) -> float:
    """Rises and falls by a cosine: Smith & Topin 2018 (arXiv 1708.07120), in fastai's form."""
    if step < start:
        return start_fraction + (1 - start_fraction) * _FALLS["cosine"](step / start)
    return _cosine(step, start, end)


def _wsd(
    step: int, start: int, end: int, *, decay: int | str = "20%", shape: str = "linear"
) -> float:
    """Warm-up, stable, decay: Hu et al. 2024 (MiniCPM, arXiv 2404.06395), section 4."""
    return _FALLS[shape](min(1.0, (end - step) / decay))


def _plateau(
    step: int, start: int, end: int, *, factor: float = 0.1, patience: int = 5,
    threshold: float = 1e-4, cooldown: int = 0,
) -> float:
    """Constant here: the reductions depend on evaluations, see ``progress.Progress``."""
    return 1.0


SHAPES: dict[str, Callable[..., float]] = {
    "constant": _constant, "linear": _linear, "cosine": _cosine, "polynomial": _polynomial,
    "exponential": _exponential, "step": _step, "multistep": _multistep, "one_cycle": _one_cycle,
    "wsd": _wsd, "plateau": _plateau,
}
# These end where they end: for them the final fraction is a floor.
_FLOORED = ("exponential", "step", "multistep")


def lr_multiplier(
    name: str, step: int, total_steps: int, warmup_steps: int = 0, final_fraction: float = 0.0,
    **args: Any,
) -> float:
    """The factor on the peak learning rate at one step.

    Args:
        name: one of ``SHAPES``.
        step: 0 for the first; steps past the end are clamped to the last.
        total_steps: steps of the run, >= 1.
        warmup_steps: linear rise, (step + 1) / (warmup_steps + 1), as torch's LinearLR with
            ``start_factor=1 / (warmup_steps + 1)`` and ``total_iters=warmup_steps``; ``one_cycle``
            rises by its own cosine.
        final_fraction: the factor that the shape falls to just after the last step, or never below.
        args: the shape's own, from ``resolve_args``.

    Returns:
        In (0, 1].
    """
    step = min(step, total_steps - 1)
    warms_up = step < warmup_steps
    if warms_up and name != "one_cycle":
        return (step + 1) / (warmup_steps + 1)
    share = SHAPES[name](step, warmup_steps, total_steps, **args)
    if name in _FLOORED:
        return max(share, final_fraction)
    return share if warms_up else final_fraction + (1.0 - final_fraction) * share


def shape_args(name: str) -> dict[str, Any]:
    """The arguments that a shape takes, with their defaults; lengths are durations."""
    parameters = inspect.signature(SHAPES[name]).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_length(value: Any) -> bool:
    match = _DURATION.fullmatch(value) if isinstance(value, str) else None
    return match is not None and 0 < float(match[1]) < 1e15


# What holds for an argument, whichever shape takes it.
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "factor": (lambda v: _is_number(v) and 0 < v < 1, "a number between 0 and 1"),
    "power": (lambda v: _is_number(v) and v > 0, "a number above 0"),
    "start_fraction": (lambda v: _is_number(v) and 0 < v <= 1, "a number above 0, at most 1"),
    "threshold": (lambda v: _is_number(v) and 0 <= v < 1, "a number from 0 to below 1"),
    "patience": (_is_count, "a whole number, 0 or more"),
    "cooldown": (_is_count, "a whole number, 0 or more"),
    "every": (_is_length, 'a time above 0 such as "10 epochs", "500 steps" or "30%"'),
    "decay": (_is_length, 'a time above 0 such as "10 epochs", "500 steps" or "20%"'),
    "at": (
        lambda v: isinstance(v, list | tuple) and len(v) > 0 and all(map(_is_length, v)),
        'a list of times above 0 such as ["50%", "75%"]',
    ),
    "shape": (lambda v: v in tuple(_FALLS), f"one of {', '.join(_FALLS)}"),
}


def check_args(name: str, args: Mapping[str, Any]) -> None:
    """Checks a shape's arguments as far as that goes without the length of the run.

    Raises:
        ValueError: a name that the shape does not take, or a value that cannot be meant.
    """
    takes = shape_args(name)
    for key, value in args.items():
        if key not in takes:
            raise ValueError(f"args: {name} does not take {key!r}; it takes "
                             f"{', '.join(takes) or 'nothing'}")
        holds, rule = _RULES[key]
        if not holds(value):
            raise ValueError(f"args: {key} of {name} is {rule}, not {value!r}")


def resolve_args(
    name: str, args: Mapping[str, Any], num_samples: int, global_size: int, total_steps: int,
    warmup_steps: int,
) -> dict[str, Any]:
    """All arguments of a shape for ``lr_multiplier``: defaults filled in, lengths in steps, >= 1.

    Raises:
        ValueError: as ``check_args``; drops out of order; a run shorter than its phases.
    """
    check_args(name, args)

    def steps(text: str) -> int:
        return max(1, duration_steps(text, num_samples, global_size, total_steps))

    resolved = shape_args(name) | dict(args)
    for key in {"every", "decay"} & set(resolved):
        resolved[key] = steps(resolved[key])
    if "at" in resolved:
        times, resolved["at"] = resolved["at"], [steps(text) for text in resolved["at"]]
        if resolved["at"] != sorted(resolved["at"]):
            raise ValueError(f"args: at of multistep is in ascending order, not {list(times)}, "
                             f"which are steps {resolved['at']}")
    if "decay" in resolved:
        # Both lengths are rounded, so halves of an odd run may come to one step too many.
        if warmup_steps + resolved["decay"] > total_steps + 1:
            raise ValueError(
                f"args: decay of wsd is {resolved['decay']} steps after a warm-up of "
                f"{warmup_steps}, the whole run has {total_steps}; shorten either"
            )
        resolved["decay"] = max(1, min(resolved["decay"], total_steps - warmup_steps))
    return resolved


def check_duration(text: str) -> str:
    """``text`` itself if it reads like ``"20 epochs"``, ``"500 steps"`` or ``"5%"``.

    Raises:
        ValueError: it does not.
    """
    match = _DURATION.fullmatch(text)
    if match is None or not float(match[1]) < 1e15:
        raise ValueError('a duration reads like "20 epochs", "500 steps" or "5%"')
    return text


Duration = Annotated[str, AfterValidator(check_duration)]
"""The type of an option that is a duration."""


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


def check_interval(text: str) -> str:
    """``text`` itself if it is a duration or reads like ``"10 minutes"`` or ``"2 hours"``.

    Raises:
        ValueError: it is neither, or no time at all.
    """
    match = _CLOCK_TIME.fullmatch(text) or _DURATION.fullmatch(text)
    if match is None or not 0 < float(match[1]) < 1e15:
        raise ValueError('an interval reads like "30 seconds", "10 minutes", "1 epoch", "500 '
                         'steps" or "5%"')
    return text


def interval(
    text: str, num_samples: int, global_size: int, total_steps: int
) -> tuple[int, float | None]:
    """What an interval means: (steps, none), at least one step, or (0, seconds)."""
    match = _CLOCK_TIME.fullmatch(check_interval(text))
    if match is not None:
        return 0, float(match[1]) * _SECONDS[match[2].lower()]
    return max(1, duration_steps(text, num_samples, global_size, total_steps)), None


def check_clock_time(text: str) -> str:
    """``text`` itself if it reads like ``"30 seconds"``, ``"10 minutes"`` or ``"2 hours"``.

    Raises:
        ValueError: it does not, or is less than a second.
    """
    if not 1 <= _clock_seconds(text) < 1e9:
        raise ValueError('a time reads like "30 seconds", "10 minutes" or "2 hours", and is a '
                         "second at least")
    return text


def _clock_seconds(text: str) -> float:
    match = _CLOCK_TIME.fullmatch(text)
    return 0.0 if match is None else float(match[1]) * _SECONDS[match[2].lower()]


def clock_seconds(text: str) -> float:
    """The seconds that a time by the clock means.

    Raises:
        ValueError: as ``check_clock_time``.
    """
    return _clock_seconds(check_clock_time(text))


def is_time(step: int, every_steps: int, total_steps: int) -> bool:
    """Whether what is due every ``every_steps`` is due after ``step`` steps; always at the end."""
    return step == total_steps or (every_steps > 0 and step % every_steps == 0)
