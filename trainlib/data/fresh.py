"""Reading rows for a net that has been trained: what cannot be read is named, the rest is read.

Inputs have the shape, and targets the classes, of the training; what is read of a run's own splits
is, bit for bit, what the run read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import psutil
import torch
from torch import Tensor

from trainlib.config import UserError, nearest
from trainlib.data import builtin
from trainlib.data.columns import IMAGE, input_columns, kinds_of
from trainlib.data.decoding import Decoder
from trainlib.data.fresh_inputs import RULES, Known, input_decoder, language_part, only_table
from trainlib.data.fresh_targets import FreshTarget, builtin_target, read_target
from trainlib.data.loading import CHUNK_BYTES, num_cores
from trainlib.data.masks import Masks
from trainlib.data.options import DataOptions
from trainlib.data.parts import DEFAULT_SHARE, held_out
from trainlib.data.reading import SHARE_OF_MEMORY, Split
from trainlib.data.rough import image_files
from trainlib.data.sources import open_tables
from trainlib.data.targets import TargetInfo, columns_of, count_valid
from trainlib.data.workers import decoded
from trainlib.losses import IGNORED

if TYPE_CHECKING:
    from trainlib.tasks import TaskOptions


@dataclass
class Fresh:
    """Rows that have been read, and those that could not be."""

    split: Split
    targets: dict[str, TargetInfo]
    num_rows: int
    unread: dict[int, str] = field(default_factory=dict)
    """By row of the source, why."""
    notes: list[str] = field(default_factory=list)
    files: list[str] | None = None
    """By row of the source, of images."""


def read_rows(
    options: DataOptions, tasks: Mapping[str, TaskOptions], known: Known, which: str | None
) -> Fresh:
    """The rows of a source.

    Args:
        options: of the run, with the source to read.
        which: ``train`` or ``validation`` as the recipe splits the source, or another split of it;
            none: all rows of the only split.

    Raises:
        UserError: the source cannot be read, or a column is missing.
    """
    if any(task.kind == "language_modeling" for task in tasks.values()):
        notes: list[str] = []
        part, info = language_part(options, tasks, which, notes)
        split = Split(None, {}, torch.from_numpy(part.rows), part.decode, part.target_decoders, 0,
                      num_valid=part.num_valid)
        return Fresh(split, info, len(part.rows), notes=notes)
    if options.source in builtin.TABLES:
        table = builtin.TABLES[options.source]()
        count = len(next(iter(table.columns.values())).values)
        rows = {"train": table.train_rows, "validation": table.validation_rows,
                None: np.arange(count)}.get(which)
        if rows is None:
            raise UserError(f"--split: {options.source} has train and validation, got {which}")
        targets = {name: builtin_target(name, task, table, known.labels[name])
                   for name, task in tasks.items()}
        return _read(options, table.decode, rows, targets, tasks, known, {}, [], options.source)
    return _read_table(options, tasks, known, which)


def _read_table(
    options: DataOptions, tasks: Mapping[str, TaskOptions], known: Known, which: str | None
) -> Fresh:
    unread, notes = {}, []
    by_rule = which in RULES
    if by_rule:
        tables = open_tables(options)
        where, table = tables[0] if which == "train" else tables[-1]
    else:
        where, table, unread = only_table(options, tasks, which, notes)
    if not len(table):
        raise UserError(f"{where}: has no rows")
    kinds = kinds_of(table)
    columns = [column for task in tasks.values() for column in columns_of(task)]
    given = [options.input] if isinstance(options.input, str) else options.input
    inputs = given or input_columns(kinds, None, columns, options.tokenizer is not None)
    for name in inputs:
        if name not in kinds:
            raise UserError(f"{where}: has no column {name!r}, which the run was trained on"
                            f"{nearest(name, kinds)}")
    targets = {name: read_target(name, task, table, kinds, where, known.labels[name],
                                 known.input_shape, options.image_size is None)
               for name, task in tasks.items()}
    rows = np.arange(len(table))
    if by_rule and len(tables) == 1:
        share = options.validation_split or DEFAULT_SHARE
        labels = [target.values.numpy() for name, target in targets.items()
                  if tasks[name].kind == "classification" and target.values is not None]
        is_held_out = held_out(share, len(table), labels)
        rows = np.flatnonzero(is_held_out if which == "validation" else ~is_held_out)
    decode = input_decoder(options, table, inputs, kinds, where, known, unread, notes)
    fresh = _read(options, decode, rows, targets, tasks, known, unread, notes, where)
    if kinds[inputs[0]] == IMAGE:
        fresh.files = image_files(table, inputs[0])
    return fresh


def _read(
    options: DataOptions, decode: Decoder, rows: np.ndarray, targets: dict[str, FreshTarget],
    tasks: Mapping[str, TaskOptions], known: Known, unread: dict[int, str], notes: list[str],
    where: str,
) -> Fresh:
    """All rows that can be decoded."""
    num_rows, wanted = len(rows), set(rows.tolist())
    unread = {row: why for row, why in unread.items() if row in wanted}
    rows = rows[[row not in unread for row in rows.tolist()]]
    decoders = {name: target.decode for name, target in targets.items() if target.decode}
    workers = max(1, num_cores()) if options.workers is None else options.workers
    masks = {name: Masks(name, tasks[name].ignore_index, list(known.labels[name]))
             for name in decoders}
    chosen, inputs, stored, counts = [], [], {name: [] for name in decoders}, {}
    in_memory = options.in_memory
    for some, chunk, read in _pieces(decode, decoders, rows, workers, unread):
        if in_memory == "auto":
            size = chunk[0].nbytes * len(rows)
            in_memory = size <= SHARE_OF_MEMORY * psutil.virtual_memory().total
        is_good = _check(some, chunk, known, getattr(decode, "columns", []), unread)
        some, chunk = some[is_good.numpy()], chunk[is_good]
        chosen.append(some)
        if in_memory:
            inputs.append(chunk)
        for name, values in read.items():
            counts.setdefault(name, []).append(masks[name].add(values[is_good], some, where))
            if in_memory:
                stored[name].append(values[is_good])
    rows = np.concatenate(chosen) if chosen else np.empty(0, np.int64)
    if not len(rows):
        first = f"; row {min(unread)}: {unread[min(unread)]}" if unread else ""
        raise UserError(f"{where}: none of {num_rows} rows can be read{first}")
    infos, values, classes = {}, {}, {}
    for name, target in targets.items():
        if target.decode:
            classes[name], note = _classes(masks[name], tasks[name].ignore_index, name)
            infos[name], more = TargetInfo(list(known.labels[name]), may_miss=True,
                                           misses_parts=True), note
        else:
            infos[name], values[name], more = target.finish(rows)
        notes += [more] if more else []
    num_valid = {name: count_valid(each) for name, each in values.items()}
    num_valid |= {name: torch.cat(each) for name, each in counts.items()}
    in_memory_targets = {name: torch.cat(each) for name, each in stored.items()} if inputs else {}
    split = Split(
        torch.cat(inputs) if inputs else None, values | in_memory_targets, torch.from_numpy(rows),
        decode, {} if inputs else decoders, workers, classes, num_valid,
    )
    infos = {name: replace(info, may_miss=info.may_miss or bool((num_valid[name] == 0).any()))
             for name, info in infos.items()}
    return Fresh(split, infos, num_rows, unread, notes)


def _pieces(
    decode: Decoder, decoders: Mapping[str, Decoder], rows: np.ndarray, workers: int,
    unread: dict[int, str],
) -> Iterator[tuple[np.ndarray, Tensor, dict[str, Tensor]]]:
    """What can be decoded of the rows, in order; of the rest, why not, goes into ``unread``."""
    def halves(some: np.ndarray) -> Iterator[tuple[np.ndarray, Tensor, dict[str, Tensor]]]:
        try:
            yield some, decode(some), {name: each(some) for name, each in decoders.items()}
        except UserError as error:
            if len(some) == 1:
                unread[int(some[0])] = str(error)
                return
            for half in np.array_split(some, 2):
                yield from halves(half)

    start, size = 0, 0
    while start < len(rows) and not size:  # the first that can be decoded says how large they are
        for piece in halves(rows[start : start + 1]):
            size = piece[1].nbytes
            yield piece
        start += 1
    rows = rows[start:]
    chunks = np.split(rows, range(0, len(rows), max(1, CHUNK_BYTES // max(size, 1)))[1:])
    stream = decoded(decode, [c for c in chunks if len(c)], workers if len(chunks) > workers else 0,
                     False, decoders, is_forgiving=True)
    for some, read in zip([c for c in chunks if len(c)], stream, strict=True):
        if isinstance(read, UserError):
            yield from halves(some)
        else:
            yield some, *read


def _check(
    rows: np.ndarray, chunk: Tensor, known: Known, columns: list[str], unread: dict[int, str]
) -> Tensor:
    """[rows] bool: whether inputs are finite, or tokens that the net knows."""
    if chunk.is_floating_point():
        is_bad, what = ~chunk.isfinite(), "missing, NaN or infinite"
    elif chunk.dtype != torch.uint8 and known.vocab_size is not None:
        is_bad = (chunk < 0) | (chunk >= known.vocab_size)
        what = f"tokens outside 0..{known.vocab_size - 1}, which the net knows"
    else:
        return torch.ones(len(rows), dtype=torch.bool)
    bad_rows = is_bad.flatten(1).any(1)
    for place in bad_rows.nonzero().flatten().tolist():
        named = columns
        if chunk.ndim == 2 and len(columns) == chunk.shape[1]:
            named = [name for name, bad in zip(columns, is_bad[place].tolist(), strict=True) if bad]
        unread[int(rows[place])] = f"{', '.join(map(repr, named)) or 'inputs'}: {what}"
    return ~bad_rows


def _classes(masks: Masks, ignored: int | None, name: str) -> tuple[Tensor, str | None]:
    """[257] the class number of each value of a mask, as in training; a line about the others."""
    count, seen = len(masks.label_names), masks.seen.nonzero().flatten().tolist()
    table = torch.full((257,), IGNORED)
    table[:count] = torch.arange(count)
    if count == 2 and set(seen) <= {0, 255} and 255 in seen:
        table[[1, 255]] = torch.tensor([IGNORED, 1])  # masks of 0 and 255
    if ignored is not None and 0 <= ignored <= 255:
        table[ignored] = IGNORED
    unknown = [value for value in seen if table[value] == IGNORED]
    note = (f"{name}: masks have the values {', '.join(map(str, unknown[:5]))}, which training did "
            "not have; their pixels are left out of the evaluation")
    return table, note if unknown else None
