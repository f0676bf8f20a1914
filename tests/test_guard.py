"""The guard's verdict on the host and on the device, and its list of bad steps."""

import copy
import json

import pytest
import torch
from torch import nn

from trainlib.guard import MAX_BAD_STEPS_IN_A_ROW, Diverged, Guard, Readback, StepRecord
from trainlib.progress import Progress

FINE, NAN, INF = torch.tensor(1.0), torch.tensor(float("nan")), torch.tensor(float("inf"))


def guard_of(optimizer=None, file=None, device="cpu", scaler=None):
    optimizer = optimizer or torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    inspect = lambda step: {"suspects": [7], "rows": [6, 7]}  # noqa: E731
    return Guard(optimizer, torch.device(device), scaler, inspect, file)


@pytest.mark.parametrize("loss, norm, allowed", [
    (FINE, FINE, True), (NAN, FINE, False), (FINE, NAN, False), (INF, INF, False),
])
def test_on_a_cpu_the_verdict_is_a_host_value(loss, norm, allowed):
    guard = guard_of()
    assert guard.allows(0, loss.view(1), norm) is allowed and guard.healthy is allowed


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad"])
@pytest.mark.parametrize("norm, moves", [(FINE, True), (NAN, False)])
def test_with_the_flag_on_the_device_the_fused_optimizer_skips_by_itself(name, norm, moves):
    """The path of a GPU; torch's fused optimizers on a CPU read the same flag."""
    parameter = nn.Parameter(torch.ones(4))
    optimizer = getattr(torch.optim, name)([parameter], lr=0.1, fused=True)
    guard = guard_of(optimizer)
    guard.on_device = True
    parameter.grad = torch.ones(4)
    assert guard.allows(0, FINE.view(1), FINE)
    optimizer.step()
    before, state = parameter.detach().clone(), copy.deepcopy(optimizer.state_dict()["state"])
    parameter.grad = torch.full((4,), norm.item())
    assert guard.allows(0, FINE.view(1), norm)
    assert bool(guard.healthy) is moves
    optimizer.step()
    assert parameter.detach().equal(before) is not moves
    if not moves:
        for slot, value in optimizer.state_dict()["state"].get(0, {}).items():
            expected = state[0][slot]
            assert value is expected or torch.equal(value, expected), slot


def test_only_fused_optimizers_are_trusted_with_the_flag():
    plain = torch.optim.RMSprop([nn.Parameter(torch.zeros(1))])
    fused = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0, fused=True)
    assert not guard_of(plain, device="cuda").on_device
    assert guard_of(fused, device="cuda").on_device
    assert not guard_of(fused, device="cuda", scaler=torch.amp.GradScaler("cpu")).on_device
    assert not guard_of(fused).on_device


def record(step, loss=1.0, norm=1.0):
    return StepRecord(step, 0.1, [loss], norm, [0.0, 0.0])


def test_bad_steps_are_listed_and_ten_in_a_row_end_the_run(tmp_path):
    file = tmp_path / "bad_steps.jsonl"
    guard, progress = guard_of(file=file), Progress()
    assert guard.observe(record(0), progress) is None and not file.exists()
    line = guard.observe(record(1, loss=float("nan")), progress)
    assert "step 1: the loss is not finite" in line and "row 7" in line
    assert "gradient" in guard.observe(record(2, norm=float("inf")), progress)
    guard.observe(record(3), progress)  # a good step in between starts the count again
    for step in range(4, 3 + MAX_BAD_STEPS_IN_A_ROW):
        guard.observe(record(step, norm=float("nan")), progress)
    with pytest.raises(Diverged, match="10 steps in a row"):
        guard.observe(record(99, norm=float("nan")), progress)
    entries = [json.loads(entry) for entry in file.read_text().splitlines()]
    assert entries[0] == {"step": 1, "reason": "loss", "suspects": [7], "rows": [6, 7]}
    assert len(entries) == 12


def test_processes_without_the_file_only_count():
    guard, progress = guard_of(file=None), Progress()
    guard.inspect_step = None
    assert "skipped" in guard.observe(record(1, loss=float("nan")), progress)


def test_on_a_cpu_values_are_read_at_once():
    readback = Readback(torch.device("cpu"))
    losses, requests = torch.tensor([[2.0], [3.0]], dtype=torch.float64)
    [got] = readback.push(4, 0.5, losses, FINE, requests, flush=False)
    assert got == StepRecord(4, 0.5, [2.0], 1.0, [3.0]) and got.is_finite


def test_the_search_for_a_loss_scale_is_no_bad_step():
    guard, progress = guard_of(scaler=torch.amp.GradScaler("cpu", init_scale=4.0)), Progress()
    guard.scaler.scale(FINE)  # makes the scale exist
    for step in range(30):
        assert guard.observe(record(step, norm=float("inf")), progress) is None
    assert "loss" in guard.observe(record(30, loss=float("nan")), progress)
    guard.scaler.update(0.5)
    assert "gradient" in guard.observe(record(31, norm=float("inf")), progress)
