"""What is predicted: target column, loss, weight, metrics.

A task turns outputs and targets into unreduced losses, and batches of an evaluation into
additive statistics. Which samples, and the division by a count, are not its business.
"""

import inspect
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from trainlib import losses, metrics
from trainlib.config import Options, UserError, nearest, one_of


class TaskOptions(Options):
    kind: Literal["classification"] = "classification"
    """What is predicted: classification is one class of several."""
    target: str | None = None
    """The column to predict; none: the column of the task's name, or the only candidate."""
    loss: Annotated[str, one_of(losses.LOSSES)] = "cross_entropy"
    """Which loss: cross_entropy or focal."""
    loss_args: dict[str, Any] = {}
    """Arguments of the loss, such as label_smoothing, class_weights, gamma, alpha."""
    weight: float = Field(1.0, gt=0)
    """Factor of this task's mean loss in the total."""

    @model_validator(mode="after")
    def _loss_takes_args(self) -> "TaskOptions":
        takes = list(inspect.signature(losses.LOSSES[self.loss]).parameters)[2:]
        for name in self.loss_args:
            if name not in takes:
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

    def losses(self, output: Tensor, targets: dict[str, Tensor]) -> Tensor:
        """[items] unreduced losses in fp32, in nats."""
        return self.loss(output, targets[self.target])

    def check_output(self, output: Any, batch_size: int) -> None:
        """Refuses an output that does not fit the classes.

        Raises:
            UserError: with both shapes.
        """
        wanted = (batch_size, len(self.label_names))
        given = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        if given != wanted:
            raise UserError(
                f"the model's output is {given}, task {self.name!r} needs {wanted}: one logit for "
                f"each of its {wanted[1]} classes; leave --model.args.classes to the data"
            )

    @property
    def counts_size(self) -> int:
        """Length of the vector of additive counts."""
        return len(self.label_names) ** 2

    def counts(self, output: Tensor, targets: dict[str, Tensor]) -> Tensor:
        """[counts_size] additive counts of one batch: the confusion matrix, row by row."""
        return metrics.confusion_counts(
            output.argmax(1), targets[self.target], len(self.label_names)
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
    options: dict[str, TaskOptions], label_names: dict[str, list[str]]
) -> dict[str, TaskOptions]:
    """The options with every target column named; without any, one task on the only candidate.

    Args:
        label_names: of each candidate column.

    Raises:
        UserError: an unknown column, or several candidates and none chosen.
    """
    candidates = list(label_names)
    if not options:
        if len(candidates) != 1:
            raise UserError(
                f"tasks: several columns could be the target: {', '.join(candidates)}; choose one "
                "with --tasks.NAME.target COLUMN"
            )
        return {candidates[0]: TaskOptions(target=candidates[0])}
    resolved = {}
    for name, task in options.items():
        target = task.target or (name if name in candidates else None)
        if target is None and len(candidates) == 1:
            target = candidates[0]
        if target not in candidates:
            given = task.target or name
            raise UserError(
                f"tasks.{name}.target: no target column {given!r}{nearest(given, candidates)}"
            )
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
        loss = partial(losses.LOSSES[task.loss], **task.loss_args)
        try:
            loss(torch.zeros(1, len(names)), torch.zeros(1, dtype=torch.int64))
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{where}.loss_args: {task.loss}: {error}") from error
        tasks.append(Task(name, task.target, names, task.weight, loss))
    return tasks
