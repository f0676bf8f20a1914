"""Tasks: target columns, losses by name, and what does not fit."""

import pytest
import torch
from torch import nn

from trainlib import tasks
from trainlib.config import UserError
from trainlib.evaluate import try_model
from trainlib.tasks import TaskOptions

NAMES = {"digit": ["zero", "one", "two"]}


def build(**options):
    resolved = tasks.resolve({"digit": TaskOptions(**options)}, NAMES)
    return tasks.build_tasks(resolved, NAMES)[0]


def test_without_tasks_the_only_candidate_is_the_target():
    assert tasks.resolve({}, NAMES)["digit"].target == "digit"
    assert tasks.resolve({"any": TaskOptions()}, NAMES)["any"].target == "digit"
    with pytest.raises(UserError, match="several columns could be the target: a, b"):
        tasks.resolve({}, {"a": [], "b": []})


@pytest.mark.parametrize("options, message", [
    ({"target": "digits"}, "no target column 'digits'; did you mean 'digit'"),
    ({"loss": "crossentropy"}, "did you mean 'cross_entropy'"),
    ({"loss_args": {"gama": 1}}, "cross_entropy does not take 'gama'"),
    ({"loss": "focal", "loss_args": {"gama": 1}}, "did you mean 'gamma'"),
    ({"loss_args": {"class_weights": [1, 2]}}, "one factor a class, 3 here"),
    ({"loss_args": {"label_smoothing": "much"}}, "tasks.digit.loss_args"),
])
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_a_second_task_is_refused():
    with pytest.raises(UserError, match="one classification task"):
        tasks.build_tasks({"a": TaskOptions(target="digit"), "b": TaskOptions(target="digit")},
                          NAMES)


@pytest.mark.parametrize("model, message", [
    (nn.Linear(4, 5), r"\(2, 5\).*needs \(2, 3\)"),
    (nn.Unflatten(1, (2, 2)), r"\(2, 2, 2\).*needs \(2, 3\)"),
    (nn.Linear(7, 3), r"cannot take inputs of shape \(2, 4\)"),
])
def test_a_model_that_does_not_fit_is_refused_with_both_shapes(model, message):
    with pytest.raises(UserError, match=message):
        try_model(model, torch.zeros(2, 4), [build()])


def test_a_model_that_fits_is_tried_without_a_trace():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)).train()
    try_model(model, torch.randn(2, 4), [build()])
    assert model.training and model[0].num_batches_tracked == 0


def test_counts_of_parts_add_up():
    task = build()
    output, target = torch.randn(11, 3), torch.randint(3, (11,))
    losses = task.losses(output, {"digit": target})
    assert losses.shape == (11,)
    whole = task.result(losses.sum().item(), task.counts(output, {"digit": target}))
    parts = sum(task.counts(output[i : i + 4], {"digit": target[i : i + 4]})
                for i in range(0, 11, 4))
    assert task.result(0.0, parts)["confusion"] == whole["confusion"]
    assert whole["loss"] == losses.sum().item() / 11
    logged = tasks.logged_metrics([task], {"digit": whole})
    assert list(logged) == tasks.metric_names([task])
    assert logged["eval/loss"] == whole["loss"]
    assert "zero" in task.report(whole)
