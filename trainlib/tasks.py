"""What is predicted: target column, loss, weight, metrics.

A task turns outputs and targets into unreduced losses, and batches of an evaluation into
additive statistics. Which samples, and the division by a count, are not its business.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, Field, model_validator
from torch import Tensor

from trainlib import losses, metrics
from trainlib.augment import Mix
from trainlib.config import Options, UserError, nearest
from trainlib.user_code import describe_error, import_object, is_object_spec


def find_loss(name: str) -> Callable[..., Tensor]:
    """The loss of a name in ``losses``, or the user's own as file.py:name or package.module:name.

    Raises:
        ValueError: there is no such loss.
    """
    if name in losses.LOSSES:
        return losses.LOSSES[name]
    if not is_object_spec(name):
        raise ValueError(f"unknown{nearest(name, losses.LOSSES)}")
    found = import_object(name)
    if not callable(found):
        raise ValueError(f"this is a {type(found).__name__}; give a function")
    return found


def _check_loss(name: str) -> str:
    find_loss(name)
    return name


class TaskOptions(Options):
    kind: Literal["classification"] = "classification"
    """What is predicted: classification is one class of several."""
    target: str | None = None
    """The column to predict; none: the column of the task's name, or the only candidate."""
    loss: Annotated[str, AfterValidator(_check_loss)] = "cross_entropy"
    """Which loss: cross_entropy, focal, or a function of your own, file.py:name, from outputs
    [batch, classes] and targets [batch] to one loss an item [batch]."""
    loss_args: dict[str, Any] = {}
    """Arguments of the loss, such as label_smoothing, class_weights, gamma, alpha."""
    weight: float = Field(1.0, gt=0)
    """Factor of this task's mean loss in the total."""

    @model_validator(mode="after")
    def _loss_takes_args(self) -> TaskOptions:
        try:
            parameters = inspect.signature(find_loss(self.loss)).parameters
        except (TypeError, ValueError):  # written in C: tried when the tasks are built
            return self
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        takes = list(parameters)[2:]
        for name in self.loss_args:
            if name not in takes and not takes_any:
                raise UserError(
                    f"loss_args: {self.loss} does not take {name!r}{nearest(name, takes)}"
                )
        return self


@dataclass(frozen=True)
class Task:
    """One prediction."""

    name: str
    target: str
    label_names: list[str]
    weight: float
    loss: partial

    def output(self, output: Any) -> Any:
        """This task's part of what a model returned: a tensor, a mapping, or a Hugging Face output.
        """
        if isinstance(output, Mapping):
            return output[self.name] if self.name in output else output.get("logits", output)
        return output

    def losses(self, output: Any, targets: dict[str, Tensor], mix: Mix | None = None) -> Tensor:
        """[items] unreduced losses in fp32, in nats.

        Args:
            mix: how MixUp or CutMix has blended the inputs; the losses are blended likewise, which
                for the cross entropy is its loss on the blended target.
        """
        output, target = self.output(output), targets[self.target]
        losses = self.loss(output, target)
        return losses if mix is None else mix.blend(
            losses, self.loss(output, target[mix.partner])
        )

    def check_output(self, output: Any, batch_size: int) -> None:
        """Refuses an output that does not fit the classes.

        Raises:
            UserError: with what is given and the shape that is needed.
        """
        wanted, given = (batch_size, len(self.label_names)), self.output(output)
        if isinstance(given, Mapping):
            what = f"a mapping of {', '.join(map(str, given))}"
        elif not isinstance(given, Tensor):
            what = f"a {type(given).__name__}"
        elif given.shape == wanted and given.is_floating_point():
            return
        else:
            what = f"{tuple(given.shape)}"
            what += "" if given.is_floating_point() else f" of {given.dtype}"
        raise UserError(
            f"the model's output is {what}, task {self.name!r} needs {wanted}: one logit for each "
            f"of its {wanted[1]} classes (in a mapping by the name of the task, or 'logits'); "
            "leave the number of classes to the data"
        )

    @property
    def counts_size(self) -> int:
        """Length of the vector of additive counts."""
        return len(self.label_names) ** 2

    def counts(self, output: Any, targets: dict[str, Tensor]) -> Tensor:
        """[counts_size] additive counts of one batch: the confusion matrix, row by row."""
        return metrics.confusion_counts(
            self.output(output).argmax(1), targets[self.target], len(self.label_names)
        ).flatten()

    def result(self, loss_sum: float, counts: Tensor) -> dict:
        """The metrics that sums over all samples mean, as ``metrics.classification_metrics``."""
        counts = counts.view(len(self.label_names), -1).cpu()
        return {
            "loss": loss_sum / counts.sum().item(),
            "confusion": counts.to(torch.int64).tolist(),
        } | metrics.classification_metrics(counts)

    def report(self, result: dict) -> str:
        """The result as the text that people know."""
        return metrics.classification_report(result, self.label_names)


def logged_metrics(tasks: list[Task], results: dict[str, dict]) -> dict[str, float]:
    """``eval/*`` of the results by task: the task's name stands in the key if there are several."""
    logged = {"eval/loss": sum(task.weight * results[task.name]["loss"] for task in tasks)}
    for task in tasks:
        prefix = f"eval/{task.name}/" if len(tasks) > 1 else "eval/"
        result = results[task.name]
        logged |= {f"{prefix}loss": result["loss"]} if len(tasks) > 1 else {}
        logged[f"{prefix}accuracy"] = result["accuracy"]
        logged |= {f"{prefix}macro_{name}": value for name, value in result["macro"].items()}
    return logged


def metric_names(tasks: list[Task]) -> list[str]:
    """The keys of ``logged_metrics``."""
    blank = {"loss": 0.0, "accuracy": 0.0, "macro": dict.fromkeys(("precision", "recall", "f1"), 0)}
    return list(logged_metrics(tasks, {task.name: blank for task in tasks}))


def resolve(
    options: dict[str, TaskOptions], candidates: list[str], columns: list[str]
) -> dict[str, TaskOptions]:
    """The options with every target column named; without any, one task on the only candidate.

    Args:
        candidates: the columns that could be the only target.
        columns: all columns.

    Raises:
        UserError: an unknown column, or no or several candidates and none chosen.
    """
    def only_candidate() -> str:
        if len(candidates) == 1:
            return candidates[0]
        found = (f"several columns could be the target: {', '.join(candidates)}" if candidates else
                 f"no column of class labels, strings or integers among {', '.join(columns)}")
        raise UserError(f"tasks: {found}; choose one with --tasks.NAME.target COLUMN")

    if not options:
        target = only_candidate()
        return {target: TaskOptions(target=target)}
    resolved = {}
    for name, task in options.items():
        target = task.target or (name if name in columns else only_candidate())
        if target not in columns:
            raise UserError(f"tasks.{name}.target: no column {target!r}{nearest(target, columns)}")
        resolved[name] = task.model_copy(update={"target": target})
    return resolved


def build_tasks(
    options: dict[str, TaskOptions], label_names: dict[str, list[str]]
) -> list[Task]:
    """The tasks that resolved options describe, each loss tried once on blank logits.

    Raises:
        UserError: arguments that the loss refuses; a second task.
    """
    if len(options) > 1:
        raise UserError(
            f"tasks: a job has one classification task here, got {', '.join(options)}"
        )
    tasks = []
    for name, task in options.items():
        where = f"tasks.{name}"
        names = label_names[task.target]
        loss = partial(find_loss(task.loss), **task.loss_args)
        try:
            tried = loss(torch.zeros(2, len(names)), torch.zeros(2, dtype=torch.int64))
        except Exception as error:  # whatever a loss of the user's own raises
            given = str(error) if task.loss in losses.LOSSES else describe_error(error)
            raise UserError(f"{where}.loss_args: {task.loss}: {given}") from error
        if not isinstance(tried, Tensor) or tried.shape != (2,):
            shape = list(tried.shape) if isinstance(tried, Tensor) else type(tried).__name__
            raise UserError(f"{where}.loss: {task.loss} returns {shape} for two items; return one "
                            "loss an item, [batch], and leave the mean to the script")
        tasks.append(Task(name, task.target, names, task.weight, loss))
    return tasks
