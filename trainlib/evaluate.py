"""One exact pass over a data set.

Batch ``j`` runs on process ``j % world_size``, so every batch has the same shape and content on
any number of processes; what is added up are counts and float64 sums. No sample is padded,
repeated or dropped, and nothing here changes the model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed
from accelerate import Accelerator
from torch import nn

from trainlib.metrics import sum_dtype

if TYPE_CHECKING:
    from trainlib.data import Reader, Split
    from trainlib.tasks import Task


@torch.no_grad()
def evaluate(
    model: nn.Module, split: Split, tasks: list[Task], batch_size: int, accelerator: Accelerator
) -> dict[str, dict]:
    """The metrics of each task over every sample of a split, the same on every process.

    Args:
        model: the module inside any wrapper; put into eval mode and back.
        split: on the model's device.
    """
    device = accelerator.device
    totals = [torch.zeros(t.statistics_size, dtype=sum_dtype(device), device=device) for t in tasks]
    was_training = model.training
    model.eval()
    stride = batch_size * accelerator.num_processes
    for start in range(batch_size * accelerator.process_index, len(split), stride):
        chosen = slice(start, start + batch_size)
        targets = {name: column[chosen] for name, column in split.targets.items()}
        output = model(split.inputs[chosen])
        for task, total in zip(tasks, totals, strict=True):
            total += task.statistics(output, targets)
    model.train(was_training)
    if accelerator.num_processes > 1:
        for total in totals:
            torch.distributed.all_reduce(total)
    return {task.name: task.result(total) for task, total in zip(tasks, totals, strict=True)}


@torch.no_grad()
def inspect_step(model: nn.Module, reader: Reader, tasks: list[Task], step: int) -> dict:
    """The rows of a step's global batch, and among them those whose own loss is not finite.

    Runs on one process, without communication; the model stays as it is.
    """
    rows, suspects = reader.rows(step), []
    was_training = model.training
    model.eval()
    split = reader.split
    for row, sample in zip(rows, reader.plan.samples(step).tolist(), strict=True):
        chosen = slice(sample, sample + 1)
        targets = {name: column[chosen] for name, column in split.targets.items()}
        output = model(split.inputs[chosen])
        if not all(task.losses(output, targets).isfinite().all() for task in tasks):
            suspects.append(row)
    model.train(was_training)
    return {"suspects": suspects, "rows": rows}
