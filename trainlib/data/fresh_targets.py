"""Targets of rows that a net was not trained on: by the labels of the training, where they fit.

A target that is missing, or that the training did not know, costs a row its evaluation only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from trainlib.config import UserError
from trainlib.data.columns import (
    CLASS,
    IMAGE,
    INTEGER,
    LIST,
    NUMBER,
    TEXT,
    encode_values,
    read_column,
)
from trainlib.data.decoding import Decoder, MaskDecoder, NumberDecoder
from trainlib.data.masks import ListMasks
from trainlib.data.targets import TargetInfo, columns_of, open_target
from trainlib.losses import IGNORED, is_valid

if TYPE_CHECKING:
    import datasets
    import pyarrow

    from trainlib.data.builtin import Table
    from trainlib.tasks import TaskOptions

_TRUTHS = {"true": 1.0, "false": 0.0}


@dataclass
class FreshTarget:
    """One task's target in a source."""

    name: str
    labels: list[str] | dict
    values: Tensor | None
    """[rows of the source, ...] as an encoder gives them; none: not there, or decoded."""
    decode: Decoder | None = None
    """Of masks."""
    note: str | None = None
    unknown: np.ndarray | None = None
    """[rows of the source] bool: which have what training did not have."""
    blank: Tensor | None = None
    """[1, ...] a missing target."""

    def finish(self, rows: np.ndarray) -> tuple[TargetInfo, Tensor, str | None]:
        """What is known of the target, its values for some rows as tasks get them, a line."""
        note, labels = self.note, self.labels
        if self.values is None:
            values = self.blank.expand(len(rows), *self.blank.shape[1:]).clone()
        else:
            values = self.values[torch.from_numpy(rows)]
            count = int(self.unknown[rows].sum()) if self.unknown is not None else 0
            if count:
                note = (f"{count:,} rows have a {self.name} that training did not have{note}: "
                        "predicted, and left out of the evaluation")
            else:
                note = None
        if not isinstance(labels, dict):
            return self._info(values, TargetInfo(list(labels))), values, note
        # As in training, to the last bit.
        mean, scale = (torch.tensor(labels[key], dtype=torch.float64)
                       for key in ("mean", "deviation"))
        values = (values - mean) / scale
        middle = values.nanmean(0).nan_to_num()
        info = TargetInfo(list(labels["columns"]), tuple(labels["mean"]),
                          tuple(labels["deviation"]), tuple(middle.tolist()))
        return self._info(values, info), values, note

    def _info(self, values: Tensor, info: TargetInfo) -> TargetInfo:
        valid = is_valid(values).reshape(len(values), -1)
        return replace(info, may_miss=not bool(valid.all()),
                       misses_parts=bool((valid.any(1) & ~valid.all(1)).any()))


def blank_target(kind: str, labels: list[str] | dict, shape: list[int] | None) -> Tensor:
    """[1, ...] a target that is missing."""
    if kind == "classification":
        return torch.full((1,), IGNORED)
    if kind == "segmentation":
        return torch.full((1, *(shape or (1, 1, 1))[-2:]), IGNORED)
    width = len(labels["columns"] if isinstance(labels, dict) else labels)
    dtype = torch.float64 if kind == "regression" else torch.float32
    return torch.full((1, width), float("nan"), dtype=dtype)


def builtin_target(
    name: str, task: TaskOptions, table: Table, labels: list[str] | dict
) -> FreshTarget:
    """The target of a builtin source."""
    column = table.columns.get(columns_of(task)[0])
    shape = [*next(iter(table.columns.values())).values.shape[1:]]
    if column is None or column.kind != task.kind:
        blank = blank_target(task.kind, labels, shape)
        return FreshTarget(name, labels, None, note=f"no target of {name}: predicted only",
                           blank=blank)
    if task.kind == "segmentation":
        return FreshTarget(name, labels, None, column.values.__getitem__)
    return FreshTarget(name, labels, column.values)


def read_target(
    name: str, task: TaskOptions, table: datasets.Dataset, kinds: Mapping[str, str], where: str,
    labels: list[str] | dict, input_shape: list[int] | None, must_fit: bool,
) -> FreshTarget:
    """The target of a task in a table, if it has one.

    Args:
        labels: of the training, as in labels.json.
        must_fit: whether masks have the size of the inputs already.
    """
    blank = blank_target(task.kind, labels, input_shape)
    missing = [column for column in columns_of(task) if column not in kinds]
    if missing:
        return FreshTarget(name, labels, None, blank=blank,
                           note=f"no column {missing[0]!r}: {name} is predicted, not evaluated")
    try:
        if task.kind == "segmentation":
            decode = _mask_decoder(task, table, kinds, where, input_shape, must_fit)
            return FreshTarget(name, labels, None, decode)
        read = _classes if task.kind == "classification" else _numbers
        values, unknown, shown = read(task, table, kinds, where, labels)
    except UserError as error:
        return FreshTarget(name, labels, None, blank=blank, note=f"{name} is predicted, not "
                           f"evaluated: {error}")
    note = f" ({', '.join(map(repr, shown[:5]))})" if shown else ""
    return FreshTarget(name, labels, values, note=note, unknown=unknown, blank=blank)


def _classes(task, table, kinds, where, labels) -> tuple[Tensor, np.ndarray, list]:
    column = columns_of(task)[0]
    if kinds[column] not in (CLASS, TEXT, INTEGER, NUMBER):
        raise UserError(f"{where}: {column!r} holds {kinds[column]} values, no classes")
    codes, values = encode_values(table, column, where, task.ignore_index, True)
    numbers = {label: number for number, label in enumerate(labels)}
    # "01" is read as 1 where nothing else stands in its column.
    whole = {int(label): number for label, number in numbers.items() if label.isdecimal()}
    known = [numbers.get(str(value), whole.get(value, -1)) for value in values]
    found = np.array([*known, IGNORED])[codes]
    unknown = found == -1
    shown = [values[code] for code in np.unique(codes[unknown])]
    return torch.from_numpy(np.where(unknown, IGNORED, found)), unknown, shown


def _numbers(task, table, kinds, where, labels) -> tuple[Tensor, np.ndarray, list]:
    """Of a regression or of several labels, [rows, entries], by the names of the training."""
    import datasets
    import pyarrow

    columns, wrong = columns_of(task), {}
    if any(kinds[column] == TEXT for column in columns):  # a text among numbers makes all text
        table = datasets.Dataset(pyarrow.table(
            {column: as_numbers(table, column, wrong) if kinds[column] == TEXT
             else read_column(table, column) for column in columns}))
        kinds = dict.fromkeys(columns, NUMBER)
    names, encode = open_target(task, table, kinds, where, True, None)
    values, wanted = encode(table, where), labels
    if isinstance(labels, dict):
        wanted = labels["columns"]
        if names != wanted:
            raise UserError(f"{where}: has {', '.join(names)}, training had {', '.join(wanted)}")
    unknown = np.zeros(len(values), bool)
    unknown[list(wrong)] = True
    shown = []
    if names != wanted:  # names that rows list
        if kinds[columns[0]] == LIST:
            raise UserError(f"{where}: has {', '.join(names)}, training had {', '.join(wanted)}")
        ordered = torch.zeros(len(values), len(wanted)).masked_fill(values.isnan().all(1)[:, None],
                                                                    float("nan"))
        for name, column in zip(names, values.unbind(1), strict=True):
            if name in wanted:
                ordered[:, wanted.index(name)] = column
            else:
                unknown |= (column == 1).numpy()
                shown.append(name)
        values = ordered
    values = values.masked_fill(torch.from_numpy(unknown)[:, None], float("nan"))
    return values, unknown, shown


def _mask_decoder(task, table, kinds, where, input_shape, must_fit) -> Decoder:
    column, size = columns_of(task)[0], None if input_shape is None else tuple(input_shape[-2:])
    if kinds[column] == IMAGE:
        decoder = MaskDecoder(table, column, 1, size, where)
        decoder.must_fit = must_fit
        return decoder
    if kinds[column] == LIST:
        sizes = None if size is None else list(size)
        return ListMasks(NumberDecoder(table, [column], True, where, sizes), task.ignore_index)
    raise UserError(f"{where}: {column!r} holds {kinds[column]} values, no masks")


def as_numbers(
    table: datasets.Dataset, column: str, wrong: dict[int, Any]
) -> pyarrow.Array:
    """A column of anything as float64, null where it is none; by row, why not, in ``wrong``."""
    import pyarrow

    values = []
    for row, value in enumerate(read_column(table, column).to_pylist()):
        if isinstance(value, str):
            value = _TRUTHS.get(value.strip().lower(), value)
        try:
            values.append(None if value is None else float(value))
        except (TypeError, ValueError):
            values.append(None)
            wrong.setdefault(row, f"{column!r}: {str(value)[:80]!r} is no number")
    return pyarrow.array(values, pyarrow.float64())
