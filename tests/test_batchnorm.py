"""Running statistics: once a step, averaged over micro-batches, untouched by a skipped step."""

import copy

import pytest
import torch
from torch import nn

from trainlib.batchnorm import BatchStatistics


def net(momentum=0.1):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, momentum=momentum), nn.Flatten(),
                         nn.Linear(4 * 36, 3), nn.BatchNorm1d(3, momentum=momentum)).train()


def step(model, statistics, micro_batches, healthy=True):
    sums = torch.zeros(statistics.size, dtype=torch.float64)
    statistics.begin()
    for inputs in micro_batches:
        model(inputs)
        statistics.add_to(sums, True)
    statistics.finish(sums, healthy)


def batches(count):
    return list(torch.randn(count, 6, 1, 8, 8, generator=torch.Generator().manual_seed(2)).unbind())


@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
def test_one_micro_batch_a_step_is_plain_batchnorm(momentum):
    plain, ours = net(momentum), net(momentum)
    statistics = BatchStatistics(ours, 1)
    for inputs in batches(3):
        plain(inputs)
        step(ours, statistics, [inputs])
    for a, b in zip(plain.buffers(), ours.buffers(), strict=True):  # blended in float64, cast once
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_step_blends_the_average_of_its_micro_batches_once(momentum):
    ours, probe = net(momentum), net(momentum=1.0)
    parts = batches(3)
    before = {k: v.clone() for k, v in ours.named_buffers()}
    captured = []
    for inputs in parts:
        probe(inputs)
        captured.append({k: v.clone().double() for k, v in probe.named_buffers()})
    statistics = BatchStatistics(ours, 3)
    step(ours, statistics, parts)
    factor = 1.0 if momentum is None else momentum  # the first step of a cumulative average
    for name, buffer in ours.named_buffers():
        if name.endswith("num_batches_tracked"):
            assert buffer.item() == 1
            continue
        mean = sum(c[name] for c in captured) / 3
        expected = before[name].double() * (1 - factor) + factor * mean
        torch.testing.assert_close(buffer.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("count", [1, 3])
def test_a_forward_that_is_run_again_changes_nothing(count):
    once, twice = net(), net()
    plain, recomputed = BatchStatistics(once, count), BatchStatistics(twice, count)
    step(once, plain, batches(count))
    sums = torch.zeros(recomputed.size, dtype=torch.float64)
    recomputed.begin()
    for inputs in batches(count):
        twice(inputs)
        twice(inputs)
        recomputed.add_to(sums, True)
    recomputed.finish(sums, True)
    assert all(v.equal(twice.state_dict()[k]) for k, v in once.state_dict().items())


@pytest.mark.parametrize("healthy", [False, torch.tensor(False)])
@pytest.mark.parametrize("count", [1, 3])
def test_a_skipped_step_leaves_no_trace(count, healthy):
    ours = net()
    statistics = BatchStatistics(ours, count)
    step(ours, statistics, batches(count))
    before = copy.deepcopy(ours.state_dict())
    step(ours, statistics, [torch.full((6, 1, 8, 8), float("nan"))] * count, healthy)
    assert all(v.equal(before[k]) for k, v in ours.state_dict().items())
    step(ours, statistics, batches(count), healthy=torch.tensor(True))
    assert all(v.isfinite().all() for v in ours.state_dict().values())
    assert ours[1].num_batches_tracked.item() == 2


def test_frozen_modules_are_left_alone():
    model = net()
    model[1].eval()
    statistics = BatchStatistics(model, 2)
    assert len(statistics.modules) == 1 and model[1].momentum == 0.1
    assert BatchStatistics(nn.Linear(2, 2), 2).size == 0
