"""One exact pass over a data set; and what else runs a model outside the step.

Batch ``j`` runs on process ``j % world_size``, so every batch has the same shape and content on
any number of processes. Added up over processes are counts, and the sums of each batch in a slot
of their own: every slot has one non-zero addend, so no order of addition shows. No sample is
padded, repeated or dropped, and nothing here changes the model. Of a model that is cut over the
processes every forward needs all of them: one without a batch runs the first once more, whose
result goes nowhere.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.distributed
from accelerate import Accelerator
from torch import Tensor, nn

from trainlib import agreement, shards
from trainlib.config import UserError
from trainlib.memory import in_one_line, is_out_of_memory
from trainlib.metrics import sum_dtype
from trainlib.user_code import describe_error

if TYPE_CHECKING:
    from trainlib.data import EvalReader, Reader
    from trainlib.tasks import Task


@torch.no_grad()
def evaluate(
    model: nn.Module, reader: EvalReader, tasks: list[Task], accelerator: Accelerator,
    is_asked_to_stop: Callable[[], bool] = lambda: False,
    say: Callable[[str], object] | None = None,
) -> dict[str, dict] | None:
    """The metrics of each task over every sample of a split, the same on every process.

    Args:
        model: the module inside any wrapper; put into eval mode and back.
        reader: this process's batches of the split.
        is_asked_to_stop: agreed by all processes, which ask it equally often, between batches.
        say: where a run can do without the answer: told if the memory of a process does not
            suffice. Not of a model that is cut, for whose forward the others wait.

    Returns:
        By task; none where the answer was yes, or where ``say`` was told.
    """
    device, world_size = accelerator.device, accelerator.num_processes
    # On a GPU an answer waits for the device.
    rounds_between = 8 if device.type == "cuda" else 1
    zeros = partial(torch.zeros, dtype=sum_dtype(device), device=device)
    counts = [zeros(task.num_counts) for task in tasks]
    sums = [zeros(reader.num_batches, task.num_sums) for task in tasks]
    arguments = model_arguments(model, tasks)
    batches = iter(reader)
    may_fail, failure = say is not None and not shards.holds_sharded(model), None
    with eval_mode(model):
        for round_number in range(-(-reader.num_batches // world_size)):
            if round_number % rounds_between == 0 and is_asked_to_stop():
                return None
            if failure is not None:
                continue  # to ask as often as the others
            batch = next(batches, None)
            if batch is None:  # the last round may have fewer batches than processes
                if shards.holds_sharded(model):
                    inputs, targets = reader.first_batch()
                    model(inputs, **arguments(targets))
                break
            number, inputs, targets = batch
            try:
                output = model(inputs, **arguments(targets))
                for task, task_counts, task_sums in zip(tasks, counts, sums, strict=True):
                    batch_counts, task_sums[number] = task.statistics(output, targets)
                    task_counts += batch_counts
            except Exception as error:
                if not (may_fail and is_out_of_memory(error)):
                    raise
                failure = in_one_line(error)
    if may_fail:
        failures = [each for each in agreement.from_all(failure, device) if each is not None]
        if failures:
            if accelerator.is_main_process:
                say(f"predictions, and all that takes another pass over the validation split: not "
                    f"made ({failures[0]}); weights and metrics are written")
            return None
    if world_size > 1:
        for total in [*counts, *sums]:
            torch.distributed.all_reduce(total)
    return {
        task.name: task.result(task_counts, task_sums)
        for task, task_counts, task_sums in zip(tasks, counts, sums, strict=True)
    }


def model_arguments(
    model: nn.Module, tasks: list[Task]
) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """From targets to what the model is given besides the inputs.

    A model whose ``forward`` takes ``targets`` gets those of a job of language modelling with the
    plain cross entropy, and may return {"losses": [batch, tokens]} without ever holding logits.
    """
    only = tasks[0]
    if (len(tasks) == 1 and only.may_fuse
            and "targets" in inspect.signature(model.forward).parameters):
        return lambda targets: {"targets": targets[only.name]}
    return lambda targets: {}


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode for a while; every module then goes back to its own mode, frozen ones too.

    What was gathered of a cut module is let go of.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training
        shards.reshard(model)


def try_model(
    model: nn.Module, inputs: Tensor, targets: dict[str, Tensor], tasks: list[Task],
    num_samples: int | None = None,
) -> None:
    """Runs the model forward, and in training backward, before anything is written.

    Gradients and torch's generator are afterwards what they were, and buffers what they were after
    the evaluation, which changes none of a net that knows the two apart.

    Args:
        model: on the CPU; in evaluation it is tried first.
        inputs, targets: a few samples.
        num_samples: of which so many are taken at most: those of the smallest micro-batch.

    Raises:
        UserError: the model cannot take the inputs, or its output does not fit a task.
    """
    inputs = inputs[:num_samples]
    targets = {name: target[:num_samples] for name, target in targets.items()}
    arguments = model_arguments(model, tasks)

    def attempt(what: str, is_training: bool) -> None:
        try:
            output = model(inputs, **arguments(targets))
        except Exception as error:  # whatever a net of the user's own raises
            hint = "" if inputs.is_floating_point() else (
                "; these are token numbers, for nets that begin with an embedding, such as gpt")
            raise UserError(f"the model cannot take inputs of shape {tuple(inputs.shape)}{what}: "
                            f"{describe_error(error)}{hint}") from error
        for task in tasks:
            task.check_output(output, targets, [task.name for task in tasks])
        try:
            losses = [task.losses(output, targets) for task in tasks]
        except Exception as error:  # whatever a loss of the user's own raises
            raise UserError(f"the loss cannot take the model's output{what}: "
                            f"{describe_error(error)}") from error
        if is_training:
            try:
                sum(loss.sum() for loss in losses).backward()
            except Exception as error:
                raise UserError(f"the model has no backward pass: {describe_error(error)}"
                                ) from error

    with torch.random.fork_rng([]):
        with eval_mode(model), torch.no_grad():
            attempt("", False)
        buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
        attempt(" in training", True)
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
    model.zero_grad(set_to_none=True)


@torch.no_grad()
def inspect_step(model: nn.Module, reader: Reader, tasks: list[Task], step: int) -> dict:
    """The rows of a step's global batch, and among them those whose own loss is not finite.

    Runs on one process, without communication; on all, if the model is cut over them. The model
    stays as it is.
    """
    rows, suspects = reader.rows(step), []
    one_by_one = reader.plan.samples(step)[:, None]
    arguments = model_arguments(model, tasks)
    with eval_mode(model):
        batches = reader.split.batches(one_by_one, reader.device)
        for row, (inputs, targets) in zip(rows, batches, strict=True):
            output = model(inputs, **arguments(targets))
            if not all(task.losses(output, targets).isfinite().all() for task in tasks):
                suspects.append(row)
    return {"suspects": suspects, "rows": rows}
