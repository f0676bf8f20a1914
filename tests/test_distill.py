"""distill.py as users run it: the same bits anywhere, the loop of train.py, every kind of task."""

import json
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from launching import ROOT, assert_same_run, load, losses, records, train, weights
from safetensors.torch import load_file
from warm import fork

import distill as script
from trainlib import distillation
from trainlib.config import UserError
from trainlib.models import load_model
from trainlib.tasks import TaskOptions

SHORT = ["--loop.duration", "24 steps", "--log.every", "1", "--loop.eval_every", "8 steps",
         "--batch.micro_size", "16", "--batch.eval_size", "64"]
RESNET = ["--model.name", "resnet", "--model.args.width", "8"]
GPT = ["--data.source", "builtin:pydocs", "--data.tokenizer", "bytes", "--data.block_size", "32",
       "--tasks.text.kind", "language_modeling", "--model.name", "gpt", "--model.args.width", "16",
       "--model.args.depth", "1", "--model.args.heads", "2", "--batch.global_size", "8",
       "--batch.micro_size", "4", "--batch.eval_size", "2048"]
JOBS = {
    "digits": ([], RESNET),
    "multi_task": (["--tasks", "{digit: {}, ink: {kind: regression, weight: 0.5}, "
                    "quadrants: {kind: multilabel}}"], ["--model.args.hidden", "[64]"]),
    "segmentation": (["--data.source", "builtin:digits_ink", "--tasks.mask",
                      "{kind: segmentation, ignore_index: 255}", "--model.name", "unet",
                      "--model.args", "{width: 4, depth: 1}", "--batch.global_size", "16"],
                     ["--model.args.width", "6"]),
    "regression": (["--data.source", "builtin:diabetes", "--tasks.progression.kind", "regression"],
                   ["--model.args.hidden", "[64]"]),
    "language": (GPT, ["--model.args.width", "32"]),
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """From a job's name to the folder of its teacher, trained once."""
    folder = tmp_path_factory.mktemp("teachers")

    def made(job="digits", seed=0):
        run = folder / f"{job}_{seed}"
        if not run.exists():
            flags, larger = JOBS[job]
            train(run, *SHORT, *flags, *larger, "--seed", str(seed))
        return str(run)

    return made


def distil(folder, *flags, processes=1):
    return train(folder, *SHORT, *flags, processes=processes, script="distill.py")


def of(*runs):
    return ["--distill.teachers", json.dumps(list(runs))]


@pytest.mark.parametrize("job", ["digits", "language"])
def test_without_soft_loss_the_weights_are_those_of_train_py(tmp_path, job):
    flags = JOBS[job][0]
    unused = {"run": str(tmp_path / "teacher"), "recipe": "recipes/digits_resnet.yaml"}
    alone = distil(tmp_path / "distill", *flags, *of(unused), "--distill.kd_weight", "0")
    assert not (tmp_path / "teacher").exists()
    plain = train(tmp_path / "train", *SHORT, *flags)
    left, right = weights(alone), weights(plain)
    assert left.keys() == right.keys() and all(left[k].equal(right[k]) for k in left)
    assert losses(alone) == losses(plain)


CASES = {
    "dropout": ("digits", []),
    "augmentation, mixup, two kinds of dkd": (
        "digits", [*RESNET, "--data.augment.crop", "1", "--data.augment.mixup", "0.3",
                   "--distill.loss", "dkd", "--distill.loss_args.beta", "2"]),
    "features": ("digits", [*RESNET, "--model.args.width", "4", "--distill.features", json.dumps({
        "blocks.0 -> blocks.0": {"loss": "mse"},
        "blocks.1 -> blocks.1": {"loss": "attention", "weight": 10},
        "blocks.2 -> blocks.2": {"loss": "similarity"}})]),
    "dist": ("digits", ["--distill.loss", "dist"]),
    "cache": ("digits", ["--distill.cache", "logits"]),
    "multi_task": ("multi_task", []),
    "segmentation": ("segmentation", ["--loop.duration", "8 steps"]),
    "language": ("language", []),
}


@pytest.mark.parametrize("case", CASES)
def test_one_two_and_three_processes_give_the_same_bits(tmp_path, teacher, case):
    job, flags = CASES[case]
    flags = [*JOBS[job][0], *of(teacher(job)), *flags]
    runs = []
    for processes in (1, 2, 3):
        cache = ["--distill.cache_dir", str(tmp_path / f"cache {processes}")] * (case == "cache")
        runs.append(distil(tmp_path / str(processes), *flags, *cache, processes=processes))
    assert_same_run(runs[0], runs[1])
    assert_same_run(runs[0], runs[2])
    assert not any("training_only" in name for name in weights(runs[0]))
    logged = [record for record in records(runs[0]) if "train/loss" in record]
    named = {key for record in logged for key in record if key.startswith("train/")}
    assert any(key.endswith("kd_loss") for key in named)
    assert sum(losses(runs[0])[-4:]) < sum(losses(runs[0])[:4])


def test_a_cached_run_differs_by_fp16_alone(tmp_path, teacher):
    flags = of(teacher())
    live = distil(tmp_path / "live", *flags)
    stored = [*flags, "--distill.cache", "logits", "--distill.cache_dir", str(tmp_path / "cache")]
    cached = distil(tmp_path / "cached", *stored)
    assert losses(live) != losses(cached)
    assert losses(live)[:5] == pytest.approx(losses(cached)[:5], rel=1e-3)
    again = distil(tmp_path / "again", *stored)
    assert_same_run(cached, again)


@pytest.mark.parametrize("flags", [
    ["--optim.ema_half_life", "5 steps", "--distill.teachers", '[ema]'],
    [*RESNET, "--model.args.width", "4", "--distill.features", '{"blocks.1 -> blocks.1": {}}',
     "--distill.warmup", "50%"],
    ["--distill.cache", "logits"],
], ids=["ema", "projectors", "cache"])
def test_killed_and_resumed_it_goes_on_to_the_same_bits(tmp_path, teacher, flags):
    flags = [*of(teacher()), *flags, "--checkpoint.every", "5 steps"]
    if "--distill.cache" in flags:
        flags += ["--distill.cache_dir", str(tmp_path / "cache")]
    run = tmp_path / "run"
    result = fork(["--run_dir", str(run), "--log.trackers", "[]", *SHORT, *flags],
                  script="tests/struck_train.py", STRIKE="SIGKILL step 17", SCRIPT="distill")
    assert (tmp_path / "run.struck").exists(), result.stderr
    assert not (run / "final").exists()
    assert_same_run(distil(run, *flags), distil(tmp_path / "undisturbed", *flags))


def test_teachers_stay_as_they_are(tmp_path, teacher, monkeypatch):
    kept, build = [], distillation.build_teachers

    def spied(*arguments):
        kept.extend(build(*arguments))
        return kept

    monkeypatch.setattr(distillation, "build_teachers", spied)
    before = {name: t.clone() for name, t in load_model(teacher()).state_dict().items()}
    torch.set_num_threads(1)
    script.main(["--run_dir", str(tmp_path / "run"), "--log.trackers", "[]", *SHORT, *of(teacher()),
                 "--loop.duration", "100 steps", "--distill.features",
                 '{"3 -> blocks.0": {"loss": "similarity"}}'])
    [one] = kept
    after = one.module.state_dict()
    assert before.keys() == after.keys() and all(after[k].equal(before[k]) for k in before)
    assert not any(module.training for module in one.module.modules())
    assert all(p.grad is None for p in one.module.parameters())


def test_several_teachers_teach_as_their_average(tmp_path, teacher):
    """Of twice the same teacher the average is that teacher; weight 0 is no part of it."""
    one = distil(tmp_path / "one", *of(teacher()))
    weighted = of({"run": teacher(), "weight": 3}, {"run": teacher(seed=1), "weight": 0})
    assert_same_weights(one, distil(tmp_path / "weighted", *weighted))
    twice = distil(tmp_path / "twice", *of(teacher(), teacher()))
    assert losses(twice) == pytest.approx(losses(one), rel=1e-4)
    both = distil(tmp_path / "both", *of(teacher(), teacher(seed=1)))
    logits = distil(tmp_path / "logits", *of(teacher(), teacher(seed=1)),
                    "--distill.average", "logits")
    assert len({losses(run)[0] for run in (one, both, logits)}) == 3


def assert_same_weights(first, second):
    left, right = weights(first), weights(second)
    assert left.keys() == right.keys() and all(left[k].equal(right[k]) for k in left)


def test_the_built_in_job_makes_its_teacher_then_the_student_alone_then_the_student(tmp_path):
    teacher = {"run": str(tmp_path / "teacher"), "recipe": "recipes/digits_resnet.yaml"}
    run = distil(tmp_path / "run", *of(teacher), "--distill.baseline", "--loop.duration",
                 "60 steps")
    report = json.loads((run / "distillation.json").read_text())
    assert report["teachers"]["eval/accuracy"] > 0.97
    alone = json.loads((tmp_path / "run_alone" / "best" / "evaluation.json").read_text())
    assert report["alone"]["eval/accuracy"] == alone["digit"]["accuracy"]
    best = json.loads((run / "best" / "evaluation.json").read_text())
    assert report["student"]["eval/accuracy"] == best["digit"]["accuracy"]
    student, whole = report["student"]["eval/accuracy"], report["teachers"]["eval/accuracy"]
    gap = whole - alone["digit"]["accuracy"]
    assert report["gap_closed"] == (student - alone["digit"]["accuracy"]) / gap
    assert 0.5 < report["agreement"]["eval/agreement"] <= 1
    last = records(run)[-1]
    assert last["eval/agreement"] == report["agreement"]["eval/agreement"]
    assert last["teacher/accuracy"] == whole and last["eval/gap_closed"] == report["gap_closed"]
    # The student alone is the run that train.py makes of the same flags.
    plain = train(tmp_path / "plain", *SHORT, "--loop.duration", "60 steps")
    assert_same_weights(plain, tmp_path / "run_alone")
    again = fork(["--run_dir", str(run), "--log.trackers", "[]", *SHORT, *of(teacher),
                  "--distill.baseline", "--loop.duration", "60 steps"], script="distill.py")
    assert again.returncode == 0 and "this run has finished" in again.stdout


def test_agreement_and_the_teachers_metrics_are_those_of_a_pass_by_hand(tmp_path, teacher):
    run = distil(tmp_path / "run", *of(teacher(), teacher(seed=1)))
    report = json.loads((run / "distillation.json").read_text())
    validation = load().validation
    inputs = validation.inputs
    with torch.no_grad():
        student = load_model(run)(inputs).double()
        both = [load_model(teacher(seed=seed))(inputs).double().softmax(1) for seed in (0, 1)]
    mean = (both[0] + both[1]) / 2
    target = validation.targets["digit"].long()
    agreement = (student.argmax(1) == mean.argmax(1)).double().mean().item()
    accuracy = (mean.argmax(1) == target).double().mean().item()
    assert report["agreement"]["eval/agreement"] == pytest.approx(agreement, abs=1e-12)
    assert report["teachers"]["eval/accuracy"] == pytest.approx(accuracy, abs=1e-12)
    loss = -mean[torch.arange(len(target)), target].log().mean().item()
    assert report["teachers"]["eval/loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("job", ["multi_task", "regression", "segmentation", "language"])
def test_every_kind_of_task_is_compared(tmp_path, teacher, job):
    flags = JOBS[job][0]
    run = distil(tmp_path / "run", *flags, *of(teacher(job)), "--loop.duration", "8 steps")
    report = json.loads((run / "distillation.json").read_text())
    evaluation = json.loads((Path(teacher(job)) / "best" / "evaluation.json").read_text())
    for task, result in evaluation.items():
        key = f"eval/{task}/loss" if len(evaluation) > 1 else "eval/loss"
        assert report["teachers"][key] == pytest.approx(result["loss"], rel=1e-5)
        key = f"eval/{task}/agreement" if len(evaluation) > 1 else "eval/agreement"
        assert -5 < report["agreement"][key] <= 1


def test_numbers_are_compared_in_the_students_scale(tmp_path, teacher):
    """A teacher of other rows has another mean and deviation."""
    rows = datasets.Dataset.from_dict({
        "x": [float(n) for n in range(200)], "y": [3.0 * n + 5 for n in range(200)]})
    rows.to_parquet(str(tmp_path / "all.parquet"))
    rows.select(range(0, 200, 7)).to_parquet(str(tmp_path / "few.parquet"))
    shape = ["--tasks.y.kind", "regression", "--data.normalize", "false", "--batch.global_size",
             "16", "--model.args.hidden", "[]", "--model.args.dropout", "0", "--optim.lr", "1e-4"]
    large = train(tmp_path / "teacher", *SHORT, *shape, "--data.source",
                  str(tmp_path / "few.parquet"))
    run = distil(tmp_path / "run", *shape, *of(str(large)), "--data.source",
                 str(tmp_path / "all.parquet"))
    one = load_model(large)
    labels = {who: json.loads((path / "best" / "labels.json").read_text())["y"]
              for who, path in (("teacher", large), ("student", run))}
    assert labels["teacher"]["mean"] != labels["student"]["mean"]
    validation_rows = [r for r in records(run) if "teacher/mae" in r]
    data = load(tasks={"y": TaskOptions(kind="regression", target="y")}, normalize=False,
                source=str(tmp_path / "all.parquet")).validation
    with torch.no_grad():
        told = one(data.inputs).double().flatten() * labels["teacher"]["deviation"][0]
    told += labels["teacher"]["mean"][0]
    true = data.targets["y"].double().flatten() * labels["student"]["deviation"][0]
    true += labels["student"]["mean"][0]
    expected = (told - true).abs().mean().item()
    assert validation_rows[-1]["teacher/mae"] == pytest.approx(expected, rel=1e-4)


def refused(tmp_path, *flags):
    folder = tmp_path / "run"
    with pytest.raises(UserError) as caught:
        script.main(["--run_dir", str(folder), "--log.trackers", "[]", *SHORT, *flags])
    assert not folder.exists()
    return str(caught.value)


def test_bad_input_is_refused_in_one_line_before_anything_is_written(tmp_path, teacher):
    run = teacher()
    (tmp_path / "empty").mkdir()
    features = "--distill.features"
    for flags, message in (
        (["--distill.teachers", "[]"], "teachers: none given"),
        (["--data.source", "builtin:diabetes", "--tasks.progression.kind", "regression"],
         "distill.teachers: none given"),
        (of(str(tmp_path / "nowhere")), "nowhere: no .safetensors file"),
        (of(str(tmp_path / "empty")), "no model.safetensors in best/, final/"),
        ([*of(run), "--distill.temperature", "0"], "distill.temperature"),
        ([*of(run), "--distill.temperature", "-1"], "distill.temperature"),
        ([*of(run), "--distill.kd_weight", "0", "--distill.hard_weight", "0"], "both are 0"),
        (of({"run": run, "weight": 0}), "weights sum to 0"),
        ([*of(run), features, '{"layer -> blocks.0": {}}'], "has no module 'layer'"),
        ([*of(run), features, '{"3 -> block.0": {}}'], "did you mean 'blocks.0'"),
        ([*of(run), features, '{"blocks.0": {}}'], "two modules by path"),
        ([*of(run), features, '{"3 -> blocks.0": {teacher: 1}}'], "teacher 1 of 1"),
        ([*of(run), features, '{"3 -> blocks.0": {}}'], "choose modules of one resolution"),
        ([*of(run), features, '{"3 -> blocks.0": {loss: msee}}'], "did you mean 'mse'"),
        ([*of(run), "--distill.loss", "kll"], "did you mean 'kl'"),
        ([*of(run), "--distill.loss", "kl", "--distill.loss_args.beta", "1"], "does not take"),
        ([*of(run), "--distill.loss", "jsd", "--distill.loss_args.beta", "2"], "beta"),
        ([*of(run), "--distill.loss", "bernoulli_kl"], "is not for classification"),
        ([*of(run), "--distill.tasks.digt.loss", "kl"], "did you mean 'digit'"),
        ([*of(run), "--distill.cache", "logits", "--data.augment.crop", "1"],
         "data.augment.crop makes other inputs"),
        ([*of(run), "--distill.cache", "logits", features, '{"3 -> blocks.0": {}}'],
         "leave out cache or features"),
        ([*of(run), "--distill.cache_top_k", "3"], "is for a cache"),
        (["--distill.teachers", "[ema]"], "set optim.ema_half_life"),
        (of({"run": run, "ema": True}), "one of run, ema or model"),
        (of({"run": run, "weights": "x"}), "belongs to a teacher with model"),
        (of({"model": {"name": "mpl"}}), "did you mean 'mlp'"),
        ([*of(run), "--distill.loss", "jsd", "--distill.loss_args.beta", "abc"], "distill.loss"),
        ([*of(run), "--distill.cache", "logits", "--distill.cache_top_k", "3",
          "--distill.standardize"], "leave out one of them"),
        (of({"run": run + "/none", "recipe": "recipes/digits_mlp_from_resnet.yaml"}),
         "has teachers of its own"),
        ([*of({"ema": True, "precision": "bf16"}), "--optim.ema_half_life", "5 steps"],
         "has those of the run"),
        (["--tasks.digit.kind", "multilabel", "--tasks.digit.target", "quadrants", *of(run)],
         "is a classification, the student's a multilabel"),
    ):
        assert message in refused(tmp_path, *flags), flags


def test_a_teacher_of_other_classes_is_refused_by_their_names(tmp_path):
    def table(name, labels):
        rows = {"x": [float(n) for n in range(60)], "y": [labels[n % len(labels)] for n in
                                                          range(60)]}
        datasets.Dataset.from_dict(rows).to_parquet(str(tmp_path / f"{name}.parquet"))
        return ["--data.source", str(tmp_path / f"{name}.parquet"), "--batch.global_size", "16"]

    run = train(tmp_path / "teacher", *SHORT, *table("animals", ["ant", "bee", "cat"]),
                "--loop.duration", "2 steps")
    message = refused(tmp_path, *table("more", ["ant", "bee", "cat", "dog"]), *of(str(run)))
    assert "has 3 classes of 'y', the student 4" in message
    message = refused(tmp_path, *table("others", ["ant", "bear", "cat"]), *of(str(run)))
    assert "its class 1 of 'y' is 'bee', the student's is 'bear'" in message
    flags = table("again", ["cat", "bee", "ant"])  # the same classes, sorted to the same order
    distil(tmp_path / "fine", *flags, *of(str(run)), "--loop.duration", "2 steps")


def test_a_cache_of_another_teacher_is_refused(tmp_path, teacher):
    cache = ["--distill.cache", "logits", "--distill.cache_dir", str(tmp_path / "cache")]
    distil(tmp_path / "one", *of(teacher()), *cache, "--loop.duration", "2 steps")
    assert "holds other outputs: teachers" in refused(tmp_path, *of(teacher(seed=1)), *cache)
    assert "batch.eval_size (64 there, 32 here)" in refused(
        tmp_path, *of(teacher()), *cache, "--batch.eval_size", "32")
    [file] = (tmp_path / "cache").glob("part_*")
    assert load_file(file)["digit"].dtype == torch.float16
    # Nothing of it is needed where the student learns alone.
    distil(tmp_path / "alone", *of(teacher()), *cache, "--distill.kd_weight", "0")


def test_the_same_weights_in_another_net_are_another_teacher(tmp_path, teacher):
    """The number of heads leaves no trace in the weights."""
    def flags(heads):
        spec = {"model": {"name": "gpt", "args": {"depth": 1, "width": 32, "heads": heads}},
                "weights": f"{teacher('language')}/best/model.safetensors"}
        return [*GPT, *of(spec), "--distill.cache", "logits", "--distill.cache_dir",
                str(tmp_path / "cache")]

    distil(tmp_path / "one", *flags(2), "--loop.duration", "2 steps")
    assert "holds other outputs: teachers" in refused(tmp_path, *flags(4))


OWN_LM = """
from torch import nn

class Bare(nn.Module):
    def __init__(self, vocab_size):
        super().__init__()
        self.table, self.head = nn.Embedding(vocab_size, 8), nn.Linear(8, vocab_size + 7)

    def forward(self, tokens):
        return self.head(self.table(tokens))
"""


@pytest.mark.parametrize("flags", [[], ["--tasks.text.loss_args.label_smoothing", "0.3"]],
                         ids=["plain", "smoothed"])
def test_a_language_model_that_gives_logits_for_more_tokens_is_taught(tmp_path, teacher, flags):
    (tmp_path / "own.py").write_text(OWN_LM)
    own = ["--model.name", f"{tmp_path}/own.py:Bare", "--model.args", "{}"]
    run = distil(tmp_path / "run", *[word for word in GPT if not word.startswith("--model")][:8],
                 "--batch.global_size", "8", "--batch.micro_size", "4", *own, *flags,
                 *of(teacher("language")), "--loop.duration", "4 steps")
    report = json.loads((run / "distillation.json").read_text())
    assert 0 <= report["agreement"]["eval/agreement"] <= 1
    plain = report["teachers"]["eval/perplexity"]
    is_plain = report["teachers"]["eval/loss"] == pytest.approx(torch.tensor(plain).log().item())
    assert is_plain == (not flags)


@pytest.mark.parametrize("flags", [
    [*RESNET, "--model.args.width", "4", "--distill.features", '{"blocks.1 -> blocks.1": {}}'],
    ["--distill.cache", "logits"], ["--optim.ema_half_life", "5 steps", "--distill.teachers",
                                    '[ema]'], GPT,
], ids=["projector", "cache", "ema", "language"])
def test_in_bf16_it_learns_as_well(tmp_path, teacher, monkeypatch, flags):
    job = "language" if flags is GPT else "digits"
    flags = [*of(teacher(job)), *flags]
    if "--distill.cache" in flags:
        flags += ["--distill.cache_dir", str(tmp_path / "cache")]
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    curve = losses(distil(tmp_path / "run", *flags, "--loop.duration", "12 steps"))
    assert sum(curve[-3:]) < sum(curve[:3])


def test_the_average_of_the_student_teaches_it(tmp_path, monkeypatch):
    """The teacher holds the averaged weights and buffers themselves, at the end of the run too."""
    kept = {}
    follow = distillation.Teachers.follow
    monkeypatch.setattr(distillation.Teachers, "follow",
                        lambda self, ema: (kept.update(teachers=self, ema=ema), follow(self, ema)))
    torch.set_num_threads(1)
    script.main(["--run_dir", str(tmp_path / "run"), "--log.trackers", "[]", *SHORT, *RESNET,
                 "--optim.ema_half_life", "5 steps", "--distill.teachers", "[ema]",
                 "--loop.duration", "6 steps"])
    [teacher], averages = kept["teachers"].teachers, kept["ema"].averages
    held = dict(teacher.module.named_parameters()) | dict(teacher.module.named_buffers())
    assert any("running_mean" in name for name in averages)
    for name, average in averages.items():
        assert held[name].data_ptr() == average.data_ptr() and held[name].equal(average), name
    assert not (tmp_path / "run" / "distillation.json").exists()


def test_the_gap_is_that_to_better_teachers_alone(tmp_path):
    def closed(student, teacher, alone, lower):
        metrics = [{"eval/loss": value} for value in (student, teacher)]
        report, logged, lines = distillation.summarize(
            "eval/loss", lower, *metrics, {"eval/agreement": 0.5}, {"eval/loss": alone})
        assert ("gap" in lines) == ("eval/gap_closed" in logged) == (
            report["gap_closed"] is not None)
        return report["gap_closed"]

    assert closed(0.8, 0.5, 1.0, lower=True) == pytest.approx(0.4)
    assert closed(0.8, 0.9, 0.7, lower=False) == pytest.approx(0.5)
    assert closed(1.3, 1.5, 1.0, lower=True) is None and closed(0.8, 0.7, 0.7, lower=False) is None


def test_a_teacher_of_one_task_of_two_is_compared_in_that_task(tmp_path, teacher):
    run = distil(tmp_path / "run", "--tasks", "{digit: {}, ink: {kind: regression}}",
                 *of(teacher()), "--loop.duration", "4 steps")
    report = json.loads((run / "distillation.json").read_text())
    assert set(report["agreement"]) == {"eval/digit/agreement"}
    assert all(key.startswith("eval/digit/") for key in report["teachers"])


def test_top_k_of_all_tokens_is_the_whole_distribution(tmp_path, teacher):
    flags = [*GPT, *of(teacher("language")), "--distill.cache", "logits"]
    whole = distil(tmp_path / "whole", *flags, "--distill.cache_dir", str(tmp_path / "a"))
    top = distil(tmp_path / "top", *flags, "--distill.cache_dir", str(tmp_path / "b"),
                 "--distill.cache_top_k", "256")
    assert losses(top) == pytest.approx(losses(whole), rel=2e-3)
    few = distil(tmp_path / "few", *flags, "--distill.cache_dir", str(tmp_path / "c"),
                 "--distill.cache_top_k", "8")
    soft = [[r["train/kd_loss"] for r in records(run) if "train/kd_loss" in r]
            for run in (top, few)]
    assert soft[1][0] < soft[0][0]  # merged classes never add to a divergence
    size = [sum(f.stat().st_size for f in (tmp_path / name).glob("part_*")) for name in "ac"]
    assert size[1] < size[0] / 5


def test_a_teacher_by_model_and_weights_is_the_run_it_was_taken_from(tmp_path, teacher):
    spec = {"model": {"name": "resnet", "args": {"width": 8}},
            "weights": f"{teacher()}/best/model.safetensors"}
    by_spec = distil(tmp_path / "spec", *of(spec))
    assert_same_weights(by_spec, distil(tmp_path / "run", *of(teacher())))


@pytest.mark.parametrize("flags", [
    {"precision": "bf16"}, {"precision": "fp32"}, {"compile": "aot_eager"},
], ids=str)
def test_a_teacher_has_its_own_precision_and_compiler(tmp_path, teacher, flags):
    plain = losses(distil(tmp_path / "plain", *of(teacher()), "--loop.duration", "4 steps"))
    other = losses(distil(tmp_path / "other", *of({"run": teacher()} | flags), "--loop.duration",
                          "4 steps"))
    assert other == pytest.approx(plain, rel=0.05 if flags.get("precision") == "bf16" else 1e-4)
    assert (other != plain) == (flags.get("precision") == "bf16")


def test_the_warm_up_is_a_line_from_zero(tmp_path, teacher):
    run = distil(tmp_path / "run", *of(teacher()), "--distill.warmup", "12 steps",
                 "--loop.duration", "14 steps")
    rows = [r for r in records(run) if "train/kd_loss" in r]
    for step, row in enumerate(rows):
        share = min(1, (step + 1) / 13)
        assert row["train/loss"] == pytest.approx(
            row["train/hard_loss"] + share * row["train/kd_loss"], rel=1e-9)


def test_a_run_that_is_stopped_in_its_teacher_says_so_where_one_looks(tmp_path):
    teacher = {"run": str(tmp_path / "teacher"), "recipe": "recipes/digits_resnet.yaml"}
    arguments = ["--run_dir", str(tmp_path / "run"), "--log.trackers", "[]", *SHORT, *of(teacher)]
    result = fork(arguments, script="tests/struck_train.py", STRIKE="SIGTERM step 9",
                  SCRIPT="distill")
    assert result.returncode == 75
    for folder in ("teacher", "run"):
        assert json.loads((tmp_path / folder / "exit.json").read_text())["code"] == 75
    distil(tmp_path / "run", *of(teacher))


def test_help_names_every_option():
    command = [sys.executable, "distill.py", "--help"]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    assert "--distill.cache_top_k" in text and "--distill.temperature" in text
