"""Lengths of a run, the best evaluation, and patience."""

import pytest

from trainlib.config import UserError
from trainlib.progress import LoopOptions, Progress, check_monitor, plan_steps


def test_only_a_strictly_better_value_is_best():
    progress = Progress()
    seen = []
    for step, value in enumerate([0.5, 0.5, 0.7, float("nan"), 0.6]):
        progress.step = step
        seen.append(progress.observe(value, lower_is_better=False))
    assert seen == [True, False, True, False, False]
    assert (progress.best_value, progress.best_step) == (0.7, 2)
    assert progress.is_out_of_patience(2) and not progress.is_out_of_patience(3)
    assert not progress.is_out_of_patience(None)


def test_less_is_better_for_a_loss():
    assert check_monitor("eval/loss", ["eval/loss", "eval/accuracy"])
    assert not check_monitor("eval/accuracy", ["eval/loss", "eval/accuracy"])
    progress = Progress()
    assert [progress.observe(v, True) for v in (2.0, 3.0, 1.0)] == [True, False, True]
    with pytest.raises(UserError, match="did you mean 'eval/accuracy'"):
        check_monitor("eval/acuracy", ["eval/loss", "eval/accuracy"])


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
