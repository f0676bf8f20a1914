"""Which column is what: the inputs, the targets, and the class numbers of a target's values."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trainlib.config import UserError, nearest
from trainlib.losses import IGNORED

if TYPE_CHECKING:
    import datasets
    import pyarrow

IMAGE, CLASS, TEXT, INTEGER, NUMBER, LIST = "image", "class", "text", "integer", "number", "list"


def kinds_of(table: datasets.Dataset) -> dict[str, str]:
    """What each column holds: one of the six kinds, or the name of a type that is none of them."""
    import datasets
    import pyarrow.types as types

    def kind(feature: object, type_: pyarrow.DataType) -> str:
        if isinstance(feature, datasets.Image):
            return IMAGE
        if isinstance(feature, datasets.ClassLabel):
            return CLASS
        type_ = getattr(type_, "storage_type", type_)  # of Array2D and its kin
        if types.is_struct(type_) and {"bytes", "path"} <= {field.name for field in type_}:
            return IMAGE  # an image column whose file does not say so
        if types.is_binary(type_) or types.is_large_binary(type_):
            return IMAGE
        if types.is_string(type_) or types.is_large_string(type_):
            return TEXT
        if types.is_integer(type_) or types.is_boolean(type_):
            return INTEGER
        if types.is_floating(type_) or types.is_decimal(type_):
            return NUMBER
        if types.is_list(type_) or types.is_large_list(type_) or types.is_fixed_size_list(type_):
            inner = kind(None, type_.value_type)
            return LIST if inner in (INTEGER, NUMBER, LIST) else f"list of {inner}"
        return str(type_)

    schema = table.features.arrow_schema
    return {name: kind(feature, schema.field(name).type)
            for name, feature in table.features.items()}


def target_candidates(
    kinds: dict[str, str], chosen_inputs: Sequence[str], reads_text: bool
) -> list[str]:
    """The columns that could be the only target: class labels, else texts and integers.

    Args:
        reads_text: whether a text is the input; then it is a target only if nothing else is.
    """
    for wanted in ((CLASS,), *([(INTEGER,)] if reads_text else []), (TEXT, INTEGER)):
        found = [name for name, kind in kinds.items()
                 if kind in wanted and name not in chosen_inputs]
        if found:
            return found
    return []


def input_columns(
    kinds: dict[str, str], given: str | list[str] | None, targets: Sequence[str], reads_text: bool
) -> list[str]:
    """The columns that the model sees.

    Args:
        given: as ``data.input``.
        reads_text: whether there is a tokenizer, so that a text is the first choice.

    Raises:
        UserError: an unknown, unfit or ambiguous column, with the candidates.
    """
    listed = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
    if given is None:
        for wanted in (*([TEXT] if reads_text else []), IMAGE, LIST):
            found = [name for name, kind in kinds.items() if kind == wanted and name not in targets]
            if len(found) > 1:
                raise UserError(f"data.input: several columns could be the input: "
                                f"{', '.join(found)}; choose one with --data.input COLUMN")
            if found:
                return found
        found = [name for name, kind in kinds.items()
                 if kind in (INTEGER, NUMBER) and name not in targets]
        if not found:
            hint = ""
            if TEXT in kinds.values():
                hint = ("; a model of the text itself has --tasks.NAME.kind language_modeling"
                        if reads_text else "; a text needs --data.tokenizer")
            raise UserError(f"data.input: no column of images or numbers besides the target; the "
                            f"source has {listed}{hint}")
        return found
    names = [given] if isinstance(given, str) else given
    for name in names:
        if name not in kinds:
            raise UserError(f"data.input: no column {name!r}{nearest(name, kinds)}")
        if name in targets:
            raise UserError(f"data.input: {name!r} is the target, the model must not see it")
        fit = (INTEGER, NUMBER) if len(names) > 1 else (IMAGE, LIST, TEXT, INTEGER, NUMBER)
        if kinds[name] not in fit:
            raise UserError(f"data.input: {name!r} holds {kinds[name]} values; an input is one "
                            f"column of images, lists of numbers or text, or columns of numbers; "
                            f"the source has {listed}")
        if kinds[name] == TEXT and not reads_text:
            raise UserError(f"data.input: {name!r} holds text, which needs a tokenizer: "
                            "--data.tokenizer bytes, or the id or folder of a Hugging Face one; "
                            "paths of images become images by cast_column(..., datasets.Image())")
    if not names or len(set(names)) < len(names):
        raise UserError(f"data.input: needs one or more columns, each once; got {names}")
    return names


def check_columns(
    kinds: dict[str, str], others: dict[str, str], inputs: Sequence[str], targets: Sequence[str],
    classes: Sequence[str], where: str,
) -> None:
    """Refuses another table that lacks a column, or in which it holds something else.

    Args:
        kinds: of the training table.
        others: of the other table.
        classes: the targets whose values are classes, which may have several types.
        where: what the other table is, for messages.

    Raises:
        UserError: with both kinds.
    """
    for name in [*inputs, *targets]:
        if name not in others:
            raise UserError(f"{where}: has no column {name!r}{nearest(name, others)}")
        alike = {CLASS, TEXT, INTEGER, NUMBER} if name in classes else {INTEGER, NUMBER}
        if others[name] != kinds[name] and not {others[name], kinds[name]} <= alike:
            raise UserError(f"{where}: {name!r} holds {others[name]} values, in training "
                            f"{kinds[name]} values; give both the same type")


class Labels(NamedTuple):
    """How the values of a target column become class numbers."""

    column: str
    names: list[str]
    numbers_of: dict
    """The class number of each value that the training split has; a class label's value is its
    name, so that tables which number the same classes otherwise fit together."""
    ignored: int | None
    may_miss: bool

    def numbers(self, table: datasets.Dataset, where: str) -> Tensor:
        """[rows] int64 class numbers of a table, IGNORED where the target is missing.

        Raises:
            UserError: missing values, or values that are no class; with how many and the first row.
        """
        codes, values = encode_values(table, self.column, where, self.ignored, self.may_miss)
        # The last entry is that of the code -1.
        numbers = np.array([*(self.numbers_of.get(v, -1) for v in values), IGNORED])[codes]
        unknown = np.unique(codes[numbers == -1])
        shown = ", ".join(repr(values[code]) for code in unknown[:5])
        refuse(numbers == -1, where,
               f"{self.column!r} has values that the training split does not have ({shown})")
        return torch.from_numpy(numbers)


def read_labels(
    table: datasets.Dataset, column: str, kind: str, where: str, ignored: int | None = None,
    may_miss: bool = False,
) -> Labels:
    """The classes of a target column, in the order that is declared, else in ascending order.

    Args:
        ignored: the number that means that the target is missing, besides null, NaN and, in a
            column of class labels, -1.
        may_miss: whether rows without a target are counted out; otherwise they are refused.

    Raises:
        UserError: the column holds something else than classes, or one class only.
    """
    if kind == NUMBER:  # what a file's reader makes of integers with gaps, too
        is_missing = _is_missing(table, column)
        if not may_miss:
            refuse(is_missing, where, f"the target {column!r} is missing")
        present = read_floats(table, column)[~is_missing]
        is_whole = np.isfinite(present).all() and (present == np.floor(present)).all()
        if may_miss and is_missing.any() and is_whole:
            kind = INTEGER
    if kind not in (CLASS, TEXT, INTEGER):
        raise UserError(
            f"{where}: {column!r} holds {kind} values; the target of a classification holds class "
            "labels, strings or integers"
            + ("; numbers are for the kind regression" if kind == NUMBER else "")
        )
    codes, values = encode_values(table, column, where, ignored, may_miss)
    present = {values[code] for code in np.unique(codes[codes >= 0])}
    if len(present) < 2:
        raise UserError(f"{where}: {column!r} has one class only ({', '.join(map(str, present))}); "
                        "a classification needs two or more")
    names = values if kind == CLASS else sorted(present)
    numbers_of = {value: number for number, value in enumerate(names) if value in present}
    return Labels(column, [str(name) for name in names], numbers_of, ignored, may_miss)


def encode_values(
    table: datasets.Dataset, name: str, where: str, ignored: int | None, may_miss: bool
) -> tuple[np.ndarray, list]:
    """[rows] places of a target's values in the list of distinct ones, which comes second.

    The place of a missing value is -1.
    """
    is_missing = _is_missing(table, name)
    if not may_miss:
        refuse(is_missing, where, f"the target {name!r} is missing")
    names, column = getattr(table.features[name], "names", None), read_column(table, name)
    if names is None:
        encoded = column.dictionary_encode()
        codes = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
        # Whole numbers with gaps are read as fractions.
        values = [int(value) if isinstance(value, float | Decimal) and value % 1 == 0 else value
                  for value in encoded.dictionary.to_pylist()]
        is_missing = is_missing | np.array([*(v == ignored for v in values), False])[codes]
        return np.where(is_missing, -1, codes), values
    codes = column.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    if not may_miss and ignored != -1:
        refuse(codes == -1, where, f"the target {name!r} is missing (-1)")
    codes[codes == (-1 if ignored is None else ignored)] = -1
    refuse((codes < -1) | (codes >= len(names)), where,
           f"labels of {name!r} outside 0..{len(names) - 1}")
    return codes, list(names)


def _is_missing(table: datasets.Dataset, name: str) -> np.ndarray:
    """[rows] bool: null or NaN."""
    return np.asarray(read_column(table, name).is_null(nan_is_null=True))


def read_floats(table: datasets.Dataset, name: str) -> np.ndarray:
    """[rows] float64 of a column of numbers, NaN where they are missing."""
    return read_column(table, name).cast("float64", safe=False).to_numpy(zero_copy_only=False)


def refuse(bad: object, where: str, what: str) -> None:
    """Raises UserError if any row is bad, with how many and the first."""
    rows = np.flatnonzero(np.asarray(bad))
    if len(rows):
        raise UserError(f"{where}: {what} in {len(rows)} of {len(bad)} rows, first in row "
                        f"{rows[0]}; mend or remove these rows")


def read_column(table: datasets.Dataset, name: str) -> pyarrow.Array:
    """One column as one Arrow array."""
    column = table.select_columns([name]).with_format("arrow")[:][name].combine_chunks()
    return getattr(column, "storage", column)
