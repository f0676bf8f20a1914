"""What is predicted: target column, loss, weight, metrics.

``resolve`` completes the options (``options``), ``build_tasks`` makes a task of each (``task``,
``kinds``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trainlib import losses
from trainlib.config import UserError
from trainlib.tasks.kinds import KINDS
from trainlib.tasks.options import TaskOptions, find_loss, resolve
from trainlib.tasks.task import Task
from trainlib.user_code import describe_error

if TYPE_CHECKING:
    from trainlib.augment import Mix
    from trainlib.data import TargetInfo
    from trainlib.guard import StepRecord

__all__ = [
    "Task", "TaskOptions", "build_tasks", "default_monitor", "headline", "labels", "logged_losses",
    "logged_metrics", "losses_of_trial", "metric_names", "num_outputs", "resolve",
]


def build_tasks(
    options: dict[str, TaskOptions], targets: dict[str, TargetInfo]
) -> list[Task]:
    """The tasks that resolved options describe, each loss tried once on blanks.

    Raises:
        UserError: arguments that the loss refuses, or thresholds that are not one a label.
    """
    tasks = []
    have_one_target = len({(str(task.target), task.kind) for task in options.values()}) == 1
    for name, task in options.items():
        target = targets[name]
        is_own = task.loss not in losses.LOSSES
        given = {
            "name": name, "label_names": target.label_names, "weight": task.weight,
            "loss": partial(find_loss(task.loss), **task.loss_args),
            "loss_name": "" if is_own else task.loss, "may_miss": target.may_miss,
            "takes_all": have_one_target,
        }
        if task.kind == "classification":
            given["top_k"] = task.top_k
        elif task.kind == "multilabel":
            given["thresholds"] = _thresholds(name, task.thresholds, target.label_names)
        elif task.kind == "regression":
            given |= {"mean": target.mean, "deviation": target.deviation,
                      "validation_mean": target.validation_mean}
        elif task.kind == "segmentation" and task.loss == "bce" and len(target.label_names) != 2:
            raise UserError(f"tasks.{name}.loss: bce on pixels is for two classes, the masks have "
                            f"{len(target.label_names)}; use cross_entropy")
        elif task.kind == "language_modeling":
            given |= {"vocab_size": target.vocab_size, "bytes_per_token": target.bytes_per_token,
                      "may_fuse": task.loss == "cross_entropy" and not task.loss_args}
        tasks.append(KINDS[task.kind](**given))
        tasks[-1].check_loss(task.loss, describe_error if is_own else str)
        if is_own and target.misses_parts and tasks[-1].is_per_sample:
            raise UserError(f"tasks.{name}.loss: {task.loss} returns one loss a sample, but of "
                            "some targets a part is missing (ignored pixels, missing labels, "
                            "padding), which it cannot tell; return one loss for each entry")
    return tasks


def _thresholds(name: str, given: float | list[float], label_names: list[str]) -> list[float]:
    thresholds = [given] * len(label_names) if isinstance(given, float) else given
    if len(thresholds) != len(label_names):
        raise UserError(f"tasks.{name}.thresholds: {len(thresholds)} for {len(label_names)} labels "
                        f"({', '.join(label_names)}); give one for each, or a single number")
    return thresholds


def num_outputs(tasks: list[Task]) -> int | dict[str, int]:
    """How many numbers a model gives for an item, by task if there are several targets."""
    if tasks[0].takes_all and len({task.num_outputs for task in tasks}) == 1:
        return tasks[0].num_outputs
    return {task.name: task.num_outputs for task in tasks}


def labels(tasks: list[Task]) -> dict[str, list[str] | dict]:
    """By task: the names of its classes or labels; of a regression what undoes its scale."""
    return {
        task.name: task.label_names if task.kind != "regression" else {
            "columns": task.label_names, "mean": list(task.mean), "deviation": list(task.deviation)}
        for task in tasks
    }


def losses_of_trial(
    tasks: list[Task], output: Any, inputs: Tensor, targets: dict[str, Tensor], mix: Mix | None
) -> list[Tensor]:
    """Unreduced losses, by task, of a micro-batch that is only tried."""
    return [task.losses(output, targets, mix) for task in tasks]


def logged_losses(
    tasks: list[Task], item_counts: Callable[[int], dict[str, int]], record: StepRecord
) -> dict[str, float]:
    """``train/TASK/loss`` of a step, if there are several tasks: the mean over its items, if any.

    Args:
        item_counts: from a step to the items of each task.
    """
    if len(tasks) == 1:
        return {}
    counts = item_counts(record.step)
    return {
        f"train/{task.name}/loss": share / task.weight if counts[task.name] else math.nan
        for task, share in zip(tasks, record.losses, strict=True)
    }


def logged_metrics(tasks: list[Task], results: dict[str, dict]) -> dict[str, float]:
    """``eval/*`` of the results by task: the task's name stands in the key if there are several."""
    logged = {"eval/loss": sum(task.weight * results[task.name]["loss"] for task in tasks)}
    for task in tasks:
        prefix, result = _prefix(task, tasks), results[task.name]
        logged |= {f"{prefix}loss": result["loss"]} if len(tasks) > 1 else {}
        logged |= {f"{prefix}{name}": value for name, value in task.logged(result).items()}
    return logged


def _prefix(task: Task, tasks: list[Task]) -> str:
    return f"eval/{task.name}/" if len(tasks) > 1 else "eval/"


def metric_names(tasks: list[Task]) -> list[str]:
    """The keys of ``logged_metrics``."""
    blank = {task.name: task.result(torch.ones(task.num_counts), torch.ones(task.num_sums))
             for task in tasks}
    return list(logged_metrics(tasks, blank))


def headline(tasks: list[Task]) -> list[str]:
    """The keys of ``logged_metrics`` that the terminal shows."""
    names = ["eval/loss"]
    for task in tasks:
        names += [_prefix(task, tasks) + name for name in task.headline]
    return names


def default_monitor(tasks: list[Task]) -> str:
    """The logged key that decides which weights are best, unless the options name another."""
    return f"eval/{tasks[0].monitor}" if len(tasks) == 1 else "eval/loss"
