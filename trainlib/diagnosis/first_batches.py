"""What the first micro-batches show before anything is learnt: whether data and net go together,
outputs, the initial loss, the inputs as the first layer has them, and units that are dead."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from trainlib.config import UserError
from trainlib.diagnosis import baseline
from trainlib.diagnosis.dead_units import Alive, judge_alive
from trainlib.diagnosis.findings import Report, number
from trainlib.diagnosis.job import Batch, Job, keeping_modes
from trainlib.diagnosis.outputs import (
    ends_in_sigmoid,
    judge_loss,
    judge_output,
    judge_squashed,
    squashed_items,
)
from trainlib.diagnosis.pace import FORWARD_SECONDS, GROWTH
from trainlib.memory import is_out_of_memory
from trainlib.user_code import describe_error

if TYPE_CHECKING:
    from trainlib.tasks import Task

_LARGE, _SMALL = 10.0, 1e-2  # root mean squares of inputs; normalised ones have 1
_DOMINANT_SHARE, _MOST = 0.95, 0.5  # of all squares; of a sample's squares, and of the samples
_JUDGED = (nn.Linear, _ConvNd, nn.RNNBase)
_TRIED_STEPS = 2  # an optimizer's second one may differ from its first
_SHOWN_OUTPUTS = 2**16  # of a sample: pixels or tokens, times classes


def check_fit(job: Job, batch: Batch, report: Report) -> bool:
    """Whether the net takes the inputs, and its outputs fit the tasks."""
    inputs, targets = batch.inputs[:2], {k: v[:2] for k, v in batch.targets.items()}
    try:
        with keeping_modes(job.module), torch.no_grad():
            job.module.eval()
            output = job.module(inputs, **job.arguments(targets))
            _measure(job, batch)
    except Exception as error:  # whatever a net of the user's own raises
        _raise_if_memory(error)
        report.error("model fails", f"the net cannot take inputs of shape {tuple(inputs.shape)}: "
                     f"{describe_error(error)}", "mend the net, or choose another --data.input")
        return False
    for task in job.tasks:
        try:
            task.check_output(output, targets, [each.name for each in job.tasks])
        except UserError as error:
            said, _, _ = str(error).rpartition("; ")
            report.error(
                "wrong output size", said,
                f"have the net give {task.num_outputs} numbers for {task.name!r}: leave the number "
                "of outputs out of --model.args, where the data fill it in, or mend the last layer")
            return False
    return _check_step(job, batch, report)


def _measure(job: Job, batch: Batch) -> None:
    """How long a forward takes for a sample: of so many as can be afforded, growing from two."""
    size, wanted = 2, len(batch.samples)
    while True:
        part = batch.first(size)
        began = time.perf_counter()
        job.module(part.inputs, **job.arguments(part.targets))
        if job.device.type == "cuda":
            torch.cuda.synchronize(job.device)
        seconds = time.perf_counter() - began
        job.pace.forward = seconds / len(part.samples)
        if size >= wanted or GROWTH * seconds > FORWARD_SECONDS:
            return
        size *= GROWTH


def _check_step(job: Job, batch: Batch, report: Report) -> bool:
    """Whether steps of training go through, of a smallest micro-batch, too."""
    usual, is_whole = min(job.micro_size, len(batch.samples)), job.micro_size == job.wanted_size
    smallest = min(usual, job.options.batch.smallest_micro_batch) if is_whole else usual
    for size in sorted({smallest, usual}):
        part, is_the_net = batch.first(size), True
        try:
            with job.untouched():
                for number in range(_TRIED_STEPS):
                    is_the_net = True
                    job.seed(number)
                    job.loss(part.inputs, part.targets, [part.samples]).backward()
                    is_the_net = False
                    job.update(1.0)
        except Exception as error:  # whatever code of the user's own raises
            _raise_if_memory(error)
            _report_step(job, size, error, is_the_net, report)
            return False
    return True


def _report_step(
    job: Job, size: int, error: Exception, is_the_net: bool, report: Report
) -> None:
    said = describe_error(error)
    if not is_the_net:
        report.error(
            "optimizer fails", f"a step of {job.options.optim.name} raises: {said}",
            "mend --optim.args, choose another --optim.name, or mend the optimizer, if it is your "
            "own")
    elif size == 1 and "more than 1 value per channel" in said:
        report.error(
            "model fails", f"a step of training on a micro-batch of one sample raises: {said}",
            "set --batch.micro_size to 2 or more, such that --batch.global_size "
            f"({job.options.batch.global_size}) divided by it leaves no rest of 1: BatchNorm has "
            "no statistics of one sample")
    else:
        report.error("model fails", f"a step of training raises: {said}",
                     "mend the net or the loss")


def _raise_if_memory(error: Exception) -> None:
    if is_out_of_memory(error):
        raise error


def check_first_batches(job: Job, batches: list[Batch], expected: Mapping, report: Report) -> None:
    """Outputs, initial loss, inputs and dead units, in training mode without dropout.

    Args:
        expected: by task, the loss of outputs of 0 and of the best constant, and in words what
            the first of them is.
    """
    outputs: dict[str, list[Tensor]] = {task.name: [] for task in job.tasks}
    losses = {task.name: 0.0 for task in job.tasks}
    # Of these samples: a few large targets make the loss of others another one.
    zeros = {task.name: 0.0 for task in job.tasks}
    squashed: dict[str, list[Tensor]] = {task.name: [] for task in job.tasks}
    columns, alive = Columns(), Alive()
    with job.untouched(), torch.no_grad(), columns.seen_by(job.module), alive.seen_in(job.module):
        job.seed(0)
        for batch in batches:
            output = job.module(batch.inputs, **job.arguments(batch.targets))
            logits = job.logits(batch) if any(job.arguments(batch.targets)) else output
            for task in job.tasks:
                shown = task.pick(logits).float().flatten(1)[:, :_SHOWN_OUTPUTS]
                outputs[task.name].append(shown)
                squashed[task.name].append(squashed_items(task, task.pick(logits).float()))
                target = batch.targets[task.name]
                losses[task.name] += baseline.mean_loss(
                    task, task.losses(output, batch.targets), target) / len(batches)
                zeros[task.name] += baseline.loss_of_constant(
                    task, baseline.zeros(task, batch.targets), batch.targets) / len(batches)
    for task in job.tasks:
        judge_output(task.name, torch.cat(outputs[task.name]), report)
        judge_squashed(task, torch.cat(squashed[task.name]), _has_sigmoid(job, task, batches[0]),
                       report)
        _, constant, words = expected[task.name]
        judge_loss(job, task, losses[task.name], zeros[task.name], constant, words, report)
    judge_inputs(job, columns, report)
    judge_alive(alive, report)


def _has_sigmoid(job: Job, task: Task, batch: Batch) -> bool:
    if task.loss_name != "bce":
        return False
    with job.untouched():
        return ends_in_sigmoid(task.pick(job.module(batch.inputs[:2])))


class Columns:
    """Root mean squares of what the first layer with weights is given, by channel or column."""

    def __init__(self):
        self.layer, self.unit, self.count, self._is_new_pass = "", "", 0, True
        self.sums = self.squares = self.dominated = torch.zeros(())

    @contextmanager
    def seen_by(self, module: nn.Module) -> Iterator[None]:
        def begin(*_: Any) -> None:
            self._is_new_pass = True

        def look(name: str) -> Callable:
            return lambda layer, args: self._look(name, layer, args)

        handles = [module.register_forward_pre_hook(begin, prepend=True)]
        handles += [part.register_forward_pre_hook(look(name))
                    for name, part in module.named_modules()
                    if list(part.parameters(recurse=False)) and not list(part.children())]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _look(self, name: str, layer: nn.Module, args: tuple) -> None:
        is_first, self._is_new_pass = self._is_new_pass, False
        # What a norm or an embedding is given need not be normalised.
        if not is_first or not isinstance(layer, _JUDGED) or not args:
            return
        values = args[0].detach().float()
        is_conv = isinstance(layer, _ConvNd)
        values = values.movedim(1 if is_conv else -1, 0).flatten(1)
        self.layer, self.count = name, self.count + values.shape[1]
        self.unit = "channel" if is_conv else "column"
        self.sums = self.sums + values.sum(1).cpu().double()
        self.squares = self.squares + values.square().sum(1).cpu().double()
        shares = values.square() / values.square().sum(0).clamp(min=1e-30)
        self.dominated = self.dominated + (shares > _MOST).sum(1).cpu().double()


def judge_inputs(job: Job, columns: Columns, report: Report) -> None:
    """The scale of what the first layer has, of all columns and of one beside the others."""
    if not columns.count:
        report.fact("inputs", "not judged: the first layer, if one can be seen, is a norm, an "
                    "embedding or the like")
        return
    mean, squares = columns.sums / columns.count, columns.squares / columns.count
    deviation = (squares - mean.square()).clamp(min=0).sqrt()
    rms, each = float(squares.mean().sqrt()), squares.sqrt()
    report.fact("inputs", f"as {columns.layer or 'the net'} has them: mean "
                f"{number(float(mean.mean()))}, deviation {number(float(deviation.mean()))}, root "
                f"mean square {number(rms)}")
    names = job.dataset.inputs or []
    worst = int(each.argmax())
    column = names[worst] if len(names) == len(each) else f"{columns.unit} {worst}"
    mend = ("--data.normalize true" if not job.options.data.normalize else
            "have the net itself leave the scale of its inputs as it is: they come to it with "
            "mean 0 and deviation 1")
    share = float(squares[worst] / squares.sum()) if rms else 0.0
    if not math.isfinite(rms) or rms > _LARGE or 0 < rms < _SMALL:
        report.error(
            "inputs not normalised", f"the first layer ({columns.layer or 'the net'}) is given "
            f"inputs of root mean square {number(rms)}, where 1 is usual; most in {column}: mean "
            f"{number(float(mean[worst]))}, deviation {number(float(deviation[worst]))}", mend)
    # A few large values in one column are a heavy tail, which its scale does not mend.
    is_usual = float(columns.dominated[worst]) > _MOST * columns.count
    if len(each) > 2 and share > _DOMINANT_SHARE and float(each[worst]) > 3 and is_usual:
        report.warning(
            "one column dominates", f"{column} has {share:.0%} of the inputs' squares (root mean "
            f"square {number(float(each[worst]))}; the median of all is "
            f"{number(float(each.median()))})", f"{mend}, or leave the column out of --data.input")
