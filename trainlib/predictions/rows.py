"""What a model says to each sample of a split: numbers that travel between processes, then text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trainlib.losses import cross_entropy, is_valid
from trainlib.metrics import sum_dtype

if TYPE_CHECKING:
    from trainlib.data import EvalReader
    from trainlib.tasks import Task

_UNKNOWN = float("nan")


class Prediction(NamedTuple):
    """A line of predictions.csv."""

    row: int
    """Of the source."""
    task: str
    """The task's name, with the column's where the task predicts several numbers."""
    target: str
    prediction: str
    confidence: float
    """Probability of what is predicted: of several labels the least certain one's, of pixels their
    mean, of tokens the mean of the true ones'. NaN for numbers."""
    loss: float
    """Mean over what the sample has of targets; NaN if it has none."""

    def cells(self) -> tuple[int | str, ...]:
        """As a line of the table has it; NaN is empty."""
        return (*self[:4], as_number(self.confidence), as_number(self.loss))


class Recorder:
    """One task, whose every sample is written down: what ``evaluate`` wants of a task.

    A sample is a row of numbers: its loss, the confidence, then the targets and the predictions.
    Each row lies in the slot of its batch, so that it is the same on any number of processes. Of a
    language model the losses by position are summed, too: fp32 values in float64, which is exact.
    """

    num_counts = 0

    def __init__(self, task: Task, reader: EvalReader):
        self.task, self.name, self.may_fuse = task, task.name, task.may_fuse
        self.num_samples, self.batch_size = len(reader.split), reader.batch_size
        entries = task.num_outputs if task.kind in ("multilabel", "regression") else 1
        self.width = 2 + 2 * entries
        self.num_positions = 0
        if task.kind == "language_modeling":
            self.num_positions = reader.split.read(np.arange(1))[1][task.name].shape[1]
        self.num_sums = self.batch_size * self.width + 2 * self.num_positions

    def statistics(
        self, output: Any, targets: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """No counts, and the numbers [num_sums] of one batch."""
        target, task = targets[self.name], self.task
        losses, valid = task.losses(output, targets), is_valid(target)
        dtype = sum_dtype(target.device)
        sums = torch.zeros(self.num_sums, dtype=dtype, device=target.device)
        entries, there = losses.to(dtype).reshape(len(target), -1), valid.reshape(len(target), -1)
        if entries.shape != there.shape:  # one loss a sample
            there = there.any(1, keepdim=True)
        means = entries.where(there, 0).sum(1) / there.sum(1)
        said = _SAID[task.kind](task, output, target, valid)
        columns = [means[:, None], *(part.reshape(len(target), -1) for part in said)]
        rows = torch.cat([column.to(dtype) for column in columns], 1)
        sums[: rows.numel()] = rows.flatten()
        if self.num_positions:
            per_position = entries.expand(target.shape).where(valid, 0).sum(0)
            tail = [per_position, valid.sum(0).to(dtype)]
            sums[-2 * self.num_positions :] = torch.cat(tail)
        return target.new_zeros(0), sums

    def result(self, counts: Tensor, sums: Tensor) -> dict[str, Any]:
        """``rows`` [samples, width] float64; of a language model ``positions`` [2, length]: sums of
        losses, and numbers of tokens.

        Args:
            sums: of each batch, [batches, num_sums].
        """
        sums = sums.cpu().numpy().astype(np.float64, copy=False)
        rows = sums[:, : self.batch_size * self.width].reshape(-1, self.width)
        found = {"rows": rows[: self.num_samples]}
        if self.num_positions:
            positions = sums[:, -2 * self.num_positions :].sum(0)
            found["positions"] = positions.reshape(2, -1)
        return found


def _of_class(task, output, target, valid):
    logits = task.pick(output)
    predicted = logits.argmax(1)
    confidence = logits.to(sum_dtype(logits.device)).softmax(1).gather(1, predicted[:, None])
    return confidence, target.to(confidence.dtype).where(valid, _UNKNOWN), predicted


def _of_labels(task, output, target, valid):
    probability = task.pick(output).to(sum_dtype(target.device)).sigmoid()
    thresholds = torch.tensor(task.thresholds, dtype=probability.dtype, device=target.device)
    predicted = probability >= thresholds
    confidence = torch.where(predicted, probability, 1 - probability).amin(1)
    return confidence, target, predicted


def _of_numbers(task, output, target, valid):
    dtype = sum_dtype(target.device)
    scale, middle = (torch.tensor(each, dtype=dtype, device=target.device)
                     for each in (task.deviation, task.mean))
    predicted = task.output(output, target).to(dtype)
    given = (part.reshape(len(target), -1) * scale + middle for part in (target, predicted))
    return torch.full((len(target),), _UNKNOWN, device=target.device), *given


def _of_pixels(task, output, target, valid):
    predicted, probability = decided_pixels(task, output, target)
    there = valid.flatten(1).sum(1)
    right = ((predicted == target) & valid).flatten(1).sum(1)
    return probability.where(valid, 0).flatten(1).sum(1) / there, there, right


def decided_pixels(task: Task, output: Any, target: Tensor) -> tuple[Tensor, Tensor]:
    """The class of each pixel and its probability, [samples, height, width] each."""
    logits = task.output(output, target)
    if task.is_binary:
        predicted = (logits.squeeze(1) > 0).long()
        logits = torch.cat([torch.zeros_like(logits), logits], 1)
    else:
        predicted = logits.argmax(1)
    probability = logits.float().softmax(1).gather(1, predicted[:, None]).squeeze(1)
    return predicted, probability.to(sum_dtype(target.device))


def _of_tokens(task, output, target, valid):
    there, right = valid.sum(1), torch.full((len(target),), _UNKNOWN, device=target.device)
    if isinstance(output, Mapping) and "losses" in output:  # and no logits
        entropy = output["losses"]
    else:
        logits = task.output(output, target)
        entropy = cross_entropy(logits, target)
        right = ((logits.argmax(1) == target) & valid).sum(1)
    probability = (-entropy.to(sum_dtype(target.device))).exp()
    return probability.where(valid, 0).sum(1) / there, there, right


_SAID = {"classification": _of_class, "multilabel": _of_labels, "regression": _of_numbers,
         "segmentation": _of_pixels, "language_modeling": _of_tokens}


def as_text(task: Task, row: int, numbers: Sequence[float]) -> list[Prediction]:
    """A sample's lines: one, or one for each of several numbers.

    Args:
        row: of the source.
        numbers: as ``Recorder`` has them.
    """
    loss, confidence, *rest = numbers
    asked, said = rest[: len(rest) // 2], rest[len(rest) // 2 :]
    if task.kind == "regression" and len(asked) > 1:
        return [
            Prediction(row, f"{task.name}/{column}", as_number(a), as_number(b), confidence, loss)
            for column, a, b in zip(task.label_names, asked, said, strict=True)
        ]
    words = {"classification": _class_name, "multilabel": _label_names,
             "regression": lambda task, numbers: as_number(numbers[0])}
    if task.kind in words:
        target, prediction = (words[task.kind](task, numbers) for numbers in (asked, said))
    else:
        unit = "pixels" if task.kind == "segmentation" else "tokens"
        target = f"{int(asked[0])} {unit}"
        prediction = "" if said[0] != said[0] else f"{int(said[0])} right"
    return [Prediction(row, task.name, target, prediction, confidence, loss)]


def are_mistakes(rows: np.ndarray) -> np.ndarray:
    """[samples] bool: whether target and prediction differ where both are there; of numbers they
    always do.

    Args:
        rows: [samples, width] as ``Recorder`` has them.
    """
    asked, said = np.split(rows[:, 2:], 2, axis=1)
    return ((asked == asked) & (said == said) & (asked != said)).any(1)


def _class_name(task: Task, numbers: Sequence[float]) -> str:
    return "" if numbers[0] != numbers[0] else str(task.label_names[int(numbers[0])])


def _label_names(task: Task, numbers: Sequence[float]) -> str:
    return ", ".join(str(name) for name, number in zip(task.label_names, numbers, strict=True)
                    if number == 1)


def as_number(value: float) -> str:
    """A number with the nine digits that tell fp32 apart; NaN is empty."""
    return "" if value != value else f"{value:.9g}"
