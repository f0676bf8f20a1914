"""The exact sum: order-free, equal to one big batch, silent about parameters without gradient."""

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from trainlib.gradients import StepSums


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


def gradients_of(accelerator, micro_batches, exact=True):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    sums = StepSums(accelerator, model, {"loss": 1}, exact, len(micro_batches))
    sums.clear()
    for inputs in micro_batches:
        loss = model(inputs).square().sum()
        sums.scaled(loss, True).backward()
        sums.add_gradients(True)
        sums.add("loss", [loss], True)
    sums.reduce()
    return [p.grad for p in model.parameters()], sums["loss"].item()


def test_the_sum_does_not_depend_on_the_order_of_micro_batches(accelerator):
    parts = list(torch.randn(60, 8, generator=torch.Generator().manual_seed(1)).split(4))
    # Magnitudes six decades apart, where a sum in fp32 depends on its order.
    parts = [part * 10.0 ** (i % 4 - 2) for i, part in enumerate(parts)]
    forward, forward_loss = gradients_of(accelerator, parts)
    backward, backward_loss = gradients_of(accelerator, parts[::-1])
    assert all(a.equal(b) for a, b in zip(forward, backward, strict=True))
    assert forward_loss == backward_loss
    inexact = [gradients_of(accelerator, p, exact=False)[0] for p in (parts, parts[::-1])]
    assert not all(a.equal(b) for a, b in zip(*inexact, strict=True))  # the test can fail


def test_the_exact_sum_is_the_float64_sum_rounded_once(accelerator):
    parts = list(torch.randn(12, 8, generator=torch.Generator().manual_seed(1)).split(4))
    total, _ = gradients_of(accelerator, parts)
    alone = [gradients_of(accelerator, [part])[0] for part in parts]
    for gradient, *pieces in zip(total, *alone, strict=True):
        assert gradient.equal(sum(piece.double() for piece in pieces).float())


def test_a_step_of_one_micro_batch_keeps_no_second_copy(accelerator):
    model = nn.Linear(8, 3)
    assert len(StepSums(accelerator, model, {"loss": 2}, True, 1).vector) == 2
    assert len(StepSums(accelerator, model, {"loss": 2}, True, 2).vector) == 2 + 2 + 27


def test_a_repeated_micro_batch_counts_for_nothing(accelerator):
    model = nn.Linear(2, 1)
    sums = StepSums(accelerator, model, {"loss": 1}, True, 2)
    sums.clear()
    for is_real, value in ((True, 1.0), (False, float("inf"))):
        loss = model(torch.full((1, 2), value)).sum()
        loss.backward()
        sums.add_gradients(is_real)
        sums.add("loss", [loss], is_real)
    sums.reduce()
    assert model.weight.grad.tolist() == [[1.0, 1.0]] and sums["loss"].isfinite().all()


def test_a_parameter_without_gradient_stays_without(accelerator):
    model = nn.ModuleDict({"used": nn.Linear(2, 1), "unused": nn.Linear(2, 1)})
    model["frozen"] = nn.Linear(2, 1).requires_grad_(False)
    sums = StepSums(accelerator, model, {"loss": 1}, True, 2)
    for _ in range(2):
        sums.clear()
        for _ in range(2):
            model["used"](torch.ones(1, 2)).sum().backward()
            sums.add_gradients(True)
        sums.reduce()
        assert model["used"].weight.grad.tolist() == [[2.0, 2.0]]
        model["used"].zero_grad()
        assert model["unused"].weight.grad is None and model["frozen"].weight.grad is None


def whole_numbers(memory_format):
    """A net and its micro-batches in small whole numbers, whose sums are exact in any order."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 1), nn.Flatten(),
        nn.Linear(96, 3),
    )
    for p in model.parameters():
        p.data = torch.randint(-2, 3, p.shape, generator=generator).float()
    inputs = torch.randint(-2, 3, (2, 3, 2, 4, 4), generator=generator).float()
    return (model.to(memory_format=memory_format),
            [part.to(memory_format=memory_format) for part in inputs])


def test_gradients_lie_in_memory_as_their_parameters(accelerator):
    models = {}
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model, micro_batches = whole_numbers(memory_format)
        sums = StepSums(accelerator, model, {"loss": 1}, True, len(micro_batches))
        sums.clear()
        for inputs in micro_batches:
            model(inputs).sum().backward()
            sums.add_gradients(True)
        sums.reduce()
        models[memory_format] = model
        assert all(p.grad.stride() == p.stride() for p in model.parameters())
    plain, channels_last = models.values()
    assert not channels_last[0].weight.is_contiguous()
    for one, other in zip(plain.parameters(), channels_last.parameters(), strict=True):
        assert one.grad.any() and one.grad.equal(other.grad)
    # Fused optimizers walk memory: a gradient that lies otherwise would go to other weights.
    for model, fused in ((plain, False), (channels_last, True)):
        torch.optim.AdamW(model.parameters(), 0.1, fused=fused).step()
    for one, other in zip(plain.parameters(), channels_last.parameters(), strict=True):
        torch.testing.assert_close(one, other)
