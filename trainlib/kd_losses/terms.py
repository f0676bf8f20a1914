"""Terms over the outputs of one item: classes, labels, numbers."""

import math

import torch
from torch import Tensor
from torch.nn import functional

IGNORED = -100
"""The class number of a missing target, as in torch and transformers."""


def kl(student: Tensor, teacher: Tensor, target: Tensor | None, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) of each item, in nats, times temperature^2.

    Args:
        student, teacher: [items, classes, ...] logits, classes in one order; -inf rules one out.
        target: not used.
        temperature: > 0; 1 leaves the distributions as they are.

    Returns:
        [items, ...] fp32.

    Raises:
        ValueError: shapes that differ, or an argument outside its range.

    Source: Hinton et al. 2015, arXiv:1503.02531, section 2.
    """
    log_student, log_teacher = log_probabilities(student, teacher, temperature)
    return temperature**2 * divergence(log_teacher, log_student)


def reverse_kl(
    student: Tensor, teacher: Tensor, target: Tensor | None, temperature: float = 1.0
) -> Tensor:
    """KL(student || teacher) of each item; arguments, result and errors are those of ``kl``.

    Source: Gu et al. 2023 (MiniLLM), arXiv:2306.08543, section 2.1, for one position.
    """
    log_student, log_teacher = log_probabilities(student, teacher, temperature)
    return temperature**2 * divergence(log_student, log_teacher)


def jsd(
    student: Tensor, teacher: Tensor, target: Tensor | None, temperature: float = 1.0,
    beta: float = 0.5,
) -> Tensor:
    """Generalised Jensen-Shannon divergence of each item over beta (1 - beta), like ``kl``.

    That is [beta KL(teacher || m) + (1 - beta) KL(student || m)] / (beta (1 - beta)), with the
    mixture m = beta teacher + (1 - beta) student. Undivided, as in the source, it tends to 0 at
    both ends, and beta is a factor of the learning rate; divided, it tends to ``kl`` at 0 and to
    ``reverse_kl`` at 1, which are returned there, and is 4 times the usual divergence at 0.5.

    Args:
        beta: in [0, 1]: the teacher's share of the mixture.

    Source: Agarwal et al. 2023 (GKD), arXiv:2306.13649, section 2, for the undivided form.
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta lies in [0, 1], got {beta}")
    if beta in (0, 1):
        return (reverse_kl if beta else kl)(student, teacher, target, temperature)
    log_student, log_teacher = log_probabilities(student, teacher, temperature)
    p_student, p_teacher = log_student.exp(), log_teacher.exp()
    is_out = (p_student == 0) & (p_teacher == 0)
    gap = (log_teacher - log_student).masked_fill(is_out, 0.0)
    # log(m / teacher) and log(m / student), each straight from the gap: nothing that is divided
    # by a small beta or 1 - beta is a difference of larger numbers.
    teacher_part = p_teacher * _log_mixture(-gap, 1 - beta, beta) / (1 - beta)
    student_part = p_student * _log_mixture(gap, beta, 1 - beta) / beta
    return -(temperature**2) * (teacher_part + student_part).sum(1)


def dkd(
    student: Tensor, teacher: Tensor, target: Tensor, temperature: float = 1.0,
    alpha: float = 1.0, beta: float = 8.0,
) -> Tensor:
    """Decoupled distillation of each item: alpha TCKD + beta NCKD, like ``kl``.

    TCKD is the KL of (target, rest), NCKD that of the other classes among themselves, 0 for two
    classes; ``kl`` is TCKD + (1 - teacher's probability of the target) NCKD.

    Args:
        target: [items, ...] int64 class numbers; where one is missing, value and gradient are 0.
        alpha, beta: >= 0.

    Raises:
        ValueError: as ``kl``; also a single class, or a target that does not fit.

    Source: Zhao et al. 2022, arXiv:2203.08679, equation 7.
    """
    check_factors(alpha=alpha, beta=beta)
    log_student, log_teacher = log_probabilities(student, teacher, temperature)
    check_class_numbers(student, target)
    if student.shape[1] < 2:
        raise ValueError("dkd divides the classes into target and rest, got 1 class; use kl, or "
                         "bernoulli_kl for a single logit")
    missing = target == IGNORED
    label = target.masked_fill(missing, 0)[:, None]
    # Scattered, not compared: an index outside the classes is an error on every device.
    is_target = torch.zeros_like(log_student, dtype=torch.bool).scatter_(1, label, True)

    def decouple(log_p: Tensor) -> tuple[Tensor, Tensor]:
        log_others = log_p.masked_fill(is_target, -math.inf)
        log_rest = log_others.logsumexp(1, keepdim=True)  # log(1 - p), with its digits near p = 1
        return torch.cat([log_p.gather(1, label), log_rest], 1), log_others.log_softmax(1)

    (two_student, others_student), (two_teacher, others_teacher) = (
        decouple(log_student), decouple(log_teacher)
    )
    tckd = divergence(two_teacher, two_student)
    nckd = divergence(others_teacher, others_student)
    return (temperature**2 * (alpha * tckd + beta * nckd)).masked_fill(missing, 0.0)


def logit_mse(
    student: Tensor, teacher: Tensor, target: Tensor | None, temperature: float = 1.0
) -> Tensor:
    """Squared difference of logits, mean over classes, like ``kl`` but without a temperature.

    Source: Ba and Caruana 2014, arXiv:1312.6184, section 2.2.
    """
    check_same_shape(student, teacher, num_dims=2)
    return (student.float() - teacher.float()).square().mean(1)


def bernoulli_kl(
    student: Tensor, teacher: Tensor, target: Tensor | None, temperature: float = 1.0
) -> Tensor:
    """KL(teacher || student) of each label, yes or no, in nats, times temperature^2.

    Args:
        student, teacher: [items, labels, ...] logits.

    Returns:
        [items, labels, ...] fp32.

    Source: the multi-label logits distillation of Yang et al. 2023, arXiv:2308.06453.
    """
    check_same_shape(student, teacher)
    check_temperature(temperature)
    student, teacher = (
        torch.stack([functional.logsigmoid(logits), functional.logsigmoid(-logits)], 1)
        for logits in (student.float() / temperature, teacher.float() / temperature)
    )
    return temperature**2 * divergence(teacher, student)


def mse(
    student: Tensor, teacher: Tensor, target: Tensor | None, temperature: float = 1.0
) -> Tensor:
    """Squared difference of each value, any one shape -> same shape; without a temperature."""
    check_same_shape(student, teacher)
    return (student.float() - teacher.float()).square()


def bounded_mse(
    student: Tensor, teacher: Tensor, target: Tensor, temperature: float = 1.0, margin: float = 0.0
) -> Tensor:
    """Squared error e^2 of each value where e^2 + margin > the teacher's, else 0.

    Args:
        student, teacher: any one shape; the source compares whole vectors, this each value.
        target: same shape, NaN where missing; value and gradient are 0 there.
        temperature: not used.
        margin: >= 0, in squared units of the target: how far to surpass the teacher.

    Source: Chen et al. 2017, Learning Efficient Object Detection Models with Knowledge
        Distillation, NeurIPS, section 3.3.
    """
    check_factors(margin=margin)
    check_same_shape(student, teacher)
    check_same_shape(student, target)
    missing = target.isnan()
    error, teachers = ((output.float() - target.float()).masked_fill(missing, 0.0).square()
                       for output in (student, teacher))
    return error.masked_fill(error + margin <= teachers, 0.0)


def log_probabilities(
    student: Tensor, teacher: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Both models' log-probabilities [items, classes, ...] at a temperature, fp32."""
    check_temperature(temperature)
    check_same_shape(student, teacher, num_dims=2)
    student, teacher = student.float() / temperature, teacher.float() / temperature
    return student.log_softmax(1), teacher.log_softmax(1)


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) from log-probabilities, summed over dimension 1; 0 log 0 is 0."""
    p = log_p.exp()
    # Masked before the product, or -inf on both sides would be NaN, in the gradient too.
    return (p * (log_p - log_q).masked_fill(p == 0, 0.0)).sum(1)


def _log_mixture(gap: Tensor, weight: float, rest: float) -> Tensor:
    """log(rest + weight e^gap), where rest = 1 - weight, to a share of weight's own size."""
    # The probability in front of it is below e^-gap: beyond 80 it has only to stay finite.
    gap = gap.clamp(max=80)
    if weight <= 0.9:  # exactly 0 without a gap, and all digits near it
        return torch.log1p(weight * torch.expm1(gap))
    # log1p would lose a small rest where gap << 0.
    return torch.logaddexp(gap + math.log(weight), gap.new_full((), math.log(rest)))


def check_temperature(temperature: float) -> None:
    """Refuse what is not a temperature, with a ValueError."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is a number > 0, got {temperature}; 1 leaves the "
                         "distributions as they are")


def check_factors(**factors: float) -> None:
    """Refuse factors that are negative or not finite, with a ValueError."""
    for name, factor in factors.items():
        if not 0 <= factor < math.inf:
            raise ValueError(f"{name} is a number >= 0, got {factor}")


def check_same_shape(student: Tensor, other: Tensor, num_dims: int = 0) -> None:
    """Refuse two shapes, or fewer than ``num_dims`` dimensions, with a ValueError."""
    if student.shape != other.shape or student.ndim < num_dims:
        raise ValueError(
            "student, teacher and a target of numbers have one shape, logits [items, classes, ...]"
            f"; got {tuple(student.shape)} and {tuple(other.shape)}; the models share one list of "
            "classes in one order, nothing is broadcast here"
        )


def check_class_numbers(student: Tensor, target: Tensor | None) -> None:
    """Refuse a target that is not one int64 class number an item, with a ValueError."""
    wanted = student.shape[:1] + student.shape[2:]
    if target is None or target.shape != wanted or target.dtype != torch.int64:
        given = "None" if target is None else f"{tuple(target.shape)} of {target.dtype}"
        raise ValueError(
            "logits [items, classes, ...] take class numbers [items, ...] in int64, got logits "
            f"{tuple(student.shape)} and a target {given}; move the classes to dimension 1, and "
            "make class numbers long()"
        )
