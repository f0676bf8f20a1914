"""Opening a source: which tables hold the training and the validation samples.

A builtin source comes as tensors; all others as tables.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trainlib.config import UserError, nearest
from trainlib.data.columns import (
    IMAGE,
    check_columns,
    input_columns,
    kinds_of,
    read_labels,
    target_candidates,
)
from trainlib.data.decoding import Decoder, ImageDecoder, NumberDecoder
from trainlib.data.options import BUILTIN, DataOptions
from trainlib.data.tables import is_hub_id, read_tables
from trainlib.plan import samples_of

if TYPE_CHECKING:
    import datasets

_VALIDATION_NAMES = ("validation", "valid", "val", "dev")
_DEFAULT_SHARE = 0.1


class Part(NamedTuple):
    """One split, not yet read."""

    where: str
    """What it is, for messages."""
    decode: Decoder
    rows: np.ndarray
    """[samples] int64 rows of the source."""
    targets: dict[str, Tensor]
    """By column: [samples] int64 class numbers."""


class Parts(NamedTuple):
    """Both splits of a source, for given targets."""

    train: Part
    validation: Part
    label_names: dict[str, list[str]]
    """By target column."""
    description: str
    """What is read from where, for the log."""


class Source(NamedTuple):
    """A source that has been opened, but not read."""

    target_candidates: list[str]
    """Columns that could be the only target."""
    columns: list[str]
    """All columns."""
    split: Callable[[Sequence[str]], Parts]
    """The splits, once the target columns are known."""


def open_source(options: DataOptions) -> Source:
    """The source that the options name.

    Raises:
        UserError: it cannot be read, or a split of it is not there.
    """
    if options.source.startswith("builtin:"):
        _refuse_options(options, ("revision", "subset", "input", "channels", "image_size",
                                  "train_split", "validation_split"), "is built in")
        parts = BUILTIN[options.source]()
        columns = list(parts.label_names)
        return Source(columns, columns, lambda targets: parts)
    if not is_hub_id(options.source):
        _refuse_options(options, ("revision", "subset"), "is not on the Hub")
    tables = _open_tables(options)
    kinds = kinds_of(tables[0][1])
    chosen = [options.input] if isinstance(options.input, str) else options.input or []
    return Source(target_candidates(kinds, chosen), list(kinds),
                  lambda targets: _split_tables(options, tables, kinds, targets))


def _refuse_options(options: DataOptions, names: Sequence[str], why: str) -> None:
    for name in names:
        if getattr(options, name) != DataOptions.model_fields[name].default:
            raise UserError(f"data.{name}: has no meaning here, {options.source} {why}; leave it "
                            "out")


def _open_tables(options: DataOptions) -> list[tuple[str, datasets.Dataset]]:
    """The training table and, unless a share is to be held out, the validation table.

    Each comes after what it is, for messages.
    """
    source, wanted = options.source, options.validation_split
    tables = read_tables(source, options, "data.source")
    if options.train_split not in tables:
        raise UserError(f"data.train_split: no split {options.train_split!r} in {source}"
                        f"{nearest(options.train_split, tables)}")
    named = {split: (source if len(tables) == 1 else f"{source}, {split} split", table)
             for split, table in tables.items()}
    train = named[options.train_split]
    if wanted is None:
        others = [name for name in _VALIDATION_NAMES if name in tables]
        wanted = next((name for name in others if name != options.train_split), _DEFAULT_SHARE)
    if isinstance(wanted, float):
        return [train]
    if wanted in tables:
        return [train, named[wanted]]
    if is_hub_id(wanted):
        raise UserError(f"data.validation_split: no split or file {wanted!r}"
                        f"{nearest(wanted, tables)}")
    shared = _files(wanted) & _files(source) or {wanted} & {source}
    if shared:
        raise UserError(f"data.validation_split: {min(shared)} is also trained on; validate on "
                        "other samples, or hold a share out with --data.validation_split 0.1")
    others = read_tables(wanted, options, "data.validation_split")
    if len(others) > 1:
        raise UserError(f"data.validation_split: {wanted} has several splits "
                        f"({', '.join(others)}); give a file")
    return [train, (wanted, next(iter(others.values())))]


def _files(pattern: str) -> set[str]:
    files = [pattern] if Path(pattern).exists() else glob.glob(pattern, recursive=True)
    return {str(Path(file).resolve()) for file in files}


def _split_tables(
    options: DataOptions, tables: list[tuple[str, datasets.Dataset]], kinds: dict[str, str],
    targets: Sequence[str],
) -> Parts:
    for where, table in tables:
        if len(table) == 0:
            raise UserError(f"{where}: is empty; training and validation need a sample each")
    (where, train), (other_where, validation) = tables[0], tables[-1]
    inputs = input_columns(kinds, options.input, targets)
    check_columns(kinds, kinds_of(validation), inputs, targets, other_where)
    labels = [read_labels(train, target, kinds[target], where) for target in targets]
    numbers = {each.column: each.numbers(train, where) for each in labels}
    decode = _decoder(train, inputs, kinds, options, where)
    if len(tables) == 1:
        share = options.validation_split or _DEFAULT_SHARE
        is_held_out = held_out(share, len(train), [column.numpy() for column in numbers.values()])
        if not is_held_out.any():
            raise UserError(f"{where}: no class of {targets[0]!r} has two rows, so none can be "
                            "held out; give --data.validation_split a split or a file")
        parts = [
            Part(where, decode, rows, {key: column[rows] for key, column in numbers.items()})
            for rows in (np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out))
        ]
        held = f"{share:.3g} of them held out for validation, the same whatever the seed"
    else:
        other_numbers = {each.column: each.numbers(validation, other_where) for each in labels}
        parts = [
            Part(where, decode, np.arange(len(train)), numbers),
            Part(other_where, decode.on(validation, other_where), np.arange(len(validation)),
                 other_numbers),
        ]
        held = f"validation from {other_where}"
    shown = ", ".join(inputs[:5]) + (f" and {len(inputs) - 5} more" if len(inputs) > 5 else "")
    shown += f"; target {', '.join(targets)}"
    unused = [f"{name} ({kind})" for name, kind in kinds.items() if name not in [*inputs, *targets]]
    shown += f"; not used: {', '.join(unused)}" if unused else ""
    return Parts(*parts, {each.column: each.names for each in labels},
                 f"{where}: {len(train):,} rows, {held}; input {shown}")


def _decoder(train, inputs, kinds, options, where) -> Decoder:
    if kinds[inputs[0]] == IMAGE:
        return ImageDecoder(train, inputs[0], options.channels, options.height_and_width, where)
    _refuse_options(options, ("channels", "image_size"), "gives no images as inputs")
    return NumberDecoder(train, inputs, not options.normalize, where)


def held_out(share: float, num_rows: int, labels: Sequence[np.ndarray]) -> np.ndarray:
    """[num_rows] bool: a keyed sample of the rows, of the same share in each class.

    Depends on the number of rows and the labels alone, not on the run's seed, so that runs of
    several seeds are compared on the same samples.

    Args:
        labels: class numbers by task, [num_rows] each; of several tasks the first decides.
    """
    order = samples_of(np.arange(num_rows), num_rows, seed=0)
    classes = labels[0] if labels else np.zeros(num_rows, np.int64)
    sizes = np.bincount(classes)
    quotas = np.floor(sizes * share).astype(np.int64)
    # What rounding down leaves goes to the largest remainders; the last row of a class stays.
    wanted = min(max(1, round(num_rows * share)), num_rows - 1)
    for number in np.argsort(-(sizes * share - quotas), kind="stable"):
        if quotas.sum() < wanted and quotas[number] < sizes[number] - 1:
            quotas[number] += 1
    ordered = classes[order]
    is_held_out = np.zeros(num_rows, bool)
    by_class = np.argsort(ordered, kind="stable")  # rows of each class in keyed order
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    for start, quota in zip(starts, quotas, strict=True):
        is_held_out[order[by_class[start : start + quota]]] = True
    return is_held_out


def _digits() -> Parts:
    """UCI "Optical Recognition of Handwritten Digits" (Alpaydin & Kaynak 1998), as in scikit-learn.

    Inputs are [1, 8, 8] in [0, 1]. The split is fixed, whatever the run's seed.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16  # 16 grey levels
    digits = torch.tensor(bunch.target, dtype=torch.int64)
    rows = np.arange(len(digits))
    splits = train_test_split(rows, test_size=360, stratify=bunch.target, random_state=0)
    parts = [
        Part(f"builtin:digits, {name} split", images.__getitem__, chosen, {"digit": digits[chosen]})
        for name, chosen in zip(("training", "validation"), map(np.sort, splits), strict=True)
    ]
    return Parts(*parts, {"digit": [str(name) for name in bunch.target_names]},
                 "builtin:digits: 1,797 images of handwritten digits")


BUILTIN["builtin:digits"] = _digits
