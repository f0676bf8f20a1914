"""The table of predictions for other data: a line a prediction, and one for what has none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from trainlib.predictions.rows import Prediction, as_text

if TYPE_CHECKING:
    from trainlib.data.fresh import Fresh
    from trainlib.tasks import Task

NOT_FINITE = "the net's output is NaN or infinite"


def lines(
    fresh: Fresh, task_list: list[Task], said: Mapping[str, dict]
) -> Iterator[tuple[Any, ...]]:
    """The table, its header first: a line a prediction, then one for each row without one."""
    yield (*Prediction._fields, "file", "error")
    rows = fresh.split.rows.tolist()
    for task in task_list:
        found = said[task.name]
        for place, (row, numbers) in enumerate(zip(rows, found["rows"], strict=True)):
            for line in as_text(task, row, numbers.tolist()):
                if "shares" in found and line.target.startswith("0 "):
                    line = _without_mask(task, line, found["shares"][place])
                if place in found["not_finite"]:
                    yield (*line[:3], "", "", "", _file(fresh, row), NOT_FINITE)
                    continue
                yield (*line.cells(), _file(fresh, row), "")
    for row, why in sorted(fresh.unread.items()):
        yield (row, "", "", "", "", "", _file(fresh, row), why)


def _without_mask(task: Task, line: Prediction, shares: list[float]) -> Prediction:
    parts = (f"{name} {share:.4g}"
             for name, share in zip(task.label_names, shares, strict=False) if share)
    return line._replace(target="", prediction=", ".join(parts), confidence=shares[-1])


def _file(fresh: Fresh, row: int) -> str:
    return (fresh.files[row] or "") if fresh.files else ""
