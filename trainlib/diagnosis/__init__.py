"""``train.py --diagnose``: whether a job is sound, told before hours are spent on it.

Everything is measured with the job's own parts, in fp32 on one process, and nothing is written.
What can be told without learning is (``parameters``, ``samples``, ``first_batches``); then one
micro-batch is learnt by heart (``learning``), and held-out samples are predicted after a short
training (``held_out``), each against what a net that knows nothing loses (``baseline``). All share
the ``job``, the ``pace`` at which it can be looked at, and the report (``findings``), of which
``page`` makes the text.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trainlib import shards, terminal
from trainlib.config import UserError
from trainlib.diagnosis import baseline
from trainlib.diagnosis.findings import Finding, Report
from trainlib.diagnosis.first_batches import check_first_batches, check_fit
from trainlib.diagnosis.held_out import check_held_out
from trainlib.diagnosis.job import Batch, Job
from trainlib.diagnosis.learning import (
    EXPLAINING,
    check_gradients,
    check_learning,
    learn_by_heart,
)
from trainlib.diagnosis.page import page
from trainlib.diagnosis.parameters import check_parameters, parameter_rows
from trainlib.diagnosis.samples import check_samples, read_sample

if TYPE_CHECKING:
    from accelerate import Accelerator

    from trainlib.data import Dataset
    from trainlib.tasks import Task

__all__ = ["Finding", "Job", "Report", "diagnose", "stop_if_diagnose"]

BUDGET_SECONDS = 24.0
"""Of all trials together; what does not fit is cut short, and said."""
_READING_SECONDS, _BATCHES_SECONDS, _HEART_SECONDS, _RATES_SECONDS = 4.0, 2.0, 6.0, 6.0
_FIRST_BATCHES = 8


def stop_if_diagnose(
    options: Any, accelerator: Accelerator, module: nn.Module, optimizer: torch.optim.Optimizer,
    dataset: Dataset, tasks: list[Task], augment: Callable, arguments: Callable,
    layers: dict[str, str],
) -> None:
    """Where ``options.diagnose`` is set, prints a diagnosis and ends the process.

    Args:
        options: a script's.
        module: on its device, not prepared yet.
        arguments: from targets to what the model is given besides the inputs.
        layers: the layer of each parameter, by name.

    Raises:
        SystemExit: exit code 0 without findings, 1 with some.
        UserError: there are several processes, or the model is cut.
    """
    if not options.diagnose:
        return
    if accelerator.num_processes > 1 or shards.is_sharded(module):
        raise UserError("diagnose: it runs on one process with a whole model, and finds the same "
                        "for all; start it as python train.py --diagnose ...")
    job = Job(options, module, optimizer, dataset, tasks, augment, arguments, layers,
              accelerator.device)
    rows = parameter_rows(module)
    report = diagnose(job)
    terminal.say(page(rows, report))
    raise SystemExit(1 if report.findings else 0)


def diagnose(job: Job) -> Report:
    """All that can be found within the time there is; the job stays as it is."""
    report = Report(BUDGET_SECONDS)
    check_parameters(job, report)
    train = read_sample(job.dataset.train, report.deadline(_READING_SECONDS / 2))
    validation = read_sample(job.dataset.validation, report.deadline(_READING_SECONDS / 2))
    check_samples(job, train, validation, report)
    workers = max(1, job.dataset.train.workers)
    job.pace.reading = max(train.seconds, validation.seconds) / workers
    batches = job.first_batches(_FIRST_BATCHES, report.deadline(_BATCHES_SECONDS))
    if "non-finite parameters" in report.names or not check_fit(job, batches[0], report):
        report.fact("outputs and learning", "not looked at: the net cannot be run as it is")
        return report
    batches = _affordable(job, batches, report)
    constants = {task.name: baseline.best_constant(task, train.targets) for task in job.tasks}
    expected = {
        task.name: (
            baseline.loss_of_constant(task, baseline.zeros(task, train.targets), train.targets),
            baseline.loss_of_constant(task, constants[task.name], train.targets),
            _expected_in_words(task))
        for task in job.tasks
    }
    check_first_batches(job, batches, expected, report)
    if report.names & {"non-finite output", "non-finite loss"}:
        report.fact("gradients and learning", "not looked at: outputs or losses are not finite")
        return report
    reference = sum(task.weight * expected[task.name][0] for task in job.tasks)
    trial = learn_by_heart(job, batches[0], reference, 1.0, report.deadline(_HEART_SECONDS))
    check_gradients(job, trial, report)
    learns, doubt = check_learning(
        job, batches[0], reference, trial, report.deadline(_RATES_SECONDS), report)
    may_judge = learns and not report.names & EXPLAINING
    check_held_out(job, constants, may_judge, doubt, report.deadline(math.inf), report)
    return report


def _affordable(job: Job, batches: list[Batch], report: Report) -> list[Batch]:
    """The first micro-batches, so large as there is time for."""
    there = -(-len(job.dataset.train) // job.wanted_size)
    if job.micro_size < job.wanted_size:
        report.cut(f"micro-batches: of {job.micro_size} samples, and not of {job.wanted_size}")
    elif len(batches) < min(_FIRST_BATCHES, there):
        report.cut(f"first micro-batches: {len(batches)} of {min(_FIRST_BATCHES, there)}")
    return [batch.first(job.micro_size) for batch in batches]


def _expected_in_words(task: Task) -> str:
    """What the loss of outputs of 0 is."""
    if task.loss_name == "cross_entropy":
        return f"ln {task.num_outputs}"
    if task.loss_name == "bce":
        return "ln 2"
    if task.loss_name == "mse":
        return "the mean square of these targets, which are standardised"
    return "that of outputs of 0"
