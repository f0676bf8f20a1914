"""Lengths of a run, the best evaluation, patience, and plateaus against torch's own."""

import json
import math
import random
from dataclasses import asdict

import pytest
import torch

from trainlib.config import UserError
from trainlib.progress import LoopOptions, Progress, check_monitor, plan_steps


def test_only_a_strictly_better_value_is_best():
    progress = Progress()
    seen = []
    for step, value in enumerate([0.5, 0.5, 0.7, float("nan"), 0.6]):
        progress.step = step
        seen.append(progress.observe(value, False, {"task": {"accuracy": value}}))
    assert seen == [True, False, True, False, False]
    assert (progress.best_value, progress.best_step) == (0.7, 2)
    assert progress.best_results == {"task": {"accuracy": 0.7}}
    assert progress.results == {"task": {"accuracy": 0.6}}
    assert progress.is_over(100, patience=2) and not progress.is_over(100, patience=3)
    assert progress.is_over(4, None) and not progress.is_over(5, None)
    progress.step = 5  # and not yet evaluated, by which patience may be regained
    assert not progress.is_over(5, patience=2)


def test_less_is_better_for_a_loss():
    assert check_monitor("eval/loss", ["eval/loss", "eval/accuracy"])
    assert not check_monitor("eval/accuracy", ["eval/loss", "eval/accuracy"])
    progress = Progress()
    assert [progress.observe(v, True, {}) for v in (2.0, 3.0, 1.0)] == [True, False, True]
    with pytest.raises(UserError, match="did you mean 'eval/accuracy'"):
        check_monitor("eval/acuracy", ["eval/loss", "eval/accuracy"])


def noisy_metrics(seed, lower_is_better, count=200):
    """Better for a third of the time, then flat; in coarse and fine steps, with repeats."""
    draw = random.Random(seed)
    sign = -1 if lower_is_better else 1
    return [
        2 + sign * min(i, count // 3) / count + draw.choice([0, 1e-5, 1e-2]) * draw.gauss(0, 1)
        for i in range(count)
    ]


def torch_plateau_rates(values, lower_is_better, floor, **args):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, "min" if lower_is_better else "max", threshold_mode="rel", min_lr=floor, eps=0,
        **args,
    )
    rates = []
    for value in values:
        scheduler.step(value)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


def plateau_rates(values, lower_is_better, floor, **args):
    """As a run would that is interrupted after each evaluation."""
    state, rates = Progress(), []
    for value in values:
        state = Progress(**json.loads(json.dumps(asdict(state), allow_nan=False)))
        state.reduce_on_plateau(value, lower_is_better, final_fraction=floor, **args)
        rates.append(state.lr_factor)
    return rates


@pytest.mark.parametrize("lower_is_better", [True, False])
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("floor", [0.0, 0.02])
@pytest.mark.parametrize("patience, cooldown, threshold, factor", [
    (5, 0, 1e-4, 0.1), (0, 0, 0.0, 0.9), (2, 3, 1e-2, 0.5), (1, 1, 0.1, 0.3),
])
def test_reductions_equal_torch(
    seed, lower_is_better, floor, patience, cooldown, threshold, factor
):
    args = {"factor": factor, "patience": patience, "threshold": threshold, "cooldown": cooldown}
    values = noisy_metrics(seed, lower_is_better)
    ours = plateau_rates(values, lower_is_better, floor, **args)
    assert ours == torch_plateau_rates(values, lower_is_better, floor, **args)
    assert 1.0 in ours and len(set(ours)) > 2  # it held, and it was reduced more than once


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("lower_is_better", [True, False])
def test_a_value_that_is_not_finite_is_no_improvement(bad, lower_is_better):
    args = {"factor": 0.5, "patience": 1, "threshold": 1e-4, "cooldown": 0}
    better = 1.0 if lower_is_better else 3.0
    values = [bad, 2.0, bad, bad, better, bad, bad, bad, bad]
    rates = plateau_rates(values, lower_is_better, 0.0, **args)
    assert rates == [1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.125]
    values = [math.nan if value == bad else value for value in values]
    assert rates == torch_plateau_rates(values, lower_is_better, 0.0, **args)


def test_everything_is_planned_in_steps():
    loop = LoopOptions(duration="10 epochs", eval_every="1 epoch")
    assert plan_steps(loop, "10%", 1437, 64) == (225, 23, 22)
    assert plan_steps(LoopOptions(duration="1 step"), "0 steps", 1437, 64) == (1, 1, 0)


@pytest.mark.parametrize("duration, warmup, message", [
    ("0 epochs", "0 steps", "less than one step"),
    ("5%", "0 steps", "percentage of itself"),
    ("10 steps", "10 steps", "warm up for less"),
])
def test_a_length_that_makes_no_run_is_refused(duration, warmup, message):
    with pytest.raises(UserError, match=message):
        plan_steps(LoopOptions(duration=duration), warmup, 1437, 64)
