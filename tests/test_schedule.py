"""Learning rates against torch's own schedulers, and durations."""

import pytest
import torch

from trainlib import schedule

LRS = torch.optim.lr_scheduler


def torch_multipliers(make_decay, total, warmup, final):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    decay = make_decay(optimizer, total - warmup, final)
    scheduler = decay
    if warmup:
        rise = LRS.LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
        scheduler = LRS.SequentialLR(optimizer, [rise, decay], [warmup])
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.filterwarnings("ignore:The epoch parameter:UserWarning")  # SequentialLR's own call
@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("name, make_decay, final", [
    ("constant", lambda o, steps, final: LRS.LambdaLR(o, lambda step: 1.0), 0.0),
    ("cosine", lambda o, steps, final: LRS.CosineAnnealingLR(o, steps, eta_min=final), 0.0),
    ("cosine", lambda o, steps, final: LRS.CosineAnnealingLR(o, steps, eta_min=final), 0.1),
    ("linear", lambda o, steps, final: LRS.LinearLR(
        o, start_factor=1.0, end_factor=final, total_iters=steps), 0.0),
    ("linear", lambda o, steps, final: LRS.LinearLR(
        o, start_factor=1.0, end_factor=final, total_iters=steps), 0.25),
])
def test_schedules_equal_torch(name, make_decay, final, warmup):
    ours = [schedule.lr_multiplier(name, s, 40, warmup, final) for s in range(40)]
    assert ours == pytest.approx(torch_multipliers(make_decay, 40, warmup, final), abs=1e-12)


@pytest.mark.parametrize("name", schedule.SHAPES)
@pytest.mark.parametrize("total, warmup", [(1, 0), (2, 1), (10, 0), (10, 9)])
def test_no_step_has_learning_rate_zero_or_more_than_the_peak(name, total, warmup):
    rates = [schedule.lr_multiplier(name, s, total, warmup) for s in range(total + 5)]
    assert all(0 < rate <= 1 for rate in rates)
    assert set(rates[total:]) == {rates[total - 1]}  # clamped past the end


@pytest.mark.parametrize("text, steps", [
    ("20 epochs", 450), ("1 epoch", 23), ("1epoch", 23), ("0.5 epochs", 12), ("500 steps", 500),
    ("1 step", 1), ("5%", 50), ("100 %", 1000), ("1e3 steps", 1000), ("0 steps", 0),
])
def test_durations_become_steps_once(text, steps):
    assert schedule.duration_steps(text, 1437, 64, total_steps=1000) == steps


def test_an_exact_number_of_batches_is_not_rounded_up():
    for epochs in range(1, 200):
        assert schedule.duration_steps(f"{epochs} epochs", 640, 64) == 10 * epochs


@pytest.mark.parametrize("text", ["", "20", "epochs", "-1 epochs", "5 minutes", "5 % steps"])
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(ValueError, match="a duration reads like"):
        schedule.duration_steps(text, 100, 10)


def test_the_runs_length_cannot_be_a_share_of_itself():
    with pytest.raises(ValueError, match="percentage of itself"):
        schedule.duration_steps("5%", 100, 10)


def test_it_is_time_on_multiples_and_at_the_end():
    assert [s for s in range(1, 12) if schedule.is_time(s, 4, 11)] == [4, 8, 11]
    assert [s for s in range(1, 4) if schedule.is_time(s, 0, 3)] == [3]
