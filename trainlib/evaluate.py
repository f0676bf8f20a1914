"""One exact pass over a data set.

Batch ``j`` runs on process ``j % world_size``, so every batch has the same shape and content on
any number of processes. Added up over processes are counts and the loss sum of each batch, in a
slot of its own: every slot has one non-zero addend, so no order of addition shows. No sample is
padded, repeated or dropped, and nothing here changes the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.distributed
from accelerate import Accelerator
from torch import Tensor, nn

from trainlib.config import UserError
from trainlib.metrics import sum_dtype
from trainlib.user_code import describe_error

if TYPE_CHECKING:
    from trainlib.data import EvalReader, Reader
    from trainlib.tasks import Task


@torch.no_grad()
def evaluate(
    model: nn.Module, reader: EvalReader, tasks: list[Task], accelerator: Accelerator
) -> dict[str, dict]:
    """The metrics of each task over every sample of a split, the same on every process.

    Args:
        model: the module inside any wrapper; put into eval mode and back.
        reader: this process's batches of the split.
    """
    device = accelerator.device
    zeros = partial(torch.zeros, dtype=sum_dtype(device), device=device)
    loss_sums = [zeros(reader.num_batches) for _ in tasks]
    counts = [zeros(task.counts_size) for task in tasks]
    with eval_mode(model):
        for number, inputs, targets in reader:
            output = model(inputs)
            for task, task_sums, task_counts in zip(tasks, loss_sums, counts, strict=True):
                task_sums[number] = task.losses(output, targets).to(task_sums.dtype).sum()
                task_counts += task.counts(output, targets)
    if accelerator.num_processes > 1:
        for total in [*loss_sums, *counts]:
            torch.distributed.all_reduce(total)
    return {
        task.name: task.result(task_sums.sum().item(), task_counts)
        for task, task_sums, task_counts in zip(tasks, loss_sums, counts, strict=True)
    }


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode for a while; every module then goes back to its own mode, frozen ones too."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training


def try_model(model: nn.Module, inputs: Tensor, tasks: list[Task]) -> None:
    """Runs the model forward, and in training backward, before anything is written.

    Buffers, gradients and torch's generator are afterwards what they were.

    Args:
        model: on the CPU; in evaluation it is tried first.
        inputs: as many samples as the smallest micro-batch has, or a few.

    Raises:
        UserError: the model cannot take the inputs, or its output does not fit a task.
    """
    def attempt(what: str, is_training: bool) -> None:
        try:
            output = model(inputs)
        except Exception as error:  # whatever a net of the user's own raises
            raise UserError(f"the model cannot take inputs of shape {tuple(inputs.shape)}{what}: "
                            f"{describe_error(error)}") from error
        for task in tasks:
            task.check_output(output, len(inputs))
        if is_training:
            try:
                sum(task.output(output).float().sum() for task in tasks).backward()
            except Exception as error:
                raise UserError(f"the model has no backward pass: {describe_error(error)}"
                                ) from error

    with eval_mode(model), torch.no_grad():
        attempt("", False)
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with torch.random.fork_rng([]):
        attempt(" in training", True)
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
    model.zero_grad(set_to_none=True)


@torch.no_grad()
def inspect_step(model: nn.Module, reader: Reader, tasks: list[Task], step: int) -> dict:
    """The rows of a step's global batch, and among them those whose own loss is not finite.

    Runs on one process, without communication; the model stays as it is.
    """
    rows, suspects = reader.rows(step), []
    one_by_one = reader.plan.samples(step)[:, None]
    with eval_mode(model):
        batches = reader.split.batches(one_by_one, reader.device)
        for row, (inputs, targets) in zip(rows, batches, strict=True):
            output = model(inputs)
            if not all(task.losses(output, targets).isfinite().all() for task in tasks):
                suspects.append(row)
    return {"suspects": suspects, "rows": rows}
