"""Spikes: the rule against numpy, the same verdict on host and device, and whole runs."""

import json
import math

import numpy as np
import pytest
import torch
from launching import assert_same_run, records, weights
from torch import nn
from warm import fork

from trainlib import spikes
from trainlib.guard import Guard, StepRecord
from trainlib.progress import Progress

FLAGS = ["--schedule.name", "constant", "--loop.duration", "160 steps", "--log.every", "1",
         "--log.trackers", "[]", "--log.report", "false", "--checkpoint.every", "50 steps",
         "--loop.eval_every", "80 steps", "--batch.micro_size", "16"]
SKIP = ["--loop.on_spike", "skip"]


def filled(number=spikes.WINDOW, seed=0) -> tuple[spikes.Recent, np.ndarray]:
    values = np.random.default_rng(seed).normal(5, 0.3, (number, 2))
    recent: spikes.Recent = []
    for step, (loss, norm) in enumerate(values.tolist()):
        spikes.remember(recent, step, loss, norm)
    return recent, values


@pytest.mark.parametrize("step", [0, 1, 127, 128, 129, 130, 140, 200])
def test_a_step_is_judged_by_the_128_steps_up_to_the_one_before_the_last(step):
    recent, values = filled(step)
    found = spikes.levels(recent, step)
    if step - 1 < spikes.WINDOW:  # steps 0 to step - 2 are known
        assert found == []
        return
    window = values[: step - 1][-spikes.WINDOW:]
    for level, column in zip(found, window.T, strict=True):
        assert level.mean == pytest.approx(column.mean(), rel=1e-12)
        assert level.deviation == pytest.approx(column.std(ddof=1), rel=1e-12)
        assert level.limit == pytest.approx(column.mean() + 6 * column.std(ddof=1), rel=1e-12)


def test_where_nothing_varies_nothing_is_a_spike():
    recent: spikes.Recent = []
    for step in range(140):
        spikes.remember(recent, step, 2.0, 1.0)
    assert [level.limit for level in spikes.levels(recent, 140)] == [math.inf, math.inf]


def guards(recent):
    """One that decides on the host, one that leaves it to a fused optimizer, each with steps of
    its own."""
    for on_device in (False, True):
        optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(2))], lr=0.1, fused=True)
        guard = Guard(optimizer, torch.device("cpu"), None, lambda step: {}, None,
                      json.loads(json.dumps(recent)))
        guard.on_device = on_device
        yield guard


@pytest.mark.parametrize("loss, norm, passes", [
    (5.0, 5.0, True), (0.0, 0.0, True), (9.0, 5.0, False), (5.0, 9.0, False), (9.0, 9.0, False),
    (math.nan, 5.0, False), (5.0, math.inf, False),
])
def test_host_and_device_agree_and_the_device_skips_by_itself(loss, norm, passes):
    recent, _ = filled(140)
    for guard in guards(recent):
        [parameter] = guard.optimizer.param_groups[0]["params"]
        parameter.grad = torch.ones(2)
        losses = torch.tensor([loss - 1.0, 1.0], dtype=torch.float64)  # of two tasks
        allowed = guard.allows(140, losses, torch.tensor(norm))
        assert bool(guard.healthy) is passes and allowed is (passes or guard.on_device)
        if allowed:
            guard.optimizer.step()
        assert bool((parameter != 1).all()) is passes


def test_the_limit_itself_is_no_spike():
    recent, _ = filled(140)
    limit = spikes.levels(recent, 140)[0].limit
    for guard in guards(recent):
        for loss, passes in ((limit, True), (math.nextafter(limit, math.inf), False)):
            losses = torch.tensor([loss], dtype=torch.float64)
            guard.allows(140, losses, torch.tensor(5.0))
            assert bool(guard.healthy) is passes


def test_what_was_seen_goes_through_a_checkpoint_and_never_grows():
    progress = Progress()
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    guard = Guard(optimizer, torch.device("cpu"), None, lambda step: {}, None, progress.recent)
    values = np.random.default_rng(1).normal(1, 0.1, 400).tolist()
    for step, value in enumerate(values):
        guard.observe(StepRecord(step, 0.1, [value], value, []), progress)
        assert len(progress.recent) <= spikes.WINDOW + 1
    again = Progress(**json.loads(json.dumps({"recent": progress.recent})))
    assert spikes.levels(again.recent, 400) == spikes.levels(progress.recent, 400) != []


def test_a_loss_that_has_risen_for_good_is_normal_after_a_few_steps():
    recent, _ = filled(140)
    skipped = 0
    for step in range(140, 200):
        limits = [level.limit for level in spikes.levels(recent, step)]
        skipped += 50.0 > limits[0]
        spikes.remember(recent, step, 50.0, 5.0)
    assert 1 <= skipped <= 6


def run(folder, *flags, processes=1, code=0, strike="SIGKILL never", **environment):
    result = fork(["--run_dir", str(folder), *FLAGS, *flags], processes,
                  "tests/spiky_train.py", STRIKE=strike, **environment)
    assert (folder / "final").exists() == (code == 0), result.stdout + result.stderr
    return folder


def bad_steps(folder) -> list[dict]:
    file = folder / "bad_steps.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture(scope="module")
def skipped(tmp_path_factory):
    return run(tmp_path_factory.mktemp("skip") / "run", *SKIP)


def test_a_spike_is_skipped_listed_and_said(skipped, tmp_path):
    found = bad_steps(skipped)
    assert [entry["step"] for entry in found] == [134, 150]
    for entry in found:
        assert entry["reason"].startswith("spike of the") and entry["suspects"] == []
        assert len(entry["rows"]) == 64
        assert entry["value"] > entry["mean"] + 6 * entry["deviation"]
    assert "sigma above the mean" in (skipped / "log.txt").read_text()
    # The skipped update left no trace: stopping just before it or just after it is the same.
    short = [run(tmp_path / str(steps), *SKIP, "--loop.duration", f"{steps} steps")
             for steps in (134, 135)]
    assert all(torch.equal(v, weights(short[1])[k]) for k, v in weights(short[0]).items())
    assert [len(bad_steps(folder)) for folder in short] == [0, 1]


def test_without_being_asked_spikes_pass(skipped, tmp_path):
    ignored = run(tmp_path / "run")
    assert bad_steps(ignored) == []
    rows = [r["train/loss"] for r in records(ignored) if "train/loss" in r]
    same = [r["train/loss"] for r in records(skipped) if "train/loss" in r]
    assert rows[:135] == same[:135] and rows[135:] != same[135:]


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_skip_alike(skipped, tmp_path, processes):
    other = run(tmp_path / "run", *SKIP, processes=processes)
    assert_same_run(skipped, other)
    assert bad_steps(other) == bad_steps(skipped)


@pytest.mark.parametrize("step", ["134", "136", "152"])
def test_a_resume_repeats_the_verdict(skipped, tmp_path, step):
    """Checkpoints stand at steps 50, 100 and 150: the window of both spikes is resumed."""
    folder = tmp_path / "run"
    run(folder, *SKIP, code=-9, strike=f"SIGKILL step {step}")
    run(folder, *SKIP)
    assert_same_run(skipped, folder)
    assert bad_steps(folder) == bad_steps(skipped)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_poisoned_sample_is_skipped_in_any_precision(tmp_path, precision):
    folder = tmp_path / "run"
    result = fork(["--run_dir", str(folder), *FLAGS, "--loop.duration", "12 steps",
                   "--model.name", "resnet"],
                  2, "tests/poisoned_train.py", ACCELERATE_MIXED_PRECISION=precision)
    assert [entry["step"] for entry in bad_steps(folder)] == [8], result.stdout + result.stderr
    assert len(bad_steps(folder)[0]["suspects"]) == 1
    assert all(value.isfinite().all() for value in weights(folder).values())
