"""Masks: which values they hold, which of them are classes, and their size."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from trainlib.config import UserError
from trainlib.losses import IGNORED


class Masks:
    """What the masks of a task hold: how many classes, and which pixels count.

    Values are class numbers, but masks of 0 and 255 only have the classes 0 and 1.
    """

    def __init__(self, task: str, ignored: int | None, label_names: list[str]):
        """
        Args:
            ignored: the value of pixels that do not count.
            label_names: none: the classes have their numbers for names.
        """
        self.task, self.ignored, self.label_names = task, ignored, label_names
        self.seen = torch.zeros(256, dtype=torch.bool)
        self.classes: Tensor | None = None

    def add(self, masks: Tensor, rows: np.ndarray, where: str) -> Tensor:
        """Takes [n, height, width] masks in; [n] int64 how many pixels of each count.

        Raises:
            UserError: values outside 0..255 or, after ``close``, that the training masks lack.
        """
        is_value = (masks >= 0) & (masks <= 255)
        if self.classes is not None:
            is_value &= (self.classes != -1)[masks.int().clamp(0, 255)]
        wrong = (~is_value).flatten(1).any(1).nonzero().flatten()
        if len(wrong):
            first = int(wrong[0])
            raise UserError(
                f"{where}, row {rows[first]}: the mask of task {self.task!r} has the value "
                f"{int(masks[first][~is_value[first]][0])}, " + (
                    "class numbers lie in 0..255" if self.classes is None else
                    "which no training mask has; the classes are the training masks' 0 to "
                    f"{len(self.label_names) - 1}, or as many as label_names has"))
        self.seen[masks.unique().long()] = True
        is_counted = torch.ones_like(masks) if self.ignored is None else masks != self.ignored
        return is_counted.flatten(1).sum(1)

    def close(self, where: str) -> None:
        """Fixes the classes to those seen so far; a second call changes nothing.

        Raises:
            UserError: there is one class only, or too few names.
        """
        if self.classes is not None:
            return
        values = [v for v in self.seen.nonzero().flatten().tolist() if v != self.ignored]
        is_binary = values == [0, 255]
        count = 2 if is_binary else max(values, default=0) + 1
        count = max(count, len(self.label_names))
        if count < 2:
            raise UserError(f"{where}: the masks of task {self.task!r} have the class 0 only; a "
                            "segmentation needs two or more")
        self.label_names = _check_label_names(self.task, self.label_names or None, count)
        self.classes = torch.full((256,), -1)
        self.classes[:count] = torch.arange(count)
        if is_binary:
            self.classes[[1, 255]] = torch.tensor([-1, 1])
        if self.ignored is not None and 0 <= self.ignored <= 255:
            self.classes[self.ignored] = IGNORED


def _check_label_names(name: str, given: list[str] | None, count: int) -> list[str]:
    """The names of ``count`` classes: those given, else their numbers.

    Raises:
        UserError: fewer are given.
    """
    if given is not None and len(given) < count:
        raise UserError(f"tasks.{name}.label_names: {len(given)} names, the masks have class "
                        f"numbers up to {count - 1}")
    return list(given) if given is not None else [str(number) for number in range(count)]


def check_sizes(
    name: str, inputs: tuple[int, ...], masks: tuple[int, ...], where: str
) -> None:
    """Refuses masks [n, height, width] that do not have the size of their images."""
    if len(inputs) != 4 or len(masks) != 3 or inputs[2:] != masks[1:]:
        raise UserError(f"{where}: the masks of task {name!r} have {'x'.join(map(str, masks[1:]))} "
                        f"pixels, the images {'x'.join(map(str, inputs[2:] or inputs[1:]))}; both "
                        "have one size, which --data.image_size gives them")
