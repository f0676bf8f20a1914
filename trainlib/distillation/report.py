"""What of a distillation is logged, and what it says at its end."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from trainlib.distillation.jobs import alone_dir

if TYPE_CHECKING:
    from trainlib.distillation.options import DistillOptions
    from trainlib.guard import StepRecord
    from trainlib.tasks import Task


class Part(NamedTuple):
    """One summand of the loss."""

    key: str
    """Under which its mean is logged."""
    weight: float
    rises: bool
    """Whether its weight rises over the warm-up."""
    counts: str | None
    """Whose items it is the mean over; none: all samples."""


def loss_parts(tasks: list[Task], taught: list[Task], options: DistillOptions) -> list[Part]:
    """The summands, in the order in which the objective gives them."""
    def key(task: Task, name: str) -> str:
        return f"train/{task.name}/{name}" if len(tasks) > 1 else f"train/{name}"

    soft = taught if options.kd_weight > 0 else []
    return [
        *(Part(key(task, "hard_loss"), options.hard_weight * task.weight, False, task.name)
          for task in tasks),
        *(Part(key(task, "kd_loss"), options.kd_weight * task.weight, True, kd_items(task))
          for task in soft),
        *(Part(f"train/features/{pair}", feature.weight, True, None)
          for pair, feature in options.features.items()),
    ]


def kd_items(task: Task) -> str:
    """The name under which a reader counts the items of a task's soft loss."""
    return f"{task.name}, taught"


def logged_losses(
    parts: list[Part], rise: Callable[[int], float], item_counts: Callable[[int], dict[str, int]],
    record: StepRecord,
) -> dict[str, float]:
    """Each part of a step's loss before its weights; none where it has no weight or no items."""
    counts, logged = item_counts(record.step), {}
    for part, share in zip(parts, record.losses, strict=True):
        weight = part.weight * (rise(record.step) if part.rises else 1)
        is_there = weight > 0 and (part.counts is None or counts[part.counts] > 0)
        logged[part.key] = share / weight if is_there else math.nan
    return logged


def results_alone(run_dir: Path) -> dict[str, dict] | None:
    """By task, how good the best weights of the student without teachers are, if there are any."""
    try:
        text = (Path(alone_dir(run_dir)) / "best" / "evaluation.json").read_text(encoding="utf-8")
        return json.loads(text)
    except (OSError, ValueError):
        return None


def of_teachers(
    found: dict[str, dict], results: dict[str, dict], tasks: list[Task],
    logged_metrics: Callable[[list[Task], dict[str, dict]], dict[str, float]],
) -> tuple[dict[str, float], dict[str, float]]:
    """The teachers' metrics and their agreement with the student, as they are logged.

    Args:
        found: by task that they know, what ``Comparison`` has found.
        results: of the student, by task; a task that they do not know is in none of their metrics.
    """
    logged = logged_metrics(
        tasks, {name: found[name]["teacher"] if name in found else result
                for name, result in results.items()})
    if len(found) < len(tasks):
        logged = {key: value for key, value in logged.items()
                  if key.count("/") > 1 and key.split("/")[1] in found}
    key = "eval/{}/agreement" if len(tasks) > 1 else "eval/agreement"
    return logged, {key.format(name): one["agreement"] for name, one in found.items()}


def summarize(
    monitor: str, lower_is_better: bool, student: dict[str, float], teacher: dict[str, float],
    agreement: dict[str, float], alone: dict[str, float] | None,
) -> tuple[dict[str, Any], dict[str, float], str]:
    """What a distillation has come to.

    Args:
        monitor: the key by which the student's weights were chosen.
        student, teacher, alone: logged metrics of the student's best weights, of the teachers, and
            of the same student without them.
        agreement: by the key under which it is logged.

    Returns:
        The report as JSON, what of it is logged, and lines for the terminal.
    """
    numbers, closed = {"student": student[monitor]}, None
    if monitor in teacher:
        numbers["teachers"] = teacher[monitor]
    if alone is not None:
        numbers["the same student alone"] = alone[monitor]
        gap = teacher.get(monitor, math.nan) - alone[monitor]
        # Where the teachers are no better, there is no gap to close.
        if (gap < 0 if lower_is_better else gap > 0):
            closed = (student[monitor] - alone[monitor]) / gap
    lines = [f"{monitor}: " + ", ".join(f"{who} {value:.4f}" for who, value in numbers.items())]
    lines[0] += "" if closed is None else f"; {closed:.0%} of the gap is closed"
    lines.append("agreement with the teachers: " + ", ".join(
        f"{key} {value:.4f}" for key, value in agreement.items()))
    logged = {key.replace("eval/", "teacher/", 1): value for key, value in teacher.items()}
    logged |= agreement
    logged |= {} if closed is None else {"eval/gap_closed": closed}
    report = {"monitor": monitor, "student": _plain(student), "teachers": _plain(teacher),
              "alone": None if alone is None else _plain(alone), "agreement": _plain(agreement),
              "gap_closed": closed}
    return report, logged, "\n".join(lines)


def _plain(numbers: dict[str, float]) -> dict[str, Any]:
    """JSON has no NaN."""
    return {key: value if math.isfinite(value) else None for key, value in numbers.items()}
