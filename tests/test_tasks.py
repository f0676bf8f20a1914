"""Tasks: target columns, losses by name, and what does not fit."""

import pytest
import torch
from torch import nn

from trainlib import tasks
from trainlib.augment import Mix
from trainlib.config import UserError
from trainlib.data import TargetInfo
from trainlib.evaluate import try_model
from trainlib.tasks import TaskOptions

INFOS = {"digit": TargetInfo(["zero", "one", "two"])}
TARGETS = {"digit": torch.zeros(2, dtype=torch.int64)}


def build(**options):
    resolved = tasks.resolve({"digit": TaskOptions(**options)}, ["digit"], ["digit", "image"])
    return tasks.build_tasks(resolved, INFOS)[0]


def test_without_tasks_the_only_candidate_is_the_target():
    columns = ["digit", "image"]
    assert tasks.resolve({}, ["digit"], columns)["digit"].target == "digit"
    assert tasks.resolve({"any": TaskOptions()}, ["digit"], columns)["any"].target == "digit"
    for options in ({}, {"any": TaskOptions()}):
        with pytest.raises(UserError, match="several columns could be the target: a, b; choose"):
            tasks.resolve(options, ["a", "b"], ["a", "b"])
        with pytest.raises(UserError, match="no column of class labels.* among x, y"):
            tasks.resolve(options, [], ["x", "y"])


def test_a_task_may_predict_a_column_that_is_no_candidate():
    assert tasks.resolve({"b": TaskOptions()}, ["a"], ["a", "b"])["b"].target == "b"
    named = {"any": TaskOptions(target="b")}
    assert tasks.resolve(named, ["a"], ["a", "b"])["any"].target == "b"


@pytest.mark.parametrize("options, message", [
    ({"target": "digits"}, "no column 'digits'; did you mean 'digit'"),
    ({"loss": "crossentropy"}, "did you mean 'cross_entropy'"),
    ({"loss_args": {"gama": 1}}, "cross_entropy does not take 'gama'"),
    ({"loss": "focal", "loss_args": {"gama": 1}}, "did you mean 'gamma'"),
    ({"loss_args": {"class_weights": [1, 2]}}, "one factor a class, 3 here"),
    ({"loss_args": {"label_smoothing": "much"}}, "tasks.digit.loss_args"),
])
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_several_tasks_have_outputs_losses_and_metrics_of_their_own():
    options = {"a": TaskOptions(target="digit"), "b": TaskOptions(target="digit", weight=0.5)}
    task_list = tasks.build_tasks(options, {"a": INFOS["digit"], "b": TargetInfo(["no", "yes"])})
    assert tasks.num_outputs(task_list) == {"a": 3, "b": 2}
    output = {"a": torch.randn(2, 3), "b": torch.randn(2, 2)}
    targets = {"a": torch.tensor([2, 0]), "b": torch.tensor([1, 1])}
    results = {}
    for task in task_list:
        task.check_output(output, targets, ["a", "b"])
        losses = nn.functional.cross_entropy(output[task.name], targets[task.name],
                                             reduction="none")
        assert task.losses(output, targets).equal(losses)
        results[task.name] = task.result(*task.statistics(output, targets))
    with pytest.raises(UserError, match=r"is \(2, 3\), task 'b' needs \(2, 2\).*tasks are a, b"):
        task_list[1].check_output(output["a"], targets, ["a", "b"])
    logged = tasks.logged_metrics(task_list, results)
    assert list(logged) == tasks.metric_names(task_list)
    assert logged["eval/loss"] == results["a"]["loss"] + 0.5 * results["b"]["loss"]
    assert logged["eval/b/accuracy"] == results["b"]["accuracy"]
    assert tasks.default_monitor(task_list) == "eval/loss"


@pytest.mark.parametrize("model, message", [
    (nn.Linear(4, 5), r"\(2, 5\).*needs \(2, 3\)"),
    (nn.Unflatten(1, (2, 2)), r"\(2, 2, 2\).*needs \(2, 3\)"),
    (nn.Linear(7, 3), r"cannot take inputs of shape \(2, 4\)"),
])
def test_a_model_that_does_not_fit_is_refused_with_both_shapes(model, message):
    with pytest.raises(UserError, match=message):
        try_model(model, torch.zeros(2, 4), TARGETS, [build()])


def test_a_model_that_fits_is_tried_without_a_trace():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)).train()
    try_model(model, torch.randn(2, 4), TARGETS, [build()])
    assert model.training and model[0].num_batches_tracked == 0


def test_statistics_of_parts_add_up():
    task = build()
    output, target = torch.randn(11, 3), torch.randint(3, (11,))
    losses = task.losses(output, {"digit": target})
    assert losses.shape == (11,)
    whole = task.result(*task.statistics(output, {"digit": target}))
    parts = [task.statistics(output[i : i + 4], {"digit": target[i : i + 4]})
             for i in range(0, 11, 4)]
    added = task.result(*(sum(part) for part in zip(*parts, strict=True)))
    assert added["confusion"] == whole["confusion"]
    assert added["loss"] == pytest.approx(whole["loss"], rel=1e-15)  # sums are in float64
    assert whole["loss"] == losses.double().sum().item() / 11
    logged = tasks.logged_metrics([task], {"digit": whole})
    assert list(logged) == tasks.metric_names([task])
    assert logged["eval/loss"] == whole["loss"]
    assert "zero" in task.report(whole)


def test_mixed_losses_of_the_cross_entropy_are_those_of_mixed_targets():
    task = build()
    output, target = torch.randn(5, 3), torch.randint(3, (5,))
    mix = Mix(torch.arange(4, -1, -1), torch.rand(5))
    one_hot = nn.functional.one_hot(target, 3).double()
    share = mix.share.double()[:, None]
    soft = share * one_hot + (1 - share) * one_hot[mix.partner]
    expected = nn.functional.cross_entropy(output.double(), soft, reduction="none")
    mixed = task.losses(output, {"digit": target}, mix)
    torch.testing.assert_close(mixed.double(), expected, rtol=1e-6, atol=1e-6)


def test_a_mapping_or_a_hugging_face_output_holds_the_tasks_output():
    task, logits, targets = build(), torch.randn(2, 3), {"digit": torch.tensor([0, 2])}
    for output in ({"digit": logits, "logits": -logits}, {"logits": logits, "hidden": -logits}):
        assert task.losses(output, targets).equal(task.losses(logits, targets))
        for ours, wanted in zip(task.statistics(output, targets), task.statistics(logits, targets),
                                strict=True):
            assert ours.equal(wanted)
        task.check_output(output, targets, ["digit"])
    for output, what in (({"another": logits}, "a mapping of another"), (None, "a NoneType"),
                         (logits.long(), r"\(2, 3\) of torch.int64")):
        with pytest.raises(UserError, match=f"output is {what}, task 'digit' needs"):
            task.check_output(output, targets, ["digit"])


def test_a_loss_of_the_users_own_is_one_loss_an_item(tmp_path):
    file = tmp_path / "my_loss.py"
    file.write_text("""
from torch.nn.functional import cross_entropy

def smooth(output, target, amount=0.1):
    return cross_entropy(output, target, label_smoothing=amount, reduction="none")

def mean(output, target):
    return cross_entropy(output, target)

def broken(output, target):
    return output / nothing

number = 3
""")
    output, target = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    own = build(loss=f"{file}:smooth", loss_args={"amount": 0.2})
    builtin = build(loss_args={"label_smoothing": 0.2})
    assert own.losses(output, {"digit": target}).equal(builtin.losses(output, {"digit": target}))
    for name, message in (("mean", r"returns \[\] for two items; return one loss an item, "
                                   "unreduced"),
                          ("broken", "NameError: name 'nothing' is not defined .my_loss.py, line"),
                          ("number", "this is a int; give a function"),
                          ("smoth", "has no 'smoth'; it has smooth, mean, broken")):
        with pytest.raises(ValueError, match=message):
            build(loss=f"{file}:{name}")
    with pytest.raises(ValueError, match="does not take 'amont'; did you mean 'amount'"):
        build(loss=f"{file}:smooth", loss_args={"amont": 0.2})


class Strange(nn.Linear):
    """Fails, detaches or returns a pair, but only in training; draws in both modes."""

    def __init__(self, kind):
        super().__init__(4, 3)
        self.kind = kind
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, inputs):
        output = super().forward(inputs) + torch.rand(())
        self.calls += 1
        if self.training and self.kind == "raises":
            raise RuntimeError("boom in training")
        if self.training and self.kind == "pair":
            return output, output
        return output.detach() if self.training and self.kind == "detached" else output


@pytest.mark.parametrize("kind, message", [
    ("raises", r"in training: RuntimeError: boom in training \(test_tasks.py, line"),
    ("pair", "output is a tuple"), ("detached", "no backward pass: .*does not require grad"),
])
def test_a_model_that_fails_in_training_only_is_refused(kind, message):
    with pytest.raises(UserError, match=message):
        try_model(Strange(kind), torch.zeros(2, 4), TARGETS, [build()])


def test_trying_a_model_leaves_no_trace():
    model, before = Strange("fine"), torch.get_rng_state()
    try_model(model, torch.zeros(2, 4), TARGETS, [build()])
    assert model.calls == 1 and model.weight.grad is None and model.training  # 1: in evaluation
    assert torch.get_rng_state().equal(before)


def test_a_batch_norm_that_meets_a_single_sample_is_refused_at_the_start():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).train()
    with pytest.raises(UserError, match="in training: ValueError: Expected more than 1 value"):
        try_model(model, torch.zeros(1, 4), {"digit": TARGETS["digit"][:1]}, [build()])
