"""Distillation terms against a float64 brute force, in their limits, at extreme logits."""

import math

import pytest
import torch

from trainlib import kd_losses
from trainlib.kd_losses import IGNORED

TERMS = kd_losses.CLASS_TERMS | kd_losses.BINARY_TERMS | kd_losses.NUMBER_TERMS
DIVERGENCES = ("kl", "reverse_kl", "jsd", "dkd", "bernoulli_kl")
PRECISIONS = (torch.float16, torch.bfloat16, torch.float32)
EXTREME = torch.tensor([[60.0, -60.0, 0.0], [-60.0, 60.0, 60.0], [60.0, 60.0, 60.0]])
HALF_ULP = 2.0**-24  # of fp32, relative
NAN, INF = math.nan, math.inf


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def labels(num_classes, *shape):
    return torch.randint(num_classes, shape, generator=torch.Generator().manual_seed(1))


def class_cases():
    yield draw(7, 5), draw(7, 5, seed=1), labels(5, 7)
    yield draw(4, 2), draw(4, 2, seed=1), torch.tensor([0, 1, 1, 0])
    yield EXTREME, EXTREME.flip(1), torch.tensor([1, 0, 2])
    yield EXTREME, EXTREME.roll(1, 0), torch.tensor([0, IGNORED, 1])
    yield torch.zeros(0, 3), torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)
    yield draw(1, 3), draw(1, 3, seed=1), torch.tensor([2])
    yield 3 * draw(7, 5), 3 * draw(7, 5, seed=1), labels(5, 7).masked_fill(
        torch.arange(7) % 2 == 0, IGNORED)
    yield draw(2, 3), draw(2, 3, seed=1), torch.full((2,), IGNORED)
    half = labels(4, 2, 3, 2).masked_fill(labels(2, 2, 3, 2) == 0, IGNORED)
    yield 9 * draw(2, 4, 3, 2), 9 * draw(2, 4, 3, 2, seed=1), half


def number_cases():
    for student, teacher, _ in class_cases():
        target = draw(*student.shape, seed=2)
        # Moved off the student's: bounded_mse has no derivative where both err alike.
        teacher = teacher + draw(*student.shape, seed=3)
        yield student, teacher, target.masked_fill(labels(3, *student.shape) == 0, NAN)


def cases(name):
    every = list(number_cases() if name in kd_losses.NUMBER_TERMS else class_cases())
    return [case for case in every if name != "dist" or case[0].ndim == 2]


ALL = [(name, *case) for name in TERMS for case in cases(name)]


def rows(tensor):
    """[items, classes, ...] as a list of the classes' values, position by position."""
    return tensor.double().movedim(1, -1).flatten(0, -2).tolist()


def log_softmax(logits, temperature=1.0):
    scaled = [z / temperature for z in logits]
    peak = max(scaled)
    log_total = peak + math.log(sum(math.exp(z - peak) for z in scaled))
    return [z - log_total for z in scaled]


def divergence(log_p, log_q):
    return sum(math.exp(p) * (p - q) for p, q in zip(log_p, log_q, strict=True) if p > -INF)


def log_sum(values):
    return max(values) + math.log(sum(math.exp(v - max(values)) for v in values))


def brute_item(name, s, t, label, temperature, arguments):
    """A term of one item in float64, from its definition; s and t are lists of logits."""
    if name == "logit_mse":
        return sum((a - b) ** 2 for a, b in zip(s, t, strict=True)) / len(s)
    log_s, log_t = log_softmax(s, temperature), log_softmax(t, temperature)
    if name == "kl":
        value = divergence(log_t, log_s)
    elif name == "reverse_kl":
        value = divergence(log_s, log_t)
    elif name == "jsd":
        beta = arguments.get("beta", 0.5)
        log_m = [log_sum([math.log(1 - beta) + a, math.log(beta) + b])
                 for a, b in zip(log_s, log_t, strict=True)]
        value = beta * divergence(log_t, log_m) + (1 - beta) * divergence(log_s, log_m)
        value /= beta * (1 - beta)
    else:
        if label == IGNORED:
            return 0.0
        pairs, others = [], []
        for log_p in (log_s, log_t):
            rest = [p for k, p in enumerate(log_p) if k != label]
            pairs.append([log_p[label], log_sum(rest)])
            others.append([p - log_sum(rest) for p in rest])
        value = (arguments.get("alpha", 1.0) * divergence(pairs[1], pairs[0])
                 + arguments.get("beta", 8.0) * divergence(others[1], others[0]))
    return temperature**2 * value


def correlation(a, b):
    def centred(x):
        mean = sum(x) / len(x)
        size = math.sqrt(sum((v - mean) ** 2 for v in x))
        constant = size <= 1e-6 * math.sqrt(sum(v**2 for v in x))
        return [0.0 if constant else v - mean for v in x], 0.0 if constant else size

    (a, size_a), (b, size_b) = centred(a), centred(b)
    return sum(x * y for x, y in zip(a, b, strict=True)) / (size_a * size_b + 1e-8)


def brute_dist(student, teacher, target, temperature, beta=1.0, gamma=1.0):
    p, q = ([[math.exp(v) for v in log_softmax(z, temperature)] for z in rows(x)]
            for x in (student, teacher))
    kept = [i for i, label in enumerate(target.tolist()) if label != IGNORED]
    intra = 0.0
    if len(kept) > 1:
        columns = range(student.shape[1])
        intra = sum(1 - correlation([p[i][k] for i in kept], [q[i][k] for i in kept])
                    for k in columns) / len(columns)
    return [beta * (1 - correlation(p[i], q[i])) + gamma * intra if i in kept else 0.0
            for i in range(len(target))]


def brute_value(name, s, t, y, temperature, arguments):
    if name == "mse":
        return (s - t) ** 2
    if name == "bounded_mse":
        bound = (s - y) ** 2 + arguments.get("margin", 0.0) > (t - y) ** 2
        return (s - y) ** 2 if bound else 0.0  # never where y is NaN
    log_p, log_q = ([-math.log1p(math.exp(-abs(x))) + min(x, 0) for x in (z, -z)]
                    for z in (t / temperature, s / temperature))
    return temperature**2 * divergence(log_p, log_q)


def brute(name, student, teacher, target, temperature=1.0, **arguments):
    if name == "dist":
        return torch.tensor(brute_dist(student, teacher, target, temperature, **arguments),
                            dtype=torch.float64)
    if name in ("mse", "bounded_mse", "bernoulli_kl"):
        truth = target if name == "bounded_mse" else torch.zeros_like(student)
        values = [brute_value(name, s, t, y, temperature, arguments) for s, t, y in zip(
            *(x.double().flatten().tolist() for x in (student, teacher, truth)), strict=True)]
        return torch.tensor(values, dtype=torch.float64).view(student.shape)
    values = [brute_item(name, *item, temperature, arguments)
              for item in zip(rows(student), rows(teacher), target.flatten().tolist(), strict=True)]
    shape = student.shape[:1] + student.shape[2:]
    return torch.tensor(values, dtype=torch.float64).view(shape)


def tolerance(name, student, teacher, temperature=1.0):
    """What a few roundings of log-probabilities come to; they reach twice the largest logit."""
    largest = max((x.abs().max().item() for x in (student, teacher) if x.numel()), default=0.0)
    atol = 6 * HALF_ULP * (2 * largest / temperature + 2) * (9 if name == "dkd" else 1)
    factor = 1.0 if name == "dist" else temperature**2
    return {"rtol": 2e-6, "atol": factor * atol}


@pytest.mark.parametrize("name, student, teacher, target", ALL)
@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_every_term_is_the_brute_force_in_fp32_whatever_the_models_precision(
    name, student, teacher, target, dtype, temperature
):
    student, teacher = student.to(dtype), teacher.to(dtype)
    loss = TERMS[name](student, teacher, target, temperature)
    assert loss.dtype == torch.float32
    reference = brute(name, student, teacher, target, temperature)
    close = tolerance(name, student, teacher, temperature)
    torch.testing.assert_close(loss.double(), reference, **close)


@pytest.mark.parametrize("name, student, teacher, target", ALL)
def test_gradients_are_finite_and_those_of_the_brute_force(name, student, teacher, target):
    scores = student.clone().requires_grad_()
    with torch.autograd.set_detect_anomaly(True):  # no NaN on the way, masked or not
        loss = TERMS[name](scores, teacher, target, 2.0)
        weights = draw(*loss.shape, seed=7)
        (weights * loss).sum().backward()
    assert loss.isfinite().all() and scores.grad.isfinite().all()
    if name == "dist" and student.equal(EXTREME):
        return  # has a constant row, where a correlation has no derivative
    step, differences = 1e-4, []
    for k in range(student.numel()):
        moved = torch.zeros(student.numel(), dtype=torch.float64)
        moved[k] = step
        up, down = (brute(name, student.double() + sign * moved.view_as(student), teacher, target,
                          2.0) for sign in (1, -1))
        differences.append((weights * (up - down)).sum() / (2 * step))
    reference = torch.tensor(differences, dtype=torch.float64).view_as(student)
    atol = 1e-5 + tolerance(name, student, teacher, 2.0)["atol"]
    torch.testing.assert_close(scores.grad.double(), reference, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("name, student, teacher, target", [
    case for case in ALL if case[0] in ("dkd", "dist", "bounded_mse")])
def test_value_and_gradient_are_exactly_0_without_a_target(name, student, teacher, target):
    scores = student.clone().requires_grad_()
    loss = TERMS[name](scores, teacher, target, 2.0)
    loss.sum().backward()
    if name == "bounded_mse":
        assert not loss[target.isnan()].any() and not scores.grad[target.isnan()].any()
    else:
        assert not loss[target == IGNORED].any()
        assert not scores.grad.movedim(1, -1)[target == IGNORED].any()


def test_only_the_terms_that_say_so_depend_on_the_target():
    student, teacher = draw(6, 4), draw(6, 4, seed=1)
    for name, term in TERMS.items():
        if name in kd_losses.NEEDS_TARGET:
            first, second = ((draw(6, 4, seed=2), draw(6, 4, seed=3)) if name == "bounded_mse" else
                             (torch.zeros(6, dtype=torch.int64), torch.ones(6, dtype=torch.int64)))
            assert not term(student, teacher, first).equal(term(student, teacher, second))
        else:
            of_any = term(student, teacher, torch.zeros(6, dtype=torch.int64))
            assert term(student, teacher, None).equal(of_any)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("logits", [draw(6, 4), EXTREME, 20 * draw(2, 3, 4)])
def test_the_divergence_of_a_teacher_from_itself_is_zero(name, logits):
    student = logits.clone().requires_grad_()
    target = torch.zeros_like(logits[:, 0], dtype=torch.int64)
    loss = TERMS[name](student, logits, target, 3.0)
    loss.sum().backward()
    assert not loss.any()
    assert student.grad.abs().max() <= tolerance(name, logits, logits, 3.0)["atol"]


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergences_are_never_negative_beyond_rounding(name):
    teacher = 3 * draw(50, 6)
    for distance in (1e-4, 1e-2, 1.0):
        student = teacher + distance * draw(50, 6, seed=1)
        loss = TERMS[name](student, teacher, labels(6, 50))
        assert loss.min() > -tolerance(name, student, teacher)["atol"]


@pytest.mark.parametrize("name", ["kl", "reverse_kl", "jsd"])
def test_at_high_temperature_the_gradient_is_the_difference_of_logits_over_classes(name):
    # Hinton et al. 2015, section 2.1, for zero-mean logits; jsd at 0.5 has the same second order.
    student, teacher = (x - x.mean(1, keepdim=True) for x in (draw(8, 10), draw(8, 10, seed=1)))
    scores = student.clone().requires_grad_()
    TERMS[name](scores, teacher, None, 1e3).sum().backward()
    # The next order is logits^2 / temperature / classes; p (0.1) rounds to 6e-9, times 1e3.
    torch.testing.assert_close(scores.grad, (student - teacher) / 10, rtol=0, atol=2e-3)
    loss = TERMS[name](student, teacher, None, 64.0)
    reference = (student - teacher).square().sum(1) / 20
    torch.testing.assert_close(loss, reference, rtol=0.1, atol=64**2 * 1e-7)


def test_kl_is_tckd_plus_nckd_in_proportion_to_what_the_teacher_leaves():
    student, teacher, target = 3 * draw(9, 5), 3 * draw(9, 5, seed=1), labels(5, 9)
    for temperature in (1.0, 4.0):
        tckd = kd_losses.dkd(student, teacher, target, temperature, alpha=1.0, beta=0.0)
        nckd = kd_losses.dkd(student, teacher, target, temperature, alpha=0.0, beta=1.0)
        p = (teacher / temperature).softmax(1).gather(1, target[:, None]).squeeze(1)
        whole = kd_losses.kl(student, teacher, target, temperature)
        torch.testing.assert_close(tckd + (1 - p) * nckd, whole, rtol=1e-5, atol=1e-5)


def test_two_classes_have_no_others_to_distil():
    student = draw(4, 2).requires_grad_()
    loss = kd_losses.dkd(student, draw(4, 2, seed=1), labels(2, 4), alpha=0.0)
    loss.sum().backward()
    assert not loss.any() and not student.grad.any()


@pytest.mark.parametrize("beta", [1e-9, 1e-6, 1e-3, 0.1, 0.5, 0.9, 1 - 1e-3, 1 - 1e-6])
@pytest.mark.parametrize("student, teacher", [case[:2] for case in class_cases()])
def test_jsd_keeps_its_digits_up_to_both_ends(beta, student, teacher):
    scores = student.clone().requires_grad_()
    loss = kd_losses.jsd(scores, teacher, None, 2.0, beta=beta)
    loss.sum().backward()
    assert scores.grad.isfinite().all()
    if beta >= 1e-6:  # below, the definition loses its own digits, even in float64
        target = torch.zeros_like(student[:, 0])
        reference = brute("jsd", student, teacher, target, 2.0, beta=beta)
        close = tolerance("jsd", student, teacher, 2.0)
        torch.testing.assert_close(loss.double(), reference, rtol=1e-5, atol=close["atol"])


@pytest.mark.parametrize("beta", [1e-6, 0.1, 0.3, 0.5, 0.8, 1 - 1e-6])
def test_jsd_keeps_its_digits_where_the_student_has_almost_arrived(beta):
    teacher = draw(6, 4)
    student = teacher + 1e-3 * draw(6, 4, seed=1)
    loss = kd_losses.jsd(student, teacher, None, beta=beta).double()
    reference = brute("jsd", student, teacher, torch.zeros(6), beta=beta)
    # The parts are p times a gap of 1e-3, each rounded twice, over all classes.
    atol = 8 * 1e-3 * HALF_ULP
    torch.testing.assert_close(loss, reference, rtol=1e-3, atol=atol)


def test_jsd_tends_to_the_divergences_at_its_ends_and_is_symmetric():
    student, teacher = draw(6, 4), draw(6, 4, seed=1)
    ends = ((0.0, kd_losses.kl, lambda x: x), (1.0, kd_losses.reverse_kl, lambda x: 1 - x))
    for end, limit, at in ends:
        whole = limit(student, teacher, None, 2.0)
        assert kd_losses.jsd(student, teacher, None, 2.0, beta=end).equal(whole)
        far, near = ((kd_losses.jsd(student, teacher, None, 2.0, beta=at(x)) - whole).abs().max()
                     for x in (1e-2, 1e-3))
        assert far < 0.1 * whole.max() and 0.08 < near / far < 0.12  # in proportion to beta
        close = kd_losses.jsd(student, teacher, None, 2.0, beta=at(1e-7))
        torch.testing.assert_close(close, whole, rtol=1e-5, atol=1e-5)
    for beta in (0.2, 0.5):
        swapped = kd_losses.jsd(teacher, student, None, beta=1 - beta)
        mine = kd_losses.jsd(student, teacher, None, beta=beta)
        torch.testing.assert_close(mine, swapped, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("beta", [None, 0.01, 0.99])
def test_a_class_that_both_rule_out_changes_nothing(name, beta):
    arguments = {} if beta is None or name != "jsd" else {"beta": beta}
    student, teacher = draw(5, 4), draw(5, 4, seed=1)
    out = torch.full((5, 1), -INF)
    scores = torch.cat([student, out], 1).requires_grad_()
    loss = TERMS[name](scores, torch.cat([teacher, out], 1), None, **arguments)
    loss.sum().backward()
    torch.testing.assert_close(loss, TERMS[name](student, teacher, None, **arguments))
    assert scores.grad.isfinite().all() and not scores.grad[:, -1].any()
    if name != "reverse_kl":  # the teacher alone rules it out
        scores = torch.cat([student, torch.zeros(5, 1)], 1).requires_grad_()
        TERMS[name](scores, torch.cat([teacher, out], 1), None, **arguments).sum().backward()
        assert scores.grad.isfinite().all() and (scores.grad[:, -1] > 0).all()


@pytest.mark.parametrize("name, arguments", [
    ("dkd", {"alpha": 0.5, "beta": 2.0}), ("dist", {"beta": 2.0, "gamma": 0.5}),
    ("bounded_mse", {"margin": 0.5}), ("jsd", {"beta": 0.2}),
])
def test_arguments_of_a_term_do_what_its_docstring_says(name, arguments):
    for student, teacher, target in cases(name):
        loss = TERMS[name](student, teacher, target, 2.0, **arguments)
        reference = brute(name, student, teacher, target, 2.0, **arguments)
        close = tolerance(name, student, teacher, 2.0)
        torch.testing.assert_close(loss.double(), reference, **close)


def test_dist_compares_items_only_with_those_that_have_a_target():
    student, teacher = 2 * draw(8, 5), 2 * draw(8, 5, seed=1)
    target = labels(5, 8).masked_fill(torch.arange(8) > 4, IGNORED)
    alone = kd_losses.dist(student[:5], teacher[:5], None)
    torch.testing.assert_close(kd_losses.dist(student, teacher, target)[:5], alone)
    one = kd_losses.dist(student[:1], teacher[:1], None, beta=0.0)
    assert not one.any()  # an item alone has nothing to be compared with


def test_what_is_constant_correlates_with_nothing_and_has_no_gradient():
    # Seven equal logits: the mean of 1/7 is rounded, and must not become noise.
    student = torch.full((4, 7), 0.1, requires_grad=True)
    loss = kd_losses.dist(student, draw(4, 7), None, 4.0)
    scores = kd_losses.standardize(student)
    (loss.sum() + (scores * draw(4, 7)).sum()).backward()
    torch.testing.assert_close(loss, torch.full((4,), 2.0))
    assert not student.grad.any() and not scores.any()


@pytest.mark.parametrize("shape", [(6, 5), (2, 4, 3, 2), (0, 3), (3, 2)])
def test_standardized_logits_have_mean_0_and_size_1(shape):
    logits = 5 + 3 * draw(*shape)
    reference = [[(z - sum(row) / len(row)) / (math.sqrt(sum(
        (y - sum(row) / len(row)) ** 2 for y in row) / len(row)) + 1e-7) for z in row]
        for row in rows(logits)]
    result = kd_losses.standardize(logits.half().float())
    assert result.shape == shape
    torch.testing.assert_close(result, kd_losses.standardize(logits.half()), rtol=0, atol=0)
    result = torch.tensor(rows(kd_losses.standardize(logits)))
    torch.testing.assert_close(result, torch.tensor(reference), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_averaged_logits_are_those_of_the_mean_probability(temperature, binary, dtype):
    teachers = [EXTREME.to(dtype), (9 * draw(3, 3)).to(dtype), EXTREME.flip(1).to(dtype)]
    weights = [1.0, 2.0, 5.0]

    def probabilities(logits):
        logits = logits.double() / temperature
        # Both sides of each label: 1 - p has no digits near 1.
        return torch.stack([logits.sigmoid(), (-logits).sigmoid()]) if binary else logits.softmax(1)

    mean = kd_losses.average_logits(teachers, weights, temperature, binary=binary)
    parts = zip(weights, teachers, strict=True)
    reference = sum(weight / 8 * probabilities(teacher) for weight, teacher in parts)
    # Log-probabilities up to 120 are rounded twice, and so are logits that are multiples of them.
    close = {"rtol": 4 * 128 * HALF_ULP, "atol": 0}
    torch.testing.assert_close(probabilities(mean), reference, **close)
    geometric = kd_losses.average_logits(teachers, weights, temperature, "logits", binary)
    reference = sum(w * t.double() for w, t in zip(weights, teachers, strict=True)) / 8
    torch.testing.assert_close(geometric.double(), reference, rtol=1e-6, atol=1e-5)


def test_a_single_teacher_comes_back_unchanged():
    teacher = draw(3, 4).bfloat16()
    for of in ("probabilities", "logits"):
        assert kd_losses.average_logits([teacher], [0.3], 2.0, of) is teacher
        assert kd_losses.average_logits([draw(3, 4), teacher], [0.0, 1.0], 2.0, of) is teacher


@pytest.mark.parametrize("student, teacher", [
    (3 * draw(6, 5), 3 * draw(6, 5, seed=1)), (EXTREME, EXTREME.flip(1)),
    (draw(2, 4, 3, 2), draw(2, 4, 3, 2, seed=1)), (torch.zeros(0, 3), torch.zeros(0, 3)),
    (draw(2, 1), draw(2, 1, seed=1)),
])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_kept_classes_and_the_rest_never_diverge_more_than_all_classes(
    student, teacher, temperature
):
    whole = kd_losses.kl(student, teacher, None, temperature)
    close = tolerance("kl", student, teacher, temperature)
    last = torch.zeros_like(whole)
    for k in range(1, student.shape[1] + 1):
        cache = kd_losses.top_k(teacher, k, temperature)
        scores = student.clone().requires_grad_()
        with torch.autograd.set_detect_anomaly(True):
            loss = kd_losses.top_k_kl(scores, *cache, temperature)
            loss.sum().backward()
        assert scores.grad.isfinite().all() and cache[1].dtype == torch.int64
        assert (loss >= last - close["atol"]).all()  # and more classes say more
        references = []
        for s, t in zip(rows(student), rows(teacher), strict=True):
            order = sorted(range(len(t)), key=t.__getitem__, reverse=True)
            events = []
            for log_p in (log_softmax(t, temperature), log_softmax(s, temperature)):
                rest = [log_p[c] for c in order[k:]]
                events.append([log_p[c] for c in order[:k]] + ([log_sum(rest)] if rest else []))
            references.append(temperature**2 * divergence(*events))
        if not teacher.equal(EXTREME.flip(1)):  # has ties, and any of them may be kept
            reference = torch.tensor(references, dtype=torch.float64).view_as(loss)
            torch.testing.assert_close(loss.double(), reference, **close)
        last = loss
    assert not cache[2].isfinite().any()  # there is no rest
    torch.testing.assert_close(last, whole, **close)


def test_a_half_precision_cache_is_enough_and_an_empty_rest_does_no_harm():
    student, teacher = draw(6, 5).requires_grad_(), 30 * draw(6, 5, seed=1)
    log_probs, indices, tail = kd_losses.top_k(teacher, 2)
    loss = kd_losses.top_k_kl(student, log_probs.half(), indices, torch.full((6,), -INF).half())
    loss.sum().backward()
    assert loss.dtype == torch.float32 and student.grad.isfinite().all() and loss.isfinite().all()


def flat(features):
    return features.double().flatten(1).tolist()


def unit(row):
    size = math.sqrt(sum(v * v for v in row))
    return [v / size if size else 0.0 for v in row]


def distance(a, b):
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))


def brute_features(name, student, teacher):
    s, t = flat(student), flat(teacher)
    if name == "attention":
        s, t = ([unit([sum(channel[k] ** 2 for channel in item) for k in range(len(item[0]))])
                 for item in x.double().flatten(2).tolist()] for x in (student, teacher))
    if name == "similarity":
        s, t = ([unit([sum(x * y for x, y in zip(a, b, strict=True)) for b in rows_])
                 for a in rows_] for rows_ in (s, t))
    if name == "cosine":
        return [1 - sum(x * y for x, y in zip(unit(a), unit(b), strict=True))
                for a, b in zip(s, t, strict=True)]
    values = [distance(a, b) for a, b in zip(s, t, strict=True)]
    return values if name == "attention" else [v / len(s[0]) for v in values]


@pytest.mark.parametrize("name", kd_losses.FEATURE_TERMS)
@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("shape, scale", [((5, 3, 4, 2), 1.0), ((1, 2, 3), 60.0), ((4, 3, 1), 1.0)])
def test_every_feature_term_is_the_brute_force_and_differentiable_at_0(name, dtype, shape, scale):
    student, teacher = (scale * draw(*shape)).to(dtype), (scale * draw(*shape, seed=1)).to(dtype)
    student[0] = 0.0
    for case in ((student, teacher), (teacher, student), (student, student)):
        first = case[0].clone().requires_grad_()
        loss = kd_losses.FEATURE_TERMS[name](first, case[1])
        loss.sum().backward()
        reference = torch.tensor(brute_features(name, *case), dtype=torch.float64)
        assert loss.dtype == torch.float32 and first.grad.isfinite().all()
        torch.testing.assert_close(loss.double(), reference, rtol=1e-5, atol=1e-6)


def test_relations_compare_features_of_different_sizes():
    student, teacher = draw(6, 3, 4, 4), draw(6, 8, 4, 4, seed=1)
    for name in ("attention", "similarity"):
        reference = torch.tensor(brute_features(name, student, teacher), dtype=torch.float64)
        loss = kd_losses.FEATURE_TERMS[name](student, teacher)
        torch.testing.assert_close(loss.double(), reference, rtol=1e-5, atol=1e-7)
    matrices = [torch.nn.functional.normalize(x.flatten(1) @ x.flatten(1).T) for x in
                (student, teacher)]  # Tung and Mori 2019, equation 4
    whole = (matrices[0] - matrices[1]).square().sum() / 36
    torch.testing.assert_close(kd_losses.similarity_preserving(student, teacher).mean(), whole)


def test_the_teacher_is_not_detached():
    for name, term in TERMS.items():
        teacher = draw(3, 4, seed=1).requires_grad_()
        target = draw(3, 4, seed=2) if name == "bounded_mse" else torch.tensor([0, 1, 2])
        loss = term(draw(3, 4), teacher, target).sum()
        assert loss.requires_grad == (name != "bounded_mse")  # of which it is only the bound


def test_nothing_waits_for_the_device_or_takes_its_shape_from_the_data():
    # Tensors on "meta" have no values: reading one raises.
    student, teacher = (torch.zeros(2, 3, device="meta", dtype=torch.bfloat16) for _ in range(2))
    target = torch.zeros(2, dtype=torch.int64, device="meta")
    for name, term in TERMS.items():
        loss = term(student, teacher, teacher if name == "bounded_mse" else target, 2.0)
        assert loss.device.type == "meta" and loss.dtype == torch.float32
    for term in kd_losses.FEATURE_TERMS.values():
        assert term(student[..., None], teacher[..., None]).shape == (2,)
    for binary in (False, True):
        mean = kd_losses.average_logits([student, teacher], [1, 2], 2.0, binary=binary)
        assert mean.shape == kd_losses.standardize(student).shape == (2, 3)
    assert kd_losses.top_k_kl(student, *kd_losses.top_k(teacher, 2)).shape == (2,)


@pytest.mark.parametrize("name, arguments, message", [
    *((name, {"temperature": value}, f"temperature is a number > 0, got {value}")
      for name in (*DIVERGENCES, "dist") for value in (0.0, -1.0, INF, NAN)),
    ("jsd", {"beta": -0.1}, r"beta lies in \[0, 1\], got -0.1"),
    ("jsd", {"beta": NAN}, r"beta lies in \[0, 1\], got nan"),
    ("dkd", {"alpha": -1.0}, "alpha is a number >= 0, got -1.0"),
    ("dkd", {"beta": INF}, "beta is a number >= 0, got inf"),
    ("dist", {"beta": NAN}, "beta is a number >= 0, got nan"),
    ("dist", {"gamma": -1.0}, "gamma is a number >= 0, got -1.0"),
    ("bounded_mse", {"margin": -1.0}, "margin is a number >= 0, got -1.0"),
])
def test_arguments_out_of_range_are_refused(name, arguments, message):
    target = torch.zeros(2, 3) if name == "bounded_mse" else torch.tensor([0, 1])
    with pytest.raises(ValueError, match=message):
        TERMS[name](torch.zeros(2, 3), torch.zeros(2, 3), target, **arguments)


@pytest.mark.parametrize("name", TERMS)
def test_shapes_that_do_not_fit_are_refused_and_never_broadcast(name):
    logits = torch.zeros(3, 2)
    target = logits if name == "bounded_mse" else torch.zeros(3, dtype=torch.int64)
    for other in ((3, 1), (3, 3), (1, 2), (3, 2, 1)):
        with pytest.raises(ValueError, match=r"got \(3, 2\) and .*one list of classes"):
            TERMS[name](logits, torch.zeros(other), target)
    if name in kd_losses.CLASS_TERMS:
        with pytest.raises(ValueError, match=r"logits \[items, classes"):
            TERMS[name](torch.zeros(3), torch.zeros(3), target)
    if name in ("dkd", "dist"):
        for wrong in (torch.zeros(3), torch.zeros(3, dtype=torch.int32), target[:, None]):
            with pytest.raises(ValueError, match="make class numbers long"):
                TERMS[name](logits, logits, wrong)


@pytest.mark.parametrize("call, message", [
    (lambda: kd_losses.dkd(torch.zeros(2, 1), torch.zeros(2, 1), torch.tensor([0, 0])),
     "got 1 class; use kl"),
    (lambda: kd_losses.dkd(torch.zeros(2, 3), torch.zeros(2, 3), None), "a target None"),
    (lambda: kd_losses.dist(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), None),
     r"dist takes logits \[items, classes\], got \(2, 3, 4\)"),
    (lambda: kd_losses.average_logits([], []), r"one a teacher.*got \[\] for 0 teachers"),
    (lambda: kd_losses.average_logits([torch.zeros(2, 3)], [1, 1]), "for 1 teachers"),
    (lambda: kd_losses.average_logits([torch.zeros(2, 3)] * 2, [1, -1]), "finite and >= 0"),
    (lambda: kd_losses.average_logits([torch.zeros(2, 3)] * 2, [0, 0]), "not all 0"),
    (lambda: kd_losses.average_logits([torch.zeros(2, 3)] * 2, [1, 1], of="odds"), "got 'odds'"),
    (lambda: kd_losses.average_logits([torch.zeros(2, 3)] * 2, [1, 1], 0.0), "temperature"),
    (lambda: kd_losses.average_logits([torch.zeros(2, 3), torch.zeros(2, 1)], [1, 1]), "one shape"),
    (lambda: kd_losses.top_k(torch.zeros(2, 3), 0), r"got 0 for logits \(2, 3\)"),
    (lambda: kd_losses.top_k(torch.zeros(2, 3), 4), "k lies between 1 and the number of classes"),
    (lambda: kd_losses.top_k(torch.zeros(2, 3), 2, -1.0), "temperature"),
    (lambda: kd_losses.top_k_kl(torch.zeros(2, 3), *kd_losses.top_k(torch.zeros(4, 3), 2)),
     "pass on what top_k gave"),
    (lambda: kd_losses.top_k_kl(torch.zeros(2, 1), *kd_losses.top_k(torch.zeros(2, 3), 2)),
     "pass on what top_k gave"),
    (lambda: kd_losses.feature_mse(torch.zeros(2, 3), torch.zeros(2, 4)), "project"),
    (lambda: kd_losses.feature_cosine(torch.zeros(2, 3), torch.zeros(1, 3)), "project"),
    (lambda: kd_losses.similarity_preserving(torch.zeros(2, 3), torch.zeros(3, 3)), "many samples"),
    (lambda: kd_losses.attention_transfer(torch.zeros(2, 3, 4), torch.zeros(2, 3, 5)),
     r"same positions, got \(2, 3, 4\) and \(2, 3, 5\)"),
    (lambda: kd_losses.attention_transfer(torch.zeros(2, 3), torch.zeros(2, 3)), "channels"),
])
def test_what_cannot_be_computed_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
