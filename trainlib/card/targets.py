"""What the training split holds of each target, counted from what is in memory anyway."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trainlib.card.facts import as_code

if TYPE_CHECKING:
    from trainlib.data import Dataset, TargetInfo

_SHOWN = 20  # classes or labels that are all named
_ENDS = 5  # of more, so many of the most and of the least frequent


def target_lines(
    dataset: Dataset, tasks: Mapping[str, dict[str, Any]], shape: tuple[int, ...]
) -> list[str]:
    """A line of each task: counts of classes, labels or tokens, or mean and deviation of numbers.

    Nothing is read for them, and what only a machine with room for all inputs has is not used: the
    lines are the same on any machine.

    Args:
        tasks: the options of each, by name.
        shape: of one sample; masks have the height and width of their images.
    """
    lines = []
    for name, task in tasks.items():
        counts = dataset.train.num_valid[name]
        what = _about(task["kind"], dataset, name, counts, math.prod(shape[1:]))
        missing = int((counts == 0).sum())
        without = f"; {missing:,} of {len(counts):,} samples have no such target" * (missing > 0)
        lines.append(f"Target `{name}`: {what}{without}")
    return lines


def _about(kind: str, dataset: Dataset, name: str, counts: Tensor, num_pixels: int) -> str:
    """What a kind of task counts.

    Args:
        counts: [samples] entries of each training sample's target.
    """
    info, stored = dataset.targets[name], dataset.train.targets.get(name)
    if kind == "classification":
        numbers = torch.bincount(stored[counts > 0], minlength=len(info.label_names))
        return f"training samples by class: {_frequencies(info.label_names, numbers)}"
    if kind == "multilabel":
        partly = int(((counts > 0) & (counts < len(info.label_names))).sum())
        text = f"training samples with each label: {_frequencies(info.label_names, _ones(stored))}"
        return text + f"; {partly:,} samples lack some of the labels" * (partly > 0)
    if kind == "regression":
        return f"mean and deviation in training: {_numbers(info, stored)}"
    if kind == "segmentation":
        valid, pixels = int(counts.sum()), len(counts) * num_pixels
        return f"{valid:,} of {pixels:,} pixels in training count ({valid / pixels:.1%})"
    held_out = int(dataset.validation.num_valid[name].sum())
    return f"{int(counts.sum()):,} tokens to predict in training, {held_out:,} in validation"


def _ones(stored: Tensor) -> Tensor:
    """[labels] how many rows of [rows, labels] have a 1 there; NaN is none."""
    return (stored == 1).sum(0)


def _frequencies(names: list[str], counts: Tensor) -> str:
    """Names and counts: all in their own order, or the ends of the order of frequency."""
    numbers = counts.tolist()
    if len(numbers) <= _SHOWN:
        return _listed(names, numbers, range(len(numbers)))
    order = sorted(range(len(numbers)), key=lambda place: -numbers[place])  # ties as they stand
    none = f" ({numbers.count(0):,} of {len(numbers):,} have none)" if 0 in numbers else ""
    return (f"most {_listed(names, numbers, order[:_ENDS])}; "
            f"least {_listed(names, numbers, order[-_ENDS:])}{none}")


def _listed(names: list[str], numbers: list[int], places: Iterable[int]) -> str:
    return ", ".join(f"{as_code(names[place])} {numbers[place]:,}" for place in places)


def _numbers(info: TargetInfo, stored: Tensor) -> str:
    """Of each column in its own units, and how many rows lack it where some do."""
    missing = stored.isnan().sum(0).tolist()
    columns = list(zip(info.label_names, info.mean, info.deviation, missing, strict=True))
    shown = ", ".join(
        f"{as_code(name)} {mean:.6g} and {deviation:.6g}" + f" ({lacks:,} missing)" * (lacks > 0)
        for name, mean, deviation, lacks in columns[:_SHOWN])
    more = len(columns) - _SHOWN
    return shown + f" and {more:,} more in `labels.json`" * (more > 0)
