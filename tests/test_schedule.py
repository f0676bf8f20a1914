"""Learning rates against torch's own schedulers, the shapes' arguments, and durations."""

import math

import pytest
import torch

from trainlib import schedule

LRS = torch.optim.lr_scheduler
pytestmark = pytest.mark.filterwarnings(  # SequentialLR's own call
    "ignore:The epoch parameter:UserWarning"
)


def torch_rates(total, *phases):
    """The rates of torch's schedulers one after the other; a phase is (steps, make)."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    phases = [(steps, make) for steps, make in phases if steps]
    starts = [sum(steps for steps, _ in phases[:i]) for i in range(1, len(phases))]
    schedulers = [make(optimizer) for _, make in phases]
    scheduler = LRS.SequentialLR(optimizer, schedulers, starts) if starts else schedulers[0]
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def rise(warmup):
    return warmup, lambda o: LRS.LinearLR(o, 1 / (warmup + 1), total_iters=warmup)


def stable(steps):
    return steps, lambda o: LRS.ConstantLR(o, factor=1.0, total_iters=steps)


def fall(shape, steps, final):
    return steps, {
        "linear": lambda o: LRS.LinearLR(o, 1.0, final, total_iters=steps),
        "cosine": lambda o: LRS.CosineAnnealingLR(o, steps, eta_min=final),
        "sqrt": lambda o: LRS.LambdaLR(
            o, lambda step: final + (1 - final) * (1 - math.sqrt(step / steps))),
    }[shape]


def after(warmup, rates, change):
    return rates[:warmup] + [change(rate) for rate in rates[warmup:]]


def torch_constant(total, warmup, final, **args):
    return torch_rates(total, rise(warmup), stable(total - warmup))


def torch_linear(total, warmup, final):
    return torch_rates(total, rise(warmup), fall("linear", total - warmup, final))


def torch_cosine(total, warmup, final):
    return torch_rates(total, rise(warmup), fall("cosine", total - warmup, final))


def torch_polynomial(total, warmup, final, power=2.0):
    steps = total - warmup
    rates = torch_rates(
        total, rise(warmup), (steps, lambda o: LRS.PolynomialLR(o, steps, power)))
    return after(warmup, rates, lambda rate: final + (1 - final) * rate)


def torch_exponential(total, warmup, final, factor, every):
    rates = torch_rates(total, rise(warmup), (
        total - warmup, lambda o: LRS.ExponentialLR(o, gamma=factor ** (1 / every))))
    return after(warmup, rates, lambda rate: max(rate, final))


def from_the_runs_start(total, warmup, final, make):
    rising = torch_rates(total, rise(warmup), stable(total - warmup))
    dropping = torch_rates(total, (total, make))
    return after(warmup, rising[:warmup] + dropping[warmup:], lambda rate: max(rate, final))


def torch_step(total, warmup, final, factor, every):
    return from_the_runs_start(
        total, warmup, final, lambda o: LRS.StepLR(o, every, gamma=factor))


def torch_multistep(total, warmup, final, factor, at):
    return from_the_runs_start(
        total, warmup, final, lambda o: LRS.MultiStepLR(o, at, gamma=factor))


def torch_one_cycle(total, warmup, final, start_fraction=0.04):
    if warmup == 0:  # torch's first phase divides by its length
        return torch_cosine(total, 0, final)
    return torch_rates(total, (total, lambda o: LRS.OneCycleLR(
        o, max_lr=1.0, total_steps=total + 1, pct_start=(warmup + 1) / (total + 1),
        cycle_momentum=False, div_factor=1 / start_fraction,
        final_div_factor=start_fraction / final if final else math.inf)))


def torch_wsd(total, warmup, final, decay, shape="linear"):
    return torch_rates(
        total, rise(warmup), stable(total - warmup - decay), fall(shape, decay, final))


REFERENCES = [
    (torch_constant, "constant", {}),
    (torch_linear, "linear", {}),
    (torch_cosine, "cosine", {}),
    (torch_polynomial, "polynomial", {}),
    (torch_polynomial, "polynomial", {"power": 0.9}),
    (torch_exponential, "exponential", {"factor": 0.95, "every": 1}),
    (torch_exponential, "exponential", {"factor": 0.5, "every": 6}),
    (torch_step, "step", {"factor": 0.1, "every": 12}),
    (torch_step, "step", {"factor": 0.9, "every": 1}),
    (torch_multistep, "multistep", {"factor": 0.1, "at": [3, 20, 30]}),
    (torch_multistep, "multistep", {"factor": 0.5, "at": [1, 1, 39]}),
    (torch_one_cycle, "one_cycle", {}),
    (torch_one_cycle, "one_cycle", {"start_fraction": 0.5}),
    (torch_wsd, "wsd", {"decay": 1}),
    (torch_wsd, "wsd", {"decay": 8}),
    (torch_wsd, "wsd", {"decay": 33, "shape": "cosine"}),
    (torch_wsd, "wsd", {"decay": 33, "shape": "sqrt"}),
    (torch_constant, "plateau", {"factor": 0.1, "patience": 5, "threshold": 1e-4, "cooldown": 0}),
]


def test_every_shape_has_a_reference():
    assert {name for _, name, _ in REFERENCES} == set(schedule.SHAPES)


@pytest.mark.parametrize("total, warmup", [
    (1, 0), (2, 0), (2, 1), (9, 0), (9, 7), (9, 8), (40, 0), (40, 1), (40, 7), (40, 39), (225, 7),
])
@pytest.mark.parametrize("reference, name, args", REFERENCES)
def test_schedules_equal_torch_at_every_step(reference, name, args, total, warmup):
    if name == "wsd":
        args = args | {"decay": min(args["decay"], total - warmup)}
    for final in (0.0, 0.1, 0.25, 1.0):
        ours = [schedule.lr_multiplier(name, s, total, warmup, final, **args) for s in range(total)]
        assert ours == pytest.approx(reference(total, warmup, final, **args), rel=0, abs=1e-12)


@pytest.mark.parametrize("name", schedule.SHAPES)
@pytest.mark.parametrize("total, warmup", [(1, 0), (2, 1), (10, 0), (10, 9), (1000, 50)])
def test_no_step_has_learning_rate_zero_or_more_than_the_peak(name, total, warmup):
    args = schedule.resolve_args(name, {}, 100, 10, total, warmup)
    rates = [schedule.lr_multiplier(name, s, total, warmup, **args) for s in range(total + 5)]
    assert all(0 < rate <= 1 for rate in rates)
    assert set(rates[total:]) == {rates[total - 1]}  # clamped past the end


@pytest.mark.parametrize("name, args", [
    ("linear", {}), ("cosine", {}), ("polynomial", {"power": 0.9}), ("one_cycle", {}),
    ("wsd", {"decay": 7}), ("wsd", {"decay": 7, "shape": "cosine"}),
    ("wsd", {"decay": 7, "shape": "sqrt"}),
])
def test_a_fall_reaches_its_end_one_step_after_the_last(name, args):
    shape = schedule.SHAPES[name]
    assert shape(20, 5, 20, **args) == 0 < shape(19, 5, 20, **args)
    assert shape(5, 5, 20, **args) == 1


def test_lengths_become_steps_and_defaults_are_filled_in():
    def resolve(name, warmup=0, **args):
        return schedule.resolve_args(name, args, 1437, 64, 1000, warmup)

    assert resolve("cosine") == {}
    assert resolve("polynomial") == {"power": 2.0}
    assert resolve("step", every="2 epochs") == {"factor": 0.1, "every": 45}
    assert resolve("step", factor=0.5) == {"factor": 0.5, "every": 300}
    assert resolve("exponential") == {"factor": 0.95, "every": 23}
    assert resolve("multistep") == {"factor": 0.1, "at": [500, 750]}
    assert resolve("multistep", at=["1 epoch", "100 steps", "100 steps", "50%"])["at"] == [
        23, 100, 100, 500]
    assert resolve("wsd", shape="sqrt") == {"decay": 200, "shape": "sqrt"}
    assert resolve("one_cycle") == {"start_fraction": 0.04}
    assert resolve("plateau", patience=0) == {
        "factor": 0.1, "patience": 0, "threshold": 1e-4, "cooldown": 0}


def test_a_length_is_at_least_one_step():
    assert schedule.resolve_args("step", {"every": "1%"}, 100, 10, 3, 0)["every"] == 1
    assert schedule.resolve_args("wsd", {"decay": "1%"}, 100, 10, 3, 0)["decay"] == 1
    assert schedule.resolve_args("multistep", {}, 100, 10, 1, 0)["at"] == [1, 1]


@pytest.mark.parametrize("name, args, message", [
    ("cosine", {"power": 2}, "args: cosine does not take 'power'; it takes nothing"),
    ("step", {"gamma": 0.1}, "args: step does not take 'gamma'; it takes factor, every"),
    ("step", {"factor": 1.0}, "args: factor of step is a number between 0 and 1, not 1.0"),
    ("step", {"factor": 0}, "factor of step is a number between 0 and 1, not 0"),
    ("plateau", {"factor": "0.1"}, "factor of plateau is a number .*, not '0.1'"),
    ("exponential", {"factor": math.nan}, "factor of exponential is a number"),
    ("exponential", {"every": 500}, 'every of exponential is a time .*"500 steps".*, not 500'),
    ("step", {"every": "0 steps"}, "every of step is a time above 0"),
    ("step", {"every": "1e15 steps"}, "every of step is a time above 0"),
    ("polynomial", {"power": 0}, "power of polynomial is a number above 0, not 0"),
    ("polynomial", {"power": True}, "power of polynomial is a number above 0, not True"),
    ("polynomial", {"power": math.inf}, "power of polynomial is a number above 0, not inf"),
    ("multistep", {"at": "50%"}, "at of multistep is a list of times"),
    ("multistep", {"at": []}, "at of multistep is a list of times"),
    ("multistep", {"at": ["50%", 75]}, "at of multistep is a list of times"),
    ("one_cycle", {"start_fraction": 0}, "start_fraction of one_cycle is a number above 0"),
    ("one_cycle", {"start_fraction": 1.5}, "start_fraction of one_cycle is .* at most 1, not 1.5"),
    ("wsd", {"decay": None}, "decay of wsd is a time above 0"),
    ("wsd", {"shape": "exp"}, "shape of wsd is one of linear, cosine, sqrt, not 'exp'"),
    ("wsd", {"shape": ["sqrt"]}, "shape of wsd is one of"),
    ("plateau", {"patience": -1}, "patience of plateau is a whole number, 0 or more, not -1"),
    ("plateau", {"patience": 2.5}, "patience of plateau is a whole number"),
    ("plateau", {"cooldown": False}, "cooldown of plateau is a whole number"),
    ("plateau", {"threshold": 1}, "threshold of plateau is a number from 0 to below 1"),
    ("plateau", {"threshold": -1e-4}, "threshold of plateau is a number from 0"),
])
def test_what_no_shape_can_mean_is_refused_before_the_data_is_known(name, args, message):
    with pytest.raises(ValueError, match=message) as refusal:
        schedule.check_args(name, args)
    assert str(refusal.value).startswith("args: ")
    with pytest.raises(ValueError, match=message):
        schedule.resolve_args(name, args, 100, 10, 100, 0)


@pytest.mark.parametrize("name", schedule.SHAPES)
def test_every_argument_has_a_default_and_a_rule(name):
    schedule.check_args(name, schedule.shape_args(name))
    for argument in schedule.shape_args(name):
        with pytest.raises(ValueError, match=f"args: {argument} of {name} is "):
            schedule.check_args(name, {argument: object()})


def test_drops_out_of_order_are_refused():
    with pytest.raises(ValueError, match=r"^args: at .* ascending .* steps \[50, 30\]"):
        schedule.resolve_args("multistep", {"at": ["50%", "3 epochs"]}, 100, 10, 100, 0)


def test_a_run_shorter_than_warmup_and_decay_is_refused():
    with pytest.raises(ValueError, match=r"^args: decay of wsd is 60 steps .* 42, .* 100; shorten"):
        schedule.resolve_args("wsd", {"decay": "60%"}, 100, 10, 100, 42)


def test_two_halves_of_an_odd_run_fit():
    warmup = schedule.duration_steps("50%", 100, 10, 7)
    assert schedule.resolve_args("wsd", {"decay": "50%"}, 100, 10, 7, warmup)["decay"] == 3


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
