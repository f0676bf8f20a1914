"""What a model without any use of its inputs would lose: outputs of zero, the best constant."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainlib.losses import IGNORED, is_valid

if TYPE_CHECKING:
    from trainlib.tasks import Task

_PLAIN = ("cross_entropy", "bce", "mse")  # losses whose best constant has a closed form
_REFINED_ENTRIES, _MOST_ENTRIES = 200_000, 4_000_000  # outputs, samples times classes and such
_REFINING_STEPS = 150


def constant_losses(task: Task, row: Tensor, targets: dict[str, Tensor]) -> Tensor:
    """The task's unreduced losses if every item is given the same output.

    Args:
        row: [outputs].
    """
    target = targets[task.name]
    if task.kind == "segmentation":
        output = row.view(1, -1, 1, 1).expand(len(target), -1, *target.shape[1:])
    elif task.kind == "language_modeling":
        output = row.expand(*target.shape, -1)
    else:
        output = row.expand(len(target), -1)
    return task.losses({task.name: output.contiguous()}, targets)


def per_sample(task: Task, losses: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Mean loss [samples] of each sample's items, and which samples have any."""
    items = _items(task, target)
    losses = losses.flatten(1).sum(1) if losses.ndim > 1 else losses
    return losses.cpu().double() / items.cpu().clamp(min=1), items.cpu() > 0


def mean_loss(task: Task, losses: Tensor, target: Tensor) -> float:
    """Over all items."""
    return float(losses.sum()) / max(1, int(_items(task, target).sum()))


def _items(task: Task, target: Tensor) -> Tensor:
    """[samples] how many losses of each sample count."""
    valid = is_valid(target)
    return task.items(valid.flatten(1).sum(1) if valid.ndim > 1 else valid.long())


def loss_of_constant(task: Task, row: Tensor, targets: dict[str, Tensor]) -> float:
    """The mean loss if every item is given the same output [outputs].

    Of zeros it is ln C for C classes, and the variance of numbers that are standardised.
    """
    some = _first(task, targets, _MOST_ENTRIES)
    return mean_loss(task, constant_losses(task, row, some), some[task.name])


def zeros(task: Task, targets: dict[str, Tensor]) -> Tensor:
    """The output [outputs] of a net that knows nothing."""
    return torch.zeros(task.num_outputs, device=targets[task.name].device)


def _first(task: Task, targets: dict[str, Tensor], most: int) -> dict[str, Tensor]:
    """So many samples that outputs for all their items have ``most`` entries."""
    target = targets[task.name]
    is_one = task.kind in ("multilabel", "regression", "classification")
    items = 1 if is_one else target[0].numel()
    return {task.name: target[: max(1, most // (items * task.num_outputs))]}


def best_constant(task: Task, targets: dict[str, Tensor], prior: float = 1.0) -> Tensor:
    """The output [outputs] of which the loss over the targets is least.

    Args:
        prior: added to the count of each class, for what other samples may hold.
    """
    target = targets[task.name]
    row = _closed_form(task, target, prior).nan_to_num()
    if task.loss_name in _PLAIN and not task.loss.keywords:
        return row
    some = _first(task, targets, _REFINED_ENTRIES)
    row = row.clone().requires_grad_()
    optimizer = torch.optim.Adam([row], lr=0.05)
    for _ in range(_REFINING_STEPS):
        loss = constant_losses(task, row, some).mean()
        [row.grad] = torch.autograd.grad(loss, [row])
        optimizer.step()
    return row.detach()


def floor(task: Task, targets: dict[str, Tensor]) -> float:
    """The least mean loss that any outputs could have, such as that of smoothed labels."""
    target = targets[task.name]
    smoothed = task.loss.keywords.get("label_smoothing")
    if not smoothed or not task.loss_name:  # a loss of the user's own may mean something else
        return 0.0
    share = torch.full((task.num_outputs,), smoothed / task.num_outputs, dtype=torch.float64)
    share[0] += 1 - smoothed
    return float(-(share * share.log()).sum()) * bool(is_valid(target).any())


def _closed_form(task: Task, target: Tensor, prior: float) -> Tensor:
    if task.kind == "regression":
        return target.float().flatten(1).nanmean(0)
    if task.kind == "multilabel":
        return torch.logit(target.float().nanmean(0), eps=1e-4)
    classes = target[target != IGNORED].flatten()
    if getattr(task, "is_binary", False):
        return torch.logit(classes.float().mean().view(1), eps=1e-4)
    counts = torch.bincount(classes, minlength=task.num_outputs).float() + prior
    return (counts / counts.sum()).log()
