"""How good the teachers are on the validation split, and how far the student agrees with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainlib.distillation.objective import (
    Hidden,
    gives_hidden,
    rows_of,
    token_chunks,
    token_rows,
)
from trainlib.losses import cross_entropy, is_valid
from trainlib.metrics import sum_dtype

if TYPE_CHECKING:
    from trainlib.distillation.teachers import Teachers
    from trainlib.tasks import Task


class Both(nn.Module):
    """Student and teachers as one model, for one pass over a split."""

    def __init__(self, teachers: Teachers, student: nn.Module):
        super().__init__()
        self.teachers, self.student = teachers, student
        asks = teachers.gives_hidden and gives_hidden(student)
        self.arguments = {"hidden_only": True} if asks else {}

    def forward(self, inputs: Tensor) -> dict[str, Any]:
        """What both say to the same inputs."""
        with self.teachers.accelerator.autocast():
            student = self.student(inputs, **self.arguments)
        return {"student": student, "teachers": self.teachers.outputs(inputs)}


class Comparison:
    """One task, evaluated for the teachers and compared: what ``evaluate`` wants of a task."""

    may_fuse = False

    def __init__(self, task: Task, teachers: Teachers):
        self.task, self.teachers, self.name = task, teachers, task.name
        self.num_counts = task.num_counts + 2
        self.num_sums = task.num_sums + 4 * (task.kind == "regression")

    def statistics(
        self, output: Mapping[str, Any], targets: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The task's own for the teachers, and what their agreement is made of."""
        task, target = self.task, targets[self.name]
        taught = self.teachers.taught(output["teachers"], targets, 1.0)[self.name]
        if task.kind == "language_modeling":
            return self._of_tokens(output["student"], taught, target)
        student = task.output(output["student"], target)
        counts, sums = task.statistics(taught, dict(targets))
        valid = is_valid(target)
        if task.kind == "regression":
            pair = [one.to(sums.dtype).where(valid, 0) for one in (student, taught)]
            parts = [pair[1].sum(), pair[1].square().sum(), (pair[0] - pair[1]).square().sum(),
                     valid.to(sums.dtype).sum()]
            return torch.cat([counts, counts.new_zeros(2)]), torch.cat([sums, torch.stack(parts)])
        same = self._decided(student) == self._decided(taught)
        return self._with_agreement(counts, same, valid), sums

    def _of_tokens(self, student: Any, taught: Any, target: Tensor) -> tuple[Tensor, Tensor]:
        dtype = sum_dtype(target.device)
        sums, same = torch.zeros(2, dtype=dtype, device=target.device), []
        rows, valid = target.flatten(), is_valid(target)
        for chunk, student_logits, teacher_logits in _token_chunks(self.task, student, taught):
            # The task's own loss, and the plain entropy, of which perplexity is made.
            for number, loss in enumerate((self.task.entry_losses, cross_entropy)):
                sums[number] += loss(teacher_logits, rows[chunk]).to(dtype).sum()
            same.append(student_logits.argmax(1) == teacher_logits.argmax(1))
        counts = torch.cat([valid.sum().view(1)] * 2)
        return self._with_agreement(counts, torch.cat(same).view_as(target), valid), sums

    def _with_agreement(self, counts: Tensor, same: Tensor, valid: Tensor) -> Tensor:
        agreeing = torch.stack([(same & valid).sum(), valid.sum()])
        return torch.cat([counts, agreeing.to(counts.dtype)])

    def _decided(self, logits: Tensor) -> Tensor:
        task = self.task
        if task.kind == "multilabel":
            thresholds = torch.tensor(task.thresholds, device=logits.device)
            return logits.float().sigmoid() >= thresholds
        if getattr(task, "is_binary", False):
            return logits.squeeze(1) > 0
        return logits.argmax(1)

    def result(self, counts: Tensor, sums: Tensor) -> dict[str, Any]:
        """``teacher``: the task's result for the teachers; ``agreement``.

        Agreement is the share of items that both decide alike; of numbers, the share of the
        variance of the teachers' that the student's explain.
        """
        task, counts = self.task, counts.cpu()
        sums = sums.cpu().view(-1, self.num_sums).sum(0)
        teacher = task.result(counts[: task.num_counts], sums[: task.num_sums])
        if task.kind == "regression":
            total, squares, difference, number = sums[task.num_sums :].tolist()
            spread = squares - total**2 / max(number, 1)
            agreement = 1 - difference / spread if spread > 0 else float("nan")
        else:
            same, number = counts[task.num_counts :].tolist()
            agreement = same / number if number else float("nan")
        return {"teacher": teacher, "agreement": agreement}


def _token_chunks(
    task: Task, student: Any, taught: Any
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows of tokens with both logits [tokens, vocab_size], a few at a time."""
    hidden, head, taught = token_rows(task, student, taught)
    for rows in token_chunks(len(hidden), task.vocab_size):
        logits = hidden[rows] if head is None else functional.linear(
            hidden[rows].to(head.dtype), head)
        some = rows_of(taught, rows)
        yield rows, logits[:, : task.vocab_size], (
            some.logits() if isinstance(some, Hidden) else some)
