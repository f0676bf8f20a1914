"""Metrics against scikit-learn or a float64 brute force, to the last digits."""

import math
import operator

import pytest
import torch
from sklearn import metrics as oracle

from trainlib import metrics


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def predictions(num_items, num_classes, missing=()):
    generator = torch.Generator().manual_seed(num_items)
    labels = torch.tensor([k for k in range(num_classes) if k not in missing])
    target = labels[torch.randint(len(labels), (num_items,), generator=generator)]
    predicted = labels[torch.randint(len(labels), (num_items,), generator=generator)]
    return predicted, target


CASES = [(1, 2, ()), (5, 3, ()), (97, 10, ()), (360, 10, (0, 7))]


def test_a_single_class_is_always_right():
    counts = metrics.confusion_counts(*predictions(50, 1), 1)
    ours = metrics.classification_metrics(counts)
    assert ours["accuracy"] == ours["macro"]["f1"] == ours["weighted"]["f1"] == 1.0


@pytest.mark.parametrize("num_items, num_classes, missing", CASES)
def test_metrics_equal_scikit_learn(num_items, num_classes, missing):
    predicted, target = predictions(num_items, num_classes, missing)
    counts = metrics.confusion_counts(predicted, target, num_classes)
    labels = list(range(num_classes))
    assert counts.tolist() == oracle.confusion_matrix(target, predicted, labels=labels).tolist()
    ours = metrics.classification_metrics(counts)
    theirs = oracle.classification_report(target, predicted, output_dict=True, zero_division=0)
    assert ours["accuracy"] == pytest.approx(oracle.accuracy_score(target, predicted), abs=1e-12)
    for ours_average, name in ((ours["macro"], "macro avg"), (ours["weighted"], "weighted avg")):
        for key, their_key in (("precision",) * 2, ("recall",) * 2, ("f1", "f1-score")):
            assert ours_average[key] == pytest.approx(theirs[name][their_key], abs=1e-12)
    columns = oracle.precision_recall_fscore_support(
        target, predicted, labels=labels, zero_division=0
    )
    for key, column in zip(("precision", "recall", "f1", "support"), columns, strict=True):
        assert [c[key] for c in ours["classes"]] == pytest.approx(column.tolist(), abs=1e-12)


def test_counts_of_parts_add_up_to_the_counts_of_the_whole():
    predicted, target = predictions(97, 10)
    parts = [metrics.confusion_counts(predicted[i : i + 8], target[i : i + 8], 10)
             for i in range(0, 97, 8)]
    assert sum(parts).equal(metrics.confusion_counts(predicted, target, 10))


def test_the_report_reads_like_scikit_learns():
    predicted, target = predictions(97, 3)
    counts = metrics.confusion_counts(predicted, target, 3)
    names = ["cat", "dog", "a long name indeed"]
    ours = metrics.classification_report(metrics.classification_metrics(counts), names)
    theirs = oracle.classification_report(target, predicted, target_names=names, digits=4)
    assert ours.split() == theirs.split()


@pytest.mark.parametrize("shape", [(60,), (4, 15), (3, 4, 5)])
def test_items_without_a_target_are_not_counted_whatever_their_shape(shape):
    predicted, target = predictions(60, 4)
    predicted[0], target[0] = 3, 3  # next to the cell that is cut off
    kept = torch.arange(60) % 3 > 0
    partly = target.masked_fill(~kept, -100)
    counts = metrics.confusion_counts(predicted.view(shape), partly.view(shape), 4)
    assert counts.equal(metrics.confusion_counts(predicted[kept], target[kept], 4))
    nothing = metrics.confusion_counts(predicted, torch.full((60,), -100), 4)
    assert not nothing.any() and nothing.dtype == torch.int64
    assert metrics.classification_metrics(nothing)["accuracy"] == 0


def test_a_class_number_that_is_too_high_is_refused_and_not_left_out():
    with pytest.raises(RuntimeError, match="out of bounds"):
        metrics.confusion_counts(torch.tensor([0]), torch.tensor([3]), 3)


@pytest.mark.parametrize("num_items, num_classes", [(1, 3), (40, 3), (97, 10)])
def test_ranks_give_the_top_k_accuracy_of_scikit_learn(num_items, num_classes):
    output, target = draw(num_items, num_classes), predictions(num_items, num_classes)[1]
    ranks = metrics.target_ranks(output, target)
    assert ranks.dtype == torch.int64
    for k in range(1, num_classes):
        theirs = oracle.top_k_accuracy_score(target, output, k=k, labels=range(num_classes))
        assert (ranks < k).double().mean().item() == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_ranks_break_ties_as_argmax_does(dtype):
    output = (draw(200, 5) * 2).round().to(dtype)  # few values, many ties
    output[:20], output[20:40, 2], output[40:60, 3] = 1.0, float("nan"), float("-inf")
    target = predictions(200, 5)[1]
    ranks = metrics.target_ranks(output, target)
    assert (ranks == 0).equal(output.argmax(1) == target)
    order = output.nan_to_num(float("inf")).argsort(dim=1, descending=True, stable=True)
    assert ranks.equal((order == target[:, None]).int().argmax(1))


def test_a_missing_target_is_never_in_the_top_k():
    assert metrics.target_ranks(draw(2, 5), torch.tensor([-100, -1])).tolist() == [5, 5]
    assert metrics.target_ranks(torch.zeros(1, 1), torch.tensor([0])).tolist() == [0]


def bins_one_by_one(confidence, is_correct, num_bins):
    """Equation 3 of Guo et al., one item after the other."""
    bins = [[] for _ in range(num_bins)]
    for value, right in zip(confidence.tolist(), is_correct.tolist(), strict=True):
        bins[max(k for k in range(num_bins) if k == 0 or k / num_bins < value)].append(
            (value, right))
    error = sum(len(items) / len(confidence) * abs(
        sum(right for _, right in items) - sum(value for value, _ in items)
    ) / len(items) for items in bins if items)
    return [len(items) for items in bins], error


@pytest.mark.parametrize("num_items, num_bins", [(1, 15), (7, 1), (500, 15), (500, 10)])
def test_the_calibration_error_is_that_of_its_equation(num_items, num_bins):
    confidence = draw(num_items).sigmoid().double()
    confidence[1:7] = torch.tensor([0.0, 1.0, 0.2, 0.3, 0.5, 0.6])[: num_items - 1]  # edges
    confidence[3:4] = 0.2  # float64's own
    is_correct = draw(num_items, seed=1) > 0
    counts, sums = metrics.calibration_bins(confidence, is_correct, num_bins)
    in_bins, error = bins_one_by_one(confidence, is_correct, num_bins)
    assert counts[0].tolist() == in_bins and counts[1].sum() == is_correct.sum()
    assert counts.dtype == torch.int64 and sums.dtype == confidence.dtype
    assert metrics.calibration_error(counts, sums) == pytest.approx(error, abs=1e-12)
    halves = [metrics.calibration_bins(confidence[part], is_correct[part], num_bins)
              for part in (slice(3), slice(3, None))]
    assert (halves[0][0] + halves[1][0]).equal(counts)
    torch.testing.assert_close(halves[0][1] + halves[1][1], sums, rtol=1e-14, atol=0)


def test_items_without_confidence_are_left_out_of_the_calibration():
    confidence, is_correct = draw(40).sigmoid(), draw(40, seed=1) > 0
    whole = metrics.calibration_bins(confidence[20:], is_correct[20:], 15)
    confidence[:20] = float("nan")
    assert all(map(torch.equal, metrics.calibration_bins(confidence, is_correct, 15), whole))
    nothing = metrics.calibration_bins(confidence[:20], is_correct[:20], 15)
    assert metrics.calibration_error(*nothing) == 0


@pytest.mark.parametrize("num_items, num_labels", [(1, 2), (40, 2), (97, 7), (40, 1), (1, 1)])
@pytest.mark.parametrize("some_missing", [False, True])
def test_multilabel_metrics_equal_scikit_learn(num_items, num_labels, some_missing):
    predicted = draw(num_items, num_labels) > 0
    target = draw(num_items, num_labels, seed=1).sigmoid()
    target[0, 0] = 0.5  # counts as 1
    target[:, 1:2] = 0.0  # never present
    predicted[:, 2:3] = False  # never predicted
    truth = (target >= 0.5).int()
    valid = torch.ones_like(predicted)
    if some_missing:
        valid = draw(num_items, num_labels, seed=2) > 0
        valid[0, 0], valid[:, -1] = num_labels == 1, False
        target = target.masked_fill(~valid, float("nan"))
    counts = metrics.multilabel_counts(predicted, target)
    ours = metrics.multilabel_metrics(counts)
    assert counts.dtype == torch.int64 and counts.sum(1).equal(valid.sum(0))

    def scores(truth, predicted, average="binary"):
        values = oracle.precision_recall_fscore_support(
            truth, predicted, average=average, zero_division=0) if len(truth) else [0.0] * 3
        return dict(zip(("precision", "recall", "f1"), values, strict=False))

    classes = [scores(truth[valid[:, k], k], predicted[valid[:, k], k]) for k in range(num_labels)]
    support = (truth.bool() & valid).sum(0).tolist()
    assert [c["support"] for c in ours["classes"]] == support
    for entry, reference in zip(ours["classes"], classes, strict=True):
        assert {k: entry[k] for k in reference} == pytest.approx(reference, abs=1e-12)
    assert ours["micro"] == pytest.approx(scores(truth[valid], predicted[valid]), abs=1e-12)
    for name in ("precision", "recall", "f1"):
        column = [c[name] for c in classes]
        weighted = sum(map(operator.mul, column, support)) / max(sum(support), 1)
        assert ours["macro"][name] == pytest.approx(sum(column) / num_labels, abs=1e-12)
        assert ours["weighted"][name] == pytest.approx(weighted, abs=1e-12)
    accuracy = (truth[valid] == predicted[valid]).double().sum().item() / max(valid.sum().item(), 1)
    assert ours["accuracy"] == pytest.approx(accuracy, abs=1e-12)
    if num_labels > 1 and not some_missing:
        for average in ("micro", "macro", "weighted"):
            reference = scores(truth.numpy(), predicted.int().numpy(), average)
            assert ours[average] == pytest.approx(reference, abs=1e-12)
    halves = (metrics.multilabel_counts(predicted[part], target[part])
              for part in (slice(3), slice(3, None)))
    assert sum(halves).equal(counts)


def regression_case(num_items, offset):
    """Values in the original unit, and what standardises them."""
    target = draw(num_items, 4).double() * torch.tensor([1.0, 1e-3, 50.0, 1e6]) + offset
    prediction = target + draw(num_items, 4, seed=1).double() * torch.tensor([0.5, 1e-3, 5.0, 1e5])
    mean, deviation = target.mean(0), torch.tensor([1.0, 1.5e-3, 40.0, 1e6], dtype=torch.float64)
    return prediction, target, mean, deviation


@pytest.mark.parametrize("num_items", [2, 3, 100])
@pytest.mark.parametrize("offset", [0.0, 1e5])
@pytest.mark.parametrize("some_missing", [False, True])
def test_regression_metrics_equal_scikit_learn(num_items, offset, some_missing):
    prediction, target, mean, deviation = regression_case(num_items, offset)
    valid = torch.ones_like(target, dtype=torch.bool)
    if some_missing:
        valid[2::2, 0], valid[:, 2] = False, False
    standardised = ((target - mean) / deviation).masked_fill(~valid, float("nan"))
    inputs = ((prediction - mean) / deviation, standardised)
    counts, sums = metrics.regression_sums(*inputs)
    assert counts.dtype == torch.int64 and sums.dtype == torch.float64
    ours = metrics.regression_metrics(counts, sums, deviation)
    columns = [k for k in range(4) if valid[:, k].any()]
    for name, score in (("mae", oracle.mean_absolute_error), ("r2", oracle.r2_score),
                        ("rmse", oracle.root_mean_squared_error)):
        theirs = [score(target[valid[:, k], k], prediction[valid[:, k], k]) for k in columns]
        assert [ours["columns"][k][name] for k in columns] == pytest.approx(theirs, rel=1e-9)
        assert ours[name] == pytest.approx(sum(theirs) / len(theirs), rel=1e-9)
        if not some_missing:
            assert ours[name] == pytest.approx(score(target, prediction), rel=1e-9)
    assert [c["support"] for c in ours["columns"]] == valid.sum(0).tolist()
    parts = [metrics.regression_sums(*(x[i : i + 7] for x in inputs)) for i in range(0, 100, 7)]
    assert sum(part[0] for part in parts).equal(counts)
    torch.testing.assert_close(sum(part[1] for part in parts), sums, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_items", [1, 2, 999])
@pytest.mark.parametrize("value", [0.0, 0.1, -1234.567])
def test_r2_of_constant_targets_is_1_if_every_prediction_is_exact_else_0(num_items, value):
    target = torch.full((num_items, 2), value, dtype=torch.float64)
    prediction = target.clone()
    prediction[0, 1] += 1e-3
    ours = metrics.regression_metrics(*metrics.regression_sums(prediction, target), torch.ones(2))
    assert [c["r2"] for c in ours["columns"]] == [1.0, 0.0]
    if num_items == 2:  # of one item scikit-learn's is NaN, of many its mean is off by a rounding
        assert ours["r2"] == oracle.r2_score(target, prediction)


def test_columns_without_any_target_make_no_metric():
    nothing = metrics.regression_sums(draw(3, 2), torch.full((3, 2), float("nan")).double())
    ours = metrics.regression_metrics(*nothing, torch.ones(2))
    assert all(math.isnan(ours[name]) for name in ("mae", "rmse", "r2"))


@pytest.mark.parametrize("num_items, num_classes, missing", [*CASES, (50, 1, ())])
def test_segmentation_metrics_equal_scikit_learn(num_items, num_classes, missing):
    predicted, target = predictions(num_items, num_classes, missing)
    ours = metrics.segmentation_metrics(metrics.confusion_counts(predicted, target, num_classes))
    labels = sorted({*predicted.tolist(), *target.tolist()})
    for mean, name, score in (("miou", "iou", oracle.jaccard_score),
                              ("dice", "dice", oracle.f1_score)):
        theirs = score(target, predicted, labels=labels, average=None, zero_division=0)
        assert ours[mean] == pytest.approx(theirs.mean(), abs=1e-12)
        by_class = [ours["classes"][k][name] for k in labels]
        assert by_class == pytest.approx(theirs.tolist(), abs=1e-12)
    accuracy = oracle.accuracy_score(target, predicted)
    assert ours["pixel_accuracy"] == pytest.approx(accuracy, abs=1e-12)
    assert sum(c["support"] for c in ours["classes"]) == num_items


def test_language_metrics_follow_from_the_mean_loss():
    ours = metrics.language_metrics(loss_sum=8 * math.log(16), num_tokens=8, bytes_per_token=4.0)
    assert ours == pytest.approx({"perplexity": 16.0, "bits_per_byte": 1.0}, rel=1e-12)
    assert metrics.language_metrics(1e6, 1, 4.0)["perplexity"] == math.inf
    assert math.isnan(metrics.language_metrics(0.0, 0, 4.0)["perplexity"])


def test_no_statistic_waits_for_the_device_or_takes_its_shape_from_the_data():
    numbers = torch.zeros(6, dtype=torch.int64, device="meta")  # has no values: reading one raises
    values = torch.zeros(6, 3, device="meta")
    assert metrics.confusion_counts(numbers, numbers, 3).shape == (3, 3)
    assert metrics.target_ranks(values, numbers).shape == (6,)
    assert metrics.calibration_bins(values[:, 0], numbers > 0, 15)[0].shape == (2, 15)
    assert metrics.multilabel_counts(values > 0, values).shape == (3, 4)
    assert metrics.regression_sums(values, values.double())[1].shape == (4, 3)


def test_every_report_has_one_row_a_class_below_its_headings():
    predicted, target = draw(40, 2) > 0, (draw(40, 2, seed=1) > 0).float()
    ours = metrics.multilabel_report(
        metrics.multilabel_metrics(metrics.multilabel_counts(predicted, target)), ["cat", "dog"])
    theirs = oracle.classification_report(
        target.numpy(), predicted.int().numpy(), target_names=["cat", "dog"], digits=4,
        zero_division=0).split("samples avg")[0]
    assert ours.split() == theirs.split()
    sums = metrics.regression_sums(draw(40, 1), draw(40, 1, seed=1).double())
    result = metrics.regression_metrics(*sums, torch.tensor([3e6]))
    head, _, row = metrics.regression_report(result, ["price"]).splitlines()
    assert head.split() == ["mae", "rmse", "r2", "support"] and len(head) == len(row)
    assert row.split() == ["price", *(f"{result[k]:.4g}" for k in ("mae", "rmse", "r2")), "40"]
    result = metrics.segmentation_metrics(torch.tensor([[1, 0], [1, 2]]))
    head, _, sky, sea, *_ = metrics.segmentation_report(result, ["sky", "sea"]).splitlines()
    assert head.split() == ["iou", "dice", "support"]
    assert [sky.split(), sea.split()] == [["sky", "0.5000", "0.6667", "1"],
                                          ["sea", "0.6667", "0.8000", "3"]]
