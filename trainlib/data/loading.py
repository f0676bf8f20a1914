"""Loading a data set: one ordered pass that decodes, checks and measures."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import psutil
import torch
from torch import Tensor
from tqdm import tqdm

from trainlib.augment import Augment
from trainlib.config import UserError, is_first_process
from trainlib.data.masks import Masks, check_sizes
from trainlib.data.options import AugmentOptions, DataOptions
from trainlib.data.parts import Part
from trainlib.data.reading import SHARE_OF_MEMORY, Split, model_inputs
from trainlib.data.sources import Source
from trainlib.data.targets import TargetInfo, check_shared_rows, count_valid
from trainlib.data.text import load_tokenizer
from trainlib.data.workers import decoded
from trainlib.losses import IGNORED
from trainlib.user_code import describe_error, import_object

if TYPE_CHECKING:
    from trainlib.tasks import TaskOptions

CHUNK_BYTES = 2**22  # of inputs that a worker decodes at a time; a few chunks wait in memory


@dataclass(frozen=True)
class Dataset:
    """A training and a validation split, what is known of their targets, and the inputs' scale."""

    train: Split
    validation: Split
    targets: dict[str, TargetInfo]
    """By task."""
    mean: Tensor | None
    """Of the training inputs as the model is given them, for each entry of a sample's first
    dimension: [channels, 1, 1] for images, [columns] for numbers; none: inputs stay as they are."""
    deviation: Tensor | None
    """As ``mean``; 1 where the inputs are constant."""
    description: str
    """What was read and how, for the log."""
    inputs: list[str] | None = None
    """The columns that the model sees, where a table has others."""
    token_range: tuple[int, int] | None = None
    """The smallest and the largest of inputs that are integers; of text, that there can be."""
    pad_id: int | None = None
    tokenizer: str | None = None
    """Of which tokens are, where inputs or targets were text."""

    def example(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Inputs and targets of a training sample or two, as model and tasks are given them."""
        inputs, targets = self.train.read(np.arange(min(2, len(self.train))))
        return model_inputs(inputs), self.train.task_targets(targets)

    def to_text(self) -> Callable[[list[int]], str] | None:
        """From tokens back to text; none where there are none."""
        return None if self.tokenizer is None else load_tokenizer(self.tokenizer, False).decode

    def tokenizer_json(self) -> str | None:
        """The tokenizer as a ``tokenizer.json``; none where there is none, or that of bytes."""
        to_json = None if self.tokenizer is None else load_tokenizer(self.tokenizer, False).to_json
        return None if to_json is None else to_json()


def load(source: Source, options: DataOptions, tasks: Mapping[str, TaskOptions]) -> Dataset:
    """Both splits of a source, checked and measured in one pass over each.

    Raises:
        UserError: what cannot be decoded or trained on, with the file or row.
    """
    parts = source.split(tasks)
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # on this machine
    workers = max(1, num_cores() // processes) if options.workers is None else options.workers
    train, validation = parts.train, parts.validation
    first, first_targets = next(decoded(train.decode, [train.rows[:1]], 0, False,
                                        train.target_decoders))
    size = sum(t.nbytes for t in (first, *first_targets.values()))
    size *= len(train.rows) + len(validation.rows)
    in_memory = options.in_memory
    if in_memory == "auto":
        in_memory = size <= SHARE_OF_MEMORY * psutil.virtual_memory().total / processes
    is_text = parts.vocab_size is not None
    moments = Moments() if options.normalize and not is_text else None
    masks = {
        name: Masks(name, task.ignore_index, task.label_names or parts.targets[name].label_names)
        for name, task in tasks.items() if task.kind == "segmentation"
    }
    for name in masks:
        check_sizes(name, tuple(first.shape), tuple(first_targets[name].shape), train.where)
    # What is broken or missing is better told now than after hours; tokens have been looked at.
    is_bytes = first.dtype == torch.uint8
    reads = in_memory or not is_text and (moments is not None or masks or not is_bytes)
    token_range = [0, parts.vocab_size - 1 if is_text else 0]
    splits = []
    for part, counts in ((train, moments), (validation, None)):
        splits.append(
            _read(part, first, workers, in_memory, counts, masks, token_range) if reads else
            Split(None, part.targets, torch.from_numpy(part.rows), part.decode,
                  part.target_decoders, workers, num_valid=_num_valid(part, {}))
        )
        for seen in masks.values():
            seen.close(part.where)
    classes = {name: seen.classes for name, seen in masks.items()}
    splits = [replace(split, classes=classes) for split in splits]
    _check_targets(splits)
    where = (f"in memory ({size / 2**20:,.1f} MiB)" if in_memory else
             f"read from disk by {workers} worker processes ({size / 2**20:,.1f} MiB decoded)")
    shape = "x".join(map(str, first.shape[1:]))
    infos = _completed(parts.targets, splits, masks, options.augment.crop > 0)
    notes = [*_missing(splits[0]), *(f"classes of {name}: {', '.join(seen.label_names)}"
                                     for name, seen in masks.items())]
    has_tokens = not first.is_floating_point() and not is_bytes
    return Dataset(
        *splits, infos, *(moments.result() if moments else (None, None)),
        f"data: {parts.description}; {len(train.rows):,} training and {len(validation.rows):,} "
        f"validation samples of {shape} {where}" + "".join(f"; {line}" for line in notes),
        parts.inputs, tuple(token_range) if has_tokens else None, parts.pad_id,
        options.tokenizer if is_text else None,
    )


def _check_targets(splits: list[Split]) -> None:
    """Refuses tasks without a target in a split, or without a common sample."""
    for split, what in zip(splits, ("training", "validation"), strict=True):
        for name, counts in split.num_valid.items():
            if not counts.any():
                raise UserError(f"tasks.{name}: no {what} sample has this target")
    check_shared_rows(splits[0].num_valid)


def _completed(
    infos: Mapping[str, TargetInfo], splits: list[Split], masks: Mapping[str, Masks],
    is_cropped: bool,
) -> dict[str, TargetInfo]:
    """What is known of the targets, with what only reading them has told.

    Args:
        is_cropped: whether crops leave pixels to ignore in masks that had none.
    """
    completed, first_targets = {}, splits[0].read(np.arange(1))[1]
    for name, info in infos.items():
        entries = first_targets[name].numel()
        counts = torch.cat([split.num_valid[name] for split in splits])
        leaves_holes = name in masks and is_cropped
        completed[name] = replace(
            info, may_miss=leaves_holes or bool((counts < entries).any()),
            misses_parts=leaves_holes or bool(((counts > 0) & (counts < entries)).any()),
            label_names=masks[name].label_names if name in masks else info.label_names,
        )
    return completed


def _missing(train: Split) -> list[str]:
    """Lines about the columns of which targets are missing."""
    lines = []
    for name, counts in train.num_valid.items():
        whole, any_part = int((counts == 0).sum()), int((counts < counts.max()).sum())
        lines += [f"{whole:,} training samples lack {name}"] if whole else []
        # Of labels and numbers; masks and the ends of texts are made of parts.
        is_float = name in train.targets and train.targets[name].is_floating_point()
        if is_float and any_part > whole:
            lines += [f"{any_part - whole:,} training samples lack a part of {name}"]
    return lines


def num_cores() -> int:
    """Cores that this process may use, which may be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _read(
    part: Part, first: Tensor, workers: int, in_memory: bool, moments: Moments | None,
    masks: Mapping[str, Masks], token_range: list[int],
) -> Split:
    """A part of a source, decoded and checked in one ordered pass.

    Args:
        first: [1, ...] inputs, which show shape and type of all.
        moments: takes all inputs in, if given.
        masks: take all masks in.
        token_range: is widened to the smallest and the largest of inputs that are integers.
    """
    inputs, targets, counts, bad_rows = None, {}, {name: [] for name in masks}, []
    is_bad = torch.zeros(first.shape[1], dtype=torch.bool)  # by column or channel
    if in_memory:
        inputs = torch.empty((len(part.rows), *first.shape[1:]), dtype=first.dtype)
    starts = range(0, len(part.rows), max(1, CHUNK_BYTES // first.nbytes))
    chunks = np.split(part.rows, starts[1:])
    # Less than a chunk for each worker is sooner decoded here than the workers are started.
    stream = decoded(part.decode, chunks, workers if len(chunks) > workers else 0, False,
                     part.target_decoders)
    progress = tqdm(total=len(part.rows), desc=f"reading {part.where}", unit=" rows", delay=2,
                    disable=None if is_first_process() else True, leave=False)
    for (chunk, chunk_targets), start, rows in zip(stream, starts, chunks, strict=True):
        place = slice(start, start + len(rows))
        for name, seen in masks.items():
            counts[name].append(seen.add(chunk_targets[name], rows, part.where))
        if in_memory:
            inputs[place] = chunk
            for name, chosen in chunk_targets.items():
                if name not in targets:
                    targets[name] = chosen.new_empty(len(part.rows), *chosen.shape[1:])
                targets[name][place] = chosen
        if chunk.is_floating_point():
            is_finite = chunk.isfinite()
            bad_rows += rows[(~is_finite.flatten(1).all(1)).numpy()].tolist()
            is_bad |= ~is_finite.transpose(0, 1).flatten(1).all(1)
        elif chunk.dtype != torch.uint8:
            token_range[0] = min(token_range[0], int(chunk.min()))
            token_range[1] = max(token_range[1], int(chunk.max()))
        if moments:
            moments.add(chunk)
        progress.update(len(rows))
    progress.close()
    if bad_rows:
        columns = getattr(part.decode, "columns", [])
        named = ""
        if len(columns) == len(is_bad) and first.ndim == 2:
            chosen = [column for column, bad in zip(columns, is_bad.tolist(), strict=True) if bad]
            named = f", in {', '.join(chosen)}"
        raise UserError(f"{part.where}: missing, NaN or infinite inputs in {len(bad_rows)} of "
                        f"{len(part.rows)} samples, first in row {bad_rows[0]}{named}; mend or "
                        "remove these rows, or name the other columns with data.input")
    seen = {name: torch.cat(chunks) for name, chunks in counts.items()}
    return Split(
        inputs, part.targets | targets, torch.from_numpy(part.rows), part.decode,
        {} if in_memory else part.target_decoders, workers, num_valid=_num_valid(part, seen),
    )


def _num_valid(part: Part, seen: Mapping[str, Tensor]) -> dict[str, Tensor]:
    known = {name: count_valid(values) for name, values in part.targets.items()}
    return known | {name: counts[part.rows] for name, counts in part.num_valid.items()} | dict(seen)


class Moments:
    """Mean and deviation of inputs, by channel or column, from one pass.

    Bytes are counted by value, so that their sums are exact. Numbers are added up in float64 as
    differences from the first sample: a large mean does not cancel, and a constant has deviation 0.
    """

    def __init__(self) -> None:
        self.count = 0
        self.first = self.sums = self.squares = 0

    def add(self, chunk: Tensor) -> None:
        """Takes [n, channels or columns, ...] inputs in."""
        values = chunk.transpose(0, 1).flatten(1)
        if self.count == 0:
            self.is_bytes = chunk.dtype == torch.uint8
            self.shape = (-1, *[1] * max(chunk.ndim - 2, 0))
            self.first = values[:, :1].double()
        self.count += values.shape[1]
        if self.is_bytes:
            counts = torch.stack([torch.bincount(channel, minlength=256) for channel in values])
            levels = torch.arange(256)
            self.sums = self.sums + counts @ levels
            self.squares = self.squares + counts @ levels.square()
        else:
            differences = values.double() - self.first
            self.sums = self.sums + differences.sum(1)
            self.squares = self.squares + differences.square().sum(1)

    def result(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation in fp32, of bytes as fractions of 255; the deviation is 1 for 0."""
        n = self.count
        if self.is_bytes:
            pairs = zip(self.sums.tolist(), self.squares.tolist(), strict=True)
            variance = torch.tensor([(n * q - s * s) / (n * 255) ** 2 for s, q in pairs],
                                    dtype=torch.float64)
            mean = self.sums.double() / (n * 255)
        else:
            difference = self.sums / n
            variance = (self.squares / n - difference.square()).clamp(min=0)
            mean = self.first[:, 0] + difference
        deviation = variance.sqrt().float()
        deviation = torch.where(deviation > 0, deviation, 1.0)
        return mean.float().view(self.shape), deviation.view(self.shape)


def build_augment(
    options: AugmentOptions, example: Tensor, tasks: Mapping[str, TaskOptions]
) -> Augment:
    """The augmentation that the options name, tried on some inputs.

    Raises:
        UserError: an option does not fit the inputs or the tasks, or the user's function cannot be
            had or fails.
    """
    masks = tuple(name for name, task in tasks.items() if task.kind == "segmentation")
    given = options.model_dump() | {"masks": masks, "ignored": IGNORED}
    if options.function is not None:
        try:
            given["function"] = import_object(options.function)
            with torch.no_grad(), torch.random.fork_rng([]):
                given["function"](example.clone())
        except Exception as error:  # whatever a user's function raises
            raise UserError(f"data.augment.function: {describe_error(error)}") from error
    augment = Augment(**given)
    try:
        augment.try_on(example)
    except ValueError as error:
        raise UserError(str(error)) from error
    return augment
