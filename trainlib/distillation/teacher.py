"""One frozen teacher: where it comes from, and whether it fits the student's tasks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from copy import deepcopy
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trainlib import shards
from trainlib.config import UserError
from trainlib.distillation.options import DistillOptions, TeacherOptions
from trainlib.user_code import describe_error

if TYPE_CHECKING:
    from trainlib.data.loading import Dataset
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
        teacher.check_inputs(tokenizer, dataset.inputs)
        teacher.try_on(inputs, targets, tasks)
        teachers.append(teacher)
    return teachers


def _build(
    chosen: TeacherOptions, student: nn.Module, dataset: Dataset, facts: tuple, models: ModuleType
) -> nn.Module:
    if chosen.ema:
        if shards.is_asked():
            raise UserError("a teacher is whole, FSDP2 cuts the student's average over the "
                            "processes; use a config without FSDP2")
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
        self.config = getattr(module, "run_config", None) or {"model": options.model}
        """What the net was trained with; of a bare net only what it is."""
        self.names: dict[str, str] = {}
        """By task of the student, the name of the same one here."""
        self.scales: dict[str, tuple[Tensor, Tensor]] = {}
        """By regression, the factor and offset that make the student's numbers of those here."""
        labels = getattr(module, "label_names", None)
        kinds = {name: one["kind"] for name, one in self.config.get("tasks", {}).items()}
        for task in tasks:
            name = task.name
            if labels is None:
                self.names[name] = name
                continue
            if name not in labels and len(tasks) == len(labels) == 1:
                [name] = labels  # there is only one thing that it can mean
            if name in labels:
                self.names[task.name] = name
                self._check(task, labels[name], kinds.get(name, task.kind))
        if not self.names:
            raise UserError(f"{where}: knows {', '.join(labels)}, the student learns "
                            f"{', '.join(task.name for task in tasks)}; give a teacher of one of "
                            "these tasks")

    def _check(self, task: Task, labels: list | dict, kind: str) -> None:
        if kind != task.kind:
            raise UserError(f"{self.where}: its task {self.names[task.name]!r} is a {kind}, the "
                            f"student's a {task.kind}; give a teacher of the same kind")
        known = labels["columns"] if isinstance(labels, dict) else labels
        if known != task.label_names:
            raise UserError(f"{self.where}: {_difference(known, task.label_names, task.name)}; "
                            "both need the same classes in the same order")
        if isinstance(labels, dict):
            # Each learnt its numbers in deviations from the mean of its own training split.
            mean, deviation = (torch.tensor(labels[key]).double() for key in ("mean", "deviation"))
            own_mean, own = (torch.tensor(each).double() for each in (task.mean, task.deviation))
            self.scales[task.name] = (deviation / own).float(), ((mean - own_mean) / own).float()

    def check_inputs(self, tokenizer: str | None, columns: list[str] | None) -> None:
        """Refuses a teacher of another tokenizer or of other columns."""
        if "data" not in self.config:
            return
        own = self.config["data"].get("tokenizer")
        if own != tokenizer:
            raise UserError(f"{self.where}: reads tokens of {own}, the student those of "
                            f"{tokenizer}; both need one tokenizer")
        own = self.config["data"].get("input")
        if isinstance(own, list) and columns is not None and own != columns:
            raise UserError(f"{self.where}: sees the columns {', '.join(own)}, the student "
                            f"{', '.join(columns)}; both need the same in one order")

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
                found = part_of(output, self.names[task.name])
                try:
                    named = {task.name: found} if isinstance(found, Tensor) else found
                    task.check_output(named, targets, [task.name])
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
        """Hex digits that are others if the net, a weight, a buffer, its share, its precision, or
        what it is asked for is; the code of a net of the user's own leaves no trace."""
        scales = {name: [part.tolist() for part in scale] for name, scale in self.scales.items()}
        rest = (self.weight, self.options.precision, self.names, scales, self.config["model"])
        digest = hashlib.sha256(json.dumps(rest, sort_keys=True, default=str).encode())
        for name, tensor in sorted(self.module.state_dict().items()):
            values = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
            digest.update(values.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]


def part_of(output: Any, name: str) -> Any:
    """What of a net's output belongs to a task of a name."""
    return output[name] if isinstance(output, Mapping) and name in output else output


def _difference(there: list[str], here: list[str], task: str) -> str:
    if len(there) != len(here):
        return f"has {len(there)} classes of {task!r}, the student {len(here)}"
    number = next(n for n, (a, b) in enumerate(zip(there, here, strict=True)) if a != b)
    return (f"its class {number} of {task!r} is {there[number]!r}, the student's is "
            f"{here[number]!r}")
