"""Metrics against scikit-learn, to the last digits."""

import pytest
import torch
from sklearn import metrics as oracle

from trainlib import metrics


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
