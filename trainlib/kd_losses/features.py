"""Terms over features: student and teacher [samples, ...] -> [samples] fp32.

All raise ValueError where the shapes do not fit; to compare features of different sizes, project
the student's to the teacher's first.
"""

import torch
from torch import Tensor


def feature_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared difference of features of one shape, mean over each sample's features.

    Source: Romero et al. 2015 (FitNets), arXiv:1412.6550, equation 3, where it is half the sum.
    """
    student, teacher = _rows(student), _rows(teacher)
    _check_same(student, teacher)
    return (student - teacher).square().mean(1)


def feature_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - the cosine of the angle between each sample's features; 1 where either is all 0."""
    student, teacher = _rows(student), _rows(teacher)
    _check_same(student, teacher)
    return 1 - (_unit(student) * _unit(teacher)).sum(1)


def attention_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance between the attention maps of [samples, channels, ...positions].

    A map is the sum over channels of squares, as a vector over positions of length 1; the channels
    may differ in number.

    Source: Zagoruyko and Komodakis 2017, arXiv:1612.03928, equation 2, with the distance squared,
        as in the authors' code, and without beta / 2.
    """
    maps = [features.float().square().sum(1) for features in (student, teacher)
            if features.ndim > 2]
    if len(maps) < 2 or maps[0].shape != maps[1].shape:
        raise ValueError(
            "attention takes features [samples, channels, ...positions] of the same positions, got "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}; choose layers of one resolution"
        )
    student_map, teacher_map = (_unit(positions.flatten(1)) for positions in maps)
    return (student_map - teacher_map).square().sum(1)


def similarity_preserving(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of each sample's similarities to the samples of this micro-batch.

    Similarities are the rows of A A^T, of length 1, for A [samples, features]; the mean over
    samples is the source's loss. It is batch-relational: taken over one micro-batch, the same
    samples on any number of processes. Features may differ in number, samples not.

    Source: Tung and Mori 2019, arXiv:1907.09682, equations 1 to 4.
    """
    student, teacher = (_unit(rows @ rows.T) for rows in (_rows(student), _rows(teacher)))
    _check_same(student, teacher)
    return (student - teacher).square().mean(1)


def _rows(features: Tensor) -> Tensor:
    return features.float()[..., None].flatten(1)


def _unit(rows: Tensor) -> Tensor:
    """Rows of length 1; a row of 0 stays, without a gradient, since it has no direction."""
    length = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / length.masked_fill(length == 0, torch.inf)


def _check_same(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            "student and teacher have as many features, and similarity as many samples; got "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}; project the student's features"
        )
