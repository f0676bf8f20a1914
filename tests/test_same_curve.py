"""One recipe gives the same weights on any number of processes; real processes, real files."""

import json
from dataclasses import replace

import pytest
import torch
from launching import assert_same_run, launch, load, losses, records, train, weights
from matplotlib.axes import Axes
from PIL import Image
from poisoned_train import poisoned_sample
from safetensors.torch import load_file
from warm import fork

from benchmarks import peer_curve, same_curve

SHORT = ["--loop.duration", "60 steps", "--log.every", "1", "--batch.micro_size", "16"]
WITHOUT_DROPOUT = ["--loop.duration", "60 steps", "--log.every", "1", "--model.args.dropout", "0"]
SGD = ["--optim.name", "sgd", "--optim.args.momentum", "0.9", "--optim.lr", "0.05"]


@pytest.mark.parametrize("optimizer", [[], SGD], ids=["adamw", "sgd_momentum"])
@pytest.mark.parametrize("model", ["mlp", "resnet"])
def test_one_two_and_three_processes_give_the_same_bits(tmp_path, model, optimizer):
    flags = [*SHORT, "--model.name", model, *optimizer]
    one, two, three = (
        train(tmp_path / str(n), *flags, processes=n) for n in (1, 2, 3)
    )
    assert len(losses(one)) == 60 and losses(one)[-1] < losses(one)[0]
    assert_same_run(one, two)
    assert_same_run(one, three)


def test_a_ragged_last_micro_batch_and_idle_processes_change_no_bit(tmp_path):
    # 50 = 3 x 16 + 2: four micro-batches on three processes leave two slots idle.
    flags = [*SHORT[:-2], "--batch.global_size", "50", "--batch.micro_size", "16",
             "--loop.duration", "20 steps", "--model.name", "resnet"]
    assert_same_run(train(tmp_path / "1", *flags), train(tmp_path / "3", *flags, processes=3))


def test_more_processes_than_micro_batches_change_no_bit_and_are_told(tmp_path):
    flags = ["--run_dir", str(tmp_path / "2"), "--log.trackers", "[]", "--batch.micro_size", "64",
             "--loop.duration", "20 steps", "--model.name", "resnet", "--log.every", "1"]
    result = fork(flags, processes=2)
    assert "idle" in result.stdout
    flags[1] = str(tmp_path / "1")
    result = fork(flags)
    assert "idle" not in result.stdout
    assert_same_run(tmp_path / "1", tmp_path / "2")


def test_the_launchers_thread_count_changes_no_bit(tmp_path):
    one = train(tmp_path / "one", *SHORT)
    launch(["--run_dir", str(tmp_path / "two"), "--log.trackers", "[]", *SHORT],
           OMP_NUM_THREADS="2")
    assert_same_run(one, tmp_path / "two")


def test_every_way_to_cut_a_batch_gives_one_curve_to_rounding(tmp_path):
    reference = train(tmp_path / "1x64", *WITHOUT_DROPOUT, "--batch.micro_size", "64")
    ddp = ["--batch.exact_sum", "false"]
    others = [
        train(tmp_path / "1x32", *WITHOUT_DROPOUT, "--batch.micro_size", "32"),
        train(tmp_path / "1x32_fp32", *WITHOUT_DROPOUT, "--batch.micro_size", "32", *ddp),
        train(tmp_path / "2x32", *WITHOUT_DROPOUT, "--batch.micro_size", "32", processes=2),
        train(tmp_path / "ddp2", *WITHOUT_DROPOUT, "--batch.micro_size", "16", *ddp, processes=2),
        train(tmp_path / "ddp3", *WITHOUT_DROPOUT, "--batch.micro_size", "16", *ddp, processes=3),
    ]
    for other in others:
        differences = [abs(a - b) for a, b in zip(losses(reference), losses(other), strict=True)]
        assert max(differences) <= 1e-6, other.name


POISONED = "tests/poisoned_train.py"


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("micro_size", ["16", "64"])
def test_a_poisoned_sample_costs_one_update_and_is_named(tmp_path, processes, micro_size):
    """The poison passes the input check and overflows in the first layer: NaN, once an epoch."""
    flags = ["--schedule.name", "constant", "--schedule.warmup", "0 steps", "--model.name",
             "resnet", "--loop.duration", "22 steps", "--log.every", "1", "--batch.micro_size",
             micro_size, "--loop.eval_every", "22 steps"]
    run = train(tmp_path / "run", *flags, processes=processes, script=POISONED)
    bad = [json.loads(line) for line in (run / "bad_steps.jsonl").read_text().splitlines()]
    assert len(bad) == 1
    digits = load()
    row = int(digits.train.rows[poisoned_sample(digits)])
    assert bad[0]["step"] == 8 and bad[0]["suspects"] == [row]
    assert row in bad[0]["rows"] and len(bad[0]["rows"]) == 64
    [null] = [r for r in records(run) if "train/loss" in r and r["train/loss"] is None]
    assert null["step"] == bad[0]["step"] + 1
    # What was skipped left no trace: stopping just before it or just after it is the same.
    flags[flags.index("22 steps")] = f"{bad[0]['step']} steps"
    before = train(tmp_path / "before", *flags, processes=processes, script=POISONED)
    flags[flags.index(f"{bad[0]['step']} steps")] = f"{bad[0]['step'] + 1} steps"
    after = train(tmp_path / "after", *flags, processes=processes, script=POISONED)
    assert not (before / "bad_steps.jsonl").exists() and (after / "bad_steps.jsonl").exists()
    assert all(torch.equal(v, weights(after)[k]) for k, v in weights(before).items())
    assert all(v.isfinite().all() for v in weights(run).values())


@pytest.mark.parametrize("processes", [1, 2])
def test_twenty_bad_steps_in_a_row_end_the_run_and_leave_finite_checkpoints(tmp_path, processes):
    """NaN on one process only, where there are two, and not on the main one."""
    run = tmp_path / "run"
    result = fork(
        ["--run_dir", str(run), "--log.trackers", "[]", "--log.report", "false",
         "--checkpoint.every", "4 steps", "--loop.eval_every", "7 steps"], processes,
        "benchmarks/poisoned.py", NAN_STEPS=",".join(map(str, range(13, 33))),
    )
    assert result.returncode == 3 and "Traceback" not in result.stderr
    bad = [json.loads(line) for line in (run / "bad_steps.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in bad] == list(range(13, 23))
    assert all(len(entry["rows"]) == 64 for entry in bad)
    files = [*run.glob("checkpoints/*/*.safetensors"), run / "best" / "model.safetensors"]
    assert len(files) >= 3 and not (run / "final").exists()
    for file in files:
        assert all(value.isfinite().all() for value in load_file(file).values()), file


def test_ten_bad_steps_in_a_row_end_the_run_with_code_3(tmp_path):
    # lr 1e30 makes the first update overflow everything after it.
    result = fork(["--run_dir", str(tmp_path / "run"), "--log.trackers", "[]", "--optim.lr",
                     "1e30", "--schedule.warmup", "0 steps"])
    assert result.returncode == 3 and "Traceback" not in result.stderr
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["code"] == 3
    assert len((tmp_path / "run" / "bad_steps.jsonl").read_text().splitlines()) == 10


# ---- the benchmark of the same name, and the peers' side of it ----

def test_a_peer_trains_the_benchmarks_job_and_leaves_losses_and_weights(tmp_path):
    training = same_curve.train_peer(tmp_path / "run", "accelerate", "mlp", processes=1, steps=2)
    fresh = peer_curve.job("mlp").build(torch.device("cpu")).state_dict()
    assert training.weights.keys() == fresh.keys()
    assert not training.weights["1.weight"].equal(fresh["1.weight"])
    # Four micro-batches from fresh weights: near the loss of ten equally likely classes.
    assert len(training.losses) == 2
    assert training.losses[0] == pytest.approx(torch.tensor(10.0).log().item(), abs=0.3)


def made_training(shift: float = 0.0) -> same_curve.Training:
    weights = {"weight": torch.zeros(3) + 2 * shift, "running_mean": torch.ones(2) + 3 * shift}
    return same_curve.Training([2.0, 1.5, 1.0 + shift], str(shift), weights)


def made_trainings(ours_shift: float = 0.0) -> same_curve.Trainings:
    """Ours on three process counts, and a peer's on two, which differ by 0.25."""
    return {
        (loop, job): {1: made_training(), 2: made_training(shift), **more}
        for loop, shift, more in ((same_curve.OURS, 0.0, {3: made_training(ours_shift)}),
                                  ("Lightning", 0.25, {}))
        for job in same_curve.PEER_JOBS
    }


def test_the_benchmark_judges_every_bit_of_ours_and_none_of_the_peers():
    trainings = made_trainings()
    assert same_curve.is_same(trainings)
    lines = same_curve.table(trainings).splitlines()
    assert lines[1].split()[-5:] == ["1,", "2", "0.0e+00", "0.0e+00", "0.0e+00"]
    assert lines[-1].split()[-5:] == ["1,", "2", "2.5e-01", "5.0e-01", "7.5e-01"]
    assert not same_curve.is_same(made_trainings(ours_shift=1e-12))
    first = trainings[same_curve.OURS, same_curve.RESNET]
    first[2] = replace(first[2], digest="of a buffer that differs")
    assert not same_curve.is_same(trainings)


def test_the_benchmarks_picture_has_a_column_for_each_loop(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(Axes, "text", lambda axes, x, y, text, **style: said.append(text))
    monkeypatch.setattr(Axes, "set_title", lambda axes, title: said.append(title))
    same_curve.draw(made_trainings(), tmp_path / "picture.png")
    assert said == [same_curve.OURS, "exactly 0\nat every step,\nboth nets", "Lightning"]
    with Image.open(tmp_path / "picture.png") as image:
        assert image.width > image.height and len(image.getcolors()) > 8


def test_the_benchmarks_command_trains_each_loop_and_draws(tmp_path, monkeypatch, capsys):
    trained = []

    def made(folder, job, *rest):
        trained.append((job, *rest))
        return made_training()

    monkeypatch.setattr(same_curve, "train", made)
    monkeypatch.setattr(same_curve, "train_peer", made)
    monkeypatch.setattr(same_curve, "find_spec",
                        lambda name: name if name == "accelerate" else None)
    monkeypatch.setattr(same_curve.sys, "argv", [
        "same_curve.py", "--peers", "--picture", str(tmp_path / "picture.png")])
    with pytest.raises(SystemExit) as end:
        same_curve.main()
    assert end.value.code == 0 and (tmp_path / "picture.png").exists()
    ours = [(flags, count, 60) for flags in same_curve.JOBS.values() for count in (1, 2, 3)]
    peers = [("accelerate", job, count, 60) for job in ("mlp", "resnet") for count in (1, 2)]
    assert trained == ours + peers  # four micro-batches are no whole share of three processes
    said = capsys.readouterr().out
    assert "all equal, bit for bit" in said and "left out: lightning is not installed" in said
