"""What a run folder says: its options, its evaluation, and its records as lines to draw.

``metrics.jsonl`` may have millions of lines: it is read once, and of each line to draw no more is
kept than a picture shows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

NUM_POINTS = 2_000  # of a line, on a picture that is less than 2,000 pixels wide
HALF_LIFE_SHARE = 0.02  # of the run: how far back the smoothing looks
_LOWER_IS_BETTER = ("loss", "mae", "rmse", "perplexity", "bits_per_byte", "calibration_error")
_TAIL_BYTES = 1 << 20  # in which the last line stands
_LEFT_OUT = ("speed/", "memory/")


class NotARun(ValueError):
    """A folder does not hold a run; the message names it and what is missing."""


def read_config(run: Path) -> dict[str, Any]:
    """The resolved options of a run.

    Raises:
        NotARun: there is no readable ``config.yaml``.
    """
    try:
        config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    except OSError as error:
        raise NotARun(f"{run}: a run folder holds config.yaml, which cannot be read "
                      f"({error.strerror}); give the folder that --run_dir named") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise NotARun(f"{run}: config.yaml is not valid YAML "
                      f"({' '.join(str(error).split())}); restore it from best/") from error
    if not isinstance(config, dict):
        raise NotARun(f"{run}: config.yaml is a mapping of options in a run folder, got "
                      f"{type(config).__name__}; give the folder that --run_dir named")
    return config


def read_json(file: Path) -> dict[str, Any]:
    """A file of JSON, or nothing where it is missing or damaged."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def finite(value: Any) -> float:
    """A logged value as a number; NaN where it is none, or one without end."""
    if not isinstance(value, int | float):
        return math.nan
    try:
        number = float(value)
    except OverflowError:  # an integer of hundreds of digits
        return math.nan
    return number if math.isfinite(number) else math.nan


def lower_is_better(key: str) -> bool:
    """Whether less of a logged key is better, as for the choice of the best weights."""
    return key.endswith(_LOWER_IS_BETTER)


def thin(steps: np.ndarray, values: np.ndarray, num_points: int) -> np.ndarray:
    """Which of many points to draw: the first, the last, and the extremes of equal stretches.

    Of a stretch with NaN in it, where the line has a gap, the first NaN is kept as well.

    Args:
        steps, values: [points], the steps ascending.
        num_points: about how many are kept.

    Returns:
        [kept] int64, ascending.
    """
    if len(steps) <= num_points:
        return np.arange(len(steps))
    num_stretches = max(num_points // 2 - 1, 1)
    stretch = ((steps - steps[0]) / (steps[-1] - steps[0]) * num_stretches).astype(np.int64)
    keep = [[0, len(steps) - 1]]
    missing = np.flatnonzero(np.isnan(values))
    present = np.flatnonzero(~np.isnan(values))
    keep.append(missing[np.unique(stretch[missing], return_index=True)[1]])
    for sign in (1, -1):
        # Stable: of equal extremes the first.
        order = present[np.lexsort((sign * values[present], stretch[present]))]
        keep.append(order[np.unique(stretch[order], return_index=True)[1]])
    return np.unique(np.concatenate(keep)).astype(np.int64)


class Line:
    """Points by step, thinned as they come."""

    def __init__(self, num_points: int = NUM_POINTS):
        self.num_points = num_points
        self._steps: list[float] = []
        self._values: list[float] = []

    def add(self, step: float, value: float) -> None:
        """Takes a point in; one of an earlier step replaces all from there on."""
        while self._steps and self._steps[-1] >= step:
            self._steps.pop()
            self._values.pop()
        self._steps.append(step)
        self._values.append(value)
        if len(self._steps) >= 8 * self.num_points:
            steps, values = self.points()
            self._steps, self._values = steps.tolist(), values.tolist()

    def points(self) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values, about ``num_points`` of them; a value is NaN where there is none."""
        steps, values = np.array(self._steps, float), np.array(self._values, float)
        kept = thin(steps, values, self.num_points)
        return steps[kept], values[kept]


class Smoother:
    """An exponential average over steps that owes nothing to a start at zero.

    With records at equal distances it is Adam's bias-corrected average (Kingma & Ba 2015,
    arXiv:1412.6980, section 3); a missing value has no weight. Where records are further apart
    than a half-life, the last still counts as much as all before it.
    """

    def __init__(self, half_life_steps: float):
        self.half_life_steps = half_life_steps
        self._sum = self._weight = 0.0
        self._step: float | None = None

    def add(self, step: float, value: float) -> float:
        """Takes a value in and returns the average; NaN for NaN."""
        if math.isnan(value):
            return value
        gap = 0.0 if self._step is None else max(step - self._step, 0.0)
        decay = 0.5 ** min(gap / self.half_life_steps, 1.0)
        self._step = step
        self._sum = self._sum * decay + value
        self._weight = self._weight * decay + 1.0
        return self._sum / self._weight


@dataclass
class Curves:
    """The records of a run, by logged key."""

    lines: dict[str, Line] = field(default_factory=dict)
    smoothed: dict[str, Line] = field(default_factory=dict)
    """Of what is noisy: the losses of training steps and the norm of their gradient."""
    last_step: float = 0.0
    epochs_per_step: float = 0.0

    def best(self, key: str) -> tuple[float, float] | None:
        """Step and value of the first best of a key, if there is one."""
        if key not in self.lines:
            return None
        steps, values = self.lines[key].points()
        if not np.isfinite(values).any():
            return None
        at = np.nanargmin(values) if lower_is_better(key) else np.nanargmax(values)
        return float(steps[at]), float(values[at])


def read_curves(run: Path) -> Curves:
    """The records of ``metrics.jsonl``; a line that is not whole is left out."""
    file, curves = run / "metrics.jsonl", Curves()
    half_life_steps = max(_last_step(file) * HALF_LIFE_SHARE, 1e-9)
    smoothers: dict[str, Smoother] = {}
    for record in read_records(file):
        step, epoch = record.pop("step"), finite(record.pop("epoch", None))
        curves.last_step = max(curves.last_step, step)
        if step > 0 and epoch >= 0:
            curves.epochs_per_step = epoch / step
        for key, value in record.items():
            if key.startswith(_LEFT_OUT):
                continue
            value = finite(value)  # written null where it was not
            if key not in curves.lines:
                curves.lines[key] = Line()
                if key.startswith("train/") and key != "train/lr":
                    curves.smoothed[key], smoothers[key] = Line(), Smoother(half_life_steps)
            curves.lines[key].add(step, value)
            if key in smoothers:
                curves.smoothed[key].add(step, smoothers[key].add(step, value))
    return curves


def read_records(file: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a file of records, in their order; none where it cannot be read."""
    with suppress(OSError), file.open("rb") as lines:
        for line in lines:
            record = _record(line)
            if record is not None:
                yield record


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_whole = isinstance(record, dict) and math.isfinite(finite(record.get("step")))
    return record if is_whole else None


def _last_step(file: Path) -> float:
    """The step of the last whole line, 0 if there is none."""
    try:
        with file.open("rb") as lines:
            lines.seek(max(file.stat().st_size - _TAIL_BYTES, 0))
            tail = lines.read().splitlines()
    except OSError:
        return 0.0
    return next((float(record["step"]) for line in reversed(tail) if (record := _record(line))),
                0.0)
