"""Several teachers in one, and teachers cut down to what a cache keeps."""

import math

import torch
from torch import Tensor
from torch.nn import functional

from trainlib.kd_losses.terms import check_same_shape, check_temperature, divergence


def average_logits(
    teachers: list[Tensor],
    weights: list[float],
    temperature: float = 1.0,
    of: str = "probabilities",
    binary: bool = False,
) -> Tensor:
    """Logits of the weighted mean of several teachers, for use as those of one.

    Args:
        teachers: [items, classes, ...] logits each; one alone comes back as it is.
        weights: one >= 0 a teacher, of any sum > 0; a teacher of weight 0 takes no part.
        temperature: > 0, at which the probabilities are those of the mean.
        of: "probabilities": softmax(result / temperature) is the mean of the teachers'; or
            "logits": the mean of the logits, a normalised geometric mean of the probabilities.
        binary: each entry is a label of its own, with sigmoid in place of softmax.

    Returns:
        [items, classes, ...] fp32; a single teacher's own tensor.

    Raises:
        ValueError: no teacher, shapes that differ, or an argument outside its range.

    Source: Hinton et al. 2015, arXiv:1503.02531, section 1: either mean of an ensemble.
    """
    check_temperature(temperature)
    if of not in ("probabilities", "logits"):
        raise ValueError(f'of is "probabilities" or "logits", got {of!r}')
    is_weight = all(0 <= weight < math.inf for weight in weights)
    if len(weights) != len(teachers) or not is_weight or not sum(weights) > 0:
        raise ValueError("weights are finite and >= 0, one a teacher, not all 0; got "
                         f"{weights} for {len(teachers)} teachers")
    for teacher in teachers[1:]:
        check_same_shape(teachers[0], teacher, num_dims=2)
    shares = [weight / sum(weights) for weight in weights if weight > 0]
    teachers = [teacher for teacher, weight in zip(teachers, weights, strict=True) if weight > 0]
    if len(teachers) == 1:
        return teachers[0]
    if of == "logits":
        return sum(share * teacher.float() for share, teacher in zip(shares, teachers, strict=True))

    def log_mean(log_p: list[Tensor]) -> Tensor:
        terms = [part + math.log(share) for part, share in zip(log_p, shares, strict=True)]
        return torch.stack(terms).logsumexp(0)

    scaled = [teacher.float() / temperature for teacher in teachers]
    if binary:
        log_yes = log_mean([functional.logsigmoid(logits) for logits in scaled])
        return temperature * (log_yes - log_mean([functional.logsigmoid(-z) for z in scaled]))
    return temperature * log_mean([logits.log_softmax(1) for logits in scaled])


def top_k(teacher: Tensor, k: int, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """The k most probable classes of each item, and the probability of all the others together.

    Args:
        teacher: [items, classes, ...] logits.
        k: 1 up to the number of classes.
        temperature: > 0; the probabilities are at this temperature, and only good for it.

    Returns:
        log-probabilities [items, k, ...] fp32, largest first; their classes [items, k, ...] int64;
        the others' log-probability [items, ...] fp32, -inf where there are no others.

    Raises:
        ValueError: an argument outside its range.
    """
    check_temperature(temperature)
    if teacher.ndim < 2 or not 1 <= k <= teacher.shape[1]:
        raise ValueError("k lies between 1 and the number of classes of logits [items, classes, "
                         f"...], got {k} for logits {tuple(teacher.shape)}")
    log_p = (teacher.float() / temperature).log_softmax(1)
    log_probs, indices = log_p.topk(k, dim=1)
    return log_probs, indices, _log_rest(log_p, indices).squeeze(1)


def top_k_kl(
    student: Tensor, log_probs: Tensor, indices: Tensor, tail_log_prob: Tensor,
    temperature: float = 1.0,
) -> Tensor:
    """KL(teacher || student) of each item over k + 1 events, in nats, times temperature^2.

    The events are the k classes that ``top_k`` kept and all the others together. Merging events
    never adds to a divergence, so this is at most ``kl``, and ``kl`` itself when k = classes.

    Args:
        student: [items, classes, ...] logits.
        log_probs, indices, tail_log_prob: from ``top_k``, in any precision.
        temperature: the one given to ``top_k``.

    Returns:
        [items, ...] fp32.

    Raises:
        ValueError: shapes that do not fit, or an argument outside its range.
    """
    check_temperature(temperature)
    if (student.ndim < 2 or log_probs.shape != indices.shape
            or not 1 <= log_probs.shape[1] <= student.shape[1]
            or tail_log_prob.shape != student.shape[:1] + student.shape[2:]
            or tail_log_prob.shape != indices.shape[:1] + indices.shape[2:]):
        shapes = [tuple(x.shape) for x in (student, log_probs, indices, tail_log_prob)]
        raise ValueError("logits [items, classes, ...] take log_probs and indices [items, k, ...] "
                         f"and tail_log_prob [items, ...], got {shapes}; pass on what top_k gave")
    log_student = (student.float() / temperature).log_softmax(1)
    kept, log_teacher = log_student.gather(1, indices), log_probs.float()
    if indices.shape[1] < student.shape[1]:  # else there are no others
        kept = torch.cat([kept, _log_rest(log_student, indices)], 1)
        log_teacher = torch.cat([log_teacher, tail_log_prob.float()[:, None]], 1)
    return temperature**2 * divergence(log_teacher, kept)


def _log_rest(log_p: Tensor, indices: Tensor) -> Tensor:
    """[items, 1, ...]: the log-probability of all classes but these, never as 1 - their sum."""
    return log_p.scatter(1, indices, -math.inf).logsumexp(1, keepdim=True)
