"""All teachers of a run: asked together, answering as one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from trainlib import kd_losses
from trainlib.config import UserError, nearest
from trainlib.distillation.objective import Hidden, gives_hidden
from trainlib.distillation.options import DistillOptions
from trainlib.distillation.teacher import Teacher, part_of

if TYPE_CHECKING:
    from accelerate import Accelerator

    from trainlib.augment import Mix
    from trainlib.distillation.features import FeatureLosses
    from trainlib.distillation.objective import SoftLoss
    from trainlib.distillation.stored import StoredOutputs
    from trainlib.ema import Ema
    from trainlib.tasks import Task


class Teachers:
    """All teachers of a run: what they say to inputs, averaged, by task of the student."""

    def __init__(
        self, teachers: list[Teacher], tasks: list[Task], options: DistillOptions,
        accelerator: Accelerator,
    ):
        """
        Raises:
            UserError: a task without teacher and without hard loss, one that has no average, or
                options for one that is not there.
        """
        for name in options.tasks:
            if name not in (names := [task.name for task in tasks]):
                raise UserError(f"distill.tasks: no task {name!r}{nearest(name, names)}")
        self.teachers, self.options, self.accelerator = teachers, options, accelerator
        self.known = [task for task in tasks if any(task.name in t.names for t in teachers)]
        self.tasks = self.known if options.kd_weight > 0 else []
        """The tasks with a soft loss."""
        self.stored: StoredOutputs | None = None
        """Where outputs are read instead of computed."""
        untaught = [task.name for task in tasks if task not in self.known]
        self.notes = []
        if teachers and untaught:
            if options.hard_weight == 0:
                raise UserError(f"distill.hard_weight: 0, but no teacher has task {untaught[0]!r}, "
                                "which then has no loss; give it a weight")
            self.notes.append(f"no teacher has {', '.join(untaught)}: learnt from targets alone")
        for task in self.known:
            if not sum(t.weight for t in teachers if task.name in t.names) > 0:
                raise UserError(f"distill.teachers: the weights of those that have task "
                                f"{task.name!r} sum to 0; give one a weight above 0")
        self.gives_hidden = bool(self.tasks) and options.cache is None and (
            len(tasks) == 1 and tasks[0].kind == "language_modeling"
            and all(gives_hidden(teacher.module) for teacher in teachers))
        for teacher in teachers:
            teacher.to(accelerator.device)

    @property
    def are_others(self) -> bool:
        """Whether any of them is another net than the student's own average."""
        return bool(self.known) and not all(one.options.ema for one in self.teachers)

    def follow(self, ema: Ema | None) -> None:
        """Makes copies of the student hold its averaged weights, now and after every step."""
        for teacher in self.teachers:
            if not teacher.options.ema or ema is None:
                continue
            named = dict(teacher.module.named_parameters()) | dict(teacher.module.named_buffers())
            for name, tensor in named.items():
                if name in ema.averages:
                    tensor.data = ema.averages[name]

    def teach(
        self, inputs: Tensor, targets: Mapping[str, Tensor], samples: np.ndarray
    ) -> dict[str, Any]:
        """By task with a soft loss, what ``SoftLoss`` takes; hooks on the teachers see the inputs.

        Args:
            inputs, targets: of a micro-batch, as the student gets them.
            samples: which of the training split they are.
        """
        if self.stored is not None:
            return self.stored.read(samples)
        outputs = self.outputs(inputs)
        return self.taught(outputs, targets, self.options.temperature) if self.tasks else {}

    @torch.no_grad()
    def outputs(self, inputs: Tensor) -> list[Any]:
        """Each teacher's own output."""
        arguments = {"hidden_only": True} if self.gives_hidden else {}
        outputs = []
        for teacher in self.teachers:
            with self._precision(teacher.options.precision):
                outputs.append(teacher.module(inputs, **arguments))
        return outputs

    @torch.no_grad()
    def taught(
        self, outputs: list[Any], targets: Mapping[str, Tensor], temperature: float
    ) -> dict[str, Any]:
        """By task, the teachers' average in the form that ``SoftLoss`` takes.

        Args:
            outputs: of ``outputs``.
            targets: for their shapes.
            temperature: at which probabilities are averaged.
        """
        taught: dict[str, Any] = {}
        for task in self.known:
            known = [(teacher, output) for teacher, output in
                     zip(self.teachers, outputs, strict=True) if task.name in teacher.names]
            weights = [teacher.weight for teacher, _ in known]
            average = partial(self._average, task, weights, temperature)
            if self.gives_hidden:
                hidden, heads = ([output[key] for _, output in known] for key in ("hidden", "head"))
                taught[task.name] = Hidden(hidden, heads, average)
            else:
                taught[task.name] = average([
                    self._in_form(task, teacher, output, targets) for teacher, output in known])
        return taught

    def _in_form(
        self, task: Task, teacher: Teacher, output: Any, targets: Mapping[str, Tensor]
    ) -> Tensor:
        output = part_of(output, teacher.names[task.name])
        if task.kind == "language_modeling":
            return task.pick(output).flatten(0, 1)
        logits = task.output(output, targets[task.name])
        if task.name in teacher.scales:
            factor, offset = teacher.scales[task.name]
            return logits.float() * factor + offset
        return logits

    def _average(
        self, task: Task, weights: list[float], temperature: float, logits: list[Tensor]
    ) -> Tensor:
        if task.kind == "language_modeling":  # a net may have room for more tokens than there are
            logits = [one[:, : task.vocab_size] for one in logits]
        of = "logits" if task.kind == "regression" else self.options.average
        is_binary = task.kind == "multilabel" or getattr(task, "is_binary", False)
        return kd_losses.average_logits(logits, weights, temperature, of, is_binary).float()

    def _precision(self, precision: str) -> AbstractContextManager:
        kind = self.accelerator.device.type
        if precision == "run":
            return self.accelerator.autocast()
        if precision == "bf16":
            return torch.autocast(kind, torch.bfloat16)
        return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled() else nullcontext()


def student_arguments(
    student: nn.Module, teachers: Teachers, otherwise: Callable[[dict[str, Tensor]], dict]
) -> Callable[[dict[str, Tensor]], dict]:
    """What the student is given besides the inputs: of a language model its hidden states are
    asked, whose logits are then made a few at a time, wherever there are teachers."""
    if not teachers.tasks or teachers.tasks[0].kind != "language_modeling" or not (
            gives_hidden(student)):
        return otherwise
    return lambda targets: {"hidden_only": True}


def losses_of_trial(
    tasks: list[Task], teachers: Teachers, soft_losses: Mapping[str, SoftLoss],
    features: FeatureLosses, output: Any, inputs: Tensor, targets: dict[str, Tensor],
    mix: Mix | None,
) -> list[Tensor]:
    """Unreduced losses of a micro-batch that is only tried: hard, soft and of features.

    Teachers are asked, also those whose outputs will be read from disk.
    """
    taught = teachers.teach(inputs, targets, np.empty(0))
    losses: list[Tensor] = []
    for task in tasks:
        if task.name in taught:
            losses += soft_losses[task.name].losses(output, taught[task.name], targets, mix)
        else:
            losses.append(task.losses(output, targets, mix))
    return losses + features.losses()
