"""Targets: from the values of columns to the tensor that a task of some kind is given.

Class numbers are int64, IGNORED where they are missing; labels (0 or 1) are fp32 and numbers
float64 with mean 0 and deviation 1, both NaN where they are missing. Masks are read like images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from trainlib.config import UserError
from trainlib.data.columns import (
    IMAGE,
    INTEGER,
    LIST,
    NUMBER,
    read_column,
    read_floats,
    read_labels,
    refuse,
)
from trainlib.data.decoding import Decoder, MaskDecoder, NumberDecoder, nesting
from trainlib.data.masks import ListMasks
from trainlib.losses import is_valid

if TYPE_CHECKING:
    import datasets

    from trainlib.tasks import TaskOptions


@dataclass(frozen=True)
class TargetInfo:
    """What the data say about a target."""

    label_names: list[str]
    """Of the classes, labels or columns of numbers; none for text."""
    mean: tuple[float, ...] = ()
    """Of each column of numbers in the training split."""
    deviation: tuple[float, ...] = ()
    validation_mean: tuple[float, ...] = ()
    """Of the validation split, in deviations from ``mean``."""
    vocab_size: int = 0
    """Of the tokens that are predicted."""
    bytes_per_token: float = 1.0
    """Of the texts that are validated on or, of one text, of the whole."""
    may_miss: bool = False
    """Whether any sample lacks an entry of this target."""
    misses_parts: bool = False
    """Whether any sample lacks some entries, but not all."""


Encoder = Callable[["datasets.Dataset", str], "Tensor | Decoder"]
"""From a table and what it is, for messages, to the targets of its rows, or their decoder."""


def columns_of(task: TaskOptions) -> list[str]:
    """The target columns of a task."""
    return [task.target] if isinstance(task.target, str) else list(task.target)


def open_target(
    task: TaskOptions, table: datasets.Dataset, kinds: Mapping[str, str], where: str,
    may_miss: bool, image_size: tuple[int, int] | None,
) -> tuple[list[str], Encoder]:
    """The names of a target's labels (none yet for masks), and what encodes it.

    Args:
        table: of training.
        may_miss: whether rows without a target are counted out; otherwise they are refused.
        image_size: height and width that masks are brought to; none: the images have one size.

    Raises:
        UserError: the columns do not hold what the kind of task needs.
    """
    columns = columns_of(task)
    first = columns[0]
    if task.kind in ("multilabel", "regression"):
        read = _read_label_sets if task.kind == "multilabel" else _read_numbers
        return read(task, table, kinds, where, may_miss)
    if len(columns) > 1:
        raise UserError(f"{where}: a {task.kind} task has one target column, got "
                        f"{', '.join(columns)}")
    if task.kind == "classification":
        labels = read_labels(table, first, kinds[first], where, task.ignore_index, may_miss)
        return labels.names, labels.numbers
    if kinds[first] == IMAGE:
        masks = MaskDecoder(table, first, 1, image_size, where)
        return [], masks.on
    if kinds[first] == LIST and not image_size:
        return [], ListMasks(NumberDecoder(table, [first], True, where), task.ignore_index).on
    raise UserError(f"{where}: {first!r} holds {kinds[first]} values; the target of a segmentation "
                    "holds images of class numbers, or lists of them without data.image_size")


def _read_numbers(task, table, kinds, where, may_miss) -> tuple[list[str], Encoder]:
    columns = columns_of(task)
    for column in columns:
        fit = (INTEGER, NUMBER, LIST) if len(columns) == 1 else (INTEGER, NUMBER)
        if kinds[column] not in fit:
            raise UserError(f"{where}: {column!r} holds {kinds[column]} values; the target of a "
                            "regression holds numbers, or is one list of them")

    def encode(table: datasets.Dataset, where: str) -> Tensor:
        if kinds[columns[0]] == LIST:
            values = _lists(table, columns[0], where, len(names))
        else:
            values = np.stack([read_floats(table, column) for column in columns], 1)
        what = f"{', '.join(map(repr, columns))}"
        refuse(np.isinf(values).any(1), where, f"the target {what} is infinite")
        return _missing_rows_refused(values, what, where, may_miss)

    names = columns
    if kinds[columns[0]] == LIST:
        width = _first_length(table, columns[0])
        names = [f"{columns[0]}[{number}]" for number in range(width)]
    return names, encode


def _read_label_sets(task, table, kinds, where, may_miss) -> tuple[list[str], Encoder]:
    """Columns of 0 and 1, one list of them, or one list of names or of class labels a row."""
    columns = columns_of(task)
    first = columns[0]
    element = getattr(table.features[first], "feature", None)
    if len(columns) > 1 or kinds[first] in (INTEGER, NUMBER):
        for column in columns:
            if kinds[column] not in (INTEGER, NUMBER):
                raise UserError(f"{where}: {column!r} holds {kinds[column]} values; a label of a "
                                "multilabel task is a column of 0 and 1")
        names = columns

        def numbers(table: datasets.Dataset, where: str) -> np.ndarray:
            return np.stack([read_floats(table, column) for column in columns], 1)
    elif kinds[first] == "list of text" or hasattr(element, "names"):
        rows = _label_lists(table, first, where)
        found = sorted({value for row in rows for value in row or ()})
        names = list(getattr(element, "names", None) or found)

        def numbers(table: datasets.Dataset, where: str) -> np.ndarray:
            return _sets(_label_lists(table, first, where), first, names, where)
    elif kinds[first] == LIST:
        width = _first_length(table, first)
        names = task.label_names or [f"{first}[{number}]" for number in range(width)]
        if len(names) != width:
            raise UserError(f"{where}: {first!r} has {width} labels a row, label_names gives "
                            f"{len(names)}")

        def numbers(table: datasets.Dataset, where: str) -> np.ndarray:
            return _lists(table, first, where, width)
    else:
        raise UserError(f"{where}: {first!r} holds {kinds[first]} values; the target of a "
                        "multilabel task is several columns of 0 and 1, one list of them, or one "
                        "list of names")
    if not names:
        raise UserError(f"{where}: {first!r} has no label in any row")
    if task.label_names and names != task.label_names:
        raise UserError(f"{where}: label_names is for lists of 0 and 1; the labels here are "
                        f"{', '.join(names)}")

    def encode(table: datasets.Dataset, where: str) -> Tensor:
        values = numbers(table, where)
        if task.ignore_index is not None:
            values = np.where(values == task.ignore_index, np.nan, values)
        is_label = np.isnan(values) | (values == 0) | (values == 1)
        what = f"{', '.join(map(repr, columns))}"
        refuse(~is_label.all(1), where, f"{what} has values other than 0 and 1")
        return _missing_rows_refused(values, what, where, may_miss).float()

    return names, encode


def _missing_rows_refused(values: np.ndarray, what: str, where: str, may_miss: bool) -> Tensor:
    if not may_miss:
        refuse(np.isnan(values).all(1), where, f"the target {what} is missing")
    return torch.from_numpy(np.ascontiguousarray(values))


def _first_length(table: datasets.Dataset, column: str) -> int:
    """The length of the first list that has an entry, or 0."""
    return next((len(row) for row in read_column(table, column).to_pylist() if row), 0)


def _lists(table: datasets.Dataset, column: str, where: str, width: int) -> np.ndarray:
    """[rows, width] float64 of lists of one length; a row without a list is NaN."""
    if nesting(table, column)[0] != 1:
        raise UserError(f"{where}: {column!r} holds lists of lists; a target is one list a row")
    rows = read_column(table, column).to_pylist()
    refuse([row is not None and len(row) != width for row in rows], where,
           f"{column!r} has lists of another length than {width}, the first one's,")
    missing = [float("nan")] * width
    return np.array([missing if row is None else row for row in rows], np.float64).reshape(
        len(rows), width)


def _label_lists(table: datasets.Dataset, column: str, where: str) -> list[list[str] | None]:
    """The names of the labels that each row lists, of a column of names or of class labels."""
    rows = read_column(table, column).to_pylist()
    refuse([row is not None and None in row for row in rows], where,
           f"{column!r} lacks a name in its list")
    names = getattr(getattr(table.features[column], "feature", None), "names", None)
    if names is None:
        return rows
    refuse([not all(0 <= value < len(names) for value in row or ()) for row in rows], where,
           f"labels of {column!r} outside 0..{len(names) - 1}")
    return [row if row is None else [names[value] for value in row] for row in rows]


def _sets(
    rows: list[list[str] | None], column: str, names: list[str], where: str
) -> np.ndarray:
    """[rows, labels] float64, 1 for each label that a row lists; a row without a list is NaN."""
    places = {name: number for number, name in enumerate(names)}
    unknown = sorted({value for row in rows for value in row or () if value not in places})
    refuse([any(value not in places for value in row or ()) for row in rows], where,
           f"{column!r} has labels that the training split does not have "
           f"({', '.join(map(repr, unknown[:5]))})")
    values = np.zeros((len(rows), len(places)))
    for number, row in enumerate(rows):
        if row is None:
            values[number] = np.nan
        else:
            values[number, [places[value] for value in row]] = 1
    return values


def finish(
    name: str, kind: str, label_names: list[str], train: Tensor, validation: Tensor
) -> tuple[TargetInfo, Tensor, Tensor]:
    """What is known of a target once the training rows are, and both splits as tasks get them.

    Args:
        train, validation: [rows, ...] as an encoder gives them.

    Raises:
        UserError: a number is the same in all training rows, or in none.
    """
    if kind != "regression":
        return TargetInfo(label_names), train, validation
    mean, deviation = train.nanmean(0), []
    for column, label in zip((train - mean).unbind(1), label_names, strict=True):
        known = column[~column.isnan()]
        if not len(known):
            raise UserError(f"tasks.{name}: no training sample has {label!r}")
        largest = known.abs().max()  # scaled by it, no square is too large or too small
        deviation.append(largest * (known / largest.clamp(min=1e-300)).square().mean().sqrt())
        if not deviation[-1] > 1e-14 * (known + mean[len(deviation) - 1]).abs().max():
            raise UserError(f"tasks.{name}: {label!r} has one value only in the training rows; a "
                            "regression needs two or more")
    scale = torch.stack(deviation)
    train, validation = (train - mean) / scale, (validation - mean) / scale
    middle = validation.nanmean(0).nan_to_num()  # of a column that is missing there, any will do
    info = TargetInfo(label_names, *(tuple(each.tolist()) for each in (mean, scale, middle)))
    return info, train, validation


def count_valid(targets: Tensor) -> Tensor:
    """[rows] int64: how many entries of each row's target are there."""
    return is_valid(targets).flatten(1).sum(1) if targets.ndim > 1 else is_valid(targets).long()


def check_shared_rows(valid: Mapping[str, Tensor]) -> None:
    """Refuses tasks of which no training row has both targets.

    Args:
        valid: by task, [rows] how many entries of the target are there.
    """
    names: Sequence[str] = list(valid)
    for number, first in enumerate(names):
        for second in names[number + 1 :]:
            if not ((valid[first] > 0) & (valid[second] > 0)).any():
                raise UserError(f"tasks: no training row has a target of both {first!r} and "
                                f"{second!r}; tasks of one job share rows, so train these as two")
