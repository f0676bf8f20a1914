"""Frozen teachers: checked against the student's tasks, asked together, answering as one."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from trainlib import kd_losses
from trainlib.config import UserError
from trainlib.distillation.objective import Hidden
from trainlib.distillation.options import DistillOptions, TeacherOptions
from trainlib.user_code import describe_error

if TYPE_CHECKING:
    from accelerate import Accelerator

    from trainlib.data.loading import Dataset
    from trainlib.distillation.stored import StoredOutputs
    from trainlib.ema import Ema
    from trainlib.tasks import Task

_INPUT_SCALE = ("input_mean", "input_deviation")


def build_teachers(
    options: DistillOptions, tokenizer: str | None, student: nn.Module, dataset: Dataset,
    tasks: list[Task], models: ModuleType,
) -> list[Teacher]:
    """The teachers, on the CPU, each tried on a sample; torch's generator stays as it was.

    Args:
        tokenizer: of the student's data.
        models: of trainlib, which makes and loads nets.

    Raises:
        UserError: one that cannot be had, cannot take the student's inputs, or was trained on other
            classes or tokens.
    """
    inputs, targets = dataset.example()
    num_outputs = {task.name: task.num_outputs for task in tasks}
    facts = (tuple(inputs.shape[1:]), num_outputs if len(tasks) > 1 else tasks[0].num_outputs,
             dataset.token_range, dataset.pad_id)
    teachers = []
    for number, chosen in enumerate(options.teachers if options.teaches else ()):
        where = f"distill.teachers: {chosen.run or ('ema' if chosen.ema else f'[{number}]')}"
        with torch.random.fork_rng([]):
            try:
                module = _build(chosen, student, dataset, facts, models)
            except ValueError as error:  # pydantic's of the net's options among them
                raise UserError(f"{where}: {error}") from error
        teacher = Teacher(module, chosen, tasks, where)
        teacher.check_tokens(tokenizer)
        teacher.try_on(inputs, targets, tasks)
        teachers.append(teacher)
    return teachers


def _build(
    chosen: TeacherOptions, student: nn.Module, dataset: Dataset, facts: tuple, models: ModuleType
) -> nn.Module:
    if chosen.ema:
        return deepcopy(student)
    if chosen.run is not None:
        return models.load_model(chosen.run)
    net = models.complete(models.ModelOptions.model_validate(chosen.model), *facts)
    scale = [dataset.mean, dataset.deviation]
    if chosen.mean is not None:
        like = dataset.mean if dataset.mean is not None else torch.empty(len(chosen.mean), 1, 1)
        scale = [torch.tensor(numbers, dtype=torch.float32).view(like.shape)
                 for numbers in (chosen.mean, chosen.deviation)]
    module = models.build_model(net, *scale)
    models.start_weights(module, chosen.weights, [])
    return module


class Teacher:
    """One frozen net and what of it each task of the student can learn from."""

    def __init__(self, module: nn.Module, options: TeacherOptions, tasks: list[Task], where: str):
        """
        Args:
            module: put into eval mode, without gradients.
            where: the teacher, for messages.

        Raises:
            UserError: it was trained on other classes, in number or order, or has none of the
                student's tasks.
        """
        self.module, self.options = module.eval().requires_grad_(False), options
        self.weight, self.where = options.weight, where
        self.names: dict[str, str] = {}
        """By task of the student, the name of the same one here."""
        self.scales: dict[str, tuple[Tensor, Tensor]] = {}
        """By regression, the factor and offset that make the student's numbers of those here."""
        labels = getattr(module, "label_names", None)
        for task in tasks:
            name = task.name
            if labels is None:
                self.names[name] = name
                continue
            if name not in labels and len(tasks) == len(labels) == 1:
                [name] = labels  # there is only one thing that it can mean
            if name in labels:
                self.names[task.name] = name
                self._check(task, labels[name])
        if not self.names:
            raise UserError(f"{where}: knows {', '.join(labels)}, the student learns "
                            f"{', '.join(task.name for task in tasks)}; give a teacher of one of "
                            "these tasks")

    def _check(self, task: Task, labels: list | dict) -> None:
        if isinstance(labels, dict) != (task.kind == "regression"):
            raise UserError(f"{self.where}: its task {self.names[task.name]!r} is of another kind "
                            f"than {task.kind}; give a teacher of the same kind")
        known = labels["columns"] if isinstance(labels, dict) else labels
        if known != task.label_names:
            raise UserError(f"{self.where}: {_difference(known, task.label_names, task.name)}; "
                            "both need the same classes in the same order")
        if isinstance(labels, dict):
            # Each learnt its numbers in deviations from the mean of its own training split.
            mean, deviation = (torch.tensor(labels[key]).double() for key in ("mean", "deviation"))
            own_mean, own = (torch.tensor(each).double() for each in (task.mean, task.deviation))
            self.scales[task.name] = (deviation / own).float(), ((mean - own_mean) / own).float()

    def check_tokens(self, tokenizer: str | None) -> None:
        """Refuses a teacher of another tokenizer."""
        config = getattr(self.module, "run_config", None)
        own = config["data"].get("tokenizer") if config else tokenizer
        if own != tokenizer:
            raise UserError(f"{self.where}: reads tokens of {own}, the student those of "
                            f"{tokenizer}; both need one tokenizer")

    @torch.no_grad()
    def try_on(self, inputs: Tensor, targets: dict[str, Tensor], tasks: list[Task]) -> None:
        """Runs the net once on the CPU.

        Raises:
            UserError: it cannot take the student's inputs, or gives something else than a task
                needs.
        """
        try:
            output = self.module(inputs)
        except Exception as error:  # whatever a net of the user's own raises
            raise UserError(f"{self.where}: cannot take inputs of shape {tuple(inputs.shape)}, as "
                            f"the student gets them: {describe_error(error)}") from error
        for task in tasks:
            if task.name in self.names:
                found = _part(output, self.names[task.name])
                try:
                    task.check_output(found, targets, [task.name])
                except UserError as error:
                    raise UserError(f"{self.where}: {error}") from error

    def to(self, device: torch.device) -> None:
        """Puts the net on its device, in its precision, compiled if asked to."""
        self.module.to(device)
        self.scales = {name: tuple(part.to(device) for part in scale)
                       for name, scale in self.scales.items()}
        if self.options.precision == "bf16":
            scale = {name: getattr(self.module, name, None) for name in _INPUT_SCALE}
            self.module.to(torch.bfloat16)
            for name, value in scale.items():
                if value is not None:  # inputs are scaled in fp32
                    setattr(self.module, name, value)
        if self.options.compile is not None:
            self.module.compile(backend=self.options.compile, dynamic=False)

    def fingerprint(self) -> str:
        """Hex digits that are others if a weight, a buffer, the share or the precision is."""
        digest = hashlib.sha256(repr((self.weight, self.options.precision)).encode())
        for name, tensor in sorted(self.module.state_dict().items()):
            values = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
            digest.update(values.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]


class Teachers:
    """All teachers of a run: what they say to inputs, averaged, by task of the student."""

    def __init__(
        self, teachers: list[Teacher], tasks: list[Task], options: DistillOptions,
        accelerator: Accelerator,
    ):
        """
        Raises:
            UserError: a task without teacher and without hard loss, or one that has no average.
        """
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
            and all(_gives_hidden(teacher.module) for teacher in teachers))
        for teacher in teachers:
            teacher.to(accelerator.device)

    def follow(self, ema: Ema | None) -> None:
        """Makes copies of the student hold its averaged weights, now and after every step.

        Raises:
            UserError: there is no average.
        """
        for teacher in self.teachers:
            if not teacher.options.ema:
                continue
            if ema is None:
                raise UserError("distill.teachers: ema is the average of the student's weights; "
                                "set optim.ema_half_life, which makes one")
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
        output = _part(output, teacher.names[task.name])
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
            _gives_hidden(student)):
        return otherwise
    return lambda targets: {"hidden_only": True}


def _gives_hidden(module: nn.Module) -> bool:
    return "hidden_only" in inspect.signature(module.forward).parameters


def _part(output: Any, name: str) -> Any:
    return output[name] if isinstance(output, Mapping) and name in output else output


def _difference(there: list[str], here: list[str], task: str) -> str:
    if len(there) != len(here):
        return f"has {len(there)} classes of {task!r}, the student {len(here)}"
    number = next(n for n, (a, b) in enumerate(zip(there, here, strict=True)) if a != b)
    return (f"its class {number} of {task!r} is {there[number]!r}, the student's is "
            f"{here[number]!r}")
