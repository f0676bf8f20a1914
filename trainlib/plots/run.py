"""All pictures of one run, and its table of classes."""

from __future__ import annotations

import csv
import io
import math
import re
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from trainlib.plots import paper
from trainlib.plots.classes import draw_confusion, draw_labels
from trainlib.plots.curves import draw_curves, kinds
from trainlib.plots.numbers import draw_positions, draw_regression
from trainlib.plots.records import read_config, read_curves, read_json
from trainlib.plots.report import write_report

_POSITIONS = "loss_by_position.csv"


def draw_run(run: Path, say: Callable[[str], object] = print) -> list[Path]:
    """Draws what the files of a run folder allow, over what was drawn there before, and then the
    report that shows all of it.

    Args:
        say: is told what there is too little of to be drawn.

    Returns:
        The files that were written.

    Raises:
        NotARun: the folder holds no run.
    """
    run = Path(run)
    return [*_draw_pictures(run, say), write_report(run)]


def _draw_pictures(run: Path, say: Callable[[str], object]) -> list[Path]:
    config, name, written = read_config(run), run.resolve().name, []
    curves = read_curves(run)
    if curves.lines:
        draw_curves(run / "curves.png", name, config, curves)
        written.append(run / "curves.png")
    else:
        say(f"{run}: no records in metrics.jsonl, so no curves.png")
    evaluation = read_json(run / "best" / "evaluation.json")
    labels = read_json(run / "best" / "labels.json")
    tasks = {task: kind for task, kind in kinds(config).items()
             if isinstance(evaluation.get(task), dict)}
    if not tasks:
        say(f"{run}: no best/evaluation.json, so nothing by class")
        return written
    for task, kind in tasks.items():
        several = len(kinds(config)) > 1
        file = run / (f"confusion_matrix_{_plain(task)}.png" if several else "confusion_matrix.png")
        names = class_names(labels.get(task), evaluation[task])
        title = f"{name}: {task}, validation, best weights"
        if _draw_task(run, file, title, task, kind, evaluation[task], names):
            written.append(file)
    rows = per_class(config, labels, evaluation)
    if rows:
        file = run / "per_class.csv"
        paper.write(file, _as_csv(rows).encode())
        written.append(file)
    return written


def _draw_task(
    run: Path, file: Path, title: str, task: str, kind: str, result: dict[str, Any],
    names: list[str],
) -> bool:
    """Whether there was anything to draw."""
    if kind in ("classification", "segmentation") and result.get("confusion"):
        counts = np.array(result["confusion"], dtype=np.int64)
        is_image = kind == "segmentation"
        title += (f", mean IoU {result['miou']:.4f}, pixel accuracy "
                  f"{result['pixel_accuracy']:.4f}" if is_image else
                  f", accuracy {result['accuracy']:.4f}")
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
    config: dict[str, Any], labels: dict[str, Any], evaluation: dict[str, Any]
) -> list[dict[str, Any]]:
    """A row for each class, label or column of each task, with what its kind knows of it."""
    rows = []
    for task, kind in kinds(config).items():
        result = evaluation.get(task)
        if not isinstance(result, dict):
            continue
        entries = result.get("classes") or result.get("columns") or []
        thresholds = config["tasks"][task].get("thresholds") if kind == "multilabel" else None
        if not isinstance(thresholds, list):
            thresholds = [thresholds] * len(entries)
        for name, threshold, entry in zip(
            class_names(labels.get(task), result), thresholds, entries, strict=False
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


def _plain(name: str) -> str:
    """A task's name as part of a file's."""
    return re.sub(r"[^\w.-]", "_", name)
