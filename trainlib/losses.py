"""Unreduced losses, each with its source: pure functions of outputs and targets.

A loss returns one value an item (a label, a pixel), in fp32 whatever the precision of the model
and of the targets. Nothing here averages over items: the script divides one sum by the global
count, once.

A missing target is ``IGNORED`` among class numbers and NaN among floating-point targets; its loss
is exactly 0, and so is its gradient. Nothing here waits for a GPU, and no shape depends on the
data, so targets outside their range are refused by the device alone, or not at all.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

IGNORED = -100
"""The class number of a missing target, as in torch and transformers."""


def is_valid(target: Tensor) -> Tensor:
    """Same shape, bool: where a target is not missing, among class numbers or floating point."""
    return ~target.isnan() if target.is_floating_point() else target != IGNORED


def cross_entropy(
    output: Tensor,
    target: Tensor,
    label_smoothing: float = 0.0,
    class_weights: list[float] | None = None,
) -> Tensor:
    """Cross entropy of each item, in nats.

    Args:
        output: [items, classes, ...] logits.
        target: [items, ...] int64 class numbers, or [items, classes, ...] floating-point
            probabilities, missing where one of an item's is NaN.
        label_smoothing: in [0, 1): the share of the target spread evenly over all classes
            (Szegedy et al. 2016, arXiv:1512.00567, section 7).
        class_weights: [classes] factors. The sum is divided by the number of items, not by the
            sum of their weights, so that the divisor is known before the first backward.

    Returns:
        [items, ...] fp32.

    Raises:
        ValueError: an argument outside its range, not one weight a class, or a target that does
            not fit the output.
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing lies in [0, 1), got {label_smoothing}")
    is_soft = target.is_floating_point() and target.shape == output.shape and output.ndim > 1
    missing = None
    if is_soft:
        missing = target.isnan().any(1)
        target = target.float().masked_fill(missing[:, None], 0.0)
    else:
        _check_class_numbers(output, target)
    weights = None
    if class_weights is not None:
        weights = _factors("class_weights", class_weights, output, "class")
    loss = functional.cross_entropy(
        output.float(), target, weight=weights, ignore_index=IGNORED,
        label_smoothing=label_smoothing, reduction="none",
    )
    return loss.masked_fill(missing, 0.0) if is_soft else loss


def focal(
    output: Tensor, target: Tensor, gamma: float = 2.0, alpha: list[float] | None = None
) -> Tensor:
    """Focal loss of each item: cross entropy times (1 - p)^gamma, in nats.

    Args:
        output: [items, classes, ...] logits.
        target: [items, ...] int64 class numbers.
        gamma: >= 0; 0 is the cross entropy.
        alpha: [classes] factors of the target class.

    Returns:
        [items, ...] fp32.

    Raises:
        ValueError: gamma below 0, not one factor a class, or a target that does not fit the
            output.

    Source: Lin et al. 2017, arXiv:1708.02002, equations 4 and 5, for many classes.
    """
    if not 0 <= gamma < math.inf:
        raise ValueError(f"gamma is a number >= 0, got {gamma}")
    _check_class_numbers(output, target)
    missing, label = _split_missing(target)
    log_probabilities = functional.log_softmax(output.float(), dim=1)
    log_p = log_probabilities.gather(1, label[:, None]).squeeze(1)
    # 1 - p through expm1 keeps its digits where p is near 1. Held off 0, because the gradient
    # of x^gamma is infinite there for gamma < 1.
    one_minus_p = (-torch.expm1(log_p)).clamp(min=torch.finfo(torch.float32).tiny)
    loss = -log_p if gamma == 0 else -(one_minus_p**gamma) * log_p
    if alpha is not None:
        loss = loss * _factors("alpha", alpha, output, "class")[label]
    return loss.masked_fill(missing, 0.0)


def bce(
    output: Tensor, target: Tensor, pos_weight: float | list[float] | None = None
) -> Tensor:
    """Binary cross entropy of each label, in nats.

    Args:
        output: [items, labels, ...] logits.
        target: same shape, in [0, 1], NaN where missing.
        pos_weight: factor of the positive part, >= 0; a list is one factor a label.

    Returns:
        [items, labels, ...] fp32.

    Raises:
        ValueError: a factor below 0, not one factor a label, or shapes that differ.
    """
    _check_same_shape(output, target)
    if isinstance(pos_weight, list | tuple):
        factor = _factors("pos_weight", pos_weight, output, "label")
        factor = factor.view(-1, *[1] * (output.ndim - 2))
    else:
        factor = 1.0 if pos_weight is None else pos_weight
        if not 0 <= factor < math.inf:
            raise ValueError(f"pos_weight is a number >= 0, or a list of them, got {pos_weight}")
    output, target = output.float(), target.float()
    missing = target.isnan()
    target = target.masked_fill(missing, 0.0)
    # Two terms of one sign: torch's own (1 - t) x + log(1 + e^-x) loses its digits at x << 0.
    positive = factor * target * functional.logsigmoid(output)
    negative = (1 - target) * functional.logsigmoid(-output)
    return (-positive - negative).masked_fill(missing, 0.0)


def mse(output: Tensor, target: Tensor) -> Tensor:
    """Squared error of each value.

    Args:
        output: any shape.
        target: same shape, NaN where missing.

    Returns:
        same shape, fp32.

    Raises:
        ValueError: shapes that differ.
    """
    return _error(output, target).square()


def l1(output: Tensor, target: Tensor) -> Tensor:
    """Absolute error of each value; arguments, result and errors are those of ``mse``."""
    return _error(output, target).abs()


def huber(output: Tensor, target: Tensor, delta: float = 1.0) -> Tensor:
    """Huber loss of each value: e^2 / 2 up to |e| = delta, delta (|e| - delta / 2) beyond.

    Args:
        output: any shape.
        target: same shape, NaN where missing.
        delta: > 0, in units of the target: where the loss turns from a parabola into lines.

    Returns:
        same shape, fp32.

    Raises:
        ValueError: delta not above 0, or shapes that differ.

    Source: Huber 1964, Robust Estimation of a Location Parameter, doi:10.1214/aoms/1177703732.
    """
    if not 0 < delta < math.inf:
        raise ValueError(f"delta is a number > 0, got {delta}")
    error = _error(output, target).abs()
    # Both branches in one formula: beyond delta, inner stands still.
    inner = error.clamp(max=delta)
    return inner * (error - inner / 2)


def dice(output: Tensor, target: Tensor, smooth: float = 1.0) -> Tensor:
    """Soft Dice loss of each item: 1 - the mean over classes of 2 |p t| / (|p| + |t|).

    The sums run over the pixels of one item that have a target, with ``smooth`` added above and
    below. The denominator has plain sums, where the source has sums of squares; for predictions
    of 0 and 1 they are the same.

    Args:
        output: [items, classes, ...] logits; a single channel is the foreground's, against a
            target of 0 and 1.
        target: [items, ...] int64 class numbers.
        smooth: > 0, in pixels: a class that is absent and not predicted counts as right.

    Returns:
        [items] fp32.

    Raises:
        ValueError: smooth not above 0, or a target that does not fit the output.

    Source: Milletari et al. 2016 (V-Net), arXiv:1606.04797, section 3.
    """
    if not 0 < smooth < math.inf:
        raise ValueError(f"smooth is a number > 0, got {smooth}")
    _check_class_numbers(output, target)
    # Without pixels, an item is one pixel.
    logits, target = output.float()[..., None].flatten(2), target[..., None].flatten(1)
    items, channels, pixels = logits.shape
    probabilities = logits.sigmoid() if channels == 1 else logits.softmax(1)
    missing, label = _split_missing(target)
    # Scattered, not compared: an index outside the classes is an error on every device.
    truth = logits.new_zeros(items, max(channels, 2), pixels)
    truth = truth.scatter_(1, label[:, None], 1.0)[:, -channels:].masked_fill(missing[:, None], 0.0)
    probabilities = probabilities.masked_fill(missing[:, None], 0.0)
    overlap = 2 * (probabilities * truth).sum(2) + smooth
    total = probabilities.sum(2) + truth.sum(2) + smooth
    # The mean of 1 - x, not 1 - the mean: exactly 0 where nothing has a target.
    return (1 - overlap / total).mean(1)


def _check_class_numbers(output: Tensor, target: Tensor) -> None:
    wanted = output.shape[:1] + output.shape[2:]
    if output.ndim < 2 or target.shape != wanted or target.dtype != torch.int64:
        raise ValueError(
            "an output [items, classes, ...] takes class numbers [items, ...] in int64, the cross "
            "entropy also probabilities of the output's shape; got an output "
            f"{tuple(output.shape)} and a target {tuple(target.shape)} of {target.dtype}; move "
            "the classes to dimension 1, and make class numbers long()"
        )


def _check_same_shape(output: Tensor, target: Tensor) -> None:
    if output.shape != target.shape:
        raise ValueError(
            f"output and target have one shape, got {tuple(output.shape)} and "
            f"{tuple(target.shape)}; reshape one of them, nothing is broadcast here"
        )


def _split_missing(target: Tensor) -> tuple[Tensor, Tensor]:
    """Where class numbers are missing, and the class numbers with 0 there."""
    missing = target == IGNORED
    return missing, target.masked_fill(missing, 0)


def _error(output: Tensor, target: Tensor) -> Tensor:
    """The fp32 error of each value, 0 where the target is missing."""
    _check_same_shape(output, target)
    return (output.float() - target.float()).masked_fill(target.isnan(), 0.0)


def _factors(name: str, factors: list[float], output: Tensor, what: str) -> Tensor:
    """[classes] fp32 factors, on the output's device."""
    num_factors = output.shape[1] if output.ndim > 1 else 1
    if not isinstance(factors, list | tuple) or len(factors) != num_factors:
        raise ValueError(f"{name} is a list of one factor a {what}, {num_factors} here; got "
                         f"{factors}")
    if not all(0 <= factor < math.inf for factor in factors):
        raise ValueError(f"{name}: factors are finite and >= 0, got {factors}")
    on_cpu = torch.tensor(factors, dtype=torch.float32)
    # Not blocking, or the host would wait for the GPU; Apple's would read the freed source.
    return on_cpu.to(output.device, non_blocking=output.device.type == "cuda")


LOSSES = {
    "cross_entropy": cross_entropy,
    "focal": focal,
    "bce": bce,
    "mse": mse,
    "l1": l1,
    "huber": huber,
    "dice": dice,
}
