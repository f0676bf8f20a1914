"""All pictures of one run, and its table of classes."""

from __future__ import annotations

import csv
import io
import math
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from trainlib.plots import paper
from trainlib.plots.classes import draw_confusion, draw_labels
from trainlib.plots.curves import draw_curves, kinds
from trainlib.plots.names import of_files, shorten
from trainlib.plots.numbers import draw_positions, draw_regression
from trainlib.plots.records import finite, read_config, read_curves, read_json
from trainlib.plots.report import write_report

_POSITIONS = "loss_by_position.csv"
_EVALUATION = "best/evaluation.json"
_SOURCES = {"regression": "predictions.csv", "language_modeling": _POSITIONS}
_NAME_LENGTH, _TASK_LENGTH = 60, 40  # letters, in a title


def draw_run(
    run: Path, say: Callable[[str], object] = print, ended: dict[str, Any] | None = None
) -> list[Path]:
    """Draws what the files of a run folder allow, over what was drawn there before, and then the
    report that shows all of it.

    Args:
        say: is told what is left out and why: nothing to draw, or a damaged file.
        ended: what ``exit.json`` will say, of a run that draws before it ends.

    Returns:
        The files that were written.

    Raises:
        NotARun: the folder holds no run.
        CannotWrite: it takes no file.
    """
    run = Path(run)
    config, work = read_config(run), _Work(run, say)
    _draw_pictures(run, config, work)
    with work.on(run / "report.html"):
        work.written.append(write_report(run, say, ended))
    if not work.written and work.refusal is not None:
        raise work.refusal
    return work.written


class _Work:
    """Files of a run folder, each made or left out by itself: no damage costs more than it must."""

    def __init__(self, run: Path, say: Callable[[str], object]):
        self.run, self.say = run, say
        self.written: list[Path] = []
        self.refusal: paper.CannotWrite | None = None

    @contextmanager
    def on(self, file: Path | str, source: str = "") -> Iterator[None]:
        """Says in one line why a file, made of another, is left out, and goes on."""
        try:
            yield
        except Exception as error:
            of = f"made of {source}; " if source else ""
            self.say(f"{self.run / file}: left out ({of}{paper.reason(error)})")
            if isinstance(error, paper.CannotWrite):
                self.refusal = self.refusal or error


def _draw_pictures(run: Path, config: dict[str, Any], work: _Work) -> None:
    name = shorten(run.resolve().name, _NAME_LENGTH)
    file = run / "curves.png"
    with work.on(file, "metrics.jsonl"):
        curves = read_curves(run)
        if not curves.lines:
            work.say(f"{run}: no records in metrics.jsonl, so no curves.png")
        elif draw_curves(file, name, config, curves):
            work.written.append(file)
        else:
            work.say(f"{run}: no key of metrics.jsonl is known here, so no curves.png")
    evaluation = read_json(run / "best" / "evaluation.json")
    labels = read_json(run / "best" / "labels.json")
    tasks = {task: kind for task, kind in kinds(config).items()
             if isinstance(evaluation.get(task), dict)}
    if not tasks:
        work.say(f"{run}: no best/evaluation.json, so nothing by class")
        return
    parts, rows = of_files(kinds(config)), []
    for task, kind in tasks.items():
        file = run / (f"confusion_matrix_{parts[task]}.png" if len(parts) > 1 else
                      "confusion_matrix.png")
        title = f"{name}: {shorten(task, _TASK_LENGTH)}, validation, best weights"
        with work.on(file, _SOURCES.get(kind, _EVALUATION)):
            names = class_names(labels.get(task), evaluation[task])
            if _draw_task(run, file, title, task, kind, evaluation[task], names):
                work.written.append(file)
        with work.on(f"per_class.csv, task {shorten(task, _TASK_LENGTH)}", _EVALUATION):
            rows += per_class(task, config, labels.get(task), evaluation[task])
    if rows:
        file = run / "per_class.csv"
        with work.on(file):
            paper.write(file, _as_csv(rows).encode(errors="backslashreplace"))
            work.written.append(file)


def _draw_task(
    run: Path, file: Path, title: str, task: str, kind: str, result: dict[str, Any],
    names: list[str],
) -> bool:
    """Whether there was anything to draw."""
    if kind in ("classification", "segmentation") and result.get("confusion"):
        counts = np.array(result["confusion"], dtype=np.int64)
        is_image = kind == "segmentation"
        for key, said in (("miou", "mean IoU"), ("pixel_accuracy", "pixel accuracy"),
                          ("accuracy", "accuracy")):
            if not math.isnan(finite(result.get(key))):
                title += f", {said} {result[key]:.4f}"
        if counts.shape != (len(names), len(names)):
            raise ValueError(f"best/evaluation.json has {len(names)} classes and a confusion "
                             f"matrix of shape {list(counts.shape)}")
        ious = [entry["iou"] for entry in result["classes"]] if is_image else None
        draw_confusion(file, title, counts, names, "pixels" if is_image else "samples", ious)
        return True
    if kind == "multilabel" and result.get("classes"):
        draw_labels(file, title, result["classes"], names)
        return True
    if kind == "regression" and (run / "predictions.csv").exists():
        return draw_regression(file, title, _predictions(
            run / "predictions.csv", task, names))
    if kind == "language_modeling" and (run / _POSITIONS).exists():
        draw_positions(file, title, _losses(run / _POSITIONS))
        return True
    return False


def class_names(labels: Any, result: dict[str, Any]) -> list[str]:
    """The names of a task's classes, labels or columns; their numbers where names are unknown.

    Args:
        labels: the task's in ``labels.json``.
    """
    entries = result.get("classes") or result.get("columns") or []
    names = labels.get("columns") if isinstance(labels, dict) else labels
    if not isinstance(names, list) or len(names) != len(entries):
        names = range(len(entries))
    return [str(name) for name in names]


def per_class(
    task: str, config: dict[str, Any], labels: Any, result: dict[str, Any]
) -> list[dict[str, Any]]:
    """A row for each class, label or column of a task, with what its kind knows of it.

    Args:
        labels: the task's in ``labels.json``.
    """
    rows, entries = [], result.get("classes") or result.get("columns") or []
    options = {str(name): options for name, options in config["tasks"].items()}[task]
    thresholds = options.get("thresholds") if options.get("kind") == "multilabel" else None
    if not isinstance(thresholds, list):
        thresholds = [thresholds] * len(entries)
    for name, threshold, entry in zip(
        class_names(labels, result), thresholds, entries, strict=True
    ):
        row = {"task": task, "class": name} | entry
        rows.append(row if threshold is None else row | {"threshold": threshold})
    return rows


def _as_csv(rows: list[dict[str, Any]]) -> str:
    """The support comes last; what a kind does not know is empty."""
    columns = dict.fromkeys(key for row in rows for key in row if key != "support")
    table = io.StringIO()
    writer = csv.DictWriter(table, [*columns, "support"], restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return table.getvalue()


def _predictions(file: Path, task: str, columns: list[str]) -> dict[str, tuple[array, array]]:
    """Targets and predictions of each column: its lines are the task's, or TASK/COLUMN's."""
    found = {column: (array("d"), array("d")) for column in columns}
    names = {f"{task}/{column}": column for column in columns}
    names |= {task: columns[0]} if len(columns) == 1 else {}
    with file.open(encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            if row.get("task") in names:
                for values, key in zip(found[names[row["task"]]], ("target", "prediction"),
                                       strict=True):
                    values.append(_number(row.get(key)))
    return found


def _losses(file: Path) -> list[float]:
    """The loss at each position of the window."""
    with file.open(encoding="utf-8", newline="") as lines:
        return [_number(row.get("loss")) for row in csv.DictReader(lines)]


def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan
