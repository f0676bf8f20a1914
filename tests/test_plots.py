"""The pictures of a run folder: what is there, that it is right, and that nothing spoils it."""

import csv
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from matplotlib.figure import Figure
from PIL import Image

from trainlib import plots, progress, tasks
from trainlib.metrics import (
    classification_metrics,
    multilabel_metrics,
    regression_metrics,
    segmentation_metrics,
)
from trainlib.plots import comparison, curves, names, numbers, paper, records
from trainlib.plots.__main__ import main
from trainlib.plots.classes import _pooled, _share_text, draw_confusion, most_confused
from trainlib.plots.comparison import run_names
from trainlib.plots.numbers import draw_positions, draw_regression
from trainlib.plots.records import Line, Smoother, read_curves, thin
from trainlib.tasks.kinds import KINDS


def confusion(num_classes, seed=0):
    random = np.random.default_rng(seed)
    counts = random.poisson(0.3, (num_classes, num_classes)) + 40 * np.eye(num_classes, dtype=int)
    return torch.tensor(counts)


def result(kind, size=3):
    if kind == "classification":
        counts = confusion(size)
        return {"loss": 0.5, "confusion": counts.tolist()} | classification_metrics(counts)
    if kind == "segmentation":
        counts = confusion(size) * 10_000
        return {"loss": 0.5, "confusion": counts.tolist()} | segmentation_metrics(counts)
    if kind == "multilabel":
        counts = torch.tensor(np.random.default_rng(0).integers(0, 99, (size, 4)))
        return {"loss": 0.5} | multilabel_metrics(counts)
    if kind == "regression":
        count, sums = torch.tensor([9] * size), torch.rand(4, size).double() + 1
        return {"loss": 0.5} | regression_metrics(count, sums, torch.ones(size).double())
    return {"loss": 0.5, "perplexity": 1.6, "bits_per_byte": 0.7}


def logged(num_records, every=10, first=0, loss=lambda step: 2.3 / (1 + step / 50)):
    for step in range(first + every, first + every * num_records + 1, every):
        yield {"step": step, "epoch": step / 45, "train/loss": loss(step), "train/lr": 0.1 / step,
               "train/grad_norm": 1 + math.sin(step), "speed/samples_per_second": 9.0}
        if step % (3 * every) == 0:
            yield {"step": step, "epoch": step / 45, "eval/loss": loss(step), "eval/accuracy":
                   0.9 - abs(step - 60) / 1000, "eval/miou": 0.5, "eval/micro_f1": 0.4,
                   "eval/mae": 3.0, "eval/r2": -0.5, "eval/perplexity": 9.0}


FEW = [{"step": 1, "train/lr": 0.1}, {"step": 2, "train/lr": 0.1}]  # sooner drawn than many


def labels_of(kind, names):
    return {"columns": names, "mean": [0.0], "deviation": [1.0]} if kind == "regression" else names


@pytest.fixture
def make_run(tmp_path):
    def make(name, kinds, lines=None, size=3, names=None, **options):
        run = tmp_path / name
        (run / "best").mkdir(parents=True)
        names = names or [f"class {number}" for number in range(size)]
        config = {"run_dir": str(run), "seed": 0, "loop": {"monitor": "eval/loss"},
                  "tasks": {task: {"kind": kind, "thresholds": 0.25}
                            for task, kind in kinds.items()}}
        (run / "config.yaml").write_text(yaml.safe_dump(config | options))
        evaluation = {task: result(kind, size) for task, kind in kinds.items()}
        (run / "best" / "evaluation.json").write_text(json.dumps(evaluation))
        (run / "best" / "labels.json").write_text(json.dumps(
            {task: labels_of(kind, names) for task, kind in kinds.items()}))
        lines = logged(30) if lines is None else lines
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return run

    return make


def write_predictions(run, task, rows):
    with (run / "predictions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["row", "task", "target", "prediction", "confidence", "loss"])
        writer.writerows([number, task, *row, "", 0.1] for number, row in enumerate(rows))


def assert_picture(file, size=None):
    """A PNG of light paper with dark ink on it, on its whole width."""
    with Image.open(file) as image:
        grey = np.asarray(image.convert("L"), int)
    height, width = grey.shape
    assert size is None or (width, height) == size
    assert grey.max() == 255 and grey.min() < 60
    assert (np.concatenate([grey[:2], grey[-2:]]) > 250).all()
    assert 0.003 < (grey < 128).mean() < 0.8
    assert (grey[:, : width // 3] < 128).any() and (grey[:, -width // 3:] < 128).any()
    return grey


# ---- one run ----

@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_each_kind_leaves_its_pictures_and_no_more(make_run, kind):
    run = make_run("run", {"t": kind})
    if kind == "regression":
        write_predictions(run, "t/class 1", [(1, 1.5), (2, 1.5), ("", 3)])
    if kind == "language_modeling":
        (run / "loss_by_position.csv").write_text("position,tokens,loss\n1,9,3.0\n2,0,\n3,9,2\n")
    given = {file.name for file in run.iterdir()}
    said = []
    written = plots.draw_run(run, said.append)
    names = ["curves.png", "confusion_matrix.png"]
    names += ["per_class.csv"] if kind != "language_modeling" else []
    names += ["report.html"]
    assert [file.name for file in written] == names
    assert {file.name for file in run.iterdir()} == {*given, *names}
    for file in written[:2]:
        assert_picture(file)
    assert said == []


def test_the_curves_have_two_panels_a_row(make_run):
    run = make_run("run", {"t": "classification"})
    plots.draw_run(run)
    assert_picture(run / "curves.png", (1650, 1020))


def test_several_tasks_have_a_picture_each_and_one_table(make_run):
    run = make_run("run", {"digit": "classification", "a b/c": "multilabel"})
    assert {file.name for file in plots.draw_run(run)} == {
        "curves.png", "confusion_matrix_digit.png", "confusion_matrix_a_b_c.png", "per_class.csv",
        "report.html"}
    with (run / "per_class.csv").open() as file:
        assert [row["task"] for row in csv.DictReader(file)] == ["a b/c"] * 3 + ["digit"] * 3


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "language_modeling"])
def test_the_table_of_classes_has_the_numbers_of_the_evaluation(make_run, kind):
    names = ["a, b", 'say "c"', "d"]
    run = make_run("run", {"t": kind}, names=names)
    plots.draw_run(run)
    with (run / "per_class.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    evaluation = json.loads((run / "best" / "evaluation.json").read_text())["t"]
    entries = evaluation.get("classes") or evaluation["columns"]
    assert [row.pop("class") for row in rows] == names
    assert {row.pop("task") for row in rows} == {"t"}
    assert list(rows[0])[-1] == "support"
    if kind == "multilabel":
        assert {row.pop("threshold") for row in rows} == {"0.25"}
    assert [{key: float(value) for key, value in row.items()} for row in rows] == entries


@pytest.mark.parametrize("kind", ["classification", "segmentation", "multilabel"])
@pytest.mark.parametrize("size", [1, 2, 21, 100])
def test_few_and_many_classes_are_drawn(make_run, kind, size):
    run = make_run("run", {"t": kind}, size=size)
    plots.draw_run(run)
    assert max(assert_picture(run / "confusion_matrix.png").shape) <= 3300


def test_names_of_classes_are_text_and_not_formulae(make_run):
    run = make_run("run", {"t": "classification"}, names=["$x^{", "猫", "a\nb" * 40])
    plots.draw_run(run)
    assert_picture(run / "confusion_matrix.png")


def test_drawing_again_gives_the_same_bytes(make_run):
    run = make_run("run", {"t": "segmentation"})
    first = {file: file.read_bytes() for file in plots.draw_run(run)}
    second = {file: file.read_bytes() for file in plots.draw_run(run)}
    assert first == second and len(first) == 4


def test_more_colour_is_darker_in_grey():
    import matplotlib

    from trainlib.plots.paper import LINES, SHADES, inked_shades

    for shades in (matplotlib.colormaps[SHADES], inked_shades()):
        luminance = shades(np.linspace(0, 1, 256))[:, :3] @ [0.299, 0.587, 0.114]
        assert (np.diff(luminance) <= 1e-3).all() and luminance[0] - luminance[-1] > 0.5
    # And lines differ in dashes and markers, not only in colour.
    assert len({str(dashes) for _, dashes, _ in LINES}) == len({m for *_, m in LINES}) == len(LINES)


# ---- names ----

@pytest.mark.parametrize("some", [
    [f"a rather long name of class {number}" for number in range(20)],
    [f"the class {number} with a long start and a long end" for number in range(120)],
    ["same", "same", "other"],
    ["\U000f0000", "\U000f0001", "\ud800", "a\x00b"],
], ids=["ends differ", "middles differ", "twice the same", "no font has them"])
def test_names_of_classes_fit_and_are_told_apart(tmp_path, some):
    short = names.of_classes(some)
    assert len(set(short)) == len(some) and max(map(len, short)) <= names.LENGTH
    # And those that look alike without the letters that no font has, by their numbers.
    legible = ["".join(letter for letter in text if ord(letter) in names._letters())
               for text in short]
    assert len(set(legible)) == len(some)
    assert names.of_classes(["cat", "a dog"]) == ["cat", "a dog"]


def test_names_keep_the_end_that_tells_them_apart():
    some = [f"a rather long name of class {number}" for number in range(20)]
    for number, text in enumerate(names.of_classes(some)):
        assert text.startswith("a rather") and text.endswith(f" class {number}")


def test_the_names_at_an_axis_are_those_that_are_told_apart(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(paper, "name_ticks", lambda _, texts, *__, **___: shown.append(texts))
    some = [f"a long start before the class {number} and a long end" for number in range(9)]
    draw_confusion(tmp_path / "a.png", "a", np.eye(9, dtype=int), some, "samples")
    assert shown and all(len(set(texts)) == 9 for texts in shown)


@pytest.mark.parametrize("some", [
    ["/data/projects/very/long/path/one/file", "/data/projects/very/long/path/two/file"],
    [f"a/{'b' * 40}/number_{number}/run" for number in range(3)],
    ["x" * 50 + "1" + "x" * 50, "x" * 50 + "2" + "x" * 50, "short"],
    ["a" * 30, "a" * 31, "a" * 32, "a" * 32], ["", "b"], ["one"],
])
def test_short_forms_differ_where_and_only_where_names_do(some):
    short = names.tell_apart(some, 28)
    assert max(map(len, short)) <= 28
    assert [[a == b for b in short] for a in short] == [[a == b for b in some] for a in some]


def test_every_task_has_a_picture_of_its_own(make_run):
    tasks = ["a b", "a_b", "a/b", "A_B", "n" * 250, "n" * 249 + "m", "猫" * 250]
    run, said = make_run("run", dict.fromkeys(tasks, "classification"), FEW), []
    written = plots.draw_run(run, said.append)
    pictures = {file for file in written if file.name.startswith("confusion_matrix_")}
    assert len({file.name.casefold() for file in pictures}) == len(tasks) and said == []
    assert all(file.exists() for file in written) and run / "per_class.csv" in written
    parts = names.of_files(["a b", "a_b", "c d"])  # a name that is plain keeps it
    assert (parts["a_b"], parts["c d"]) == ("a_b", "c_d") and parts["a b"].startswith("a_b_")


# ---- records that are odd ----

@pytest.mark.parametrize("lines", [
    list(logged(1)),
    list(logged(1, every=1)),
    [line for line in logged(30) if "train/loss" not in line],
    [line for line in logged(30) if "eval/loss" not in line],
    [{"step": 0, "epoch": 0.0, "eval/loss": 2.3}],
    [line | {key: None for key in line if "/" in key} for line in logged(30)],
    [line | ({"train/loss": None} if line["step"] % 20 else {}) for line in logged(30)],
    [*logged(30), *logged(30, first=150)],
    [{"step": 3}],
    [line | {"train/loss": 10.0 ** -line["step"]} for line in logged(30)],
    [line | {"train/loss": 0.0, "train/grad_norm": -0.0} for line in logged(30)],
], ids=["one record", "one step", "no training", "no evaluation", "before the first step",
        "nothing finite", "gaps", "steps again", "no values", "300 decades", "zeros"])
def test_odd_records_are_drawn_without_a_warning(make_run, lines):
    run = make_run("run", {"t": "classification"}, lines)
    written = plots.draw_run(run, [].append)
    if any("/" in key for line in lines for key in line):
        assert run / "curves.png" in written
        assert_picture(run / "curves.png")


def test_without_records_or_an_evaluation_it_says_so_and_draws_the_rest(make_run):
    run, said = make_run("run", {"t": "classification"}, []), []
    assert [file.name for file in plots.draw_run(run, said.append)] == [
        "confusion_matrix.png", "per_class.csv", "report.html"]
    assert len(said) == 1 and "metrics.jsonl" in said[0]
    (run / "best" / "evaluation.json").write_text("{torn")
    said.clear()
    assert [file.name for file in plots.draw_run(run, said.append)] == ["report.html"]
    assert len(said) == 2 and "evaluation.json" in said[1]


NO_NUMBERS = [
    '{"step": 310, "epoch": "seven", "train/loss": "high", "speed/samples_per_second": []}',
    '{"step": 310, "epoch": 7, "train/loss": ' + "9" * 400 + "}",
    '{"step": ' + "9" * 400 + ', "epoch": 7, "train/loss": 1.0}',
    '{"step": NaN, "epoch": 7, "train/loss": 1.0}', "[" * 100_000, "\x00",
    '{"step": 320, "epoch": Infinity, "train/loss": 1.0, "memory/peak_gib": Infinity}',
]


def test_a_value_that_is_no_number_costs_no_picture(make_run):
    run, said = make_run("run", {"t": "classification"}), []
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(record + "\n" for record in NO_NUMBERS)
    assert [file.name for file in plots.draw_run(run, said.append)] == [
        "curves.png", "confusion_matrix.png", "per_class.csv", "report.html"]
    assert said == []
    assert read_curves(run).epochs_per_step == pytest.approx(1 / 45, rel=0.05)


def test_keys_that_are_unknown_are_said_to_be(make_run):
    lines = [{"step": 1, "eval/other": 1.0}]
    run, said = make_run("run", {"t": "language_modeling"}, lines), []
    assert [file.name for file in plots.draw_run(run, said.append)] == ["report.html"]
    assert len(said) == 1 and "no key" in said[0] and "curves.png" in said[0]


DAMAGES = {
    "classes are missing": lambda result: result.pop("classes"),
    "classes are words": lambda result: result.update(classes=["a", "b", "c"]),
    "the matrix is ragged": lambda result: result["confusion"][1].pop(),
    "the matrix has words": lambda result: result.update(confusion=[["x"] * 3] * 3),
    "the matrix is a number": lambda result: result.update(confusion=7),
    "a value is null": lambda result: result["classes"][1].update(iou=None, f1=None),
}


@pytest.mark.parametrize("kind", ["classification", "segmentation", "multilabel"])
def test_a_damaged_task_costs_no_other(make_run, capsys, kind):
    whole = {"a": "classification", "z": "segmentation"}
    run = make_run("run", whole | dict.fromkeys(DAMAGES, kind), FEW)
    evaluation = json.loads((run / "best" / "evaluation.json").read_text())
    for task, damage in DAMAGES.items():
        evaluation[task].setdefault("confusion", [[1, 2, 3], [4, 5, 6], [7, 8, 9]])
        damage(evaluation[task])
    (run / "best" / "evaluation.json").write_text(json.dumps(evaluation))
    assert main([str(run)]) == 0
    captured = capsys.readouterr()
    written = {file.rpartition("/")[2] for file in captured.out.splitlines()}
    assert written >= {"curves.png", "confusion_matrix_a.png", "confusion_matrix_z.png",
                       "per_class.csv", "report.html"}
    assert all(line.startswith("plots: ") for line in captured.err.splitlines())
    for task, part in names.of_files(DAMAGES).items():
        picture = f"confusion_matrix_{part}.png"
        has_nothing = kind == "multilabel" and task == "classes are missing"
        assert has_nothing or picture in written or f"{picture}: left out" in captured.err, task
    with (run / "per_class.csv").open() as file:
        assert set(whole) <= {row["task"] for row in csv.DictReader(file)}


def test_a_matrix_is_drawn_without_its_accuracy(make_run):
    values = {"null": None, "missing": None, "a word": "high", "no number": math.nan}
    run, said = make_run("run", dict.fromkeys(values, "classification"), FEW), []
    evaluation = json.loads((run / "best" / "evaluation.json").read_text())
    for task, value in values.items():
        evaluation[task]["accuracy"] = value
    del evaluation["missing"]["accuracy"]
    (run / "best" / "evaluation.json").write_text(json.dumps(evaluation))
    written = [file.stem for file in plots.draw_run(run, said.append)]
    assert sum("confusion" in stem for stem in written) == len(values) and said == []


@pytest.mark.parametrize("content", [b"row,task,target\n\xff\xfe\n", b"a" * 200_000, None],
                         ids=["no UTF-8", "an endless cell", "a folder"])
def test_damaged_predictions_are_left_out_in_a_line(make_run, capsys, content):
    csv.field_size_limit(2**17)  # csv's own, which a prediction in this process may have raised
    run = make_run("run", {"t": "regression"}, FEW, size=1)
    if content is None:
        (run / "predictions.csv").mkdir()
    else:
        (run / "predictions.csv").write_bytes(content)
    assert main([str(run)]) == 0
    captured = capsys.readouterr()
    assert [file.rpartition("/")[2] for file in captured.out.split()] == [
        "curves.png", "per_class.csv", "report.html"]
    assert len(captured.err.splitlines()) == 1 and "predictions.csv" in captured.err
    assert "written" not in captured.err and "--out" not in captured.err


def test_a_torn_line_is_left_out(make_run):
    run = make_run("run", {"t": "classification"})
    whole = read_curves(run).lines["train/loss"].points()
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 310, "train/lo')
    again = read_curves(run)
    assert np.array_equal(again.lines["train/loss"].points(), whole)
    assert again.last_step == 300


def test_a_step_that_was_done_again_replaces_what_came_after_it():
    line = Line()
    for step, value in [(10, 1.0), (20, 2.0), (30, 3.0), (20, 5.0), (40, 6.0)]:
        line.add(step, value)
    assert [list(part) for part in line.points()] == [[10, 20, 40], [1, 5, 6]]


def test_the_best_step_is_the_first_best_as_training_has_it(make_run):
    for key, better in (("eval/loss", min), ("eval/accuracy", max)):
        lines = [{"step": step, key: value} for step, value in
                 enumerate([0.5, 0.3, None, 0.7, 0.3, 0.7], 1)]
        run = make_run(key.replace("/", "_"), {"t": "classification"}, lines)
        state = progress.Progress()
        for line in lines:
            state.step = line["step"]
            value = math.nan if line[key] is None else line[key]
            state.observe(value, records.lower_is_better(key), {})
        assert read_curves(run).best(key) == (state.best_step, state.best_value)
        assert state.best_value == better([0.3, 0.7])


def test_metrics_mean_the_same_as_in_training():
    assert records._LOWER_IS_BETTER == progress._LOWER_IS_BETTER
    for kind, task in KINDS.items():
        if isinstance(task.headline, tuple):  # that of a regression depends on its columns
            assert curves.HEADLINE[kind] == task.headline
    assert set(curves.HEADLINE) == set(KINDS) and tasks.KINDS is KINDS


# ---- smoothing and thinning ----

def test_smoothing_is_the_bias_corrected_average():
    half_life, values = 30.0, np.random.default_rng(0).normal(size=200)
    decay, average = 0.5 ** (10 / half_life), 0.0
    smoother = Smoother(half_life)
    for number, value in enumerate(values, 1):
        average = decay * average + (1 - decay) * value
        found = smoother.add(10 * number, value)
        # Sums of up to 200 terms, each rounded.
        assert found == pytest.approx(average / (1 - decay**number), rel=1e-12, abs=1e-13)


def test_smoothing_a_constant_changes_nothing_and_a_gap_has_no_weight():
    smoother = Smoother(5)
    found = [smoother.add(step, value) for step, value in
             [(1, 3.0), (2, math.nan), (3, 3.0), (900, 3.0), (10**9, 3.0)]]
    assert math.isnan(found.pop(1)) and found == pytest.approx([3.0] * 4, rel=1e-15)
    smoother, other = Smoother(5), Smoother(5)
    with_gap = [smoother.add(*point) for point in [(1, 1.0), (2, math.nan), (3, 2.0)]]
    assert with_gap[2] == [other.add(*point) for point in [(1, 1.0), (3, 2.0)]][1]


def test_records_far_apart_are_smoothed_too():
    smoother = Smoother(0.01)
    assert [smoother.add(step, step / 10) for step in (10, 20)] == pytest.approx([1, 5 / 3])


@pytest.mark.parametrize("num_points", [1, 2, 3, 99, 100, 101, 5000])
def test_thinning_keeps_ends_and_extremes(num_points):
    random = np.random.default_rng(num_points)
    steps = np.cumsum(random.integers(1, 50, num_points)).astype(float)
    values = random.normal(size=num_points)
    kept = thin(steps, values, 100)
    assert len(kept) <= 100 and (np.diff(kept) > 0).all()
    assert {0, num_points - 1, values.argmin(), values.argmax()} <= set(kept.tolist())
    if num_points <= 100:
        assert len(kept) == num_points


def test_thinning_keeps_the_extremes_and_gaps_of_a_long_stream():
    line, values = Line(100), np.random.default_rng(0).normal(size=50_000)
    values[[777, 31_234]] = -50, 60
    values[40_000:42_000] = math.nan
    for step, value in enumerate(values):
        line.add(step, value)
    steps, found = line.points()
    assert len(steps) <= 110
    assert np.array_equal(found, values[steps.astype(int)], equal_nan=True)
    assert (steps[np.nanargmin(found)], steps[np.nanargmax(found)]) == (777, 31_234)
    assert np.isnan(found[(steps >= 40_000) & (steps < 42_000)]).all()
    assert np.isnan(found).any() and (steps[0], steps[-1]) == (0, 49_999)


def test_a_long_run_is_thinned_and_smoothed_from_every_record(make_run):
    num_records, random = 30_000, np.random.default_rng(0)
    values = random.normal(1, 0.3, num_records).tolist()
    run = make_run("run", {"t": "classification"}, (
        {"step": step, "epoch": step / 9, "train/loss": value}
        for step, value in enumerate(values, 1)))
    found = read_curves(run)
    smoother = Smoother(num_records * records.HALF_LIFE_SHARE)
    smoothed = [smoother.add(step, value) for step, value in enumerate(values, 1)]
    steps, thinned = found.smoothed["train/loss"].points()
    assert len(steps) <= records.NUM_POINTS + 2
    assert thinned.tolist() == [smoothed[int(step) - 1] for step in steps]
    steps, thinned = found.lines["train/loss"].points()
    assert (thinned.min(), thinned.max()) == (min(values), max(values))
    assert (found.last_step, found.epochs_per_step) == (num_records, pytest.approx(1 / 9))


# ---- many lines ----

def test_no_line_is_dropped_and_no_panel_has_more_than_can_be_told_apart():
    tasks = [f"task {number}" for number in range(30)]
    config = {"tasks": {task: {"kind": "classification"} for task in tasks}}
    keys = [f"train/{task}_loss" for task in tasks] + [f"eval/{task}/accuracy" for task in tasks]
    panels = curves.choose_panels([config], keys)
    assert sorted(key for panel in panels for key in panel.keys) == sorted(keys)
    assert max(len(panel.keys) for panel in panels) <= len(paper.LINES)
    assert len({panel.title for panel in panels}) == len(panels)


@pytest.mark.parametrize("num_lines", [2, 6, 8])
def test_a_long_legend_covers_no_line(num_lines):
    figure = Figure((5.5, 4), layout="constrained")
    axes = figure.add_subplot()
    for number in range(num_lines):
        axes.plot([0, 1], [number, 1], label=f"validation task {number} accuracy")
    curves.finish_panel(axes, curves.Panel("title", "unit", []), 1)
    figure.draw_without_rendering()
    legend = axes.get_legend().get_window_extent()
    inside = legend.overlaps(axes.get_window_extent())
    assert inside == (num_lines < 6)
    assert figure.bbox.containsx(legend.x1) and figure.bbox.containsy(legend.y0)
    assert not legend.overlaps(axes.xaxis.label.get_window_extent())


# ---- classes and numbers ----

def test_the_most_confused_pairs_come_first_and_right_ones_are_no_mistakes():
    counts = np.array([[9, 3, 0], [1, 9, 0], [0, 5, 9]])
    assert most_confused(counts) == [(2, 1), (0, 1), (1, 0)]
    assert most_confused(counts, most=1) == [(2, 1)]
    assert most_confused(np.diag([3, 4])) == []


def test_a_mistake_among_a_thousand_classes_is_seen():
    counts = np.diag(np.full(1000, 5))
    counts[997, 3] = 2
    pooled = _pooled(counts)
    assert len(pooled) <= 400 and pooled[997 // 3, 3 // 3] == 2 and pooled.max() == 5


def test_only_a_class_without_a_mistake_has_a_hundred_percent():
    assert [_share_text(share, 10) for share in (0.01, 0.5, 99.4, 99.9, 100)] == [
        "<1", "0", "99", ">99", "100"]
    assert [_share_text(share, 2) for share in (0.01, 0.06, 99.96, 100)] == [
        "<0.1", "0.1", ">99.9", "100.0"]


def test_a_confusion_matrix_without_samples_is_drawn(tmp_path):
    draw_confusion(tmp_path / "a.png", "a", np.zeros((3, 3), int), list("abc"), "samples")
    draw_confusion(tmp_path / "b.png", "b", np.zeros((30, 30), int), list("abc") * 10, "samples")
    assert_picture(tmp_path / "a.png")
    assert_picture(tmp_path / "b.png")


@pytest.mark.parametrize("num_samples, spread", [(1, 1), (7, 0), (88, 50), (2500, 50), (2500, 0)])
def test_predictions_are_drawn_as_dots_and_many_as_cells(tmp_path, num_samples, spread):
    random = np.random.default_rng(0)
    pair = 150 + spread * random.normal(size=(2, num_samples))
    assert draw_regression(tmp_path / "a.png", "title", {"progression": pair})
    assert_picture(tmp_path / "a.png", (1530, 765))


def test_of_predictions_only_the_tasks_own_are_drawn(make_run):
    run = make_run("run", {"t": "regression"}, size=1)
    write_predictions(run, "another", [("1", "2")] * 3)
    assert run / "confusion_matrix.png" not in plots.draw_run(run)
    write_predictions(run, "t", [("1", "2"), ("", "3"), ("nan", "1")])
    assert run / "confusion_matrix.png" in plots.draw_run(run)


def test_of_very_many_columns_the_worst_are_drawn(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(numbers, "_draw_column", lambda *given: drawn.append(given[4]))
    random = np.random.default_rng(0)
    true, wrong = random.normal(size=(2, 12, 50))
    scales = np.geomspace(1e-3, 1e3, 12)[:, None]
    # Errors of 1, 2, ... deviations, in units in which the first columns have the smallest ones.
    predicted = true + wrong * np.arange(12, 0, -1)[:, None]
    draw_regression(tmp_path / "a.png", "title", {
        f"column {number}": pair
        for number, pair in enumerate(zip(true * scales, predicted * scales, strict=True))})
    error = np.abs(predicted - true).mean(1) / true.std(1)
    assert drawn == [f"column {number}" for number in np.argsort(-error)[:8]]
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (1530, round((8 * 4.6 + 0.5) * 150))


@pytest.mark.parametrize("losses", [[2.0], [None, 2.0, 1.0], [None], [1.0] * 4096])
def test_losses_by_position_are_drawn(tmp_path, losses):
    draw_positions(tmp_path / "a.png", "title", losses)
    assert_picture(tmp_path / "a.png", (1200, 600))


# ---- several runs ----

def test_only_options_that_differ_are_in_the_table():
    one = {"run_dir": "a", "seed": 0, "optim": {"lr": 0.1, "args": {}}, "tags": ["x"], "only": None}
    two = {"run_dir": "b", "seed": 0, "optim": {"lr": 0.2, "args": {"nesterov": True}},
           "tags": ["x", "y"]}
    assert plots.differences([one, two]) == {
        "optim.lr": ["0.1", "0.2"], "optim.args": ["{}", "(unset)"],
        "tags": ['["x"]', '["x", "y"]'], "only": ["null", "(unset)"],
        "optim.args.nesterov": ["(unset)", "true"],
    }
    assert plots.differences([one, one | {"run_dir": "c"}]) == {}


def test_several_runs_are_drawn_over_each_other_above_what_differs(make_run, tmp_path, capsys):
    one = make_run("one", {"t": "classification"})
    two = make_run("two", {"t": "classification"}, list(logged(9)), seed=7)
    differing = plots.overlay([one, two], tmp_path / "both.png")
    assert differing == {"seed": ["0", "7"]}
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["option", "one", "two"], ["seed", "0", "7"]]
    assert_picture(tmp_path / "both.png")


def test_the_table_is_printed_whole_and_shown_so_that_it_says_what_differs(
    make_run, tmp_path, monkeypatch
):
    said, shown, make = [], [], comparison._shown_table
    monkeypatch.setattr(comparison, "_shown_table", lambda *given: shown.extend(make(*given))
                        or shown)
    sources = [f"/data/projects/{'very/' * 10}long/path/{which}/{'file' * 10}"
               for which in ("one", "two")]
    names = [f"cifar10_a_quite_long_name_of_a_run_with_seed_{seed}" for seed in range(2)]
    runs = [make_run(name, {"t": "classification"}, FEW, data={"source": source})
            for name, source in zip(names, sources, strict=True)]
    plots.overlay(runs, tmp_path / "both.png", said.append)
    assert [line.split() for line in said[0].splitlines()] == [
        ["option", *names], ["data.source", *sources]]
    for line in shown:
        _, one, two = line.split()
        assert one != two and max(len(one), len(two)) <= 28


def test_more_runs_than_fit_are_counted_and_drawn_all(tmp_path):
    values = [str(number) for number in range(70)]
    table = comparison._shown_table(values, {"seed": values})
    assert table[0].split() == ["option", *values[:8]] and "62 more runs" in table[-1]
    assert len(list(comparison._styled(values))) == 70
    assert len({str(style) for _, style in comparison._styled(values[:64])}) == 64


def test_runs_of_one_name_are_told_apart_by_their_paths(make_run, tmp_path, capsys):
    runs = [make_run("a/run", {"t": "classification"}), make_run("b/run", {"t": "classification"})]
    assert plots.overlay(runs, tmp_path / "both.png") == {}
    assert capsys.readouterr().out == "no option differs\n"
    assert run_names(runs) == [str(run) for run in runs]
    assert run_names([runs[0], tmp_path]) == ["run", tmp_path.name]


def test_runs_of_other_kinds_empty_ones_and_very_many_are_drawn_too(make_run, tmp_path):
    runs = [make_run(f"run {number}", {"t": kind}, [] if number % 4 == 3 else None, seed=number)
            for number, kind in enumerate([*KINDS, *KINDS])]
    plots.overlay(runs, tmp_path / "all.png", [].append)
    assert_picture(tmp_path / "all.png")
    plots.overlay([runs[3], runs[7]], tmp_path / "none.png", [].append)
    assert (tmp_path / "none.png").exists()


# ---- the program ----

def test_it_draws_again_and_prints_the_files(make_run, tmp_path, capsys, monkeypatch):
    run = make_run("run", {"t": "classification"})
    monkeypatch.chdir(tmp_path)
    assert main(["run"]) == 0
    assert capsys.readouterr().out.split() == [
        "run/curves.png", "run/confusion_matrix.png", "run/per_class.csv", "run/report.html"]
    assert main([str(run), "run"]) == 0
    assert capsys.readouterr().out.split("\n")[-2] == "comparison.png"
    assert_picture(tmp_path / "comparison.png")
    assert main([str(run), "run", "--out", "other.png"]) == 0 and (tmp_path / "other.png").exists()


@pytest.mark.parametrize("what", ["missing", "empty", "not YAML", "no mapping", "a file"])
def test_a_folder_that_is_no_run_is_one_line_and_exit_code_2(tmp_path, capsys, what, make_run):
    good, bad = make_run("good", {"t": "classification"}), tmp_path / "bad"
    if what == "a file":
        bad.write_text("x")
    elif what != "missing":
        bad.mkdir()
        if what != "empty":
            (bad / "config.yaml").write_text("{a: [" if what == "not YAML" else "- 1\n")
    for arguments in ([str(bad)], [str(good), str(bad), "--out", str(tmp_path / "out.png")]):
        assert main(arguments) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and len(captured.err.splitlines()) == 1
        assert str(bad) in captured.err and "config.yaml" in captured.err
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize("runs, out, words", [
    (1, "x.png", "one run"), (2, "x.pdf", "x.pdf"), (2, "x", ".png"),
    (2, "missing/x.png", "missing/x.png: cannot be written"), (2, "folder.png", "folder.png"),
])
def test_an_out_that_cannot_be_is_refused_in_a_line(
    make_run, tmp_path, capsys, monkeypatch, runs, out, words
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    folders = [str(make_run(f"run {number}", {"t": "classification"}, FEW))
               for number in range(runs)]
    assert main([*folders, "--out", out]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and words in error and "tmp" not in error
    assert not (tmp_path / "x").exists() and not list(tmp_path.rglob("x.p*"))
    assert not list(tmp_path.rglob(".tmp*"))


def test_a_folder_that_takes_no_file_is_said_to(make_run, capsys, monkeypatch):
    def fails(source, target):
        raise OSError(28, "No space left on device", source, None, target)

    run = make_run("run", {"t": "classification"}, FEW)
    monkeypatch.setattr(paper.os, "replace", fails)
    assert main([str(run)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "tmp_" not in captured.err
    assert "cannot be written (No space left" in captured.err.splitlines()[-1]


def test_a_file_that_cannot_be_replaced_costs_no_other(make_run, capsys):
    run = make_run("run", {"t": "classification"}, FEW)
    (run / "confusion_matrix.png").mkdir()
    assert main([str(run)]) == 0
    captured = capsys.readouterr()
    assert [file.rpartition("/")[2] for file in captured.out.split()] == [
        "curves.png", "per_class.csv", "report.html"]
    assert "confusion_matrix.png cannot be written" in captured.err and ".tmp" not in captured.err


def test_it_runs_as_a_module_and_needs_no_torch(make_run):
    run = make_run("run", {"t": "classification"})
    code = ("import sys, runpy; sys.argv = ['plots', sys.argv[1]]\n"
            "try: runpy.run_module('trainlib.plots', run_name='__main__')\n"
            "except SystemExit as exit: assert not exit.code\n"
            "assert 'torch' not in sys.modules and 'matplotlib.pyplot' not in sys.modules")
    done = subprocess.run([sys.executable, "-W", "error", "-c", code, str(run)],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and len(done.stdout.splitlines()) == 4


def test_a_sweep_is_drawn_and_its_answer_marked(tmp_path):
    lrs = np.geomspace(1e-6, 1, 50)
    losses = 1 + np.cos(np.linspace(0, 3, 50))
    pictures = []
    for answer in (None, 2e-5):
        file = tmp_path / f"{answer}.png"
        plots.draw_sweep(file, lrs, losses, losses - 0.1, losses + 0.1, (lrs, losses),
                         {"edge": 1e-3, "steepest": 1e-2, "none": None}, answer, "a verdict " * 30)
        assert_picture(file, (1200, 675))
        pictures.append(file.read_bytes())
    assert pictures[0] != pictures[1]
    plots.draw_sweep(tmp_path / "empty.png", [], [], [], [], None, {}, None, "nothing to see")
    assert (tmp_path / "empty.png").exists()
