"""Losses against a float64 brute force, at edge sizes, extreme logits and low precision."""

import math

import pytest
import torch
from torch.nn import functional

from trainlib import losses


def cases():
    generator = torch.Generator().manual_seed(0)
    yield torch.randn(7, 5, generator=generator), torch.randint(5, (7,), generator=generator)
    yield torch.randn(4, 2, generator=generator), torch.tensor([0, 1, 1, 0])
    extreme = torch.tensor([[60.0, -60.0, 0.0], [-60.0, 60.0, 60.0], [60.0, 60.0, 60.0]])
    yield extreme, torch.tensor([1, 0, 2])
    yield torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)
    yield torch.randn(1, 1, generator=generator), torch.tensor([0])


def brute_force(output, target, label_smoothing=0.0, weights=None, gamma=0.0):
    """One item after the other, in float64, from the definitions."""
    values = []
    for logits, label in zip(output.double().tolist(), target.tolist(), strict=True):
        peak = max(logits)
        log_total = peak + math.log(sum(math.exp(z - peak) for z in logits))
        log_p = [z - log_total for z in logits]
        weights_here = weights or [1.0] * len(logits)
        spread = label_smoothing / len(logits)
        # 1 - p as the sum of the others, since the subtraction loses every digit near p = 1.
        others = sum(math.exp(p) for k, p in enumerate(log_p) if k != label)
        modulation = others**gamma if gamma else 1.0
        values.append(sum(
            -weights_here[k] * ((1 - label_smoothing) * (k == label) + spread) * log_p[k]
            for k in range(len(logits))
        ) * modulation)
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("output, target", list(cases()))
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_equals_the_brute_force(output, target, smoothing, weighted):
    weights = [0.5 + k for k in range(output.shape[1])] if weighted else None
    loss = losses.cross_entropy(output, target, smoothing, weights)
    expected = brute_force(output, target, smoothing, weights)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("output, target", list(cases()))
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_equals_the_brute_force(output, target, gamma):
    loss = losses.focal(output, target, gamma)
    expected = brute_force(output, target, gamma=gamma)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)


def test_focal_alpha_weighs_the_target_class():
    output, target = next(cases())
    alpha = [0.1, 0.2, 0.3, 0.4, 0.5]
    expected = losses.focal(output, target, 2.0) * torch.tensor(alpha)[target]
    torch.testing.assert_close(losses.focal(output, target, 2.0, alpha), expected)


def test_focal_without_focus_is_cross_entropy():
    for output, target in cases():
        torch.testing.assert_close(losses.focal(output, target, gamma=0.0),
                                   functional.cross_entropy(output, target, reduction="none"))


@pytest.mark.parametrize("name", losses.LOSSES)
@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_gradients_are_finite_at_extreme_logits(name, gamma):
    arguments = {"gamma": gamma} if name == "focal" else {}
    for output, target in cases():
        output = output.clone().requires_grad_()
        losses.LOSSES[name](output, target, **arguments).sum().backward()
        assert output.grad.isfinite().all()


@pytest.mark.parametrize("name", losses.LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_loss_is_computed_in_fp32_whatever_the_models_precision(name, dtype):
    for output, target in cases():
        loss = losses.LOSSES[name](output.to(dtype), target)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, losses.LOSSES[name](output.to(dtype).float(), target))


@pytest.mark.parametrize("name, arguments, message", [
    ("cross_entropy", {"label_smoothing": 1.0}, r"lies in \[0, 1\), got 1.0"),
    ("cross_entropy", {"class_weights": [1.0]}, "one factor a class, 3 here"),
    ("cross_entropy", {"class_weights": [1.0, 2.0, float("nan")]}, "finite and >= 0"),
    ("focal", {"gamma": -1.0}, ">= 0, got -1.0"),
    ("focal", {"gamma": float("nan")}, ">= 0, got nan"),
    ("focal", {"alpha": [1.0, 2.0]}, "one factor a class, 3 here"),
    ("focal", {"alpha": 0.25}, "one factor a class, 3 here; got 0.25"),
])
def test_arguments_out_of_range_are_refused(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        losses.LOSSES[name](torch.zeros(2, 3), torch.tensor([0, 1]), **arguments)
