"""The numerics of the learning-rate range test, on curves whose answer is known."""

import math

import numpy as np
import pytest

from trainlib import lr_suggestion
from trainlib.lr_suggestion import (
    DIVERGES,
    NO_FALL,
    NOT_FINITE,
    STILL_FALLS,
    combine,
    fitted_curve,
    suggest,
)
from trainlib.lr_sweep import StopRule, drive, sweep_rates

LR_MIN, LR_MAX = 1e-6, 10.0


def sigmoid(lr, centre, width):
    return 1 / (1 + (lr / centre) ** (-1 / width))


def blow_up(lr, at):
    return 0.2 * np.minimum((lr / at) ** 3, 1e5)


# Families of curves: losses over rates, with a fall of about 1.
FAMILIES = {
    "sigmoid": lambda lr: 1 - sigmoid(lr, 3e-3, 0.7) + blow_up(lr, 0.5),
    "sharp": lambda lr: 1 - sigmoid(lr, 1e-3, 0.35) + blow_up(lr, 0.05),
    "plateau_at_the_end": lambda lr: 1 - sigmoid(lr, 3e-3, 0.7),
    "square_root": lambda lr: (1 + lr / 1e-3) ** -0.5 + blow_up(lr, 0.6),
    "inverse": lambda lr: (1 + lr / 3e-3) ** -1 + blow_up(lr, 1.0),
    "two_dips": lambda lr: (1 - 0.3 * sigmoid(lr, 1e-4, 0.5) - 0.7 * sigmoid(lr, 6e-3, 0.6)
                            + 0.04 * np.exp(-((np.log(lr / 4e-4) / 0.5) ** 2)) + blow_up(lr, 0.5)),
    "training": lambda lr: np.exp(-lr / 4e-3) + blow_up(lr, 0.8),
    "falls_as_steps_pass": lambda lr: (1 - 0.3 * np.log(lr / LR_MIN) / np.log(LR_MAX / LR_MIN)
                                       - 0.7 * sigmoid(lr, 2e-3, 0.7) + blow_up(lr, 0.8)),
    "negative": lambda lr: -50 - sigmoid(lr, 1e-2, 0.6) + blow_up(lr, 1.0),
}


def curve(family, num_steps=100, noise=0.0, seed=0, grows=False):
    """Rates and losses; ``noise`` in units of the fall, growing fourfold over the sweep or not."""
    lrs = np.array(sweep_rates(LR_MIN, LR_MAX, num_steps))
    size = np.linspace(0.5, 2, num_steps) if grows else 1.0
    errors = np.random.default_rng(seed).normal(size=num_steps) * size
    return lrs, FAMILIES[family](lrs) + noise * errors


def true_answers(family):
    """The steepest point of the curve without noise, and half of where its slope has halved."""
    log_lrs = np.linspace(math.log(LR_MIN), math.log(LR_MAX), 20_001)
    slopes = np.gradient(FAMILIES[family](np.exp(log_lrs)), log_lrs)
    steepest = np.argmin(slopes)
    end = steepest + np.argmax(slopes[steepest:] > slopes[steepest] / 2)
    return math.exp(log_lrs[steepest]), math.exp(log_lrs[end]) / 2


def true_steepest(family):
    return true_answers(family)[0]


@pytest.mark.parametrize("spacing", ["exponential", "linear"])
@pytest.mark.parametrize("num_steps", [20, 101])
def test_a_sweep_includes_both_ends_exactly_and_its_steps_are_equal(spacing, num_steps):
    rates = sweep_rates(1e-3, 0.3, num_steps, spacing)
    assert len(rates) == num_steps and (rates[0], rates[-1]) == (1e-3, 0.3)
    steps = np.diff(np.log(rates) if spacing == "exponential" else rates)
    assert steps == pytest.approx(steps.mean())


@pytest.mark.parametrize("lr_min, lr_max, num_steps, spacing", [
    (1e-3, 1e-3, 100, "linear"), (1e-2, 1e-3, 100, "linear"), (0.0, 1.0, 100, "linear"),
    (-1.0, 1.0, 100, "linear"), (math.nan, 1.0, 100, "linear"), (0.1, math.inf, 100, "linear"),
    (1e-6, 1.0, 19, "exponential"), (1e-6, 1.0, 20, "cubic"), (1e-7, 10.0, 100, "linear"),
])
def test_impossible_sweeps_are_refused(lr_min, lr_max, num_steps, spacing):
    with pytest.raises(ValueError, match=", got|, not| leaps to"):
        sweep_rates(lr_min, lr_max, num_steps, spacing)


def test_the_stop_rule_looks_at_the_weighted_mean_of_the_past():
    losses, rule = [5.0, -1.0, 2.0, 7.0], StopRule(50)
    for number, loss in enumerate(losses):
        rule.update(loss)
        weights = [rule.beta ** (number - i) for i in range(number + 1)]
        mean = sum(w * x for w, x in zip(weights, losses, strict=False)) / sum(weights)
        assert rule._mean == pytest.approx(mean)


def stopped_at(losses):
    rule = StopRule(len(losses))
    return next((number for number, loss in enumerate(losses) if rule.update(loss)), None)


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("offset", [0.0, -1.0, -50.0, 1000.0])
def test_the_stop_is_the_same_for_any_sign_and_size_of_the_loss(scale, offset):
    _, losses = curve("sigmoid", noise=0.02)
    expected = stopped_at(list(losses))
    assert 80 < expected < 99  # beyond the fall, in the blow-up, before the end
    assert stopped_at([scale * (loss + offset) for loss in losses]) == expected


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("num_steps", [20, 100, 300])
def test_noise_alone_never_stops_a_sweep(num_steps, seed):
    assert stopped_at(list(np.random.default_rng(seed).normal(size=num_steps))) is None


@pytest.mark.parametrize("losses", [
    pytest.param([2.0] * 100, id="constant"),
    pytest.param([0.1 + 0.2] * 50 + [0.3] * 50, id="lower"),
    pytest.param([50.0] + [2.0] * 99, id="noisy first loss"),
    pytest.param([0.0] + [2.0] * 99, id="low first loss"),
    pytest.param(list(np.linspace(3, 1, 100)), id="only falls"),
])
def test_plateaus_and_falls_run_to_the_end(losses):
    assert stopped_at(losses) is None


@pytest.mark.parametrize("num_steps", [20, 100, 300])
def test_a_curve_that_only_rises_stops_early_but_not_in_the_first_tenth(num_steps):
    rising = list(np.exp(np.linspace(0, 16, num_steps)))
    assert num_steps / 10 <= stopped_at(rising) < num_steps * 0.75


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("at", [0, 50])
def test_a_loss_that_is_not_finite_stops_at_once(loss, at):
    assert stopped_at([1.0] * at + [loss] + [1.0] * (99 - at)) == at


def test_driving_records_successful_steps_only_and_stops():
    rates, losses = curve("sigmoid")
    calls = []

    def step(number, lr):
        calls.append((number, lr))
        return None if number in (0, 7) else float(losses[number])

    lrs, recorded = drive(step, list(rates), StopRule(100))
    assert calls == list(enumerate(rates))[: len(calls)] and 80 < len(calls) < 100
    kept = [number for number, _ in calls if number not in (0, 7)]
    assert lrs == [rates[number] for number in kept]
    assert recorded == [losses[number] for number in kept]


def test_driving_ends_with_a_loss_that_is_not_finite():
    rates = sweep_rates(LR_MIN, LR_MAX, 20)
    lrs, losses = drive(lambda n, lr: math.nan if n == 3 else 1.0, rates, StopRule(20))
    assert lrs == rates[:4] and losses[:3] == [1.0] * 3 and math.isnan(losses[3])
    lrs, losses = drive(lambda n, lr: None if n > 9 else 1.0, rates, StopRule(20))
    assert lrs == [*rates[:10], rates[-1]] and math.isnan(losses[-1])


@pytest.mark.parametrize("noise, grows", [(0.0, False), (0.02, False), (0.1, False), (0.1, True)])
@pytest.mark.parametrize("num_steps", [20, 100, 300])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_median_answer_is_within_a_factor_2_of_the_curve_without_noise(
    family, num_steps, noise, grows
):
    # Many seeds where few points and much noise leave most to chance.
    seeds = 1 if noise == 0 else 50 if num_steps <= 100 else 5
    suggestions = [suggest(*curve(family, num_steps, noise, seed, grows)) for seed in range(seeds)]
    found = [one.by_method for one in suggestions if one.answer is not None]
    assert len(found) >= 0.8 * seeds
    steepest, edge = true_answers(family)
    assert 0.5 < np.median([one["steepest"] for one in found]) / steepest < 2
    # Noise breaks a stretch that ends as gently as the square root's before its end.
    factor = 2.5 if noise == 0.1 else 2
    assert 1 / factor < np.median([one["edge"] for one in found]) / edge < factor


def test_every_method_finds_the_middle_of_a_symmetric_fall():
    lrs, losses = curve("plateau_at_the_end", 200)
    assert lr_suggestion.steepest(lrs, losses) == pytest.approx(3e-3, rel=0.02)
    assert lr_suggestion.valley(lrs, losses) == pytest.approx(3e-3, rel=0.1)
    bowl = (np.log(lrs / 0.1)) ** 2
    assert lr_suggestion.minimum_tenth(lrs, bowl) == pytest.approx(0.01, rel=0.1)


@pytest.mark.parametrize("scale, offset", [(1e-30, 0.0), (1e30, 0.0), (0.5, -1e3), (3.0, 1e3)])
def test_the_unit_and_the_zero_of_the_loss_do_not_matter(scale, offset):
    lrs, losses = curve("sigmoid", noise=0.02)
    expected = suggest(lrs, losses)
    moved = suggest(lrs, scale * (losses + offset))
    assert moved.by_method == pytest.approx(expected.by_method, rel=1e-6)


@pytest.mark.parametrize("factor", [1e-4, 7.0])
def test_answers_follow_the_rates(factor):
    lrs, losses = curve("inverse", noise=0.02)
    expected, moved = suggest(lrs, losses), suggest(factor * lrs, losses)
    for name, rate in expected.by_method.items():
        assert moved.by_method[name] == pytest.approx(factor * rate, rel=1e-6)
    assert moved.doubt == pytest.approx(expected.doubt)


def test_the_same_curve_gives_the_same_answer_and_says_how_sure_it_is():
    lrs, losses = curve("sigmoid", noise=0.1)
    suggestion = suggest(lrs, losses)
    assert suggest(list(lrs), list(losses)) == suggestion
    assert suggestion.answer == float(f"{suggestion.by_method['edge']:.2g}")
    rates = suggestion.by_method.values()
    assert suggestion.doubt == max(rates) / min(rates) >= 1
    assert f"{suggestion.answer:.2g}" in suggestion.verdict


def test_linear_sweeps_and_skipped_steps_do_not_mislead():
    lrs = np.array(sweep_rates(1e-4, 0.1, 100, "linear"))
    errors = 0.02 * np.random.default_rng(0).normal(size=100)
    assert 0.5 < suggest(lrs, 1 - sigmoid(lrs, 1e-2, 0.3) + errors).by_method["steepest"] / 1e-2 < 2
    lrs, losses = curve("sigmoid", noise=0.02)
    kept = np.random.default_rng(1).random(100) < 0.6
    steepest = suggest(lrs[kept], losses[kept]).by_method["steepest"]
    assert 0.5 < steepest / true_steepest("sigmoid") < 2


@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_what_a_net_regains_after_it_has_blown_up_is_no_fall(noise):
    """Beyond a rate the net forgets all and then relearns: the steepest fall of all, too late."""
    lrs, losses = curve("sigmoid", noise=noise)
    regained = 3 * sigmoid(lrs, 0.15, 0.1) - 2.5 * sigmoid(lrs, 0.9, 0.1)
    losses = 1 - sigmoid(lrs, 3e-3, 0.7) + regained + (losses - FAMILIES["sigmoid"](lrs))
    found = suggest(lrs, losses)
    assert 0.5 < found.by_method["steepest"] / true_steepest("sigmoid") < 2
    assert found.answer < 0.1


@pytest.mark.parametrize("tail", [math.nan, math.inf, 1e300], ids=str)
def test_what_a_blow_up_ends_in_does_not_matter(tail):
    lrs, losses = curve("sharp", noise=0.02)
    losses[80:] = tail
    assert 0.5 < suggest(lrs, losses).by_method["steepest"] / true_steepest("sharp") < 2


@pytest.mark.parametrize("num_steps, grows, most", [
    # Noise that grows is misjudged by its mean; few points leave it uncertain as well.
    (20, False, 10), (50, False, 10), (100, False, 10), (100, True, 10), (20, True, 20),
])
def test_pure_noise_has_no_answer(num_steps, grows, most):
    lrs = sweep_rates(LR_MIN, LR_MAX, num_steps)
    size = np.linspace(0.5, 2, num_steps) if grows else 1.0
    verdicts = [
        suggest(lrs, size * np.random.default_rng(seed).normal(size=num_steps)).verdict
        for seed in range(200)
    ]
    silent = (NO_FALL, DIVERGES, STILL_FALLS)
    assert sum(not verdict.startswith(silent) for verdict in verdicts) <= most
    assert verdicts.count(NO_FALL) >= 170


@pytest.mark.parametrize("num_steps, least", [(20, 0.75), (50, 0.9), (100, 0.95)])
def test_a_fall_of_four_times_the_noise_has_an_answer(num_steps, least):
    answers = [suggest(*curve("sigmoid", num_steps, 0.25, seed)).answer for seed in range(60)]
    assert sum(answer is not None for answer in answers) >= least * 60


LRS = np.array(sweep_rates(LR_MIN, LR_MAX, 100))


@pytest.mark.parametrize("losses, verdict", [
    pytest.param(np.full(100, 2.3), NO_FALL, id="constant"),
    pytest.param(1e6 + 1e-10 * (np.arange(100) % 3), NO_FALL, id="rounding"),
    pytest.param(1 + blow_up(LRS, 0.5) + 0.01 * np.sin(1e3 * np.arange(100) ** 2), NO_FALL,
                 id="plateau, then a blow-up"),
    pytest.param(np.log(LRS), DIVERGES, id="rises"),
    pytest.param(LRS, DIVERGES, id="rises ever faster"),
    pytest.param(np.full(100, math.nan), NOT_FINITE, id="nan"),
    pytest.param(np.where(LRS < 2e-6, 1.0, math.nan), DIVERGES, id="soon nan"),
    pytest.param(-np.log(LRS), STILL_FALLS, id="falls evenly"),
    pytest.param(-np.sqrt(LRS), STILL_FALLS, id="falls ever faster"),
])
def test_no_number_is_made_up(losses, verdict):
    suggestion = suggest(LRS, losses)
    assert suggestion.verdict.startswith(verdict)
    assert suggestion.answer is None and suggestion.doubt is None
    assert set(suggestion.by_method.values()) == {None}
    if verdict != STILL_FALLS:
        for method in lr_suggestion.METHODS.values():
            assert method(LRS, losses) is None


def test_a_sweep_that_ends_in_nan_while_it_falls_is_not_told_to_go_on():
    losses = -np.sqrt(LRS)
    losses[-1] = math.nan
    assert suggest(LRS, losses).answer is not None


def test_the_curve_that_is_drawn_is_the_one_that_is_read():
    lrs, losses = curve("sigmoid")
    rates, levels = fitted_curve(lrs, losses)
    inside = np.array(rates) < 0.05
    np.testing.assert_allclose(np.array(levels)[inside],
                               FAMILIES["sigmoid"](np.array(rates)[inside]), atol=0.05)
    assert rates[-1] < 1 and fitted_curve([], []) is None


@pytest.mark.parametrize("num_steps", [25, 30, 40])  # 20 leave 3 a decade, which show no rise
def test_a_fall_with_too_few_points_before_the_blow_up_is_no_answer_from_after_it(num_steps):
    lrs = np.array(sweep_rates(LR_MIN, LR_MAX, num_steps))
    losses = (1 - 0.6 * sigmoid(lrs, 1e-5, 0.4) + 4 * sigmoid(lrs, 2e-4, 0.1)
              - 3.6 * sigmoid(lrs, 0.05, 0.1))
    answer = suggest(lrs, losses).answer
    assert answer is None or answer < 1e-4


def test_an_empty_sweep_diverged_at_once():
    assert suggest([], []).verdict == DIVERGES


@pytest.mark.parametrize("lrs, losses", [
    ([1.0, 2.0], [1.0]), ([0.0, 1.0], [1.0, 1.0]), ([2.0, 1.0], [1.0, 1.0]),
    ([1.0, 1.0], [1.0, 1.0]),
])
def test_what_is_no_curve_is_refused(lrs, losses):
    with pytest.raises(ValueError, match="one loss for each rate"):
        suggest(lrs, losses)


def test_repeats_give_the_median_answer_and_a_band():
    runs = [curve("sigmoid", noise=0.1, seed=seed) for seed in range(3)]
    runs[2] = runs[2][0][:90], runs[2][1][:90]
    band, suggestion = combine(runs)
    assert suggestion.answer == pytest.approx(sorted(suggest(*run).answer for run in runs)[1])
    lrs, median, low, high = band
    assert lrs == list(runs[0][0]) and "3 of 3" in suggestion.verdict
    at_50 = sorted(losses[50] for _, losses in runs)
    assert [low[50], median[50], high[50]] == at_50
    assert low[95] == min(losses[95] for _, losses in runs[:2])


def test_repeats_answer_where_most_of_them_do():
    falls, flat = curve("sigmoid"), (LRS, np.ones(100))
    assert combine([falls, falls, flat])[1].answer == pytest.approx(suggest(*falls).answer)
    assert combine([falls, flat])[1] == suggest(*flat)
    assert combine([([], [])])[1].verdict == DIVERGES
