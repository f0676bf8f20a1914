"""What the best weights say to every sample of the validation split, and some of them to look at.

``evaluate`` runs ``records`` over the split (``rows``); ``write`` leaves in the run folder
predictions.csv, examples/ (``examples``: examples.json, and a PNG for an image) and, of a language
model, loss_by_position.csv. Of other data than the run's, ``table`` has the lines, and ``places``
says where they may be written.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from trainlib import durable, shards
from trainlib.predictions.examples import Inputs, choose, render
from trainlib.predictions.rows import Prediction, Recorder, as_number, as_text

if TYPE_CHECKING:
    from trainlib.data import Dataset, EvalReader
    from trainlib.runlog import LogOptions, RunLog
    from trainlib.tasks import Task

__all__ = ["records", "write"]

_EXAMPLES, _POSITIONS = "examples", "loss_by_position.csv"


def records(tasks: list[Task], reader: EvalReader) -> list[Recorder]:
    """What ``evaluate`` is given in place of the tasks, to write down every sample."""
    return [Recorder(task, reader) for task in tasks]


def write(
    folder: Path, said: Mapping[str, dict[str, Any]] | None, tasks: list[Task], dataset: Dataset,
    model: nn.Module, options: LogOptions, run_log: RunLog,
) -> None:
    """Writes what a pass with ``records`` has found, and ``options.examples`` of it.

    Every process takes part where a sharded model needs all of them for one forward.

    Args:
        folder: of the run.
        said: by task, the results of that pass; none: it was not made.
        dataset: whose validation split that was.
        model: with the weights of that pass; in eval mode afterwards.
    """
    needs_all = shards.holds_sharded(model)
    if said is None or not (run_log.is_main or needs_all):
        return
    try:
        found = _examples(said, tasks, dataset, model.eval(), options.examples, run_log.device)
    except Exception as error:  # no run fails for want of something to look at
        if needs_all:
            raise  # the others wait in its forward
        found = []
        run_log.say(f"examples: not made ({' '.join(str(error).split())[:200]})")
    if not run_log.is_main:
        return
    try:
        _write_tables(folder, said, tasks, dataset.validation.rows.tolist())
        _write_examples(folder / _EXAMPLES, found)
    except (OSError, MemoryError) as error:
        why = getattr(error, "strerror", None) or "the machine's memory is full"
        run_log.say(f"predictions: not written ({why}); weights and metrics are")


def _examples(
    said: Mapping[str, dict[str, Any]], tasks: list[Task], dataset: Dataset, model: nn.Module,
    num_examples: int, device: torch.device,
) -> list[tuple[dict[str, Any], bytes | None]]:
    # A few samples are sooner read than workers are started.
    split = replace(dataset.validation, workers=0)
    shown = Inputs(dataset.inputs, dataset.to_text(), dataset.pad_id)
    is_compiled = getattr(model, "_compiled_call_impl", None) is not None
    found = []
    # Compiling anew for the shape of a few samples would take longer than all of this.
    with torch.compiler.set_stance("force_eager") if is_compiled else nullcontext():
        for task in tasks:
            rows = said[task.name]["rows"]
            chosen = choose(task, rows, num_examples)
            found += render(task, chosen, rows, split, model, shown, device)
    return found


def _write_tables(
    folder: Path, said: Mapping[str, dict[str, Any]], tasks: list[Task], rows: list[int]
) -> None:
    lines = (
        line.cells() for task in tasks
        for row, numbers in zip(rows, said[task.name]["rows"], strict=True)
        for line in as_text(task, row, numbers.tolist())
    )
    durable.write_text(folder / "predictions.csv", _csv(Prediction._fields, lines))
    for positions in (found["positions"] for found in said.values() if "positions" in found):
        sums, counts = positions
        means = np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0)
        lines = zip(range(1, len(sums) + 1), counts.astype(int), map(as_number, means), strict=True)
        durable.write_text(folder / _POSITIONS, _csv(("position", "tokens", "loss"), lines))


def _write_examples(folder: Path, found: list[tuple[dict[str, Any], bytes | None]]) -> None:
    if not found:
        durable.remove_folder(folder)  # of a shorter run
        return
    writers = {}
    for number, (entry, picture) in enumerate(found):
        if picture is not None:
            entry["image"] = f"{number:03d}.png"
            writers[entry["image"]] = partial(_write_bytes, picture)
    text = durable.as_json([entry for entry, _ in found])
    writers["examples.json"] = partial(_write_bytes, text.encode())
    durable.write_folder(folder, writers, with_manifest=False)


def _write_bytes(content: bytes, path: Path) -> None:
    path.write_bytes(content)


def _csv(columns: Iterable[str], rows: Iterable[Iterable]) -> str:
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return table.getvalue()
