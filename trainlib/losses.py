"""Unreduced losses, each with its source: pure functions of outputs and targets.

A loss returns one value an item, in fp32 whatever the model's precision. Nothing here averages:
the script divides one sum by the global count, once.
"""

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
        if len(class_weights) != output.shape[1]:
            raise ValueError(
                f"class_weights has one factor a class: {output.shape[1]} classes, "
                f"{len(class_weights)} factors"
            )
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
    if gamma < 0:
        raise ValueError(f"gamma is >= 0, got {gamma}")
    if alpha is not None and len(alpha) != output.shape[1]:
        raise ValueError(
            f"alpha has one factor a class: {output.shape[1]} classes, {len(alpha)} factors"
        )
    log_probabilities = functional.log_softmax(output.float(), dim=1)
    log_p = log_probabilities.gather(1, target[:, None]).squeeze(1)
    # 1 - p through expm1 keeps its digits where p is near 1. Held off 0, because the gradient
    # of x^gamma is infinite there for gamma < 1.
    one_minus_p = (-torch.expm1(log_p)).clamp(min=torch.finfo(torch.float32).tiny)
    loss = -log_p if gamma == 0 else -(one_minus_p**gamma) * log_p
    if alpha is None:
        return loss
    return loss * torch.tensor(alpha, dtype=torch.float32, device=output.device)[target]


LOSSES = {"cross_entropy": cross_entropy, "focal": focal}
