"""What the samples say without a model: balance, and which of them are the same."""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from trainlib import plan
from trainlib.diagnosis.findings import Deadline, Report, some
from trainlib.diagnosis.job import Job
from trainlib.diagnosis.pace import GROWTH
from trainlib.losses import IGNORED

if TYPE_CHECKING:
    from trainlib.data import Split
    from trainlib.tasks import Task

_CHUNK_BYTES = 2**24
_KEPT_TARGETS, _KEPT_BYTES = 4096, 2**26
_MOST_ENTRIES = 2 * 10**7  # of targets that are counted, besides those that were read
_SHARED_SHARE = 0.01  # of the samples: what is above it is no accident
_FEWEST_SHARED, _SHARED_ERRORS = 3, 3.0  # validation samples; standard errors above repetition
_FEW_INPUTS = 0.5  # of the training samples: where more repeat others, columns have few values
_RATIO, _MAJORITY = 50, 0.95  # of the most frequent class to the rarest; of the most frequent
_HANDLED = ("class_weights", "pos_weight", "alpha")


@dataclass
class Sample:
    """Samples of a split as they are read, in a keyed order."""

    rows: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    """Of the exact inputs."""
    answers: list[bytes] = field(default_factory=list)
    """Of the targets."""
    targets: dict[str, Tensor] = field(default_factory=dict)
    """As tasks are given them, of the first."""
    is_whole: bool = False
    seconds: float = 0.0
    """For each sample."""


def read_sample(split: Split, deadline: Deadline) -> Sample:
    """As many samples as there is time for, at least one."""
    total, began = len(split), time.perf_counter()
    order = plan.samples_of(np.arange(total), total, seed=0)
    inputs, targets = split.read(order[:1])
    size = sum(t.nbytes for t in (inputs, *targets.values()))
    largest = max(1, min(1024, _CHUNK_BYTES // max(1, size)))
    most = max(largest, min(_KEPT_TARGETS, _KEPT_BYTES // max(1, size)))
    sample, kept, start, chunk = Sample(), [], 0, 1
    while start < total and (not start or not deadline.is_over):
        chosen, asked = order[start : start + chunk], time.perf_counter()
        inputs, targets = split.read(chosen)
        sample.seconds = (time.perf_counter() - asked) / len(chosen)
        sample.rows += split.rows[torch.from_numpy(chosen)].tolist()
        sample.digests += _digests([inputs])
        sample.answers += _digests([targets[name] for name in sorted(targets)])
        if start < most:
            kept.append(split.task_targets(targets))
        start += len(chosen)
        affordable = int(max(0.0, deadline.left) / max(sample.seconds, 1e-9))
        chunk = max(1, min(largest, GROWTH * chunk, affordable))
    sample.seconds = min(sample.seconds, (time.perf_counter() - began) / start)
    sample.targets = {name: torch.cat([one[name] for one in kept]) for name in kept[0]}
    # What is in memory costs nothing, and a few targets say little of how large they are.
    first = torch.from_numpy(order[:most])
    sample.targets |= split.task_targets({name: stored[first.to(stored.device)]
                                          for name, stored in split.targets.items()})
    sample.is_whole = len(sample.rows) == total
    return sample


def _digests(tensors: list[Tensor]) -> list[bytes]:
    parts = [t.cpu().contiguous().flatten(1).numpy() if t.ndim > 1 else t.cpu()[:, None].numpy()
             for t in tensors]
    return [hashlib.blake2b(b"".join(part[i].tobytes() for part in parts), digest_size=16).digest()
            for i in range(len(parts[0]))]


def check_samples(job: Job, train: Sample, validation: Sample, report: Report) -> None:
    """Samples in both splits, samples with several answers, labels that are rare or missing."""
    groups: dict[bytes, list[int]] = {}
    for index, digest in enumerate(train.digests):
        groups.setdefault(digest, []).append(index)
    repeated = sum(len(group) for group in groups.values() if len(group) > 1)
    _check_shared(job, train, validation, groups, repeated, report)
    if not any(task.kind == "language_modeling" for task in job.tasks):
        _check_answers(train, groups, repeated, report)
    for task in job.tasks:
        counted = _all_targets(task, job.dataset.train, train)
        _check_balance(task, train.targets[task.name] if counted is None else counted, report)
        other = _all_targets(task, job.dataset.validation, validation)
        if counted is not None and other is not None:
            _check_validation_classes(task, counted, other, report)


def _check_shared(
    job: Job, train: Sample, validation: Sample, groups: dict[bytes, list[int]], repeated: int,
    report: Report,
) -> None:
    shared = [(row, train.rows[groups[digest][0]])
              for row, digest in zip(validation.rows, validation.digests, strict=True)
              if digest in groups]
    of_train, of_validation = len(train.rows), len(validation.rows)
    looked_at = f"{of_train:,} training and {of_validation:,} validation samples"
    report.fact("the same in both splits", f"{len(shared)} validation samples; {looked_at} were "
                f"looked at, {repeated / of_train:.1%} of the training samples repeat another")
    if not (train.is_whole and validation.is_whole):
        report.cut(f"samples in both splits, labels: {looked_at} were read")
    # A validation sample that has nothing to do with the training split finds its inputs there as
    # often as a training sample finds its own among the others. Those that are the same come
    # together, in pairs at the least, which doubles the variances.
    natural = (repeated + 1) / (of_train + 2)
    error = math.sqrt(2 * natural * (1 - natural) * (1 / of_train + 1 / of_validation))
    # Of a part of the training split a part of what is shared is seen.
    accidental = _SHARED_SHARE * of_train / len(job.dataset.train)
    usual = natural + _SHARED_ERRORS * error + accidental
    if len(shared) >= _FEWEST_SHARED and len(shared) > usual * of_validation:
        pairs = some([f"{mine} (training row {other})" for mine, other in sorted(shared)], 5)
        report.error(
            "samples in both splits", f"{len(shared)} of {of_validation:,} validation "
            f"samples have exactly the inputs of a training sample: rows {pairs}",
            "remove them from one of the splits, or hold another share out with "
            "--data.validation_split; the results on this one say too much")


def _check_answers(
    train: Sample, groups: dict[bytes, list[int]], repeated: int, report: Report
) -> None:
    doubtful = [group for group in groups.values()
                if len({train.answers[index] for index in group}) > 1]
    number = sum(map(len, doubtful))
    report.fact("same inputs, other targets", f"{number} of {len(train.rows):,} training samples")
    # Where inputs have few values, most of them come again, and answers are matters of chance.
    if _SHARED_SHARE * len(train.rows) < number and repeated <= _FEW_INPUTS * len(train.rows):
        rows = some(["/".join(str(train.rows[i]) for i in group[:3]) for group in doubtful], 5)
        report.warning(
            "same inputs, other targets", f"{number} of {len(train.rows):,} training samples have "
            f"exactly the inputs of another one and another target: rows {rows}",
            "mend their labels, or name more columns with --data.input that tell them apart")


def _all_targets(task: Task, split: Split, sample: Sample) -> Tensor | None:
    """Those of the whole split, where they are in memory or have been read."""
    stored = split.targets.get(task.name)
    if stored is not None and stored.numel() <= _MOST_ENTRIES:
        return split.task_targets({task.name: stored})[task.name]
    read = sample.targets[task.name]
    return read if len(read) == len(split) else None


def _check_validation_classes(task: Task, train: Tensor, other: Tensor, report: Report) -> None:
    """Classes, or labels that are on, of the training split that validation does not have."""
    if task.kind in ("regression", "language_modeling"):
        return
    counts = [_class_counts(task, target).tolist() for target in (train, other)]
    missing = [name for name, own, held_out in zip(task.label_names, *counts, strict=True)
               if own and not held_out]
    if missing:
        what = "has the label" if task.kind == "multilabel" else "is of the class"
        report.warning(
            "class without validation samples",
            f"{task.name}: no validation sample {what} {some(missing)}, of which there are "
            "training samples, so that its evaluation leaves them out",
            "hold a larger share out with --data.validation_split, or put samples of them into "
            "the validation split")


def _class_counts(task: Task, target: Tensor) -> Tensor:
    """By label: samples, or pixels, that have it."""
    if task.kind == "multilabel":
        return target.float().nansum(0)
    return torch.bincount(target[target != IGNORED].flatten(), minlength=len(task.label_names))


def _check_balance(task: Task, target: Tensor, report: Report) -> None:
    if task.kind in ("regression", "language_modeling"):
        return
    is_handled = task.loss_name in ("focal", "dice") or any(
        task.loss.keywords.get(name) is not None for name in _HANDLED)
    names = task.label_names
    if task.kind == "multilabel":
        shares = target.float().nanmean(0)
        rare = [(name, share) for name, share in zip(names, shares.tolist(), strict=True)
                if not 1 / _RATIO <= share <= 1 - 1 / _RATIO]
        report.fact(f"labels of {task.name}", "on in " + some(
            [f"{share:.1%} ({name})" for name, share in zip(names, shares.tolist(), strict=True)]))
        if rare and not is_handled:
            report.warning(
                "labels unbalanced", f"{task.name}: "
                + some([f"{name} is on in {share:.2%} of the samples" for name, share in rare]),
                f"--tasks.{task.name}.loss_args.pos_weight with about off/on for each label; "
                "watch eval/macro_f1")
        return
    counts = _class_counts(task, target)
    most, least = int(counts.argmax()), int(counts.argmin())
    share = float(counts[most] / counts.sum())
    what = "pixels" if task.kind == "segmentation" else "training samples"
    report.fact(f"classes of {task.name}",
                f"{len(names)}; most frequent {names[most]} ({share:.1%}), rarest {names[least]} "
                f"({float(counts[least] / counts.sum()):.2%})")
    missing = [name for name, count in zip(names, counts.tolist(), strict=True) if not count]
    if missing:
        report.warning("class without samples", f"{task.name}: no {what} of {some(missing)}",
                       "give training samples of them, or take them out of the data")
    ratio = float(counts[most] / counts[counts > 0].min())
    if (ratio > _RATIO or share > _MAJORITY) and not is_handled:
        weights = (counts.sum() / (len(names) * counts.clamp(min=1))).clamp(max=100).tolist()
        given = ", ".join(f"{weight:.3g}" for weight in weights[:12])
        given += ", ..." if len(weights) > 12 else ""
        report.warning(
            "labels unbalanced", f"{task.name}: {share:.1%} of the {what} are {names[most]!r}, "
            f"{ratio:,.0f} times as many as of the rarest class; always saying so is right in "
            f"{share:.1%}",
            f"--tasks.{task.name}.loss_args.class_weights '[{given}]', and judge by macro_f1 "
            f"(--loop.monitor), not by accuracy")
