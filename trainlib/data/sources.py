"""Opening a source: which tables hold the training and the validation samples.

A builtin source comes as tensors or texts; all others as tables. Texts become tokens here.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from torch import Tensor

from trainlib.config import UserError, nearest
from trainlib.data import builtin
from trainlib.data.columns import (
    IMAGE,
    TEXT,
    check_columns,
    input_columns,
    kinds_of,
    target_candidates,
)
from trainlib.data.decoding import Decoder, ImageDecoder, NumberDecoder
from trainlib.data.language import (
    only_language_task,
    split_language_tables,
    split_texts,
    text_decoders,
)
from trainlib.data.options import DataOptions
from trainlib.data.parts import DEFAULT_SHARE, Part, Parts, held_out, refuse_options
from trainlib.data.tables import is_hub_id, read_tables
from trainlib.data.targets import TargetInfo, columns_of, finish, open_target

if TYPE_CHECKING:
    import datasets

    from trainlib.tasks import TaskOptions

_VALIDATION_NAMES = ("validation", "valid", "val", "dev")


class Source(NamedTuple):
    """A source that has been opened, but not read."""

    target_candidates: list[str]
    """Columns that could be the only target of a classification."""
    columns: list[str]
    """All columns."""
    split: Callable[[Mapping[str, TaskOptions]], Parts]
    """The splits, once the tasks are known."""


def open_source(options: DataOptions) -> Source:
    """The source that the options name.

    Raises:
        UserError: it cannot be read, or a split of it is not there.
    """
    if options.source.startswith("builtin:"):
        refuse_options(options, ("revision", "subset", "input", "channels", "image_size",
                                 "train_split", "validation_split"), "is built in")
        if options.source in builtin.TEXTS:
            return Source([], ["text"], lambda tasks: _split_builtin_texts(options, tasks))
        table = builtin.TABLES[options.source]()
        candidates = [name for name, column in table.columns.items()
                      if column.kind == "classification"]
        return Source(candidates, list(table.columns),
                      lambda tasks: _split_builtin_table(options, table, tasks))
    if not is_hub_id(options.source):
        refuse_options(options, ("revision", "subset"), "is not on the Hub")
    tables = open_tables(options)
    kinds = kinds_of(tables[0][1])
    chosen = [options.input] if isinstance(options.input, str) else options.input or []
    return Source(target_candidates(kinds, chosen, options.tokenizer is not None), list(kinds),
                  lambda tasks: _split_tables(options, tables, kinds, tasks))


def open_tables(options: DataOptions) -> list[tuple[str, datasets.Dataset]]:
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
        wanted = next((name for name in others if name != options.train_split), DEFAULT_SHARE)
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


def _split_builtin_table(
    options: DataOptions, table: builtin.Table, tasks: Mapping[str, TaskOptions]
) -> Parts:
    refuse_options(options, ("tokenizer",), "is no text")
    rows = (table.train_rows, table.validation_rows)
    infos, targets, decoders = {}, ({}, {}), {}
    for name, task in tasks.items():
        for column in columns_of(task)[1:]:
            raise UserError(f"tasks.{name}.target: {column!r} comes second; a column of "
                            f"{options.source} is a target by itself")
        column = table.columns[columns_of(task)[0]]
        if task.kind != column.kind:
            raise UserError(f"tasks.{name}.kind: {task.target!r} of {options.source} is for "
                            f"{column.kind}, got {task.kind}")
        if column.kind == "segmentation":
            infos[name] = TargetInfo(column.label_names)
            decoders[name] = column.values.__getitem__
            continue
        infos[name], *both = finish(name, task.kind, column.label_names,
                                    *(column.values[chosen] for chosen in rows))
        for part, values in zip(targets, both, strict=True):
            part[name] = values
    parts = (Part(f"{options.source}, {which} split", table.decode, chosen, values, decoders)
             for which, chosen, values in zip(("training", "validation"), rows, targets,
                                              strict=True))
    return Parts(*parts, infos, table.description)


def _split_builtin_texts(options: DataOptions, tasks: Mapping[str, TaskOptions]) -> Parts:
    name = only_language_task(tasks, "text")
    found = builtin.TEXTS[options.source]()
    return split_texts(options, name, options.source, len(found.texts),
                       lambda rows: [found.texts[row] for row in rows], found.description)


def _split_tables(
    options: DataOptions, tables: list[tuple[str, datasets.Dataset]], kinds: dict[str, str],
    tasks: Mapping[str, TaskOptions],
) -> Parts:
    for where, table in tables:
        if len(table) == 0:
            raise UserError(f"{where}: is empty; training and validation need a sample each")
    (where, train), (other_where, validation) = tables[0], tables[-1]
    targets = [column for task in tasks.values() for column in columns_of(task)]
    if any(task.kind == "language_modeling" for task in tasks.values()):
        return split_language_tables(options, tables, kinds, tasks)
    inputs = input_columns(kinds, options.input, targets, options.tokenizer is not None)
    classes = [columns_of(task)[0] for task in tasks.values() if task.kind == "classification"]
    check_columns(kinds, kinds_of(validation), inputs, targets, classes, other_where)
    names, values = {}, {}
    for name, task in tasks.items():
        names[name], encode = open_target(task, train, kinds, where, len(tasks) > 1,
                                          options.height_and_width)
        values[name] = [encode(table, place) for place, table in tables]
    decoders, vocab_size, pad_id = _input_decoders(options, tables, inputs, kinds)
    if len(tables) == 1:
        share = options.validation_split or DEFAULT_SHARE
        labels = [values[name][0] for name, task in tasks.items() if task.kind == "classification"]
        is_held_out = held_out(share, len(train), [column.numpy() for column in labels])
        if not is_held_out.any():
            what = f"no class of {classes[0]!r} has two rows" if classes else "there is one row"
            raise UserError(f"{where}: {what}, so none can be held out; give "
                            "--data.validation_split a split or a file")
        rows = (np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out))
        held = f"{share:.3g} of them held out for validation, the same whatever the seed"
    else:
        rows = (np.arange(len(train)), np.arange(len(validation)))
        held = f"validation from {other_where}"
    infos, read, later = {}, ({}, {}), ({}, {})
    for name, task in tasks.items():
        if not isinstance(values[name][0], Tensor):
            infos[name] = TargetInfo(task.label_names or [])
            later[0][name], later[1][name] = values[name][0], values[name][-1]
            continue
        infos[name], read[0][name], read[1][name] = finish(
            name, task.kind, names[name], values[name][0][rows[0]], values[name][-1][rows[1]])
    parts = [
        Part(place, decode, *rest) for place, decode, *rest in
        zip((where, other_where), (decoders[0], decoders[-1]), rows, read, later, strict=True)
    ]
    shown = ", ".join(inputs[:5]) + (f" and {len(inputs) - 5} more" if len(inputs) > 5 else "")
    shown += f"; target {', '.join(targets)}"
    unused = [f"{name} ({kind})" for name, kind in kinds.items() if name not in [*inputs, *targets]]
    shown += f"; not used: {', '.join(unused)}" if unused else ""
    return Parts(*parts, infos, f"{where}: {len(train):,} rows, {held}; input {shown}",
                 inputs, vocab_size, pad_id)


def _input_decoders(
    options: DataOptions, tables: list[tuple[str, datasets.Dataset]], inputs: list[str],
    kinds: dict[str, str],
) -> tuple[list[Decoder], int | None, int | None]:
    """What decodes the inputs of each table, and the vocabulary and padding of tokens."""
    (where, train), *others = tables
    kind = kinds[inputs[0]]
    if kind == TEXT:
        refuse_options(options, ("channels", "image_size"), "gives no images as inputs")
        return text_decoders(options, tables, inputs[0])
    if options.tokenizer is not None:
        raise UserError(f"data.tokenizer: the input {inputs[0]!r} holds {kind} values, no text; "
                        "leave it out, or choose another with --data.input COLUMN")
    if kind == IMAGE:
        first = ImageDecoder(train, inputs[0], options.channels, options.height_and_width, where)
    else:
        refuse_options(options, ("channels", "image_size"), "gives no images as inputs")
        first = NumberDecoder(train, inputs, not options.normalize, where)
    return [first, *(first.on(table, place) for place, table in others)], None, None
