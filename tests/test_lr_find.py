"""lr_find.py as users run it, and train.py with optim.lr auto: the same answer, and no trace."""

import csv
import json

import pytest
import torch
from launching import ROOT, assert_same_run, launch, train
from PIL import Image
from warm import fork

import train as script
from trainlib import config
from trainlib.batchnorm import BatchStatistics
from trainlib.checkpoint import undone
from trainlib.checkpoint.state import model_tensors
from trainlib.ema import Ema
from trainlib.lr_suggestion import METHODS
from trainlib.optim import OptimOptions, build_optimizer

SHORT = ["--sweep.steps", "40", "--sweep.lr_min", "1e-5", "--batch.micro_size", "16"]
RESNET = ["--model.name", "resnet", "--model.args.width", "8"]


def find(folder, *flags, processes=1, run=fork):
    result = run(["--run_dir", str(folder), *flags], processes, script="lr_find.py")
    assert (folder / "lr_find.json").exists(), result.stdout + result.stderr
    return json.loads((folder / "lr_find.json").read_text()), result.stdout


def test_with_no_arguments_it_sweeps_the_default_job_and_writes_its_answer(tmp_path):
    found, output = find(tmp_path / "run", "--apply", run=launch)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "lr_find.json", "lr_find.csv", "lr_find.png", "lr_find.yaml"}
    assert 1e-3 < found["suggestion"] < 2e-2  # where the default job learns best, by its grid
    assert found["suggestion"] == float(f"{found['suggestions']['edge']:.2g}")
    assert found["doubt"] == max(found["suggestions"].values()) / min(found["suggestions"].values())
    assert f"train with --optim.lr {found['suggestion']:.2g}" in output
    assert found["verdict"] in output
    with (tmp_path / "run" / "lr_find.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["lr"]) for row in rows] == found["lrs"]
    assert [float(row["loss"]) for row in rows] == found["losses"]
    assert found["lrs"][0] == 1e-7 and len(found["lrs"]) <= 100
    picture = Image.open(tmp_path / "run" / "lr_find.png")
    assert picture.size == (1200, 675) and len(picture.convert("RGB").getcolors(10**6)) > 5
    # The recipe is the one that was swept, with the rate; and the folder is free for the run.
    applied = config.read(
        script.TrainOptions, ["--recipe", str(tmp_path / "run" / "lr_find.yaml")], "")
    run_dir, optim = str(tmp_path / "run"), OptimOptions(lr=found["suggestion"])
    assert applied == script.TrainOptions(run_dir=run_dir, optim=optim)
    train(tmp_path / "run", "--recipe", str(tmp_path / "run" / "lr_find.yaml"),
          "--loop.duration", "5 steps")


def test_the_same_curve_and_answer_on_any_number_of_processes(tmp_path):
    flags = [*SHORT, *RESNET, "--sweep.repeats", "2", "--sweep.verify", "10 steps"]
    one, _ = find(tmp_path / "1", *flags)
    assert one["suggestion"] is not None and len(one["repeats"]) == 2
    assert one["repeats"][0]["losses"] != one["repeats"][1]["losses"]
    for processes in (2, 3):
        assert find(tmp_path / str(processes), *flags, processes=processes)[0] == one


def test_another_micro_size_gives_the_same_answer(tmp_path):
    flags = [*SHORT, "--model.args.dropout", "0"]
    one, other = (find(tmp_path / size, *flags, "--batch.micro_size", size)[0]["suggestion"]
                  for size in ("16", "64"))
    assert one == pytest.approx(other, rel=1e-3)


@pytest.mark.parametrize("flags", [
    [*RESNET, "--batch.micro_size", "16", "--optim.ema_half_life", "5 steps", "--data.in_memory",
     "false", "--data.workers", "1"],
    ["--optim.name", "muon", "--batch.micro_size", "16"],
    ["--optim.name", "sgd", "--optim.args.momentum", "0.9", "--optim.layer_decay", "0.5"],
], ids=["batch norm, ema, workers", "muon", "momentum, layer decay"])
def test_a_run_with_lr_auto_is_the_run_with_the_rate_that_was_found(tmp_path, flags):
    flags = [*flags, "--loop.duration", "25 steps", "--log.every", "1"]
    auto = train(tmp_path / "auto", *flags, "--optim.lr", "auto")
    found = json.loads((auto / "lr_find.json").read_text())
    assert "lr: auto" in (auto / "config.yaml").read_text()
    given = train(tmp_path / "given", *flags, "--optim.lr", repr(found["suggestion"]))
    assert_same_run(auto, given)


def test_a_run_with_lr_auto_keeps_its_rate_when_it_is_resumed(tmp_path):
    flags = ["--optim.lr", "auto", "--loop.duration", "25 steps"]
    result = fork(["--run_dir", str(tmp_path / "run"), "--log.trackers", "[]", *flags],
                    script="tests/struck_train.py", STRIKE="SIGTERM evaluation 3")
    assert result.returncode == 75, result.stderr
    before = (tmp_path / "run" / "lr_find.json").stat().st_mtime_ns
    train(tmp_path / "run", *flags)
    assert (tmp_path / "run" / "lr_find.json").stat().st_mtime_ns == before
    assert_same_run(tmp_path / "run", train(tmp_path / "undisturbed", *flags))


@pytest.mark.parametrize("flags, message", [
    (["--sweep.lr_min", "1", "--sweep.lr_max", "0.1"], "a sweep goes from lr_min, above 0, up to"),
    (["--sweep.steps", "19"], "a sweep has at least 20 steps, got 19"),
    (["--sweep.lr_min", "0"], "sweep.lr_min"), (["--sweep.repeats", "0"], "sweep.repeats"),
    (["--sweep.verify", "often"], "a duration reads like"),
    (["--sweep.spacing", "cubic"], "sweep.spacing"),
], ids=["ends", "too few steps", "zero", "no repeats", "no duration", "spacing"])
def test_bad_input_is_refused_before_anything_is_written(tmp_path, monkeypatch, flags, message):
    import lr_find

    monkeypatch.chdir(tmp_path)
    with pytest.raises(config.UserError, match=message):
        lr_find.main(flags)
    assert list(tmp_path.iterdir()) == []


def test_a_finished_run_is_not_swept(tmp_path):
    run = train(tmp_path / "run", "--loop.duration", "3 steps")
    result = fork(["--run_dir", str(run)], script="lr_find.py")
    assert result.returncode == 2 and "holds a run or other files" in result.stderr
    assert not (run / "lr_find.json").exists()


def test_where_there_is_no_answer_it_says_why_and_makes_none_up(tmp_path):
    found, output = find(tmp_path / "high", "--sweep.lr_min", "1e3", "--sweep.lr_max", "1e5")
    assert found["suggestion"] is None and "rates from 1 to 1e+05" in found["verdict"]
    assert "no rate is suggested" in output
    found, output = find(tmp_path / "low", "--sweep.lr_min", "1e-12", "--sweep.lr_max", "1e-9")
    assert found["suggestion"] is None and "never falls by more than its noise" in output
    assert found["suggestions"] == dict.fromkeys(METHODS)


NAN_LOSS = "def loss(output, target):\n    return output.sum(1) * float('nan')\n"


def test_a_loss_that_is_not_finite_from_the_start_is_said_and_drawn(tmp_path):
    (tmp_path / "own.py").write_text(NAN_LOSS)
    found, output = find(tmp_path / "run", f"--tasks.digit.loss={tmp_path}/own.py:loss")
    assert found["suggestion"] is None and "not finite before the first update" in output
    assert (tmp_path / "run" / "lr_find.png").exists()


def test_apply_without_an_answer_leaves_no_recipe_of_an_earlier_sweep(tmp_path):
    find(tmp_path / "run", *SHORT, "--apply")
    assert (tmp_path / "run" / "lr_find.yaml").exists()
    result = fork(["--run_dir", str(tmp_path / "run"), "--sweep.lr_min", "1e-12", "--sweep.lr_max",
                   "1e-9", "--apply"], script="lr_find.py")
    assert result.returncode == 2 and "no recipe was written" in result.stderr
    assert not (tmp_path / "run" / "lr_find.yaml").exists()


def test_an_auto_run_without_an_answer_goes_on_with_the_number_it_asks_for(tmp_path):
    run = ["--run_dir", str(tmp_path / "run"), "--log.trackers", "[]", "--loop.duration", "3 steps",
           "--optim.name", "sgd", "--optim.max_grad_norm", "1e-12"]
    result = fork([*run, "--optim.lr", "auto"])
    assert result.returncode == 2 and "give a number as --optim.lr" in result.stderr
    assert fork([*run, "--optim.lr", "0.1"]).returncode == 0


def test_verifying_looks_beyond_either_end(tmp_path):
    found, output = find(tmp_path / "run", *SHORT, *RESNET, "--optim.name", "sgd",
                         "--optim.args.momentum", "0.9", "--sweep.verify", "30 steps")
    tried = {one["lr"]: one["eval_loss"] for one in found["verified"]}
    assert found["suggestion"] == min(tried, key=tried.get) in tried
    inside = [lr for lr in tried if min(tried) < lr < max(tried)]
    assert found["suggestion"] in inside and len(tried) >= 4
    assert f"of short runs the best was at {found['suggestion']:.2g}" in found["verdict"]


def test_a_folder_of_a_run_is_not_swept_into(tmp_path):
    result = fork(["--run_dir", str(tmp_path / "run"), "--log.trackers", "[]", "--loop.duration",
                   "300 steps"], script="tests/struck_train.py", STRIKE="SIGKILL step 3")
    assert (tmp_path / "run" / "config.yaml").exists(), result.stderr
    result = fork(["--run_dir", str(tmp_path / "run")], script="lr_find.py")
    assert result.returncode == 2 and "choose another --run_dir" in result.stderr
    assert not (tmp_path / "run" / "lr_find.json").exists()


def test_a_rehearsal_leaves_no_trace():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Dropout(0.5))
    optimizer = build_optimizer(OptimOptions(), net)
    statistics, ema = BatchStatistics(net, 1), Ema(net, 5)
    before = {name: tensor.clone() for name, tensor in model_tensors(net).items()}
    state, averages = torch.get_rng_state(), {n: t.clone() for n, t in ema.tensors().items()}
    with pytest.raises(ZeroDivisionError), undone(net, optimizer, statistics, ema, None):
        for step in range(3):
            statistics.begin()
            net(torch.randn(8, 3)).sum().backward()
            sums = torch.zeros(statistics.size, dtype=torch.float64)
            statistics.add_to(sums, True)
            optimizer.step()
            statistics.finish(sums, True)
            ema.update(step, True)
        assert not net[0].weight.equal(before["0.weight"])
        raise ZeroDivisionError
    assert all(tensor.equal(before[name]) for name, tensor in model_tensors(net).items())
    assert all(tensor.equal(averages[name]) for name, tensor in ema.tensors().items())
    assert torch.get_rng_state().equal(state) and not optimizer.state
    assert all(parameter.grad is None for parameter in net.parameters())
    assert statistics._num_steps[0] == 0


def test_lr_auto_reads_and_writes_as_auto():
    options = config.read(script.TrainOptions, ["--optim.lr", "auto"], "")
    assert options.optim.lr is None and "lr: auto" in config.to_yaml(options)
    assert (ROOT / "lr_find.py").exists()
