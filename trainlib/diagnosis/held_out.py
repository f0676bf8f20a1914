"""A short training, whether it helps on samples that it has not seen, and what a step waits for."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from statistics import median

import numpy as np
import torch
from torch import Tensor

from trainlib.diagnosis import baseline
from trainlib.diagnosis.findings import Deadline, Finding, Report
from trainlib.diagnosis.job import Batch, Job, keeping_modes
from trainlib.diagnosis.learning import USUAL_DECAY

_WARMUP_STEPS = 10
_LOOKS = (10, 20, 60, 80, 160, 320)  # steps after which held-out samples are looked at
_FIRST_JUDGED = 60  # a rate that is too high shows after some steps at its peak
_MUCH_DECAY = 1.0  # rate times decay, of all steps: a third of a weight is left
_LOWER_RATES = (0.1, 0.01)
_END_STEPS, _FALLEN_SHARE = 20, 0.9  # of the training loss to the best constant's
_ERRORS = 3.0  # standard errors by which the net is to beat the best constant
_DOUBTFUL_ERRORS = 1.0
_FEWEST_SAMPLES = 20
_FEWEST_STEPS = 80  # before a training that was cut short is judged
_HELD_OUT, _HELD_OUT_BYTES = 1024, 2**28
_TIMED_STEPS, _SLOW_FACTOR, _SLOW_SECONDS = 8, 1.5, 0.005


def check_held_out(
    job: Job, constants: dict[str, Tensor], may_judge: bool, doubt: Finding | None,
    deadline: Deadline, report: Report,
) -> None:
    """Whether a short training beats the best constant on samples that it has not seen, and
    whether its data come as fast as it learns.

    Args:
        constants: by task, the best constant output.
        may_judge: else only the time is measured.
        doubt: what is the matter if the net fails here, too.
    """
    held_out = _held_out(job, report)
    total = _LOOKS[-1] if may_judge else _TIMED_STEPS + 2
    attempt = _attempt(job, held_out, constants, total, may_judge, 1.0, deadline)
    _judge_time(job, attempt.waits, attempt.works, report)
    if not may_judge:
        why = "mend the findings first" if report.findings else "one batch was not learnt in time"
        report.fact("held-out samples", f"not judged: {why}")
        return
    step, size = attempt.num_steps, sum(len(batch.samples) for batch in held_out)
    report.fact("held-out samples", f"after {step} steps ahead of the best constant output by "
                + ", ".join(f"{score:.1f} standard errors ({name})"
                            for name, score in attempt.latest.items()) + f", {size} samples")
    failed = attempt.failed()
    seen = step * job.options.batch.global_size / len(job.dataset.train)
    if not failed:
        return
    if size < _FEWEST_SAMPLES:
        report.cut(f"held-out samples: {size} are too few to judge by")
        return
    if step < _LOOKS[-1] and (seen < 1 or step < _FEWEST_STEPS):
        report.cut(f"held-out samples: {step} steps, {seen:.2f} epochs, not judged")
        return
    if doubt is not None:
        report.findings.append(doubt)
        return
    behind = (f"after {step} steps ({seen:.1f} epochs) the net is no better on {size} validation "
              "samples than the best constant output (by "
              + ", ".join(f"{attempt.latest[name]:.1f} standard errors for {name}"
                          for name in failed) + f"; {_ERRORS:g} are asked for)")
    rate = max(group["lr"] for group in job.optimizer.param_groups)
    if rate * job.weight_decay * step > _MUCH_DECAY and not deadline.is_over:
        other = _attempt(job, held_out, constants, total, True, 1.0, deadline, decays=False)
        if min(other.latest.values(), default=0.0) > _ERRORS:
            report.error(
                "weight decay too high", f"with a weight decay of {job.weight_decay:g}, {behind}; "
                f"without it, it is, by {min(other.latest.values()):.1f}",
                f"--optim.weight_decay {min(USUAL_DECAY, job.weight_decay / 100):g}")
            return
    for factor in _LOWER_RATES:
        if deadline.is_over:
            report.cut("held-out samples: no lower rate was tried")
            break
        other = _attempt(job, held_out, constants, total, True, factor, deadline)
        if min(other.latest.values(), default=0.0) <= _ERRORS:
            continue
        if job.options.optim.lr is None:
            report.fact("learning rate", f"auto; {rate * factor:g} is better on held-out samples")
        else:
            report.error(
                "learning rate too high", f"at a rate of {rate:g}, {behind}; at "
                f"{rate * factor:g} it is, by {min(other.latest.values()):.1f}",
                f"--optim.lr {rate * factor:g}, or have it found: --optim.lr auto")
        return
    report.error(
        "targets do not follow", f"{behind}, though it learns a training batch by heart",
        "look whether the labels are shuffled or the columns misaligned (a join, a sort of one "
        "of two files), whether --data.input names what the target depends on, and whether the "
        "validation split is of the same kind")


@dataclass
class Attempt:
    """What came of a short training."""

    waits: list[float] = field(default_factory=list)
    works: list[float] = field(default_factory=list)
    """Seconds that each step waited for data, and worked."""
    losses: list[float] = field(default_factory=list)
    looks: list[dict[str, float]] = field(default_factory=list)
    """By task: standard errors by which the net is ahead of the constant."""
    ranked: dict[str, float] = field(default_factory=dict)
    """By task with numbers: standard errors by which their ranks follow the outputs' at last."""
    constant: float = math.inf
    """The loss of the best constants."""

    @property
    def num_steps(self) -> int:
        return len(self.losses)

    @property
    def latest(self) -> dict[str, float]:
        return self.looks[-1] if self.looks else {}

    def failed(self) -> list[str]:
        """Tasks that are not learnt. What was ahead and is not any more is overfitted, if the
        training loss has fallen meanwhile; a rate that is too high spoils both. Of numbers with a
        heavy tail a few decide on the mean loss, and the ranks tell whether they follow."""
        end = median(self.losses[-_END_STEPS:])
        has_fallen = math.isfinite(end) and end < _FALLEN_SHARE * self.constant
        # A weak but real dependence in a small split may not reach 3 errors, but stays above 1.
        best = {name: max(self.ranked.get(name, 0.0), *(look[name] for look in self.looks))
                for name in self.latest}
        return [name for name, score in self.latest.items() if score <= _DOUBTFUL_ERRORS
                and not (has_fallen and best[name] > _ERRORS)]


def _attempt(
    job: Job, held_out: list[Batch], constants: dict[str, Tensor], total: int, is_judged: bool,
    factor: float, deadline: Deadline, decays: bool = True,
) -> Attempt:
    """A short training at a multiple of the job's rate, to its end or until it is ahead."""
    targets = {task.name: torch.cat([batch.targets[task.name].cpu() for batch in held_out])
               for task in job.tasks}
    attempt = Attempt(constant=sum(
        task.weight * baseline.loss_of_constant(task, constants[task.name].cpu(), targets)
        for task in job.tasks))
    with job.untouched(uses_dropout=True):
        for wait, work, loss in _train(job, total, factor, decays):
            attempt.waits.append(wait)
            attempt.works.append(work)
            attempt.losses.append(loss)
            step = attempt.num_steps
            if is_judged and (step in _LOOKS or deadline.is_over):
                scores, attempt.ranked = _compare(job, held_out, constants)
                attempt.looks.append(scores)
                if step >= _FIRST_JUDGED and min(attempt.latest.values()) > _ERRORS:
                    break
            if deadline.is_over:
                break
    return attempt


def _train(
    job: Job, total: int, factor: float, decays: bool
) -> Iterator[tuple[float, float, float]]:
    """Steps as in the script; yields the seconds that each waited for data and worked, and the
    loss."""
    steps = job.steps()
    planned = [next(steps) for _ in range(total)]
    lists = [samples for micro_batches in planned for samples in micro_batches]
    batches = iter(job.dataset.train.to(job.device).batches(lists, job.device))
    for step, micro_batches in enumerate(planned):
        waited, lost, began = 0.0, 0.0, time.perf_counter()
        for index, _ in enumerate(micro_batches):
            asked = time.perf_counter()
            inputs, targets = next(batches)
            waited += time.perf_counter() - asked
            job.seed(2 + step * len(micro_batches) + index)
            inputs, targets, mix = job.augment(inputs, targets)
            loss = job.loss(inputs, targets, micro_batches, mix)
            loss.backward()
            lost += float(loss.detach())
        job.update(factor * min(1.0, (step + 1) / _WARMUP_STEPS), decays)
        if job.device.type == "cuda":
            torch.cuda.synchronize(job.device)
        yield waited, time.perf_counter() - began - waited, lost


def _held_out(job: Job, report: Report) -> list[Batch]:
    """Validation samples, evenly spread, as many as there is time for."""
    split = job.dataset.validation
    inputs, _ = split.read(np.arange(1))
    most = max(job.options.batch.micro_size if job.options.batch.micro_size != "auto" else 1,
               min(_HELD_OUT, _HELD_OUT_BYTES // max(1, 4 * inputs.numel())))
    wanted = min(most, len(split))
    most = job.pace.held_out(wanted)
    if most < wanted:
        report.cut(f"held-out samples: {most} of {wanted}")
    chosen = np.unique(np.linspace(0, len(split) - 1, most).round().astype(int))
    size = max(1, min(job.options.batch.eval_size, len(chosen)))
    lists = [chosen[start : start + size] for start in range(0, len(chosen), size)]
    batches = split.batches(lists, job.device)
    return [Batch(samples, *batch) for samples, batch in zip(lists, batches, strict=True)]


@torch.no_grad()
def _compare(
    job: Job, held_out: list[Batch], constants: dict[str, Tensor]
) -> tuple[dict[str, float], dict[str, float]]:
    """By task: the mean by which the net's losses are below the constant's, in standard errors;
    of numbers, also how far their ranks follow those of the outputs, likewise."""
    pairs: dict[str, list[tuple[Tensor, Tensor]]] = {
        task.name: [] for task in job.tasks if task.kind == "regression"}
    differences: dict[str, list[Tensor]] = {task.name: [] for task in job.tasks}
    with keeping_modes(job.module):
        job.module.eval()
        for batch in held_out:
            output = job.module(batch.inputs, **job.arguments(batch.targets))
            for task in job.tasks:
                mean = partial(baseline.per_sample, task, target=batch.targets[task.name])
                own, has_items = mean(task.losses(output, batch.targets))
                constant, _ = mean(baseline.constant_losses(
                    task, constants[task.name].to(job.device), batch.targets))
                differences[task.name].append((constant - own)[has_items])
                if task.name in pairs:
                    pairs[task.name].append((task.pick(output), batch.targets[task.name]))
    scores = {}
    for name, parts in differences.items():
        values = torch.cat(parts)
        error = values.std() / math.sqrt(max(1, len(values)))
        scores[name] = float(values.mean() / error.clamp(min=1e-12)) if len(values) > 1 else 0.0
        scores[name] = scores[name] if math.isfinite(scores[name]) else -math.inf
    return scores, {name: rank_score(*map(torch.cat, zip(*parts, strict=True)))
                    for name, parts in pairs.items()}


def rank_score(output: Tensor, target: Tensor) -> float:
    """Spearman's correlation in its standard errors, the mean over the numbers of a target."""
    scores = []
    for own, wanted in zip(output.flatten(1).T, target.flatten(1).T, strict=True):
        is_there = wanted.isfinite() & own.isfinite()
        both = torch.stack([own[is_there].double(), wanted[is_there].double()])
        if both.shape[1] < 2 or not (both.min(1).values < both.max(1).values).all():
            scores.append(0.0)
            continue
        ranks = both.argsort(1).argsort(1).double()
        scores.append(float(torch.corrcoef(ranks)[0, 1]) * math.sqrt(both.shape[1] - 1))
    return sum(scores) / len(scores)


def _judge_time(job: Job, waits: list[float], works: list[float], report: Report) -> None:
    skipped = 2  # in which workers start and kernels are chosen
    if len(waits) < _TIMED_STEPS + skipped:
        report.cut(f"data time: {len(waits)} steps, not judged")
        return
    wait, work = median(waits[skipped:]), median(works[skipped:])
    report.fact("time of a step", f"{1000 * wait:.1f} ms for data, {1000 * work:.1f} ms for the "
                "net and the optimizer")
    if wait > _SLOW_FACTOR * work and wait > _SLOW_SECONDS:
        split = job.dataset.train
        more = max(1, round(2 * max(1, split.workers) * wait / max(work, 1e-6)))
        report.warning(
            "slow data", f"a step waits {1000 * wait:.1f} ms for its data and works "
            f"{1000 * work:.1f} ms",
            f"--data.in_memory true, where memory allows, or --data.workers {min(more, 64)} (now "
            f"{split.workers}); smaller images (--data.image_size)")
