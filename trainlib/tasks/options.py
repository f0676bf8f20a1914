"""Options of the tasks: kind, target, loss, weight."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any, Literal

from pydantic import Field, model_validator
from torch import Tensor

from trainlib import losses
from trainlib.config import Options, UserError, nearest
from trainlib.user_code import import_object, is_object_spec

# The losses that fit each kind; the first is the default.
LOSSES_OF = {
    "classification": ("cross_entropy", "focal"),
    "multilabel": ("bce",),
    "regression": ("mse", "l1", "huber"),
    "segmentation": ("cross_entropy", "bce", "focal", "dice"),
    "language_modeling": ("cross_entropy", "focal"),
}
_ONLY_FOR = {
    "thresholds": ("multilabel",),
    "top_k": ("classification",),
    "ignore_index": ("classification", "multilabel", "segmentation"),
    "label_names": ("multilabel", "segmentation"),
}


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


class TaskOptions(Options):
    kind: Literal["classification", "multilabel", "regression", "segmentation",
                  "language_modeling"] = "classification"
    """What is predicted: one class of several, several labels each on or off, numbers, a class a
    pixel, or the next token of a text."""
    target: str | list[str] | None = None
    """The column to predict, or several of labels or numbers; none: the column of the task's name,
    or the only candidate."""
    loss: str | None = None
    """Which loss: cross_entropy or focal; bce for labels; mse, l1 or huber for numbers;
    cross_entropy, bce, focal or dice for pixels; or a function of your own, file.py:name, from
    outputs and targets to one loss an item; none: the first of its kind."""
    loss_args: dict[str, Any] = {}
    """Arguments of the loss, such as label_smoothing, class_weights, pos_weight, gamma, delta."""
    weight: float = Field(1.0, gt=0)
    """Factor of this task's mean loss in the total."""
    ignore_index: int | None = None
    """The value of a class, label or pixel that means that it is missing, besides null and NaN."""
    label_names: list[str] | None = None
    """Names of the classes of masks, or of lists of labels; none: their numbers."""
    thresholds: float | list[float] = 0.5
    """The probability from which a label is predicted, for all labels or one for each."""
    top_k: int = Field(5, ge=2)
    """Among how many best classes the right one is counted as found, if there are more."""

    @model_validator(mode="after")
    def _fits_its_kind(self) -> TaskOptions:
        for name, kinds in _ONLY_FOR.items():
            if self.kind not in kinds and getattr(self, name) != type(self).model_fields[
                name
            ].default:
                raise UserError(f"{name}: is for {' and '.join(kinds)}, this task is a "
                                f"{self.kind}; leave it out")
        thresholds = [self.thresholds] if isinstance(self.thresholds, float) else self.thresholds
        if not thresholds or not all(0 < threshold < 1 for threshold in thresholds):
            raise UserError(f"thresholds: probabilities between 0 and 1, got {self.thresholds}")
        fit = LOSSES_OF[self.kind]
        if self.loss is None:
            object.__setattr__(self, "loss", fit[0])
        try:
            function = find_loss(self.loss)
        except ValueError as error:
            raise UserError(f"loss: {self.loss!r}: {error}") from error
        if self.loss in losses.LOSSES and self.loss not in fit:
            raise UserError(f"loss: {self.loss} is not for {self.kind}; use {' or '.join(fit)}, or "
                            "a function of your own")
        self._check_loss_args(function)
        return self

    def _check_loss_args(self, function: Callable) -> None:
        try:
            parameters = inspect.signature(function).parameters
        except (TypeError, ValueError):  # written in C: tried when the tasks are built
            return
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        takes = list(parameters)[2:]
        for name in self.loss_args:
            if name not in takes and not takes_any:
                raise UserError(
                    f"loss_args: {self.loss} does not take {name!r}{nearest(name, takes)}"
                )


def resolve(
    options: dict[str, TaskOptions], candidates: list[str], columns: list[str]
) -> dict[str, TaskOptions]:
    """The options with every target column named; without any, one task on the only candidate.

    Args:
        candidates: the columns that could be the only target of a classification.
        columns: all columns.

    Raises:
        UserError: an unknown column, or no or several candidates and none chosen.
    """
    def only_candidate() -> str:
        if len(candidates) == 1:
            return candidates[0]
        found = (f"several columns could be the target: {', '.join(candidates)}" if candidates else
                 f"no column of class labels, strings or integers among {', '.join(columns)}")
        raise UserError(f"tasks: {found}; choose one with --tasks.NAME.target COLUMN, and what it "
                        "holds with --tasks.NAME.kind")

    if not options:
        target = only_candidate()
        return {target: TaskOptions(target=target)}
    resolved = {}
    for name, task in options.items():
        if not re.fullmatch(r"[A-Za-z_][\w-]*", name):
            raise UserError(f"tasks: a name consists of letters, digits, _ and -, got {name!r}")
        target = task.target or (name if name in columns else None)
        if target is None and task.kind == "language_modeling" and len(columns) == 1:
            target = columns[0]
        if target is None and task.kind != "classification":
            raise UserError(f"tasks.{name}.target: name the column to predict; the source has "
                            f"{', '.join(columns)}")
        target = target or only_candidate()
        for column in [target] if isinstance(target, str) else target:
            if column not in columns:
                raise UserError(f"tasks.{name}.target: no column {column!r}"
                                f"{nearest(column, columns)}")
        resolved[name] = task.replaced({"target": target})
    return resolved
