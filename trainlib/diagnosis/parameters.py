"""What can be told of the parameters alone: a table, and values and freezing that look wrong."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import nn

from trainlib.diagnosis.findings import Report, number, some
from trainlib.diagnosis.job import Job

_MOST_ROWS = 40


class Row(NamedTuple):
    """One line of the table."""

    name: str
    shape: str
    mean: str
    std: str
    trainable: str


@torch.no_grad()
def parameter_rows(module: nn.Module) -> list[Row]:
    """A line for each parameter; of many, one for all that differ in numbers in their names only,
    and of many such lines the first and the last."""
    named = list(module.named_parameters())
    groups: dict[tuple, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in named:
        pattern = re.sub(r"\d+", "*", name) if len(named) > _MOST_ROWS else name
        key = (pattern, tuple(parameter.shape), parameter.requires_grad)
        groups.setdefault(key, []).append((name, parameter))
    rows = []
    for (pattern, shape, is_trained), members in groups.items():
        name = members[0][0] if len(members) == 1 else f"{pattern} ({len(members)} of them)"
        numbers = torch.stack([_moments(p) for _, p in members])
        mean = numbers[:, 0].mean()
        std = (numbers[:, 1] + (numbers[:, 0] - mean).square()).mean().sqrt()
        rows.append(Row(name, "x".join(map(str, shape)) or "1", number(float(mean)),
                        number(float(std)), "yes" if is_trained else "no"))
    if len(rows) > _MOST_ROWS:
        half, left_out = _MOST_ROWS // 2, len(rows) - 2 * (_MOST_ROWS // 2)
        rows = [*rows[:half], Row(f"... {left_out} more lines", "", "", "", ""), *rows[-half:]]
    return rows


def _moments(parameter: nn.Parameter) -> torch.Tensor:
    values = parameter.detach().float()
    return torch.stack([values.mean(), values.var(correction=0)]).cpu().double()


@torch.no_grad()
def check_parameters(job: Job, report: Report) -> None:
    """Values that are not finite or all the same, and freezing that nobody asked for."""
    named = dict(job.module.named_parameters())
    broken = [name for name, p in named.items() if not p.isfinite().all()]
    if broken:
        report.error(
            "non-finite parameters", f"NaN or infinite values in {some(broken)}",
            "mend the net's own initialisation, or the file of model.init_from")
    # Zeros may be meant (the last layer of a branch, a position): whether they learn is told by
    # their gradients. Equal rows of other values stay equal.
    flat = [name for name, p in named.items()
            if p.requires_grad and p.ndim >= 2 and min(p.shape[:2]) > 1
            and name not in broken and p.min() == p.max() != 0]
    if flat:
        report.error(
            "constant parameters",
            f"{some(flat)}: all values are the same, such as "
            f"{number(float(named[flat[0]].flatten()[0]))}, so all units of the layer stay equal",
            "initialise them at random (torch.nn.init) in the net's own code")
    _check_frozen(job, report)


def _check_frozen(job: Job, report: Report) -> None:
    patterns = job.options.model.freeze
    frozen = [name for name, p in job.module.named_parameters() if not p.requires_grad]
    asked = [name for name in frozen if any(fnmatchcase(name, one) for one in patterns)]
    other = [name for name in frozen if name not in asked]
    if other:
        report.warning(
            "frozen by mistake",
            f"{len(other)} parameters are not trained though model.freeze names none of them: "
            f"{some(other)}",
            "remove requires_grad = False from the net's code, or, if it is meant, name them: "
            f"--model.freeze '[{_layer_of(other[0])}*]'")
    if asked and not job.is_pretrained():
        report.error(
            "frozen by mistake",
            f"{some(asked)}: frozen by model.freeze at random values, as no weights are loaded",
            "give --model.init_from a file or a run, or leave model.freeze out")


def _layer_of(name: str) -> str:
    """What a parameter's name begins with: its layer's and a dot, or all of it."""
    return name.rpartition(".")[0] + "." if "." in name else name
