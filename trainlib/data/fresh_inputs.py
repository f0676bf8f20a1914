"""Inputs of rows that a net was not trained on: of the shape that it was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from trainlib.config import UserError, nearest
from trainlib.data import builtin
from trainlib.data.columns import IMAGE, INTEGER, LIST, NUMBER, TEXT, kinds_of, read_column
from trainlib.data.decoding import Decoder, ImageDecoder, NumberDecoder
from trainlib.data.fresh_targets import as_numbers
from trainlib.data.language import (
    parts_of_tokens,
    split_language_tables,
    split_texts,
    texts_of,
    tokenizer_of,
    tokens_of,
)
from trainlib.data.options import DataOptions
from trainlib.data.parts import Part
from trainlib.data.rough import Used, only_unicode, read_rough
from trainlib.data.sources import open_tables
from trainlib.data.targets import TargetInfo, columns_of
from trainlib.data.text import PaddedTexts, default_cache, tokenize

if TYPE_CHECKING:
    import datasets

    from trainlib.tasks import TaskOptions

RULES = ("train", "validation")  # what the recipe means by them


class Known(NamedTuple):
    """What the training knew."""

    labels: Mapping[str, list[str] | dict]
    """By task, as in labels.json."""
    input_shape: list[int] | None
    """None: of a run that did not write it down; the first row has it."""
    input_dtype: str | None
    vocab_size: int | None


def only_table(
    options: DataOptions, tasks: Mapping[str, TaskOptions], which: str | None, notes: list[str]
) -> tuple[str, datasets.Dataset, dict[int, str]]:
    """What a source is, its table, and the rows that are unread already, with why."""
    targets = [column for task in tasks.values() for column in columns_of(task)]
    inputs = [options.input] if isinstance(options.input, str) else options.input or []
    if any(task.kind == "language_modeling" for task in tasks.values()):
        inputs, targets = targets, []
    used = Used(inputs, targets, options.tokenizer is not None)
    tables, unread = read_rough(options, used)
    if which is None and len(tables) > 1:
        raise UserError(f"{options.source} has the splits {', '.join(tables)}; choose one with "
                        "--split")
    if which is not None and which not in tables:
        raise UserError(f"--split: no split {which!r} in {options.source}{nearest(which, tables)}")
    name = which or next(iter(tables))
    where = options.source if len(tables) == 1 else f"{options.source}, {name} split"
    table = only_unicode(tables[name], inputs, targets, unread)
    kinds = kinds_of(table)
    for column in inputs if used.is_text else []:
        if kinds.get(column) == INTEGER:
            if table.info.builder_name in ("csv", "json"):  # of a folder
                raise UserError(f"{where}: {column!r} was read as numbers, so zeros in front are "
                                f"lost; name the files, as '{options.source}/*.csv'")
            table = _as_text(table, column)
            notes.append(f"{column!r} holds integers, read as the texts of them")
    return where, table, unread


def _as_text(table: datasets.Dataset, column: str) -> datasets.Dataset:
    """A table whose column of integers is one of texts."""
    import datasets
    import pyarrow

    return datasets.Dataset(pyarrow.table({
        name: read_column(table, name).cast("string") if name == column
        else read_column(table, name) for name in table.column_names}))


def language_part(
    options: DataOptions, tasks: Mapping[str, TaskOptions], which: str | None, notes: list[str]
) -> tuple[Part, dict[str, TargetInfo]]:
    """A split of a text to model, or all of it, and what is known of its targets.

    Args:
        which: as in ``read_rows``; none: all texts.
        notes: is told of texts that cannot be read.
    """
    [(name, task)] = tasks.items()
    if options.source in builtin.TEXTS:
        texts = builtin.TEXTS[options.source]().texts
        if which in RULES:
            parts = split_texts(options, name, options.source, len(texts),
                                lambda rows: [texts[row] for row in rows], "")
        elif which is None:
            whole = (options.source, tokens_of(options, options.source, lambda: texts), None)
            parts = parts_of_tokens(options, name, whole, whole, "")
        else:
            raise UserError(f"--split: {options.source} has train and validation, got {which}")
    elif which in RULES:
        tables = open_tables(options)
        parts = split_language_tables(options, tables, kinds_of(tables[0][1]), tasks)
    else:
        where, table, unread = only_table(options, tasks, which, notes)
        column = columns_of(task)[0]
        if unread:
            notes.append(f"{len(unread):,} texts cannot be read and are left out; the first, row "
                         f"{min(unread)}: {unread[min(unread)]}")
            table = table.select(np.setdiff1d(np.arange(len(table)), list(unread)))
        if kinds_of(table).get(column) != TEXT:
            raise UserError(f"{where}: has no column {column!r} of text"
                            f"{nearest(column, table.column_names)}")
        whole = (where, tokens_of(options, where, lambda: texts_of(table, column)), None)
        parts = parts_of_tokens(options, name, whole, whole, "")
    part = parts.train if which == "train" else parts.validation
    tokens = part.decode.tokens
    return part, {name: TargetInfo([], vocab_size=parts.targets[name].vocab_size,
                                   bytes_per_token=tokens.bytes_per_token, may_miss=True,
                                   misses_parts=True)}


def input_decoder(
    options: DataOptions, table: datasets.Dataset, inputs: list[str], kinds: Mapping[str, str],
    where: str, known: Known, unread: dict[int, str], notes: list[str],
) -> Decoder:
    """What decodes the inputs of a table, to the shape that the net was trained on.

    Args:
        unread: is told of rows whose text is missing, or whose value is no number.
        notes: is told of texts that are cut, or empty.

    Raises:
        UserError: the columns hold something else than in training.
    """
    shape, first = known.input_shape, inputs[0]
    kind = kinds[first]
    if options.tokenizer is not None:
        if kind != TEXT:
            raise UserError(f"{where}: {first!r} holds {kind} values, in training text")
        is_missing = np.asarray(read_column(table, first).is_null())
        for row in np.flatnonzero(is_missing).tolist():
            unread.setdefault(row, f"{first!r}: the text is missing")
        tokens = tokenize(lambda: texts_of(table, first), tokenizer_of(options, add_special=True),
                          where, False, default_cache())
        lengths = np.diff(tokens.ends, prepend=0)
        length = shape[0] if shape else min(options.block_size, int(lengths.max()))
        for what, count in (
            (f"are longer than {length} tokens: cut there, as in training",
             (lengths > length).sum()),
            ("are empty: predicted from padding alone", ((lengths == 0) & ~is_missing).sum()),
        ):
            notes += [f"{count:,} texts {what}"] if count else []
        return PaddedTexts(tokens, length, None)
    if kind == IMAGE:
        if shape is None:
            return ImageDecoder(table, first, options.channels, options.height_and_width, where)
        if len(shape) != 3:
            raise UserError(f"{where}: {first!r} holds images, the run was trained on inputs of "
                            f"shape {shape}")
        decoder = ImageDecoder(table, first, shape[0], (shape[1], shape[2]), where)
        # What training refused is no more known to the net now.
        decoder.must_be_grey = options.channels is None and shape[0] == 1
        decoder.must_fit = options.image_size is None
        return decoder
    if kind == LIST:
        decoder = NumberDecoder(table, inputs, known.input_dtype == "int64", where, shape)
        if known.input_dtype == "int64" and decoder.type != "int64":
            raise UserError(f"{where}: {first!r} holds fractions, in training integers")
        return decoder
    if shape is not None and list(shape) != [len(inputs)]:
        raise UserError(f"{where}: {first!r} holds {kind} values, the run was trained on inputs of "
                        f"shape {shape}")
    import datasets
    import pyarrow

    if any(kinds[name] not in (INTEGER, NUMBER) for name in inputs):
        columns = {
            name: read_column(table, name) if kinds[name] in (INTEGER, NUMBER)
            else as_numbers(table, name, unread) for name in inputs
        }
        table = datasets.Dataset(pyarrow.table(columns))
    return NumberDecoder(table, inputs, False, where)
