"""predictions.csv and examples/: what the best weights say to each sample, on any number of
processes, and the very numbers that the evaluation adds up."""

import csv
import io
import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from launching import ROOT, train
from PIL import Image
from warm import fork

from trainlib.losses import LOSSES
from trainlib.predictions.examples import _picture, choose
from trainlib.predictions.rows import Recorder, are_mistakes, as_text
from trainlib.tasks.kinds import (
    Classification,
    LanguageModeling,
    Multilabel,
    Regression,
    Segmentation,
)

REPORT = ["--log.report", "true"]
KINDS = ["digits_multitask", "digits_segmentation", "pydocs_gpt", "diabetes_regression"]


def table(run: Path) -> list[dict]:
    with (run / "predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def evaluation(run: Path) -> dict:
    return json.loads((run / "best" / "evaluation.json").read_text())


def of(rows: list[dict], task: str) -> list[dict]:
    return [row for row in rows if row["task"] == task]


@pytest.fixture(scope="module", params=KINDS)
def runs(request, tmp_path_factory) -> list[Path]:
    """The same short run on 1 and on 3 processes."""
    folder = tmp_path_factory.mktemp(request.param)
    flags = ["--recipe", f"recipes/{request.param}.yaml", "--loop.duration", "20 steps",
             "--loop.eval_every", "10 steps", "--batch.eval_size", "16", *REPORT]
    return [train(folder / f"{processes}" / "run", *flags, processes=processes)
            for processes in (1, 3)]


def test_any_number_of_processes_writes_the_same_bytes(runs):
    written = [
        {str(file.relative_to(run)): file.read_bytes()
         for pattern in ("predictions.csv", "loss_by_position.csv", "examples/*")
         for file in run.glob(pattern)} for run in runs
    ]
    assert {"predictions.csv", "examples/examples.json"} <= written[0].keys()
    assert written[0] == written[1]


def test_the_table_adds_up_to_the_evaluation(runs):
    rows, results = table(runs[0]), evaluation(runs[0])
    for task, result in results.items():
        losses = [float(row["loss"]) for row in of(rows, task)]
        words = [row["target"].split() for row in of(rows, task)]
        # Of pixels and tokens a sample has as many losses as targets.
        counts = [int(word[0]) if word[1:] in (["pixels"], ["tokens"]) else 1 for word in words]
        assert np.average(losses, weights=counts) == pytest.approx(result["loss"], rel=1e-6)
    if "digit" in results:
        digits = of(rows, "digit")
        right = np.mean([row["target"] == row["prediction"] for row in digits])
        assert right == pytest.approx(results["digit"]["accuracy"], rel=1e-12)
        assert all(0.1 <= float(row["confidence"]) <= 1 for row in digits)
        pairs = [(float(row["target"]), float(row["prediction"])) for row in of(rows, "ink")]
        assert np.mean([abs(a - b) for a, b in pairs]) == pytest.approx(
            results["ink"]["mae"], rel=1e-6)
        quadrants = of(rows, "quadrants")
        wrong = sum((row["target"] != row["prediction"]) for row in quadrants)
        assert 0 < wrong <= 4 * len(quadrants) * (1 - results["quadrants"]["accuracy"]) + 0.5
    if "mask" in results:
        there = sum(int(row["target"].split()[0]) for row in rows)
        right = sum(int(row["prediction"].split()[0]) for row in rows)
        assert right / there == pytest.approx(results["mask"]["pixel_accuracy"], rel=1e-12)
    if "text" in results:
        with (runs[0] / "loss_by_position.csv").open(newline="") as file:
            lines = list(csv.DictReader(file))
        tokens = [int(line["tokens"]) for line in lines]
        mean = sum(n * float(line["loss"]) for n, line in zip(tokens, lines, strict=True))
        assert mean / sum(tokens) == pytest.approx(results["text"]["loss"], rel=1e-6)
        assert [int(line["position"]) for line in lines] == list(range(1, 129))


def test_examples_are_the_worst_and_some_that_were_drawn(runs):
    entries = json.loads((runs[0] / "examples" / "examples.json").read_text())
    tasks = {entry["task"] for entry in entries}
    rows = {(row["task"], int(row["row"])): row for row in table(runs[0])}
    for task in tasks:
        groups = {group: [e for e in entries if e["task"] == task and e["group"] == group]
                  for group in ("mistake", "sample")}
        assert 0 < len(groups["mistake"]) <= 12 and len(groups["sample"]) == 12
        assert len({entry["row"] for entry in groups["sample"]}) == 12
        for entry in entries:
            if "image" in entry:
                with Image.open(runs[0] / "examples" / entry["image"]) as image:
                    assert min(image.size) >= 64
            else:
                assert entry["text"]
            if entry["task"] in ("digit", "quadrants"):
                row = rows[entry["task"], entry["row"]]
                assert (entry["target"], entry["prediction"]) == (row["target"], row["prediction"])
                if entry["group"] == "mistake":
                    assert entry["target"] != entry["prediction"]
    by_confidence = [e["confidence"] for e in entries
                     if e["task"] == "digit" and e["group"] == "mistake"]
    assert by_confidence == sorted(by_confidence, reverse=True)


def test_the_best_weights_are_asked_not_the_last(tmp_path):
    # A rate that rises without end: the best evaluation is not the last.
    run = train(tmp_path / "run", "--loop.duration", "60 steps", "--loop.eval_every", "10 steps",
                "--optim.lr", "0.3", "--schedule.name", "constant", *REPORT)
    last = json.loads((run / "final" / "evaluation.json").read_text())["digit"]["accuracy"]
    best = evaluation(run)["digit"]["accuracy"]
    right = np.mean([row["target"] == row["prediction"] for row in table(run)])
    assert best > last and right == pytest.approx(best, rel=1e-12)


def test_none_is_kept_to_look_at_if_none_is_wanted(tmp_path):
    run = train(tmp_path / "run", "--loop.duration", "5 steps", "--log.examples", "0", *REPORT)
    assert not (run / "examples").exists() and len(table(run)) == 360
    assert "data:image/png" in (run / "report.html").read_text()  # the curves


def test_a_run_that_goes_on_leaves_no_predictions_of_weights_that_are_gone(tmp_path):
    run = train(tmp_path / "run", "--loop.duration", "5 steps", *REPORT)
    written = ["predictions.csv", "examples", "report.html"]
    assert all((run / name).exists() for name in written)
    train(tmp_path / "run", "--loop.duration", "10 steps")
    assert not any((run / name).exists() for name in written)


def test_a_run_does_not_fail_for_want_of_something_to_look_at(tmp_path, monkeypatch, capsys):
    import train as script
    from trainlib.data import Dataset

    def fails(self):
        raise ConnectionError("the tokenizer has gone")

    monkeypatch.setattr(Dataset, "to_text", fails)
    torch.set_num_threads(1)
    run = tmp_path / "run"
    script.main(["--run_dir", str(run), "--log.trackers", "[]", "--loop.duration", "5 steps"])
    assert "examples: not made (the tokenizer has gone)" in capsys.readouterr().out
    assert len(table(run)) == 360 and (run / "report.html").exists()


def test_a_signal_in_the_last_pass_ends_it_and_the_same_command_makes_it(tmp_path):
    flags = ["--run_dir", str(tmp_path / "run"), "--log.trackers", "[]", "--loop.duration",
             "20 steps", "--batch.eval_size", "16"]
    script = tmp_path / "signalled.py"
    script.write_text(SIGNALLED.format(root=str(ROOT)))
    stopped = fork(flags, script=str(script))
    run = tmp_path / "run"
    assert stopped.returncode == 75 and "stopped by a signal at step 20 of 20" in stopped.stderr
    assert (run / "final").exists() and not (run / "predictions.csv").exists()
    again = fork(flags)
    assert again.returncode == 0 and len(table(run)) == 360 and (run / "report.html").exists()


SIGNALLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
import train
from trainlib import predictions, runtime

statistics = predictions.Recorder.statistics

def signalled(self, *arguments):
    os.kill(os.getpid(), signal.SIGTERM)
    return statistics(self, *arguments)

predictions.Recorder.statistics = signalled
runtime.run(train.main)
"""


def test_texts_are_shown_without_what_fills_them_up(tmp_path):
    net = tmp_path / "net.py:Bag"
    (tmp_path / "net.py").write_text(
        "from torch import nn\n\nclass Bag(nn.Module):\n"
        "    def __init__(self, num_classes):\n        super().__init__()\n"
        "        self.bag = nn.EmbeddingBag(256, num_classes)\n\n"
        "    def forward(self, tokens):\n        return self.bag(tokens)\n")
    rows = "".join(f"{'a word ' * (1 + number % 7)},{'xy'[number % 2]}\n" for number in range(80))
    (tmp_path / "texts.csv").write_text("text,label\n" + rows)
    run = train(tmp_path / "run", "--data.source", str(tmp_path / "texts.csv"), "--data.input",
                "text", "--data.tokenizer", "bytes", "--tasks.label.kind", "classification",
                "--model.name", str(net), "--loop.duration", "4 steps", *REPORT)
    entries = json.loads((run / "examples" / "examples.json").read_text())
    assert all(entry["text"] and "\0" not in entry["text"] for entry in entries)
    assert b"\0" not in (run / "report.html").read_bytes()


@pytest.mark.parametrize("image, shades", [
    (torch.ones(1, 2, 2), (255, 255)), (torch.tensor([[[-1.0, 1.0]]]), (0, 255)),
    (torch.full((4, 2, 2), 128, dtype=torch.uint8), (128, 128)),
    (torch.zeros(2, 2, 2, dtype=torch.bool), (0, 0)), (torch.ones(1, 1, 5000), (255, 255)),
])
def test_pictures_of_any_kind_of_input(image, shades):
    with Image.open(io.BytesIO(_picture(image, [], 2))) as picture:
        grey = np.asarray(picture.convert("L"))
    assert (grey.min(), grey.max()) == shades and max(grey.shape) <= 256


class Reader:
    """As much of an EvalReader as a recorder asks for."""

    def __init__(self, targets: torch.Tensor, batch_size: int):
        self.split, self.batch_size, self.targets = self, batch_size, targets

    def __len__(self) -> int:
        return len(self.targets)

    def read(self, samples):
        return None, {"t": self.targets[torch.from_numpy(samples)]}


def recorded(task, outputs: torch.Tensor, targets: torch.Tensor, batch_size: int) -> dict:
    recorder = Recorder(task, Reader(targets, batch_size))
    batches = zip(outputs.split(batch_size), targets.split(batch_size), strict=True)
    sums = [recorder.statistics(output, {"t": target})[1] for output, target in batches]
    return recorder.result(torch.zeros(0), torch.stack(sums))


def build(kind, loss, **given):
    return kind(name="t", weight=1.0, loss=partial(LOSSES[loss]), loss_name=loss, **given)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 20])
def test_numbers_of_classes_with_missing_targets(batch_size):
    task = build(Classification, "cross_entropy", label_names=["a", "b", "c"], may_miss=True)
    torch.manual_seed(0)
    outputs, targets = torch.randn(7, 3), torch.tensor([0, 1, 2, -100, 1, -100, 0])
    rows = recorded(task, outputs, targets, batch_size)["rows"]
    assert rows.shape == (7, 4)
    wide = outputs.double().softmax(1).numpy()
    for row, probabilities, target in zip(rows, wide, targets.tolist(), strict=True):
        assert row[1] == pytest.approx(probabilities.max(), rel=1e-12)
        assert row[3] == probabilities.argmax()
        [line] = as_text(task, 5, row.tolist())
        assert line.row == 5 and line.prediction == "abc"[probabilities.argmax()]
        if target == -100:
            assert math.isnan(row[0]) and line.target == "" and not are_mistakes(row[None])[0]
        else:
            assert row[0] == pytest.approx(-math.log(probabilities[target]), rel=1e-6)
            assert are_mistakes(row[None])[0] == (probabilities.argmax() != target)


def test_numbers_of_labels_columns_and_pixels():
    labels = build(Multilabel, "bce", label_names=["x", "y"], may_miss=True, thresholds=[0.5, 0.9])
    outputs = torch.tensor([[2.0, 2.0], [-1.0, 3.0]])
    targets = torch.tensor([[1.0, 0.0], [torch.nan, 1.0]])
    rows = recorded(labels, outputs, targets, 4)["rows"]
    sigmoid = 1 / (1 + math.exp(-2.0))
    assert rows[0].tolist()[1:] == pytest.approx([1 - sigmoid, 1, 0, 1, 0])  # 0.88 is below 0.9
    assert math.isnan(rows[1][2]) and rows[1][4:].tolist() == [0, 1]
    assert as_text(labels, 0, rows[1].tolist())[0][2:4] == ("y", "y")
    assert rows[1][0] == pytest.approx(math.log1p(math.exp(-3.0)), rel=1e-6)  # of y alone

    numbers = build(Regression, "mse", label_names=["u", "v"], mean=(10.0, 0.0),
                    deviation=(2.0, 0.5), validation_mean=(0.0, 0.0))
    targets = torch.tensor([[1.0, 2.0], [0.0, torch.nan]], dtype=torch.float64)
    rows = recorded(numbers, torch.tensor([[0.0, 2.0], [1.0, 4.0]]), targets, 2)["rows"]
    assert [tuple(line[1:4]) for line in as_text(numbers, 3, rows[0].tolist())] == [
        ("t/u", "12", "10"), ("t/v", "1", "1")]
    assert as_text(numbers, 3, rows[1].tolist())[1][2:4] == ("", "2")
    assert rows[:, 0].tolist() == pytest.approx([0.5, 1.0])

    for kind in ("cross_entropy", "dice", "bce"):
        pixels = build(Segmentation, kind, label_names=["paper", "ink"], may_miss=True)
        logits = torch.tensor([-3.0, 3.0, 3.0, -3.0]).view(1, 1, 2, 2)
        outputs = logits if kind == "bce" else torch.cat([-logits / 2, logits / 2], 1)
        targets = torch.tensor([[[0, 1], [0, -100]]])
        rows = recorded(pixels, outputs, targets, 1)["rows"]
        assert rows[0][2:].tolist() == [3, 2]
        assert rows[0][1] == pytest.approx(1 / (1 + math.exp(-3)), rel=1e-6)
        assert math.isfinite(rows[0][0]) and are_mistakes(rows)[0]


@pytest.mark.parametrize("fused", [False, True])
def test_losses_by_position_are_those_of_the_tokens(fused):
    task = build(LanguageModeling, "cross_entropy", label_names=[], vocab_size=5, may_miss=True)
    torch.manual_seed(1)
    logits, targets = torch.randn(5, 4, 5), torch.randint(0, 5, (5, 4))
    targets[0, 2:] = -100
    losses = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), targets, reduction="none", ignore_index=-100)
    recorder = Recorder(task, Reader(targets, 2))
    sums = []
    for at in (0, 2, 4):
        output = {"losses": losses[at : at + 2]} if fused else logits[at : at + 2]
        sums.append(recorder.statistics(output, {"t": targets[at : at + 2]})[1])
    found = recorder.result(torch.zeros(0), torch.stack(sums))
    assert found["positions"][1].tolist() == [5, 5, 4, 4]
    assert found["positions"][0] == pytest.approx(losses.double().sum(0).numpy(), rel=1e-6)
    confidence = np.exp(-losses.double().numpy())
    assert found["rows"][0][1] == pytest.approx(confidence[0, :2].mean(), rel=1e-6)
    assert found["rows"][:, 2].tolist() == [2, 4, 4, 4, 4]
    right = ((logits.argmax(2) == targets) & (targets >= 0)).sum(1).tolist()
    assert np.isnan(found["rows"][:, 3]).all() if fused else found["rows"][:, 3].tolist() == right


def test_mistakes_of_classes_come_by_confidence_and_others_by_loss():
    classes = build(Classification, "cross_entropy", label_names=["a", "b"])
    rows = np.array([[9.0, 0.6, 0, 1], [0.1, 0.9, 0, 0], [2.0, 0.8, 1, 0], [1.0, 0.7, np.nan, 0]])
    assert choose(classes, rows, 3)[:2] == [(2, "mistake"), (0, "mistake")]
    assert [group for _, group in choose(classes, rows, 3)].count("mistake") == 2
    assert sorted(at for at, group in choose(classes, rows, 9) if group == "sample") == [0, 1, 2, 3]
    numbers = build(Regression, "mse", label_names=["u"], mean=(0.0,), deviation=(1.0,),
                    validation_mean=(0.0,))
    rows = np.array([[1.0, np.nan, 0, 1], [np.nan, np.nan, np.nan, 0], [4.0, np.nan, 0, 2]])
    assert choose(numbers, rows, 5)[:2] == [(2, "mistake"), (0, "mistake")]
    assert choose(numbers, rows, 0) == []
