"""Evaluation is exact: the same bits on 1, 2 and 3 processes, and a float64 pass's numbers."""

import json

import pytest
import torch
from accelerate import Accelerator
from launching import load
from torch import nn
from warm import fork

from trainlib import data, models, tasks
from trainlib.evaluate import evaluate, inspect_step
from trainlib.plan import BatchPlan, assign

SIZES = [1, 5, 97, 360]
CPU = torch.device("cpu")
DIGITS = load()
TASKS = tasks.build_tasks(tasks.resolve({}, ["digit"], ["digit"]), DIGITS.targets)


def reader(split, batch_size, rank=0, world_size=1):
    return data.EvalReader(split, batch_size, rank, world_size, CPU)


def first(size):
    split = DIGITS.validation
    return data.Split(split.inputs[:size], {"digit": split.targets["digit"][:size]},
                      split.rows[:size])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    net = models.build_model(
        models.complete(models.ModelOptions(name="resnet"), (1, 8, 8), 10)
    ).train()
    with torch.no_grad():
        net(DIGITS.train.inputs[:64])  # running statistics off their start
    return net


@pytest.mark.parametrize("size", SIZES)
def test_it_equals_one_pass_in_float64(model, size):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    result = evaluate(model, reader(first(size), 64), TASKS, Accelerator(cpu=True))["digit"]
    assert model.training and all(v.equal(before[k]) for k, v in model.state_dict().items())
    split = first(size)
    with torch.no_grad():
        output = model.double().eval()(split.inputs.double())
    model.float().train()
    target = split.targets["digit"]
    loss = nn.functional.cross_entropy(output, target).item()
    assert result["loss"] == pytest.approx(loss, rel=1e-6)
    assert result["accuracy"] == (output.argmax(1) == target).double().mean().item()
    assert sum(c["support"] for c in result["classes"]) == size


def test_one_two_and_three_processes_give_the_same_bits(tmp_path):
    written = []
    for processes in (1, 2, 3):
        file = tmp_path / f"{processes}.json"
        result = fork([str(file)], processes, script="tests/evaluate_sizes.py")
        assert file.exists(), result.stdout + result.stderr
        written.append(json.loads(file.read_text()))
    assert [entry["size"] for entry in written[0]] == SIZES
    assert written[0] == written[1] == written[2]


def test_the_samples_of_a_bad_step_are_found(model):
    reader = data.Reader(DIGITS.train, BatchPlan(1437, 16, 0), assign(16, 8, 0, 1), CPU)
    assert inspect_step(model, reader, TASKS, 3) == {"suspects": [], "rows": reader.rows(3)}
    sample = int(reader.plan.samples(3)[5])
    reader.split.inputs[sample] = float("nan")
    try:
        assert inspect_step(model, reader, TASKS, 3)["suspects"] == [reader.rows(3)[5]]
    finally:
        reader.split.inputs[sample] = 0


def test_the_order_of_addition_does_not_show():
    """Losses 40 decades of two apart, where a float64 sum depends on its order."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2000, 10, generator=generator) * 20
    targets = torch.randint(10, (2000,), generator=generator)
    split = data.Split(inputs, {"digit": targets}, torch.arange(2000))
    one = evaluate(nn.Identity(), reader(split, 16), TASKS, Accelerator(cpu=True))["digit"]["loss"]

    class Pretended:
        """One of several processes, without the others; their slots stay 0."""

        device, num_processes = CPU, 3

    slots = []
    real = torch.distributed.all_reduce
    torch.distributed.all_reduce = lambda tensor: slots.append(tensor.clone())
    try:
        for rank in range(3):
            evaluate(nn.Identity(), reader(split, 16, rank, 3), TASKS, Pretended())
    finally:
        torch.distributed.all_reduce = real
    sums = torch.stack(slots[1::2])  # after the counts; the first column is of the losses
    assert ((sums != 0).sum(0)[:, 0] == 1).all() and ((sums != 0).sum(0) <= 1).all()
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        assert sum(sums[i] for i in order).sum(0)[0].item() / 2000 == one


def test_frozen_modules_stay_in_eval_mode(model):
    model.stem_norm.eval()
    evaluate(model, reader(first(5), 5), TASKS, Accelerator(cpu=True))
    assert model.training and not model.stem_norm.training
    model.train()
