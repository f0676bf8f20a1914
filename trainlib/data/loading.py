"""Loading a data set: one ordered pass that decodes, checks and measures."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import psutil
import torch
from torch import Tensor
from tqdm import tqdm

from trainlib.augment import Augment
from trainlib.config import UserError, is_first_process
from trainlib.data.options import AugmentOptions, DataOptions
from trainlib.data.reading import SHARE_OF_MEMORY, Split, decoded, model_inputs
from trainlib.data.sources import Part, Source
from trainlib.user_code import describe_error, import_object

_CHUNK_BYTES = 2**22  # of inputs that a worker decodes at a time; a few chunks wait in memory


@dataclass(frozen=True)
class Dataset:
    """A training and a validation split, the names of their classes, and the inputs' scale."""

    train: Split
    validation: Split
    label_names: dict[str, list[str]]
    """By target column."""
    mean: Tensor | None
    """Of the training inputs as the model is given them, for each entry of a sample's first
    dimension: [channels, 1, 1] for images, [columns] for numbers; none: inputs stay as they are."""
    deviation: Tensor | None
    """As ``mean``; 1 where the inputs are constant."""
    description: str
    """What was read and how, for the log."""

    def example(self) -> Tensor:
        """Inputs of a training sample or two, as a model is given them."""
        return model_inputs(self.train.read(np.arange(min(2, len(self.train)))))


def load(source: Source, options: DataOptions, targets: Iterable[str]) -> Dataset:
    """Both splits of a source, checked and measured in one pass over the training split.

    Raises:
        UserError: what cannot be decoded or trained on, with the file or row.
    """
    parts = source.split(list(targets))
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # on this machine
    workers = max(1, _num_cores() // processes) if options.workers is None else options.workers
    first = parts.train.decode(parts.train.rows[:1])
    size = first.nbytes * (len(parts.train.rows) + len(parts.validation.rows))
    in_memory = options.in_memory
    if in_memory == "auto":
        in_memory = size <= SHARE_OF_MEMORY * psutil.virtual_memory().total / processes
    moments = Moments() if options.normalize else None
    # What is broken or missing is better told now than after hours.
    reads = in_memory or moments is not None or first.is_floating_point()
    train, validation = (
        _read(part, first, workers, in_memory, counts) if reads else
        Split(None, part.targets, torch.from_numpy(part.rows), part.decode, workers)
        for part, counts in ((parts.train, moments), (parts.validation, None))
    )
    where = (f"in memory ({size / 2**20:,.1f} MiB)" if in_memory else
             f"read from disk by {workers} worker processes ({size / 2**20:,.1f} MiB decoded)")
    shape = "x".join(map(str, first.shape[1:]))
    return Dataset(
        train, validation, parts.label_names, *(moments.result() if moments else (None, None)),
        f"data: {parts.description}; {len(train):,} training and {len(validation):,} validation "
        f"samples of {shape} {where}",
    )


def _num_cores() -> int:
    """Cores that this process may use, which may be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _read(
    part: Part, first: Tensor, workers: int, in_memory: bool, moments: Moments | None
) -> Split:
    """A part of a source, decoded and checked in one ordered pass.

    Args:
        first: [1, ...] inputs, which show shape and type of all.
        moments: takes all inputs in, if given.
    """
    inputs, bad_rows = None, []
    if in_memory:
        inputs = torch.empty((len(part.rows), *first.shape[1:]), dtype=first.dtype)
    starts = range(0, len(part.rows), max(1, _CHUNK_BYTES // first.nbytes))
    chunks = np.split(part.rows, starts[1:])
    # Less than a chunk for each worker is sooner decoded here than the workers are started.
    stream = decoded(part.decode, chunks, workers if len(chunks) > workers else 0)
    progress = tqdm(total=len(part.rows), desc=f"reading {part.where}", unit=" rows", delay=2,
                    disable=None if is_first_process() else True, leave=False)
    for chunk, start, rows in zip(stream, starts, chunks, strict=True):
        if in_memory:
            inputs[start : start + len(rows)] = chunk
        if chunk.is_floating_point():
            bad_rows += rows[(~chunk.flatten(1).isfinite().all(1)).numpy()].tolist()
        if moments:
            moments.add(chunk)
        progress.update(len(rows))
    progress.close()
    if bad_rows:
        raise UserError(f"{part.where}: missing, NaN or infinite inputs in {len(bad_rows)} of "
                        f"{len(part.rows)} samples, first in row {bad_rows[0]}; mend or remove "
                        "these rows")
    return Split(inputs, part.targets, torch.from_numpy(part.rows), part.decode, workers)


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


def build_augment(options: AugmentOptions, example: Tensor) -> Augment:
    """The augmentation that the options name, tried on some inputs.

    Raises:
        UserError: an option does not fit the inputs, or the user's function cannot be had or fails.
    """
    given = options.model_dump()
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
