"""How good the teachers are on the validation split, and how far the student agrees with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainlib.distillation.objective import Hidden, token_chunks
from trainlib.losses import is_valid

if TYPE_CHECKING:
    from trainlib.distillation.teachers import Teachers
    from trainlib.tasks import Task


class Both(nn.Module):
    """Student and teachers as one model, for one pass over a split."""

    def __init__(self, teachers: Teachers, student: nn.Module):
        super().__init__()
        self.teachers, self.student = teachers, student
        self.arguments = {"hidden_only": True} if teachers.gives_hidden else {}

    def forward(self, inputs: Tensor) -> dict[str, Any]:
        """What both say to the same inputs."""
        return {"student": self.student(inputs, **self.arguments),
                "teachers": self.teachers.outputs(inputs)}


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
        losses, same = [], []
        rows = target.flatten()
        for chunk, student_logits, teacher_logits in _token_chunks(self.task, student, taught):
            losses.append(functional.cross_entropy(teacher_logits, rows[chunk], reduction="none"))
            same.append(student_logits.argmax(1) == teacher_logits.argmax(1))
        mapping = {"losses": torch.cat(losses).view_as(target)}
        valid = is_valid(target)
        sums = mapping["losses"].double() if target.device.type != "mps" else mapping["losses"]
        total = sums.where(valid, 0).sum().view(1)
        counts = torch.cat([valid.sum().view(1)] * 2)  # items, and tokens of the plain entropy
        same = torch.cat(same).view_as(target)
        return self._with_agreement(counts, same, valid), torch.cat([total, total])

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
        task, counts, sums = self.task, counts.cpu(), sums.cpu()
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
    if isinstance(taught, Hidden):
        hidden, head = student["hidden"].flatten(0, 1), student["head"]
        teachers = [one.flatten(0, 1) for one in taught.hidden]
    else:
        hidden, head, teachers = task.pick(student).flatten(0, 1), None, []
    for rows in token_chunks(len(hidden), task.vocab_size):
        logits = hidden[rows] if head is None else functional.linear(hidden[rows], head)
        if isinstance(taught, Hidden):
            known = [functional.linear(one[rows], matrix)
                     for one, matrix in zip(teachers, taught.heads, strict=True)]
            yield rows, logits[:, : task.vocab_size], taught.average(known)
        else:
            yield rows, logits[:, : task.vocab_size], taught[rows]
