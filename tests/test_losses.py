"""Losses against a float64 brute force, at edge sizes, extreme logits and low precision."""

import math

import pytest
import torch
from torch.nn import functional

from trainlib import losses
from trainlib.losses import IGNORED

CLASS_LOSSES = ("cross_entropy", "focal", "dice")
VALUE_LOSSES = ("bce", "mse", "l1", "huber")
PRECISIONS = (torch.float16, torch.bfloat16, torch.float32)
EXTREME = torch.tensor([[60.0, -60.0, 0.0], [-60.0, 60.0, 60.0], [60.0, 60.0, 60.0]])
# fp32 rounds to 6e-8; a handful of operations, and sums over a few classes and pixels.
CLOSE = {"rtol": 2e-6, "atol": 1e-7}


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def labels(num_classes, *shape):
    return torch.randint(num_classes, shape, generator=torch.Generator().manual_seed(1))


def class_cases():
    yield draw(7, 5), labels(5, 7)
    yield draw(4, 2), torch.tensor([0, 1, 1, 0])
    yield EXTREME, torch.tensor([1, 0, 2])
    yield torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)
    yield draw(1, 1), torch.tensor([0])
    yield draw(7, 5), labels(5, 7).masked_fill(torch.arange(7) % 2 == 0, IGNORED)
    yield draw(2, 3), torch.full((2,), IGNORED)
    half = labels(4, 2, 3, 5).masked_fill(labels(2, 2, 3, 5) == 0, IGNORED)
    yield 9 * draw(2, 4, 3, 5), half
    yield EXTREME[..., None].expand(3, 3, 2), torch.tensor([[0, 1], [IGNORED, 2], [IGNORED] * 2])
    yield torch.zeros(0, 3, 2, 2), torch.zeros(0, 2, 2, dtype=torch.int64)


def value_cases():
    nan = float("nan")
    target = labels(2, 6, 3).float()
    yield draw(6, 3), target
    yield draw(6, 3), torch.rand(6, 3, generator=torch.Generator().manual_seed(2))  # soft
    yield draw(6, 3), target.masked_fill(labels(2, 6, 3) == 0, 0.3).masked_fill(target == 1, nan)
    yield EXTREME, torch.tensor([[1.0, 0.0, 0.5], [1.0, 0.25, nan], [0.0, 1.0, 0.0]])
    yield draw(2, 3), torch.full((2, 3), nan)
    yield torch.zeros(0, 3), torch.zeros(0, 3)
    yield draw(1, 1), torch.ones(1, 1)
    yield draw(2, 3, 4), draw(2, 3, 4, seed=3).sigmoid().double()
    yield draw(5), torch.tensor([0.0, 1.0, nan, 1.0, 0.0], dtype=torch.float64)


def cases(name):
    return list(class_cases() if name in CLASS_LOSSES else value_cases())


ALL = [(name, *case) for name in losses.LOSSES for case in cases(name)]


def rows(tensor):
    """[items, classes, ...] as a list of the classes' values, pixel by pixel."""
    return tensor.double().movedim(1, -1).flatten(0, -2).tolist()


def log_softmax(logits):
    peak = max(logits)
    log_total = peak + math.log(sum(math.exp(z - peak) for z in logits))
    return [z - log_total for z in logits]


def brute_force(output, target, label_smoothing=0.0, weights=None, gamma=0.0):
    """One item after the other, in float64, from the definitions: cross entropy and focal."""
    values = []
    num_classes = output.shape[1]
    soft = target.is_floating_point()
    for logits, label in zip(rows(output), rows(target) if soft else target.flatten().tolist(),
                             strict=True):
        if math.isnan(sum(label)) if soft else label == IGNORED:
            values.append(0.0)
            continue
        truth = label if soft else [float(k == label) for k in range(num_classes)]
        log_p = log_softmax(logits)
        weights_here = weights or [1.0] * num_classes
        # 1 - p as the sum of the others, since the subtraction loses every digit near p = 1.
        modulation = gamma and sum(math.exp(p) for k, p in enumerate(log_p) if k != label)
        values.append(sum(
            -weights_here[k] * ((1 - label_smoothing) * truth[k] + label_smoothing / num_classes)
            * log_p[k] for k in range(num_classes)
        ) * (modulation**gamma if gamma else 1.0))
    shape = output.shape[:1] + output.shape[2:]
    return torch.tensor(values, dtype=torch.float64).view(shape)


def brute_force_values(name, output, target, **arguments):
    def value(x, t):
        if math.isnan(t):
            return 0.0
        if name == "bce":
            plus = math.log1p(math.exp(-abs(x)))
            log_p, log_q = min(x, 0.0) - plus, min(-x, 0.0) - plus
            return -arguments.get("pos_weight", 1.0) * t * log_p - (1 - t) * log_q
        error, delta = abs(x - t), arguments.get("delta", 1.0)
        if name == "huber":
            return error**2 / 2 if error <= delta else delta * (error - delta / 2)
        return error**2 if name == "mse" else error

    pairs = zip(output.double().flatten().tolist(), target.flatten().tolist(), strict=True)
    return torch.tensor([value(x, t) for x, t in pairs], dtype=torch.float64).view(output.shape)


def brute_force_dice(output, target, smooth=1.0):
    values = []
    for logits, label in zip(output.double(), target, strict=True):
        pixels = [(z, t) for z, t in zip(rows(logits[None]), label.flatten().tolist(), strict=True)
                  if t != IGNORED]
        foreground = len(logits) == 1
        ratios = []
        for k in [1] if foreground else range(len(logits)):
            p = [1 / (1 + math.exp(-z[0])) if foreground else math.exp(log_softmax(z)[k])
                 for z, _ in pixels]
            t = [float(label == k) for _, label in pixels]
            overlap = sum(a * b for a, b in zip(p, t, strict=True))
            ratios.append((2 * overlap + smooth) / (sum(p) + sum(t) + smooth))
        values.append(1 - sum(ratios) / len(ratios))
    return torch.tensor(values, dtype=torch.float64)


def expected(name, output, target):
    if name == "dice":
        return brute_force_dice(output, target)
    if name in VALUE_LOSSES:
        return brute_force_values(name, output, target)
    return brute_force(output, target, gamma=2.0 if name == "focal" else 0.0)


@pytest.mark.parametrize("name, output, target", ALL)
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_every_loss_is_the_brute_force_in_fp32_whatever_the_models_precision(
    name, output, target, dtype
):
    loss = losses.LOSSES[name](output.to(dtype), target)
    assert loss.dtype == torch.float32
    # Near p = 1 the loss is a difference of logits of 60, which are rounded to 4e-6.
    close = CLOSE | {"atol": 4e-6} if name in ("cross_entropy", "focal") else CLOSE
    torch.testing.assert_close(loss.double(), expected(name, output.to(dtype), target), **close)


@pytest.mark.parametrize("name, output, target, arguments", [
    *((*case, {}) for case in ALL), *(("focal", *case, {"gamma": 0.5}) for case in class_cases()),
])
def test_loss_and_gradient_are_exactly_0_without_a_target_and_finite_everywhere(
    name, output, target, arguments
):
    output = output.clone().requires_grad_()
    loss = losses.LOSSES[name](output, target, **arguments)
    loss.sum().backward()
    assert output.grad.isfinite().all() and loss.isfinite().all()
    missing = target == IGNORED if name in CLASS_LOSSES else target.isnan()
    assert losses.is_valid(target).equal(~missing)
    gradient = output.grad.movedim(1, -1) if name in CLASS_LOSSES else output.grad
    assert not gradient[missing].any()
    if name == "dice":  # one loss for all pixels of an item
        missing = missing[..., None].flatten(1).all(1)
    assert not loss[missing].any()


@pytest.mark.parametrize("output, target", list(class_cases()))
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_with_its_arguments_on_hard_and_soft_targets(
    output, target, smoothing, weighted
):
    weights = [0.5 + k for k in range(output.shape[1])] if weighted else None
    soft = (2 * draw(*output.shape, seed=5)).softmax(1).double()
    soft[:, -1:][(target == IGNORED)[:, None]] = float("nan")  # one NaN, and the item is missing
    for truth in (target, soft):
        scores = output.clone().requires_grad_()
        loss = losses.cross_entropy(scores, truth, smoothing, weights)
        reference = brute_force(output, truth, smoothing, weights)
        torch.testing.assert_close(loss.double(), reference, rtol=1e-5, atol=1e-5)
        loss.sum().backward()
        assert loss.dtype == torch.float32 and scores.grad.isfinite().all()
        assert not scores.grad.movedim(1, -1)[target == IGNORED].any()
        assert not loss[target == IGNORED].any()


@pytest.mark.parametrize("output, target", list(class_cases()))
@pytest.mark.parametrize("gamma", [0.0, 0.5, 3.0])
def test_focal_equals_the_brute_force(output, target, gamma):
    loss = losses.focal(output, target, gamma)
    reference = brute_force(output, target, gamma=gamma)
    torch.testing.assert_close(loss.double(), reference, rtol=1e-5, atol=1e-5)


def test_focal_alpha_weighs_the_target_class():
    output, target = next(class_cases())
    alpha = [0.1, 0.2, 0.3, 0.4, 0.5]
    reference = losses.focal(output, target, 2.0) * torch.tensor(alpha)[target]
    torch.testing.assert_close(losses.focal(output, target, 2.0, alpha), reference)


def test_focal_without_focus_is_cross_entropy():
    for output, target in class_cases():
        torch.testing.assert_close(losses.focal(output, target, gamma=0.0),
                                   functional.cross_entropy(output, target, reduction="none"))


@pytest.mark.parametrize("shape", [(6, 3), (2, 3, 4), (0, 3), (5,)])
def test_pos_weight_is_the_factor_of_the_positive_part(shape):
    output, target = 20 * draw(*shape), draw(*shape, seed=1).sigmoid()
    reference = brute_force_values("bce", output, target, pos_weight=2.5)
    loss = losses.bce(output, target, 2.5).double()
    torch.testing.assert_close(loss, reference, **CLOSE)
    factors = [0.0, 1.0, 2.5][: shape[1] if len(shape) > 1 else 1]
    columns = losses.bce(output, target, factors).unbind(1) if len(shape) > 1 else []
    for k, column in enumerate(columns):
        own = brute_force_values("bce", output[:, k], target[:, k], pos_weight=factors[k])
        torch.testing.assert_close(column.double(), own, **CLOSE)


@pytest.mark.parametrize("logit", [-60.0, -20.0, -10.0])
def test_bce_keeps_its_digits_where_the_model_is_right(logit):
    for output, target in ((logit, 0.0), (-logit, 1.0)):
        loss = losses.bce(torch.tensor([output]), torch.tensor([target]))
        assert loss.item() == pytest.approx(math.log1p(math.exp(logit)), rel=1e-5, abs=0)


@pytest.mark.parametrize("delta", [0.1, 1.0, 7.0])
def test_huber_is_a_parabola_and_then_lines(delta):
    output = torch.tensor([0.0, delta, -delta, 0.5, -3.0, 60.0, 1e30], requires_grad=True)
    target = torch.zeros(7, dtype=torch.float64)
    loss = losses.huber(output, target, delta)
    reference = brute_force_values("huber", output.detach(), target, delta=delta)
    torch.testing.assert_close(loss.double(), reference, **CLOSE)
    loss.sum().backward()
    torch.testing.assert_close(output.grad, output.detach().clamp(-delta, delta))


@pytest.mark.parametrize("smooth", [1e-3, 1.0, 10.0])
@pytest.mark.parametrize("scale", [1.0, 60.0])
def test_dice_of_a_single_channel_is_that_of_the_foreground(smooth, scale):
    output = (scale * draw(3, 1, 4, 5)).requires_grad_()
    target = labels(2, 3, 4, 5)
    target[0, 0], target[1] = IGNORED, IGNORED
    loss = losses.dice(output, target, smooth)
    reference = brute_force_dice(output.detach(), target, smooth)
    torch.testing.assert_close(loss.double(), reference, **CLOSE)
    loss.sum().backward()
    assert loss[1] == 0 and not output.grad[1].any() and not output.grad[0, 0, 0].any()
    assert output.grad.isfinite().all() and loss.shape == (3,)


@pytest.mark.parametrize("name", losses.LOSSES)
def test_no_loss_waits_for_the_device_or_takes_its_shape_from_the_data(name):
    arguments = {"cross_entropy": {"class_weights": [1.0, 2.0, 3.0], "label_smoothing": 0.1},
                 "focal": {"alpha": [1.0, 2.0, 3.0]}, "bce": {"pos_weight": [1.0, 2.0, 3.0]}}
    output = torch.zeros(2, 3, 4, device="meta")  # has no values: reading one raises
    target = torch.zeros_like(output)
    if name in CLASS_LOSSES:
        target = torch.zeros(2, 4, dtype=torch.int64, device="meta")
    loss = losses.LOSSES[name](output, target, **arguments.get(name, {}))
    assert loss.device.type == "meta"


@pytest.mark.parametrize("name, arguments, message", [
    ("cross_entropy", {"label_smoothing": 1.0}, r"lies in \[0, 1\), got 1.0"),
    ("cross_entropy", {"class_weights": [1.0]}, "one factor a class, 3 here"),
    ("cross_entropy", {"class_weights": [1.0, 2.0, float("nan")]}, "finite and >= 0"),
    ("focal", {"gamma": -1.0}, ">= 0, got -1.0"),
    ("focal", {"gamma": float("nan")}, ">= 0, got nan"),
    ("focal", {"alpha": [1.0, 2.0]}, "one factor a class, 3 here"),
    ("focal", {"alpha": 0.25}, "one factor a class, 3 here; got 0.25"),
    ("bce", {"pos_weight": -1.0}, ">= 0, or a list of them, got -1.0"),
    ("bce", {"pos_weight": [1.0]}, "one factor a label, 3 here"),
    ("huber", {"delta": 0.0}, "> 0, got 0.0"),
    ("dice", {"smooth": 0.0}, "> 0, got 0.0"),
])
def test_arguments_out_of_range_are_refused(name, arguments, message):
    target = torch.tensor([0, 1]) if name in CLASS_LOSSES else torch.zeros(2, 3)
    with pytest.raises(ValueError, match=message):
        losses.LOSSES[name](torch.zeros(2, 3), target, **arguments)


@pytest.mark.parametrize("name", losses.LOSSES)
def test_targets_that_do_not_fit_are_refused_and_never_broadcast(name):
    dtype = torch.int64 if name in CLASS_LOSSES else torch.float32
    message = r"got an output .*make class numbers long" if name in CLASS_LOSSES else "broadcast"
    for output, target in [((3, 1), (1,)), ((3, 2), (3, 1)), ((3, 2, 4), (3, 5)), ((3, 1), ())]:
        with pytest.raises(ValueError, match=message):
            losses.LOSSES[name](torch.zeros(output), torch.zeros(target, dtype=dtype))
    if name in CLASS_LOSSES:
        for dtype in (torch.int32, torch.float32, torch.bool):
            with pytest.raises(ValueError, match=message):
                losses.LOSSES[name](torch.zeros(3, 2), torch.zeros(3, dtype=dtype))
