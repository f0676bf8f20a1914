"""The kinds of tasks: metrics of whole evaluations against scikit-learn and float64."""

import math

import pytest
import torch
from accelerate import Accelerator
from sklearn import metrics as oracle
from torch import nn
from torch.nn import functional

from trainlib import data, tasks
from trainlib.config import UserError
from trainlib.data import TargetInfo
from trainlib.evaluate import evaluate, try_model
from trainlib.losses import IGNORED
from trainlib.tasks import TaskOptions

CPU = torch.device("cpu")
SIZES = [(1, 1), (5, 2), (97, 32)]  # samples, samples a batch
NAN = float("nan")


def build(info: TargetInfo, **options):
    return tasks.build_tasks({"it": TaskOptions(target="it", **options)}, {"it": info})[0]


def result_of(task, outputs, targets, batch_size) -> dict:
    """The evaluation of a net that only looks its outputs up."""
    split = data.Split(outputs, {"it": targets}, torch.arange(len(outputs)))
    reader = data.EvalReader(split, batch_size, 0, 1, CPU)
    return evaluate(nn.Identity(), reader, [task], Accelerator(cpu=True))["it"]


def randn(*shape) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def holes(shape, share=0.3) -> torch.Tensor:
    """Where targets are missing; never everywhere."""
    missing = torch.rand(shape, generator=torch.Generator().manual_seed(7)) < share
    missing.view(-1)[0] = False
    return missing


@pytest.mark.parametrize("size, batch_size", SIZES)
@pytest.mark.parametrize("may_miss", [False, True])
def test_classification_counts_top_k_and_calibration(size, batch_size, may_miss):
    names = [str(k) for k in range(8)]
    task = build(TargetInfo(names, may_miss=may_miss), top_k=3)
    outputs = 3 * randn(size, 8)
    target = torch.randint(8, (size,), generator=torch.Generator().manual_seed(1))
    shown = target.masked_fill(holes(size), IGNORED) if may_miss else target
    result = result_of(task, outputs, shown, batch_size)
    chosen = shown != IGNORED
    outputs, target = outputs[chosen].double(), target[chosen]
    predicted, labels = outputs.argmax(1), list(range(8))
    assert result["accuracy"] == pytest.approx(oracle.accuracy_score(target, predicted), abs=1e-9)
    assert result["top3_accuracy"] == pytest.approx(
        oracle.top_k_accuracy_score(target, outputs, k=3, labels=labels), abs=1e-9)
    confidence, error = outputs.softmax(1).amax(1), 0.0
    for number in range(15):
        inside = (confidence > number / 15) & (confidence <= (number + 1) / 15)
        right = (predicted == target)[inside].double().sum()
        error += (right - confidence[inside].sum()).abs().item() / len(target)
    assert result["calibration_error"] == pytest.approx(error, abs=1e-9)
    loss = functional.cross_entropy(outputs, target).item()
    assert result["loss"] == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("size, batch_size", SIZES)
def test_multilabel_with_thresholds_and_missing_entries(size, batch_size):
    thresholds = [0.3, 0.5, 0.7]
    task = build(TargetInfo(["a", "b", "c"], may_miss=True), kind="multilabel",
                 thresholds=thresholds)
    outputs = 2 * randn(size, 3)
    target = (randn(3, size).T > 0).float()
    missing = holes((size, 3))
    result = result_of(task, outputs, target.masked_fill(missing, NAN), batch_size)
    predicted = outputs.double().sigmoid() >= torch.tensor(thresholds).double()
    for column, entry in enumerate(result["classes"]):
        seen = ~missing[:, column]
        if not seen.any():
            continue
        wanted = oracle.precision_recall_fscore_support(
            target[seen, column], predicted[seen, column], average="binary", zero_division=0)
        found = [entry[key] for key in ("precision", "recall", "f1")]
        assert found == pytest.approx(list(wanted[:3]), abs=1e-9)
    flat = target[~missing], predicted[~missing]
    assert result["micro"]["f1"] == pytest.approx(
        oracle.f1_score(*flat, zero_division=0), abs=1e-9)
    assert result["accuracy"] == pytest.approx(oracle.accuracy_score(*flat), abs=1e-9)
    loss = functional.binary_cross_entropy_with_logits(outputs[~missing].double(),
                                                       target[~missing].double()).item()
    assert result["loss"] == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("size, batch_size", SIZES[1:])
@pytest.mark.parametrize("loss", ["mse", "l1", "huber"])
def test_regression_in_the_units_of_the_target(size, batch_size, loss):
    mean, deviation = (1e6, -3.0), (250.0, 0.1)
    info = TargetInfo(["a", "b"], mean, deviation, (0.1, -0.2), may_miss=True)
    task = build(info, kind="regression", loss=loss)
    outputs, target = randn(size, 2), randn(2, size).T.double()
    missing = holes((size, 2), 0.2)
    result = result_of(task, outputs, target.masked_fill(missing, NAN), batch_size)
    scale, shift = torch.tensor(deviation).double(), torch.tensor(mean).double()
    real, predicted = target * scale + shift, outputs.double() * scale + shift
    wanted = {"mae": [], "rmse": [], "r2": []}
    for column in range(2):
        pair = (real[~missing[:, column], column], predicted[~missing[:, column], column])
        wanted["mae"].append(oracle.mean_absolute_error(*pair))
        wanted["rmse"].append(oracle.root_mean_squared_error(*pair))
        wanted["r2"].append(oracle.r2_score(*pair))
    for name, values in wanted.items():
        # The units' own rounding: a mean of 1e6 takes 6 of a float64's 16 digits.
        assert result[name] == pytest.approx(sum(values) / 2, rel=1e-9)


def test_one_number_may_come_as_batch_or_batch_by_one():
    task = build(TargetInfo(["a"], (0.0,), (1.0,), (0.0,)), kind="regression")
    target = {"it": randn(4, 1).double()}
    wide, flat = torch.ones(4, 1), torch.ones(4)
    assert task.losses(wide, target).equal(task.losses(flat, target))
    for output in (wide, flat):
        task.check_output(output, target, ["it"])
    with pytest.raises(UserError, match=r"is \(4, 2\), task 'it' needs \(4, 1\): one number for"):
        task.check_output(torch.ones(4, 2), target, ["it"])


@pytest.mark.parametrize("loss, num_classes", [("cross_entropy", 3), ("focal", 3), ("dice", 3),
                                               ("bce", 2), ("dice", 2)])
@pytest.mark.parametrize("size, batch_size", SIZES)
def test_segmentation_with_ignored_pixels(size, batch_size, loss, num_classes):
    names = [str(k) for k in range(num_classes)]
    task = build(TargetInfo(names), kind="segmentation", loss=loss)
    outputs = randn(size, task.num_outputs, 4, 6)
    target = torch.randint(num_classes, (size, 4, 6), generator=torch.Generator().manual_seed(1))
    missing = holes((size, 4, 6))
    result = result_of(task, outputs, target.masked_fill(missing, IGNORED), batch_size)
    predicted = outputs.argmax(1) if task.num_outputs > 1 else (outputs[:, 0] > 0).long()
    pair = (target[~missing], predicted[~missing])
    assert result["pixel_accuracy"] == pytest.approx(oracle.accuracy_score(*pair), abs=1e-9)
    assert result["miou"] == pytest.approx(oracle.jaccard_score(*pair, average="macro"), abs=1e-9)
    assert result["dice"] == pytest.approx(
        oracle.f1_score(*pair, average="macro", zero_division=0), abs=1e-9)
    if loss == "bce":
        wanted = functional.binary_cross_entropy_with_logits(
            outputs[:, 0][~missing].double(), target[~missing].double())
        assert result["loss"] == pytest.approx(wanted.item(), rel=1e-6)
    if loss == "cross_entropy":
        wanted = functional.cross_entropy(outputs.double(), target.masked_fill(missing, IGNORED))
        assert result["loss"] == pytest.approx(wanted.item(), rel=1e-6)


def test_smaller_outputs_are_enlarged_to_the_masks():
    task = build(TargetInfo(["a", "b"]), kind="segmentation")
    output, target = randn(2, 2, 3, 4), {"it": torch.randint(2, (2, 9, 8))}
    task.check_output(output, target, ["it"])
    large = functional.interpolate(output, (9, 8), mode="bilinear", align_corners=False)
    assert task.losses(output, target).equal(task.losses(large, target))
    for picked in ({"out": output}, {"logits": output}, {"it": output, "out": -output}):
        assert task.losses(picked, target).equal(task.losses(output, target))


@pytest.mark.parametrize("size, batch_size", SIZES)
def test_language_modeling_counts_every_token_once(size, batch_size):
    task = build(TargetInfo([], vocab_size=11, bytes_per_token=2.5), kind="language_modeling")
    outputs = randn(size, 5, 11)
    target = torch.randint(11, (size, 5), generator=torch.Generator().manual_seed(1))
    target = target.masked_fill(holes((size, 5)), IGNORED)
    result = result_of(task, outputs, target, batch_size)
    losses = task.losses(outputs, {"it": target})
    mean = losses.double().sum().item() / (target != IGNORED).sum().item()
    assert result["perplexity"] == pytest.approx(math.exp(mean), rel=1e-9)
    assert result["bits_per_byte"] == pytest.approx(mean / math.log(2) / 2.5, rel=1e-9)
    exact = functional.cross_entropy(outputs.double().flatten(0, 1), target.flatten()).item()
    assert result["loss"] == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("options", [{"loss": "focal"}, {"loss_args": {"label_smoothing": 0.3}}])
def test_perplexity_is_the_plain_cross_entropys_whatever_the_loss_is(options):
    info = TargetInfo([], vocab_size=11, may_miss=True)
    outputs, target = randn(9, 5, 11), torch.randint(11, (9, 5)).masked_fill(holes((9, 5)), IGNORED)
    plain = result_of(build(info, kind="language_modeling"), outputs, target, 4)
    other = result_of(build(info, kind="language_modeling", **options), outputs, target, 4)
    assert other["perplexity"] == pytest.approx(plain["perplexity"], rel=1e-12)
    assert other["loss"] != pytest.approx(plain["loss"], rel=1e-4)


def test_r2_far_from_the_training_mean_keeps_its_digits(far=1e6):
    target = (far + randn(3, 50).T[:, :1]).double()
    outputs = (target + 0.1 * randn(50, 1)).float().double()
    task = build(TargetInfo(["a"], (0.0,), (1.0,), tuple(target.mean(0).tolist())),
                 kind="regression")
    split = data.Split(outputs, {"it": target}, torch.arange(50))
    reader = data.EvalReader(split, 7, 0, 1, CPU)
    result = evaluate(nn.Identity(), reader, [task], Accelerator(cpu=True))["it"]
    assert result["r2"] == pytest.approx(oracle.r2_score(target, outputs), rel=1e-9)


def test_a_loss_a_sample_cannot_tell_missing_parts(tmp_path):
    file = tmp_path / "own.py"
    file.write_text("def loss(output, target):\n    return (output - target).square().mean(1)\n")
    info = TargetInfo(["a", "b"], may_miss=True)
    build(info, kind="multilabel", loss=f"{file}:loss")
    with pytest.raises(UserError, match="one loss a sample, but of some targets a part is missing"):
        build(TargetInfo(["a", "b"], may_miss=True, misses_parts=True), kind="multilabel",
              loss=f"{file}:loss")


def test_losses_of_the_model_itself_are_taken_and_checked():
    task = build(TargetInfo([], vocab_size=11), kind="language_modeling")
    target, losses = {"it": torch.zeros(2, 5, dtype=torch.int64)}, torch.rand(2, 5).half()
    target["it"][0, 3] = IGNORED
    taken = task.losses({"losses": losses}, target)
    assert taken.dtype == torch.float32 and taken[0, 3] == 0  # whatever the model says there
    assert taken.sum() == losses.float().sum() - losses[0, 3].float()
    task.check_output({"losses": losses}, target, ["it"])
    with pytest.raises(UserError, match=r"losses are \(10,\), task 'it' needs \(2, 5\)"):
        task.check_output({"losses": losses.flatten()}, target, ["it"])


KINDS = {
    "classification": TargetInfo(["a", "b", "c"], may_miss=True),
    "multilabel": TargetInfo(["a", "b", "c"], may_miss=True),
    "regression": TargetInfo(["a", "b", "c"], (0.0,) * 3, (1.0,) * 3, (0.0,) * 3, may_miss=True),
    "segmentation": TargetInfo(["a", "b", "c"], may_miss=True),
    "language_modeling": TargetInfo([], vocab_size=3, may_miss=True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_of_ones_own_is_never_shown_missing_targets(tmp_path, kind):
    file = tmp_path / "own.py"
    file.write_text("""
def an_entry(output, target):
    assert (target == target).all() and (target >= 0).all() if target.dtype.is_floating_point \\
        else (target >= 0).all()
    return (output.sum(1) if output.ndim > target.ndim else output) * 0 + target + 1

def a_sample(output, target):
    losses = an_entry(output, target)
    return losses.flatten(1).mean(1) if losses.ndim > 1 else losses

def mean(output, target):
    return an_entry(output, target).mean()
""")
    task = build(KINDS[kind], kind=kind, loss=f"{file}:an_entry")
    target = task.blank_target()
    missing = torch.zeros_like(target, dtype=torch.bool)
    missing[0] = True
    target = target.masked_fill(missing, NAN if target.is_floating_point() else IGNORED)
    output = task.blank_output()
    if kind == "language_modeling":
        output = output.transpose(1, 2)
    losses = task.losses(output, {"it": target})
    assert losses[missing].eq(0).all() and losses[~missing].eq(1).all()
    counts, _ = task.statistics(output, {"it": target})
    assert counts[0] == (~missing).sum()
    by_sample = build(KINDS[kind], kind=kind, loss=f"{file}:a_sample")
    assert by_sample.losses(output, {"it": target}).tolist() == [0, 1]
    assert by_sample.statistics(output, {"it": target})[0][0] == 1
    with pytest.raises(UserError, match=r"returns \[\] for two items; return one loss an item, un"):
        build(KINDS[kind], kind=kind, loss=f"{file}:mean")


@pytest.mark.parametrize("kind", KINDS)
def test_logged_names_are_known_before_there_are_results(kind):
    task = build(KINDS[kind], kind=kind)
    names = tasks.metric_names([task])
    assert tasks.default_monitor([task]) in names
    assert set(tasks.headline([task])) <= set(names)
    result = task.result(torch.ones(task.num_counts), torch.ones(task.num_sums))
    assert task.report(result)


@pytest.mark.parametrize("options, info, message", [
    ({"kind": "segmentation", "loss": "bce"}, TargetInfo(["a", "b", "c"]), "for two classes"),
    ({"kind": "multilabel", "thresholds": [0.5]}, KINDS["multilabel"], "1 for 3 labels"),
    ({"kind": "multilabel", "loss_args": {"pos_weight": [1.0]}}, KINDS["multilabel"],
     "loss_args: bce: "),
    ({"kind": "regression", "loss": "huber", "loss_args": {"delta": -1}}, KINDS["regression"],
     "loss_args: huber: "),
    ({"kind": "regression", "ignore_index": 3}, KINDS["regression"], "ignore_index: is for"),
    ({"thresholds": 1.5, "kind": "multilabel"}, KINDS["multilabel"], "between 0 and 1"),
])
def test_what_does_not_fit_a_kind_is_refused(options, info, message):
    with pytest.raises(ValueError, match=message):
        build(info, **options)


def test_a_task_that_the_model_does_not_return_is_refused_with_both_lists():
    infos = {"one": KINDS["classification"], "two": KINDS["regression"]}
    both = tasks.build_tasks({"one": TaskOptions(target="one"),
                              "two": TaskOptions(target="two", kind="regression")}, infos)

    class Net(nn.Linear):
        def forward(self, inputs):
            return {"one": super().forward(inputs), "tow": super().forward(inputs)}

    targets = {"one": torch.zeros(2, dtype=torch.int64), "two": torch.zeros(2, 3).double()}
    with pytest.raises(UserError, match="mapping of one, tow, task 'two'.*tasks are one, two"):
        try_model(Net(4, 3), torch.zeros(2, 4), targets, both)


def test_all_kinds_on_a_step_without_any_target_add_zero():
    for kind, info in KINDS.items():
        task = build(info, kind=kind)
        target = task.blank_target()
        target = torch.full_like(target, NAN if target.is_floating_point() else IGNORED)
        output = task.blank_output()
        output = (output.transpose(1, 2) if kind == "language_modeling" else output)
        output = output.clone().requires_grad_()
        total = task.losses(output, {"it": target}).sum()
        total.backward()
        assert total == 0 and output.grad.eq(0).all()
