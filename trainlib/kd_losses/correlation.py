"""Logits freed of their mean and scale: the correlations of DIST, and z-scores."""

import math

import torch
from torch import Tensor

from trainlib.kd_losses.terms import (
    IGNORED,
    check_class_numbers,
    check_factors,
    log_probabilities,
)


def dist(
    student: Tensor, teacher: Tensor, target: Tensor | None, temperature: float = 1.0,
    beta: float = 1.0, gamma: float = 1.0,
) -> Tensor:
    """DIST: beta (1 - correlation over classes) + gamma (1 - correlation over items, class mean).

    The second part is one number, added to each item, so that the mean over items is the source's
    loss. It is batch-relational: taken over the items of one micro-batch, the same samples on any
    number of processes, and 0 for fewer than two items. The source has no factor temperature^2,
    nor has this. What is constant correlates with nothing: its part is 1, without a gradient.

    Args:
        student, teacher: [items, classes] logits.
        target: [items] int64 class numbers; a missing item takes no part, and its value and
            gradient are 0. With None, none is missing.
        beta, gamma: >= 0.

    Returns:
        [items] fp32.

    Raises:
        ValueError: as ``kl``; also logits that are not [items, classes].

    Source: Huang et al. 2022, arXiv:2205.10536, section 4; 1e-8 as in the authors' code.
    """
    check_factors(beta=beta, gamma=gamma)
    log_student, log_teacher = log_probabilities(student, teacher, temperature)
    if student.ndim != 2:
        raise ValueError(f"dist takes logits [items, classes], got {tuple(student.shape)}; move "
                         "positions to the items, or use kl")
    if target is None:
        missing = torch.zeros_like(student[:, 0], dtype=torch.bool)
    else:
        check_class_numbers(student, target)
        missing = target == IGNORED
    probabilities = log_student.exp(), log_teacher.exp()
    inter = 1 - _correlation(*probabilities, 1, missing[:, None])
    intra = (1 - _correlation(*probabilities, 0, missing[:, None])).mean()
    intra = intra * ((~missing).sum() > 1)
    return (beta * inter + gamma * intra).masked_fill(missing, 0.0)


def standardize(logits: Tensor) -> Tensor:
    """z-scores over classes, [items, classes, ...] -> same shape, fp32, for use before a term.

    Constant logits give 0, without a gradient.

    Source: Sun et al. 2024, arXiv:2403.01427, section 3.3; 1e-7 as in the authors' code.
    """
    centred = _centred(logits.float(), 1)
    return centred / (norm(centred, 1) / math.sqrt(logits.shape[1]) + 1e-7)


def norm(values: Tensor, dim: int) -> Tensor:
    """The L2 norm along a dimension, which is kept; its gradient at 0 is 0."""
    return torch.linalg.vector_norm(values, dim=dim, keepdim=True)


def _correlation(student: Tensor, teacher: Tensor, dim: int, missing: Tensor) -> Tensor:
    """Pearson's correlation along a dimension, over what is not missing; 0 where constant."""
    student, teacher = _centred(student, dim, missing), _centred(teacher, dim, missing)
    sizes = norm(student, dim) * norm(teacher, dim)
    return (student * teacher).sum(dim) / (sizes.squeeze(dim) + 1e-8)


def _centred(values: Tensor, dim: int, missing: Tensor | None = None) -> Tensor:
    """Values less their mean along a dimension, 0 where missing or constant."""
    if missing is None:
        centred = values - values.mean(dim, keepdim=True)
    else:
        values = values.masked_fill(missing, 0.0)
        count = (~missing).expand_as(values).sum(dim, keepdim=True).clamp(min=1)
        centred = values - values.sum(dim, keepdim=True) / count
        centred = centred.masked_fill(missing, 0.0)
    # What is left of a constant is the mean's rounding, and divided by its own size it would be
    # noise with a gradient of 1e8: a head that starts at 0 has such logits.
    is_constant = norm(centred, dim) <= 1e-6 * norm(values, dim)
    return centred.masked_fill(is_constant, 0.0)
