"""The splits of a source before they are read, and which rows are held out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from trainlib.config import UserError
from trainlib.data.decoding import Decoder
from trainlib.data.options import DataOptions
from trainlib.data.targets import TargetInfo
from trainlib.plan import samples_of

DEFAULT_SHARE = 0.1


class Part(NamedTuple):
    """One split, not yet read."""

    where: str
    """What it is, for messages."""
    decode: Decoder
    rows: np.ndarray
    """[samples] int64 rows of the source."""
    targets: dict[str, Tensor]
    """By task: [samples, ...] of those that are not read along with the inputs."""
    target_decoders: Mapping[str, Decoder] = {}
    """By task: of those that are."""
    num_valid: Mapping[str, Tensor] = {}
    """By task with a decoder that knows it: [samples] int64 entries that are there."""


class Parts(NamedTuple):
    """Both splits of a source, for given tasks."""

    train: Part
    validation: Part
    targets: dict[str, TargetInfo]
    """By task; without label names where masks have yet to be seen."""
    description: str
    """What is read from where, for the log."""
    inputs: list[str] | None = None
    """The columns that the model sees, where a table has others."""
    vocab_size: int | None = None
    """Of the tokens, where the inputs are text."""
    pad_id: int | None = None


def refuse_options(options: DataOptions, names: Sequence[str], why: str) -> None:
    """Refuses options that are given and mean nothing for this source."""
    for name in names:
        if getattr(options, name) != DataOptions.model_fields[name].default:
            raise UserError(f"data.{name}: has no meaning here, {options.source} {why}; leave it "
                            "out")


def held_out(share: float, num_rows: int, labels: Sequence[np.ndarray]) -> np.ndarray:
    """[num_rows] bool: a keyed sample of the rows, of the same share in each class.

    Depends on the number of rows and the labels alone, not on the run's seed, so that runs of
    several seeds are compared on the same samples.

    Args:
        labels: class numbers by classification, [num_rows] each; of several the first decides,
            for which rows without one are a class.
    """
    order = samples_of(np.arange(num_rows), num_rows, seed=0)
    classes = np.maximum(labels[0], -1) + 1 if labels else np.zeros(num_rows, np.int64)
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
