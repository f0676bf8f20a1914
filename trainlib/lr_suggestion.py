"""What a finished learning-rate sweep suggests, and how sure it is; pure functions.

The curve is read off a local linear fit of the loss over log lr, since a fall over lr itself is
steepest wherever lr is smallest. Methods look at stretches of the fit, because single points wander
with the noise. Nothing depends on the unit or the zero of the loss, so negative losses are like any
other. The default was chosen by measurement: benchmarks/lr_regret.py.
"""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_MIN_POINTS = 10  # of a sweep that ended early; fewer cannot tell a fall from noise
_GRID = 201  # rates at which the fitted curve is read, evenly spaced over log lr
# Half of the fit's window over the sweep's log range. Of 0.10 to 0.27, on ten families of synthetic
# curves and sweeps of 5 to 10 decades: narrower loses to noise, wider blends neighbouring falls.
_HALF_WIDTH = 0.13
_MIN_NEIGHBOURS = 5  # the window widens to hold so many, where a sweep is short or linear
# The next three: least regret over the jobs of benchmarks/lr_regret.py, three sweeps of each, and
# flat around it: 0.3 to 0.5 of 0.2 to 0.8, 0.15 to 0.4 of 0.1 to 1, 1.7 to 2.5 of 1.4 to 3.3.
_STEEP = 0.5  # of the steepest slope: the stretch around it
_RISE = 0.3  # of the fall before it: such a rise ends the curve
_BEFORE_THE_EDGE = 2
# A fall is real from so many of its standard errors on; with 20 points 3 % of sweeps of pure noise
# have one, with 50 or more under 1 %.
_LIMIT = 4.5

NOT_FINITE = ("the loss is not finite before the first update: look at the data, the loss or the "
              "precision")
DIVERGES = "the loss blows up after too few rates"
NO_FALL = "the loss never falls by more than its noise"
STILL_FALLS = "the loss still falls at the last rate: give a larger sweep.lr_max"


class _Curve(NamedTuple):
    """A local linear fit of a sweep, read on an even grid over log lr."""

    log_lrs: np.ndarray
    levels: np.ndarray
    slopes: np.ndarray
    falls: bool
    """By more than the noise, from any point to a later one."""
    num_points: int


def _fit(log_lrs: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The weights, [grid, points] each, that make losses into levels and into slopes.

    Source: local linear regression with the tricube weights of Cleveland 1979, over a window of
    fixed width and without his robustness steps.
    """
    offsets = log_lrs[None, :] - at[:, None]
    distances = np.abs(offsets)
    nearest = np.partition(distances, _MIN_NEIGHBOURS, axis=1)[:, _MIN_NEIGHBOURS]
    half_width = np.maximum(_HALF_WIDTH * (at[-1] - at[0]), 1.01 * nearest)
    weights = (1 - np.minimum(distances / half_width[:, None], 1) ** 3) ** 3
    weights /= weights.sum(1, keepdims=True)
    centre = (weights * offsets).sum(1, keepdims=True)
    slopes = weights * (offsets - centre)
    slopes /= (slopes * offsets).sum(1, keepdims=True)
    return weights - centre * slopes, slopes


def _noise(log_lrs: np.ndarray, losses: np.ndarray) -> float:
    """The standard deviation of the noise: of each point against the line of its neighbours.

    A quantile does not see the few points where the curve bends; this one is surer than the median.
    """
    share = (log_lrs[1:-1] - log_lrs[:-2]) / (log_lrs[2:] - log_lrs[:-2])
    expected = losses[:-2] + share * (losses[2:] - losses[:-2])
    errors = (losses[1:-1] - expected) / np.sqrt(1 + share**2 + (1 - share) ** 2)
    return float(np.quantile(np.abs(errors), 0.6827))  # the share within one standard deviation


def _read(lrs: Sequence[float], losses: Sequence[float]) -> _Curve | None:
    """The curve without its blow-up; None where too little is left."""
    rates, values = np.asarray(lrs, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    if len(rates) != len(values) or not (np.diff(rates, prepend=0) > 0).all():
        raise ValueError("a curve has one loss for each rate, and its rates are above 0 and "
                         f"ascending; got {len(rates)} rates and {len(values)} losses")
    values = values[: int(np.argmin(np.append(np.isfinite(values), False)))]
    if len(values) < _MIN_POINTS:
        return None
    # A blow-up says nothing about the fall, but would reach back into the fits beside it: the
    # curve ends where the losses stay as far above the first ones as the lowest is below.
    first = np.median(values[: max(3, len(values) // 10)])
    length = np.flatnonzero(values <= first + (first - values.min()))[-1] + 1
    if length < max(_MIN_POINTS, len(rates) // 5):
        return None
    while True:
        curve, rises_at = _fitted(np.log(rates[:length]), values[:length])
        shorter = int(np.searchsorted(np.log(rates[:length]), rises_at, side="right"))
        if shorter >= length:
            return curve
        if shorter < _MIN_POINTS:
            return None
        length = shorter


def _fitted(log_lrs: np.ndarray, losses: np.ndarray) -> tuple[_Curve, float]:
    """The fit, and the log lr of its first rise out of a fall, infinite where there is none.

    After a rise the net is another one: what it then regains at rates ten or a hundred times as
    large, often the steepest fall of all, says nothing about training from the start.
    """
    values = losses - losses[0]
    scale = np.abs(values).max()
    # Rounding is no fall: it has no noise around it, so the tests below would believe it.
    is_flat = scale <= 1e-12 * np.abs(losses).max()
    values = np.zeros(len(losses)) if is_flat else values / scale
    at = np.linspace(log_lrs[0], log_lrs[-1], _GRID)
    to_levels, to_slopes = _fit(log_lrs, at)
    levels, variances = to_levels @ values, (to_levels**2).sum(1)
    errors = _noise(log_lrs, values) * np.sqrt(variances[:, None] + variances[None, :])
    least = np.maximum(_LIMIT * errors, 1e-9)
    falls = np.triu(levels[:, None] - levels[None, :] > least)
    here = np.arange(_GRID)
    lowest = np.array([np.argmin(levels[: index + 1]) for index in here])
    highest = np.array([np.argmax(levels[: index + 1]) for index in lowest])
    fall, rise = levels[highest] - levels[lowest], levels - levels[lowest]
    rises = (rise > np.maximum(_RISE * fall, least[lowest, here])) & (fall > least[highest, lowest])
    curve = _Curve(at, levels, to_slopes @ values, bool(falls.any()), len(losses))
    return curve, float(at[np.argmax(rises)]) if rises.any() else math.inf


def _steep_stretch(curve: _Curve) -> slice:
    """The grid points around the steepest slope with slopes like it."""
    gentle = np.flatnonzero(curve.slopes > _STEEP * curve.slopes.min())
    gentle = np.concatenate([[-1], gentle, [_GRID]])
    after = int(np.searchsorted(gentle, np.argmin(curve.slopes)))
    return slice(int(gentle[after - 1]) + 1, int(gentle[after]))


def edge(lrs: Sequence[float], losses: Sequence[float]) -> float | None:
    """Half the rate at which the steep stretch of the fall ends; None as for ``steepest``.

    Source: Smith 2017, arXiv 1506.01186, section 3.3: the largest useful rate is where the curve
    slows, becomes ragged or turns, and the best is within a factor of two of the largest.
    """
    if (curve := _read(lrs, losses)) is None or not curve.falls:
        return None
    end = min(_steep_stretch(curve).stop, _GRID - 1)
    return math.exp(curve.log_lrs[end]) / _BEFORE_THE_EDGE


def steepest(lrs: Sequence[float], losses: Sequence[float]) -> float | None:
    """Where the loss falls steepest over log lr; None if it never falls by more than its noise.

    Source: fastai's ``steep``, but of the stretch around that point the centre.
    """
    if (curve := _read(lrs, losses)) is None or not curve.falls:
        return None
    stretch = _steep_stretch(curve)
    excess = _STEEP * curve.slopes.min() - curve.slopes[stretch]
    return math.exp(np.average(curve.log_lrs[stretch], weights=excess))


def valley(lrs: Sequence[float], losses: Sequence[float]) -> float | None:
    """Halfway, in log lr, through the deepest fall, less a tenth of its depth at either end.

    Source: fastai's ``valley``, the middle of the longest fall; the longest may be a plateau.
    """
    if (curve := _read(lrs, losses)) is None or not curve.falls:
        return None
    end = int(np.argmax(np.maximum.accumulate(curve.levels) - curve.levels))
    levels = curve.levels[: end + 1]
    start = int(np.argmax(levels))
    depths = (levels[start] - levels[start:]) / (levels[start] - levels[end])
    inside = start + np.flatnonzero((depths >= 0.1) & (depths <= 0.9))
    return math.exp((curve.log_lrs[inside[0]] + curve.log_lrs[inside[-1]]) / 2)


def minimum_tenth(lrs: Sequence[float], losses: Sequence[float]) -> float | None:
    """A tenth of the rate of the lowest loss (fastai's ``minimum``); None as for ``steepest``."""
    if (curve := _read(lrs, losses)) is None or not curve.falls:
        return None
    return math.exp(curve.log_lrs[np.argmin(curve.levels)]) / 10


METHODS = {"edge": edge, "steepest": steepest, "valley": valley, "minimum_tenth": minimum_tenth}
DEFAULT = "edge"


def fitted_curve(
    lrs: Sequence[float], losses: Sequence[float]
) -> tuple[list[float], list[float]] | None:
    """Rates and losses of the curve that the methods read; None where there is none."""
    if (curve := _read(lrs, losses)) is None:
        return None
    length = int(np.searchsorted(np.log(np.asarray(lrs)), curve.log_lrs[-1], side="right"))
    values = np.asarray(losses[:length], dtype=np.float64)
    scale = np.abs(values - values[0]).max()
    return np.exp(curve.log_lrs).tolist(), (values[0] + scale * curve.levels).tolist()


class Suggestion(NamedTuple):
    """What a sweep says."""

    answer: float | None
    by_method: dict[str, float | None]
    doubt: float | None
    """The factor between the largest and the smallest rate of all methods, and of all sweeps'
    answers; None where there is no answer."""
    verdict: str


def _suggestion(rates: dict[str, float], verdict: str, answers: Sequence[float]) -> Suggestion:
    said = [*rates.values(), *answers]
    doubt = max(said) / min(said)
    verdict += f"; the methods differ by a factor of {doubt:.2g}"
    # Rounded here, once: what is printed, written and trained with is one number.
    return Suggestion(float(f"{rates[DEFAULT]:.2g}"), rates, doubt, verdict)


def _describe(rates: dict[str, float]) -> str:
    return (f"the loss falls steepest at {rates['steepest']:.2g}; half of where that ends is "
            f"{rates['edge']:.2g}")


def _no_answer(verdict: str) -> Suggestion:
    return Suggestion(None, dict.fromkeys(METHODS), None, verdict)


def suggest(lrs: Sequence[float], losses: Sequence[float]) -> Suggestion:
    """The rate to train with, from the unsmoothed losses of a finished sweep.

    Raises:
        ValueError: not one loss for each rate, or rates that are not above 0 and ascending.
    """
    curve = _read(lrs, losses)
    if curve is None and len(losses) and not math.isfinite(losses[0]):
        return _no_answer(NOT_FINITE)
    if curve is None and len(losses):
        return _no_answer(f"{DIVERGES}: give more sweep.steps, and rates from "
                          f"{lrs[0] / 1000:.2g} to {lrs[-1]:.2g}")
    if curve is None or not curve.falls:
        return _no_answer(DIVERGES if curve is None else NO_FALL)
    if _steep_stretch(curve).stop == _GRID and len(losses) == curve.num_points:
        return _no_answer(STILL_FALLS)
    rates = {name: method(lrs, losses) for name, method in METHODS.items()}
    return _suggestion(rates, _describe(rates), ())


def combine(
    runs: Sequence[tuple[Sequence[float], Sequence[float]]],
) -> tuple[tuple[list[float], list[float], list[float], list[float]], Suggestion]:
    """Joins the sweeps of several seeds, one at least.

    Returns:
        The rates, and the median, lowest and highest loss of the sweeps that reached each rate;
        the medians, in log lr, of their answers, where more than half of the sweeps have one.
    """
    at_rate: dict[float, list[float]] = {}
    for lrs, losses in runs:
        for lr, loss in zip(lrs, losses, strict=True):
            if math.isfinite(loss):
                at_rate.setdefault(lr, []).append(loss)
    table = [at_rate[lr] for lr in sorted(at_rate)]
    band = (sorted(at_rate), list(map(statistics.median, table)), list(map(min, table)),
            list(map(max, table)))
    suggestions = [suggest(lrs, losses) for lrs, losses in runs]
    if len(suggestions) == 1:
        return band, suggestions[0]
    answered = [one for one in suggestions if one.answer is not None]
    if 2 * len(answered) <= len(runs):
        silent = [one.verdict for one in suggestions if one.answer is None]
        return band, _no_answer(statistics.mode(silent))
    rates = {name: math.exp(statistics.median(math.log(one.by_method[name]) for one in answered))
             for name in METHODS}
    answers = [one.answer for one in answered]
    return band, _suggestion(
        rates, f"{_describe(rates)}, from {min(answers):.2g} to {max(answers):.2g} in "
        f"{len(answered)} of {len(runs)} sweeps", answers
    )
