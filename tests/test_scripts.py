"""train.py as users run it: what it writes, prints and refuses."""

import json
import re
import subprocess
import sys

import pytest
import torch
import yaml
from launching import (
    ROOT,
    assert_same_run,
    launch,
    load,
    losses,
    recipes,
    records,
    train,
    weights,
)
from warm import fork

from trainlib import data
from trainlib.evaluate import evaluate
from trainlib.models import load_model

QUICK = ["--loop.duration", "20 steps", "--log.every", "5"]


def test_the_default_command_learns_digits_and_writes_its_folder(tmp_path):
    result = launch(["--run_dir", str(tmp_path / "run")])
    assert result.returncode == 0, result.stderr
    run = tmp_path / "run"
    assert {p.name for p in run.iterdir()} == {
        "config.yaml", "environment.json", "metrics.jsonl", "exit.json", "log.txt", "best", "final",
        "wandb", "checkpoints", "wandb_run.json", "curves.png", "confusion_matrix.png",
        "per_class.csv", "predictions.csv", "examples", "report.html",
    }
    assert "pictures" not in result.stdout  # of which a line would say that they failed
    ended = json.loads((run / "exit.json").read_text())
    time = ended.pop("time")
    assert ended == {"code": 0, "reason": "finished", "step": 1348}  # ceil(60 * 1437 / 64)
    assert "weighted avg" in result.stdout and "best/ holds the weights" in result.stdout
    assert "\r" not in result.stdout + result.stderr  # plain lines where there is no terminal
    environment = json.loads((run / "environment.json").read_text())
    assert environment["world_size"] == 1 and environment["torch"] == torch.__version__
    [start] = environment["starts"]
    assert (start["step"], start["processes"]) == (0, 1) and start["time"] <= time
    evaluations = [r for r in records(run) if "eval/accuracy" in r]
    best = max(r["eval/accuracy"] for r in evaluations)
    assert best >= 0.97
    training = [r for r in records(run) if "train/loss" in r]
    assert [r["step"] for r in training] == [*range(10, 1348, 10), 1348]
    assert training[-1]["epoch"] == 1348 * 64 / 1437
    assert {"train/lr", "train/grad_norm", "speed/samples_per_second", "memory/peak_gib"} <= set(
        training[0]
    )
    assert all(r["train/lr"] > 0 for r in training)
    best_evaluation = json.loads((run / "best" / "evaluation.json").read_text())["digit"]
    assert best_evaluation["accuracy"] == best and len(best_evaluation["confusion"]) == 10
    # The model that is loaded back is the one that was evaluated.
    model = load_model(run)
    assert not model.training and model.label_names == {"digit": list("0123456789")}
    assert model.run_config["optim"]["lr"] == 1e-3
    validation = load().validation
    with torch.no_grad():
        right = model(validation.inputs).argmax(1) == validation.targets["digit"]
    assert right.double().mean().item() == pytest.approx(best, abs=1e-12)


def test_a_run_does_not_fail_for_want_of_a_picture(tmp_path, monkeypatch, capsys):
    import train as script
    from trainlib import plots

    def fails(folder, say, ended):
        raise OSError("no room left")

    monkeypatch.setattr(plots, "draw_run", fails)
    torch.set_num_threads(1)
    script.main(["--run_dir", str(tmp_path / "run"), "--log.trackers", "[]", *QUICK])
    assert "pictures: not drawn (no room left); to try again: python -m trainlib.plots" in (
        capsys.readouterr().out)
    assert (tmp_path / "run" / "final").exists()


def test_a_finished_run_says_so_and_another_recipe_is_refused(tmp_path):
    run = train(tmp_path / "run", *QUICK)
    before = (run / "metrics.jsonl").read_text()
    again = fork(["--run_dir", str(run), "--log.trackers", "[]", *QUICK])
    assert again.returncode == 0 and "this run has finished" in again.stdout
    other = fork(["--run_dir", str(run), *QUICK, "--optim.lr", "5e-3"])
    assert other.returncode == 2
    assert "optim.lr (0.001 there, 0.005 here)" in other.stderr and "Traceback" not in other.stderr
    assert (run / "metrics.jsonl").read_text() == before
    assert json.loads((run / "exit.json").read_text())["code"] == 0


def test_the_config_of_a_run_is_a_recipe_for_that_run(tmp_path):
    run = train(tmp_path / "run", *QUICK, "--model.args.hidden", "[32]")
    again = train(tmp_path / "again", "--recipe", str(run / "config.yaml"))
    assert_same_run(run, again)


BAD_INPUT = [
    (["--optim.name", "AdamV"], "did you mean"),
    (["--schedule.name", "cosin"], "did you mean 'cosine'"),
    (["--model.name", "mpl"], "did you mean 'mlp'"),
    (["--data.source", "builtin:digit"], "did you mean 'builtin:digits'"),
    (["--batch.global_size", "0"], "batch.global_size"),
    (["--batch.micro_size", "0"], "batch.micro_size"),
    (["--batch.micro_size", "65"], "batch.micro_size: 65 is more than batch.global_size 64"),
    (["--model.args.classes", "5"], "(2, 5), task 'digit' needs (2, 10)"),
    (["--loop.monitor", "eval/acc"], "did you mean 'eval/accuracy'"),
    (["--schedule.warmup", "100%"], "warm up for less"),
    (["--recipe", "nowhere.yaml"], "nowhere.yaml"),
    (["--tasks.digit.loss_args.gamma", "2"], "does not take 'gamma'"),
    (["--optim.lr", "--seed", "3"], "a number is needed"),
    (["--optim.lr", ".inf"], "optim.lr"),
    (["--loop.duration", "1e999 steps"], "a duration reads like"),
    (["--optim.args.betas", "[0.9]"], "adamw refuses"),
    (["--run_dir", "/proc/no/run"], "run_dir"),
]


def test_unknown_names_are_reported_together():
    import train

    with pytest.raises(ValueError) as caught:
        train.main(["--optim.name", "adanw", "--model.name", "mpl", "--data.source",
                    "builtin:digit", "--tasks.digit.loss", "fokal", "--batch.global_size", "0"])
    for part in ("optim.name", "model.name", "data.source", "tasks.digit.loss",
                 "batch.global_size"):
        assert part in str(caught.value)


@pytest.mark.parametrize("processes", [1, 2])
def test_many_mistakes_end_with_code_2_in_lines_without_a_traceback(tmp_path, processes):
    flags = ["--batch.micro_size", "65", "--optim.lrr", "1"]
    run = fork if processes == 1 else launch
    result = run(["--run_dir", str(tmp_path / "run"), *flags], processes)
    assert result.returncode == (2 if processes == 1 else 1)  # torchrun answers 1 for any failure
    ours = [line for line in result.stderr.splitlines() if "batch.micro_size: 65" in line]
    assert len(ours) == 1  # one process speaks
    assert "optim.lrr" in result.stderr and 'train.py", line' not in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags, message", BAD_INPUT)
def test_bad_input_is_refused_before_anything_is_written(tmp_path, monkeypatch, flags, message):
    """In one process of pytest, since a start costs seconds; main is what the command runs."""
    import train
    from trainlib.config import UserError

    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        train.main(["--log.trackers", "[]", *flags])
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("environment, message", [
    ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "unset it"),
    ({"ACCELERATE_USE_DEEPSPEED": "true"}, "FSDP2"),
    ({"ACCELERATE_USE_FSDP": "true"}, "set fsdp_version: 2"),
    ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "fp16 needs a GPU"),
    ({"ACCELERATE_MIXED_PRECISION": "FP16"}, "fp16 needs a GPU"),
])
def test_launches_that_would_train_something_else_are_refused_in_one_line(
    tmp_path, environment, message
):
    result = fork(["--run_dir", str(tmp_path / "run")], **environment)
    assert result.returncode == 2
    [line] = [text for text in result.stderr.splitlines() if text.startswith("train.py:")]
    assert message in line and "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


def test_words_with_which_code_ends_the_process_are_said():
    script = ("import sys\nfrom trainlib import runtime\n"
              "runtime.run(lambda arguments: sys.exit('no data'))")
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (1, "", "no data\n")


def test_a_folder_with_other_files_is_no_run_folder(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    result = fork(["--run_dir", str(tmp_path)])
    assert result.returncode == 2 and "holds files but no run" in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("processes", [1, 2])
def test_early_stopping_is_agreed_and_names_the_result(tmp_path, processes):
    flags = ["--loop.eval_every", "5 steps", "--loop.patience", "2", "--optim.lr", "0.3",
             "--loop.duration", "400 steps", "--log.trackers", "[]"]
    result = fork(["--run_dir", str(tmp_path / "run"), *flags], processes)
    run = tmp_path / "run"
    accuracies = [r["eval/accuracy"] for r in records(run) if "eval/accuracy" in r]
    best = accuracies.index(max(accuracies))
    assert len(accuracies) == best + 3 < 80
    assert json.loads((run / "exit.json").read_text())["step"] == 5 * len(accuracies)
    assert f"The best weights, of step {5 * (best + 1)}, are the result" in result.stdout
    split = load().validation
    from accelerate import Accelerator

    from trainlib import tasks
    task_list = tasks.build_tasks(tasks.resolve({}, ["digit"], ["digit"]),
                                  {"digit": data.TargetInfo(list("0123456789"))})
    reader = data.EvalReader(split, 256, 0, 1, torch.device("cpu"))
    again = evaluate(load_model(run), reader, task_list, Accelerator(cpu=True))
    assert again["digit"]["accuracy"] == max(accuracies)


@pytest.mark.parametrize("flags", [
    ["--tasks.digit.loss", "focal", "--tasks.digit.loss_args.gamma", "2"],
    ["--tasks.digit.loss_args.label_smoothing", "0.1"],
    ["--optim.name", "rmsprop"], ["--schedule.name", "linear"],
    ["--optim.max_grad_norm", "null"], ["--deterministic"],
    ["--batch.global_size", "1", "--batch.micro_size", "1", "--loop.duration", "300 steps"],
    ["--batch.global_size", "2000", "--batch.micro_size", "2000"],
])
def test_options_train(tmp_path, flags):
    run = train(tmp_path / "run", *QUICK, *flags)
    assert losses(run)[-1] < losses(run)[0]


def test_options_change_the_weights(tmp_path):
    """No dead option: each of these gives other weights than the default."""
    reference = weights(train(tmp_path / "reference", *QUICK))
    for flags in (
        ["--seed", "1"], ["--schedule.name", "linear"], ["--schedule.warmup", "50%"],
        ["--schedule.final_fraction", "0.5"], ["--optim.weight_decay", "0.5"],
        ["--optim.max_grad_norm", "0.1"], ["--tasks.digit.weight", "0.5"],
        ["--batch.micro_size", "16"],
    ):
        other = weights(train(tmp_path / "_".join(flags).replace("/", ""), *QUICK, *flags))
        assert any(not v.equal(other[k]) for k, v in reference.items()), flags
    # Two values have one fp32 sum, exact or not; of eight the order shows.
    eight = [*QUICK, "--batch.micro_size", "8"]
    exact = weights(train(tmp_path / "exact", *eight))
    rounded = weights(train(tmp_path / "rounded", *eight, "--batch.exact_sum", "false"))
    assert any(not v.equal(rounded[k]) for k, v in exact.items())


@pytest.mark.parametrize("processes", [1, 2])
def test_bf16_comes_from_the_accelerate_config(tmp_path, monkeypatch, processes):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    half = train(tmp_path / "bf16", *QUICK, processes=processes)
    assert json.loads((half / "environment.json").read_text())["mixed_precision"] == "bf16"
    assert losses(half)[-1] < losses(half)[0]
    assert all(v.dtype != torch.bfloat16 for v in weights(half).values())
    if processes == 2:
        assert_same_run(half, train(tmp_path / "one", *QUICK))


def wandb_steps(run):
    """The history records of a run's offline file, through wandb's own reader."""
    import subprocess
    [file] = run.glob("wandb/offline-run-*/run-*.wandb")
    result = subprocess.run(["wandb", "leet", "inspect", "--json", str(file)], capture_output=True,
                            text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_wandb_gets_the_records_offline_and_one_line_says_so(tmp_path):
    for processes in (1, 2):
        run = tmp_path / str(processes)
        result = fork(["--run_dir", str(run), *QUICK], processes, WANDB_MODE=None,
                      WANDB_API_KEY=None, NETRC=str(tmp_path / "none"), HOME=str(tmp_path))
        assert json.loads((run / "exit.json").read_text())["code"] == 0, result.stderr
        output = (result.stdout + result.stderr).splitlines()
        lines = [line for line in output if line.startswith("wandb")]
        assert len(lines) == 1 and "offline" in lines[0], lines
        text = wandb_steps(run)
        for key in ("train/loss", "train/lr", "eval/accuracy"):
            assert key in text
        assert "max_grad_norm" in text  # the config
    assert_same_run(tmp_path / "1", tmp_path / "2")


def test_a_tracker_that_fails_changes_nothing(tmp_path):
    failing = fork(["--run_dir", str(tmp_path / "failing"), *QUICK], script="tests/no_tracker.py")
    assert failing.returncode == 0, failing.stderr
    assert len(re.findall("tracker:", failing.stdout)) == 1
    assert_same_run(tmp_path / "failing", train(tmp_path / "none", *QUICK))
    logging = fork(["--run_dir", str(tmp_path / "logging"), *QUICK, "--log.every", "1"],
                   script="tests/no_tracker.py", FAIL_AT="log")
    assert len(re.findall("tracker: stopped", logging.stdout)) == 1
    assert (tmp_path / "logging" / "exit.json").exists()


def test_dynamo_from_the_launcher_leaves_no_trace_in_the_names(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "AOT_EAGER")
    run = train(tmp_path / "run", *QUICK)
    assert load_model(run) and not any("_orig_mod" in name for name in weights(run))


@pytest.mark.parametrize("recipe", recipes(), ids=lambda path: path.stem)
def test_recipes_train(tmp_path, recipe, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    examples = {"csv": "wine.csv", "image_folder": "digit_images",
                "text_classification": "characters.csv"}
    sources = {}
    if recipe.stem in examples:
        result = fork([str(tmp_path)], script="recipes/example_data.py")
        assert result.returncode == 0, result.stderr
        sources = {"source": examples[recipe.stem]}
    if recipe.stem == "text_classification":
        pytest.importorskip("transformers", reason="the recipe needs transformers")
    if recipe.stem == "tinyshakespeare_gpt":
        (tmp_path / "verse.txt").write_text("To be, or not to be, that is the question:\n" * 200)
        sources = {"source": "verse.txt"}
    if recipe.stem.startswith("cifar10"):
        sources = {"source": "cifar10-train.parquet", "validation_split": "cifar10-test.parquet"}
        for name in sources.values():
            file = ROOT.parent / "shared" / "data" / name
            if not file.exists():
                pytest.skip(f"CIFAR-10 as parquet is not at {file}, and the Hub is not asked")
            import datasets

            some = datasets.Dataset.from_parquet(str(file)).select(range(256))
            some.to_parquet(str(tmp_path / name))
    flags = [f"--data.{option}={tmp_path / name}" for option, name in sources.items()]
    if recipe.stem == "cifar10_speedrun":  # made for a GPU
        flags += ["--batch.global_size", "32", "--batch.micro_size", "32"]
    script, options = "train.py", yaml.safe_load(recipe.read_text())
    if "distill" in options:
        [teacher] = options["distill"]["teachers"]
        train(tmp_path / "teacher", "--recipe", teacher["recipe"], "--loop.duration", "5 steps",
              *flags)
        script, flags = "distill.py", [*flags, f"--distill.teachers=[{tmp_path / 'teacher'}]"]
    run = train(tmp_path / "run", "--recipe", str(recipe), "--loop.duration", "5 steps", *flags,
                script=script)
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["source"]
