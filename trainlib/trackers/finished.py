"""What a run folder holds beyond its records, handed to the trackers at the end of the run."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainlib import durable

if TYPE_CHECKING:
    from trainlib.trackers.mirror import Trackers

_MOST_CLASSES = 100  # of a chart: W&B draws no more than 10,000 rows
_NAMES = ("task", "class")  # columns of per_class.csv, of which "7" and "007" are texts
_CELLS = ("target", "prediction", "confidence", "loss", "row", "group")


def hand_over(trackers: Trackers, run: Path, pictures: Iterable[Path]) -> None:
    """Hands over pictures, charts of confusion and of a learning-rate sweep, and the tables of
    classes and of predictions, as far as they are there.

    Args:
        pictures: PNGs, named by their files.
    """
    sweep = run / "lr_find.png"
    images = {file.stem: file for file in (*pictures, *([sweep] if sweep.exists() else []))}
    if images:
        trackers.images(images)
    rates = _read_csv(run / "lr_find.csv")
    trackers.chart("lr_find_curve", "line", ["lr", "loss", "curve"],
                   [[float(row["lr"]), float(row["loss"]), "mean"] for row in rates])
    labels = durable.read_json(run / "best" / "labels.json")
    for task, result in durable.read_json(run / "best" / "evaluation.json").items():
        counts, names = result.get("confusion") or [], labels.get(task)
        if len(counts) <= _MOST_CLASSES:
            names = names if isinstance(names, list) else range(len(counts))
            rows = [[str(true), str(predicted), count]
                    for true, row in zip(names, counts, strict=False)
                    for predicted, count in zip(names, row, strict=False)]
            trackers.chart(f"confusion/{task}", "confusion",
                           ["Actual", "Predicted", "nPredictions"], rows)
    classes = _read_csv(run / "per_class.csv")
    if classes:
        trackers.table("per_class", list(classes[0]), [
            [cell if name in _NAMES else _as_number(cell) for name, cell in row.items()]
            for row in classes])
    examples = _read_examples(run / "examples" / "examples.json")
    for task in dict.fromkeys(entry["task"] for entry in examples):
        entries = [entry for entry in examples if entry["task"] == task]
        what = "image" if "image" in entries[0] else "text"
        trackers.table(f"predictions/{task}", [what, *_CELLS], [
            [_shown(run / "examples", entry, what), *(entry.get(cell) for cell in _CELLS)]
            for entry in entries])


def _shown(folder: Path, entry: dict[str, Any], what: str) -> Any:
    return folder / entry[what] if what == "image" else entry.get(what, "")


def _read_csv(file: Path) -> list[dict[str, str]]:
    if not file.exists():
        return []
    with file.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def _read_examples(file: Path) -> list[dict[str, Any]]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # missing, or damaged since it was written
        return []


def _as_number(cell: str) -> float | str | None:
    try:
        return float(cell) if cell else None
    except ValueError:
        return cell
