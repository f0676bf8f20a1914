"""Masks: which values they hold, which of them are classes, and their size."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from trainlib.config import UserError
from trainlib.data.decoding import NumberDecoder
from trainlib.losses import IGNORED

if TYPE_CHECKING:
    import datasets


class ListMasks:
    """A decoder of masks that are lists of numbers, to [rows, height, width] int16."""

    def __init__(self, numbers: NumberDecoder, ignored: int | None):
        """
        Args:
            ignored: the value of pixels that do not count, which becomes -1.
        """
        self.numbers, self.ignored = numbers, ignored

    def on(self, table: datasets.Dataset, where: str) -> ListMasks:
        """The decoder of another table's masks."""
        return ListMasks(self.numbers.on(table, where), self.ignored)

    def __call__(self, rows: np.ndarray) -> Tensor:
        values = self.numbers(rows)
        is_ignored = torch.zeros_like(values, dtype=torch.bool)
        if self.ignored is not None:
            is_ignored = values == self.ignored
        is_wrong = ~is_ignored & ~((values >= 0) & (values <= 255) & (values == values.floor()))
        wrong = is_wrong.flatten(1).any(1).nonzero().flatten()
        if len(wrong):
            first = int(wrong[0])
            value = values[first][is_wrong[first]]
            raise UserError(f"{self.numbers.where}, row {rows[first]}: {self.numbers.columns[0]!r} "
                            f"has the value {value[0].item()}; class numbers of a mask lie in "
                            "0..255, what is missing has the value of ignore_index")
        return values.masked_fill(is_ignored, -1).short()


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

        Args:
            masks: values 0 to 255, or -1 for what is ignored.

        Raises:
            UserError: after ``close``, values that the training masks lack.
        """
        is_ignored = masks < 0
        if self.ignored is not None:  # compared as int64: bytes compare modulo 256
            is_ignored |= masks.long() == self.ignored
        if self.classes is not None:
            is_unseen = ~is_ignored & (self.classes[masks.long()] == -1)
            wrong = is_unseen.flatten(1).any(1).nonzero().flatten()
            if len(wrong):
                first = int(wrong[0])
                raise UserError(
                    f"{where}, row {rows[first]}: the mask of task {self.task!r} has the value "
                    f"{masks[first][is_unseen[first]][0].item()}, which no training mask has; the "
                    f"classes are 0 to {len(self.label_names) - 1}, or as many as label_names has")
        self.seen[masks[~is_ignored].unique().long()] = True
        return (~is_ignored).flatten(1).sum(1)

    def close(self, where: str) -> None:
        """Fixes the classes to those seen so far; a second call changes nothing.

        Raises:
            UserError: there is one class only, or too few names.
        """
        if self.classes is not None:
            return
        values = self.seen.nonzero().flatten().tolist()
        is_binary = values == [0, 255]
        if not is_binary and not self.label_names and 255 in values and 254 not in values:
            raise UserError(f"{where}: the masks of task {self.task!r} have the values "
                            f"{', '.join(map(str, values[:-1][:8]))} and 255; if that means that a "
                            f"pixel does not count, give --tasks.{self.task}.ignore_index 255, "
                            "else label_names for 256 classes")
        count = 2 if is_binary else max(values, default=0) + 1
        count = max(count, len(self.label_names))
        if count < 2:
            raise UserError(f"{where}: the masks of task {self.task!r} have the class 0 only; a "
                            "segmentation needs two or more")
        if not self.label_names:
            self.label_names = [str(number) for number in range(count)]
        if len(self.label_names) < count:
            raise UserError(f"tasks.{self.task}.label_names: {len(self.label_names)} names, the "
                            f"masks have class numbers up to {count - 1}")
        self.classes = torch.full((257,), -1)  # the last is that of -1
        self.classes[256] = IGNORED
        self.classes[:count] = torch.arange(count)
        if is_binary:
            self.classes[[1, 255]] = torch.tensor([-1, 1])
        if self.ignored is not None and 0 <= self.ignored <= 255:
            self.classes[self.ignored] = IGNORED


def check_sizes(
    name: str, inputs: tuple[int, ...], masks: tuple[int, ...], where: str
) -> None:
    """Refuses masks [n, height, width] that do not have the size of their images."""
    if len(inputs) != 4 or len(masks) != 3 or inputs[2:] != masks[1:]:
        raise UserError(f"{where}: the masks of task {name!r} have {'x'.join(map(str, masks[1:]))} "
                        f"pixels, the images {'x'.join(map(str, inputs[2:] or inputs[1:]))}; both "
                        "have one size, which --data.image_size gives them")
