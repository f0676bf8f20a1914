"""The net's first outputs: finite, of logits rather than of probabilities, and their loss."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import Tensor

from trainlib.diagnosis.findings import Report, number

if TYPE_CHECKING:
    from trainlib.diagnosis.job import Job
    from trainlib.tasks import Task

_LOSS_FACTOR = 3  # the initial loss may be so many times the expected one
_RESHAPING = ("View", "UnsafeView", "Reshape", "Squeeze", "Unsqueeze", "Select", "Slice", "Permute",
              "Transpose", "Clone", "Alias", "ToCopy")


def judge_output(name: str, output: Tensor, report: Report) -> None:
    """What the outputs are like, by sample."""
    if not output.isfinite().all():
        report.error("non-finite output", f"{name}: NaN or infinite outputs for the first samples",
                     "look for a division by 0, a logarithm of 0 or huge weights in the net")
        return
    spread = output.std(0, correction=0).mean()
    report.fact(f"output of {name}",
                f"from {number(float(output.min()))} to {number(float(output.max()))}, mean "
                f"{number(float(output.mean()))}, deviation between samples "
                f"{number(float(spread))} ({len(output)} samples)")


def squashed_items(task: Task, output: Tensor) -> Tensor:
    """Whether each item's outputs [...] could be probabilities, one of which sums to 1."""
    axis = 1 if task.kind == "segmentation" else -1
    within = (output >= 0).all(axis) & (output <= 1).all(axis)
    if task.loss_name == "cross_entropy":
        within &= (output.sum(axis) - 1).abs() < 1e-4
    return within.flatten()


def ends_in_sigmoid(output: Tensor) -> bool:
    """Whether the last that was computed is a sigmoid, by the graph of a pass with gradients."""
    node = output.grad_fn
    while node is not None and node.name().startswith(_RESHAPING):
        node = node.next_functions[0][0]
    return node is not None and node.name().startswith("SigmoidBackward")


def judge_squashed(task: Task, squashed: Tensor, ends_in_sigmoid: bool, report: Report) -> None:
    """A softmax or a sigmoid before a loss that has its own."""
    if task.loss_name not in ("cross_entropy", "bce") or not squashed.all():
        return
    if task.loss_name == "bce" and not ends_in_sigmoid:
        return  # by chance, as few outputs may be
    what = "a softmax" if task.loss_name == "cross_entropy" else "a sigmoid"
    report.error(
        "probabilities as output", f"{task.name}: all of the first outputs are between 0 and 1"
        + (" and sum to 1" if what == "a softmax" else "") + f", as of {what}; the loss "
        f"{task.loss_name} has its own, and two of them hardly learn",
        f"have the net return what it gives to {what} at its end (logits)")


def judge_loss(
    job: Job, task: Task, loss: float, zero: float, constant: float, words: str, report: Report
) -> None:
    """The loss at the start beside that of outputs of 0 and that of the best constant."""
    report.fact(f"initial loss of {task.name}",
                f"{number(loss)}; expected about {number(zero)} ({words}); the best constant "
                f"output has {number(constant)}")
    if not math.isfinite(loss) and "non-finite output" not in report.names:
        report.error("non-finite loss", f"{task.name}: the loss is NaN or infinite, though the "
                     "outputs are finite", "look for a division by 0 or a logarithm of 0 in the "
                     "loss, and at targets that it does not expect")
    if not math.isfinite(loss) or zero <= 0:  # or a loss with an end below 0
        return
    if loss > _LOSS_FACTOR * zero:
        report.warning(
            "initial loss", f"{task.name}: the loss begins at {number(loss)}, {loss / zero:.3g} "
            f"times the {number(zero)} ({words}) of a net that knows nothing: the first outputs "
            "are confident and wrong",
            "make the last layer's initial weights smaller (divide them by "
            f"{max(2, round(loss / zero))}), and check the scale of inputs and targets")
    elif loss < zero / _LOSS_FACTOR and loss < constant / _LOSS_FACTOR and not job.is_pretrained():
        report.warning(
            "initial loss", f"{task.name}: the loss of an untrained net is {number(loss)}, far "
            f"below the {number(zero)} ({words}) of one that knows nothing",
            "look for the target among the inputs (--data.input), and at the loss function")
