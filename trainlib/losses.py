"""Unreduced losses, each with its source: pure functions of outputs and targets.

A loss returns one value an item, in fp32 whatever the model's precision. Nothing here averages:
the script divides one sum by the global count, once.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional


def cross_entropy(
    output: Tensor,
    target: Tensor,
    label_smoothing: float = 0.0,
    class_weights: list[float] | None = None,
) -> Tensor:
    """Cross entropy of each item, in nats.

    Args:
        output: [items, classes] logits.
        target: [items] class numbers.
        label_smoothing: in [0, 1): the share of the target spread evenly over all classes
            (Szegedy et al. 2016, arXiv:1512.00567, section 7).
        class_weights: [classes] factors. The sum is divided by the number of items, not by the
            sum of their weights, so that the divisor is known before the first backward.

    Returns:
        [items] fp32.

    Raises:
        ValueError: an argument outside its range, or not one weight a class.
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing lies in [0, 1), got {label_smoothing}")
    weights = None
    if class_weights is not None:
        _check_factors("class_weights", class_weights, output.shape[1])
        weights = torch.tensor(class_weights, dtype=torch.float32, device=output.device)
    return functional.cross_entropy(
        output.float(), target, weight=weights, label_smoothing=label_smoothing, reduction="none"
    )


def focal(
    output: Tensor, target: Tensor, gamma: float = 2.0, alpha: list[float] | None = None
) -> Tensor:
    """Focal loss of each item: cross entropy times (1 - p)^gamma, in nats.

    Args:
        output: [items, classes] logits.
        target: [items] class numbers.
        gamma: >= 0; 0 is the cross entropy.
        alpha: [classes] factors of the target class.

    Returns:
        [items] fp32.

    Raises:
        ValueError: gamma below 0, or not one factor a class.

    Source: Lin et al. 2017, arXiv:1708.02002, equations 4 and 5, for many classes.
    """
    if not 0 <= gamma < math.inf:
        raise ValueError(f"gamma is a number >= 0, got {gamma}")
    if alpha is not None:
        _check_factors("alpha", alpha, output.shape[1])
    log_probabilities = functional.log_softmax(output.float(), dim=1)
    log_p = log_probabilities.gather(1, target[:, None]).squeeze(1)
    # 1 - p through expm1 keeps its digits where p is near 1. Held off 0, because the gradient
    # of x^gamma is infinite there for gamma < 1.
    one_minus_p = (-torch.expm1(log_p)).clamp(min=torch.finfo(torch.float32).tiny)
    loss = -log_p if gamma == 0 else -(one_minus_p**gamma) * log_p
    if alpha is None:
        return loss
    return loss * torch.tensor(alpha, dtype=torch.float32, device=output.device)[target]


def _check_factors(name: str, factors: list[float], num_classes: int) -> None:
    if not isinstance(factors, list | tuple) or len(factors) != num_classes:
        raise ValueError(f"{name} is a list of one factor a class, {num_classes} here; got "
                         f"{factors}")
    if not all(0 <= factor < math.inf for factor in factors):
        raise ValueError(f"{name}: factors are finite and >= 0, got {factors}")


LOSSES = {"cross_entropy": cross_entropy, "focal": focal}
