"""Layers whose gradients explode or vanish are named once, with the same words on any number of
processes, and nothing else changes."""

import math

import pytest
import torch
from accelerate import Accelerator
from launching import ROOT, assert_same_run, train
from torch import nn

from trainlib import layer_gradients
from trainlib.gradients import StepSums
from trainlib.layer_gradients import (
    EVERY_STEPS,
    EXPLODING_NORM,
    FIRST_STEPS,
    LOOKS_IN_A_ROW,
    VANISHING_NORM,
    WELL_LOOKS,
    Faults,
    LayerGradients,
    faults,
)

# Gradients of "loud", "faint", "dead" and "head" times a million, a thousand-millionth, 0 and 1.
NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, inputs, classes):
        super().__init__()
        self.loud, self.faint = nn.Linear(inputs, 16), nn.Linear(inputs, 16)
        self.dead, self.head = nn.Linear(inputs, 16), nn.Linear(48, classes)
        for layer, factor in ((self.loud, 1e6), (self.faint, 1e-9), (self.dead, 0.0)):
            for parameter in layer.parameters():
                parameter.register_hook(lambda gradient, factor=factor: gradient * factor)

    def forward(self, images):
        x = images.flatten(1)
        hidden = [self.loud(x), self.faint(x), self.dead(x)]
        return self.head(torch.relu(torch.cat(hidden, 1)))
"""
UNWATCHED = """
import sys
sys.path.insert(0, {root!r})
import train
from trainlib import runtime
from trainlib import layer_gradients
from trainlib.gradients import StepSums

StepSums.watch_layers = lambda *arguments: None
if __name__ == "__main__":
    runtime.run(train.main)
"""
FLAGS = ("--optim.lr", "1e-4", "--loop.duration", "30 steps", "--batch.global_size", "64")


def warnings(folder) -> list[str]:
    lines = (folder / "log.txt").read_text().splitlines()
    return [line for line in lines if "gradient" in line]


@pytest.mark.parametrize(("norm", "fault"), [
    (EXPLODING_NORM, None), (math.nextafter(EXPLODING_NORM, math.inf), "exploding"),
    (VANISHING_NORM, None), (math.nextafter(VANISHING_NORM, 0), "vanishing"),
    (0.0, "zero"), (None, "missing"),
])
def test_the_thresholds_are_where_they_are_said_to_be(norm, fault):
    assert faults({"one": norm, "other": 1.0}).get("one") == fault


def test_where_all_gradients_fade_none_vanishes():
    assert faults({"one": 1e-8, "other": 1e-7}) == faults({"one": 0.0, "other": 0.0}) == {}


def test_what_is_not_finite_is_left_to_the_guard():
    looks = Faults()
    for value in (math.nan, math.inf):
        assert faults({"one": value, "other": 1e9, "third": 0.0}) == {}
        assert looks.take({"one": value, "other": 1e9}) == []


def test_a_layer_is_named_once_and_again_only_after_it_was_well():
    looks, ill, well = Faults(), {"a": 2e3, "b": 1.0}, {"a": 1.0, "b": 1.0}
    assert [len(looks.take(ill)) for _ in range(30)] == [1] + [0] * 29
    for _ in range(WELL_LOOKS - 1):
        assert looks.take(well) == []
    assert looks.take(ill) == []  # not well for long enough
    for _ in range(WELL_LOOKS):
        assert looks.take(well) == []
    assert ["a (2e+03)" in line for line in looks.take(ill)] == [True]


@pytest.mark.parametrize("small", [1e-9, 0.0, None])
def test_small_gradients_are_named_when_they_last(small):
    looks = Faults()
    assert looks.take({"a": 1.0, "b": 1.0}) == []
    for _ in range(5):  # a target that is missing now and then
        assert looks.take({"a": small, "b": 1.0}) == looks.take({"a": 1.0, "b": 1.0}) == []
    said = [looks.take({"a": small, "b": 1.0}) for _ in range(2 * LOOKS_IN_A_ROW)]
    assert [len(lines) for lines in said] == [
        int(number == LOOKS_IN_A_ROW) for number in range(1, 2 * LOOKS_IN_A_ROW + 1)
    ]


def test_what_gets_no_gradient_from_the_start_is_told_elsewhere():
    looks = Faults()
    assert [looks.take({"a": None, "b": 1.0}) for _ in range(10)] == [[]] * 10


def test_looks_come_in_the_first_steps_and_then_every_hundred():
    parameter, steps, looked = nn.Parameter(torch.ones(3)), iter(range(1000)), []
    layers = LayerGradients(["a"], lambda: looked.append(layers._num_seen) or 0, steps)
    for _ in range(2 * EVERY_STEPS + 1):
        parameter.grad = torch.ones(3)
        layers.look([parameter])
    assert looked == [*FIRST_STEPS, EVERY_STEPS, 2 * EVERY_STEPS]


def test_norms_that_travel_are_read_when_they_are_there(monkeypatch):
    class Event:
        is_over, num_asked = False, 0

        def query(self):
            self.num_asked += 1
            return self.is_over

    event, said = Event(), []
    monkeypatch.setattr(layer_gradients, "_sent", lambda norms: (norms, event))
    parameter, steps = nn.Parameter(torch.ones(1)), iter(range(100))
    layers = LayerGradients(["a"], lambda: next(steps), said.append)
    for step in range(20):
        event.is_over = step == 15
        parameter.grad = torch.full((1,), 1e4)
        layers.look([parameter])
        assert len(said) == (step >= 15)
    assert said[0].startswith("step 0: exploding") and event.num_asked >= 15


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("scale", [None, 2.0**16])
def test_a_norm_is_that_of_the_whole_step_without_fp16s_scale(exact, scale):
    accelerator = Accelerator(cpu=True)
    scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
    accelerator.scaler = scaler
    model, said = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)), []
    sums = StepSums(accelerator, model, {"loss": 1}, exact, 2, said.append)
    layers = {name: name.split(".")[0] for name, _ in model.named_parameters()}
    sums.watch_layers(model, layers, lambda: 7)
    batches = [torch.randn(5, 4), torch.randn(5, 4)]
    sums.clear()
    for inputs in batches:
        loss = model(inputs).square().sum() * 1e4
        (loss if scaler is None else scaler.scale(loss)).backward()
        sums.add_gradients(True)
    sums.reduce()
    for parameter in model.parameters():
        parameter.grad = None
    (model(torch.cat(batches)).square().sum() * 1e4).backward()
    wanted = [math.hypot(*(p.grad.norm().item() for p in model[i].parameters())) for i in (0, 2)]
    assert min(wanted) > EXPLODING_NORM  # of these inputs
    line, = said
    assert line.startswith("step 7: exploding")
    shown = [float(text.split(")")[0]) for text in line.split(" in ")[1].split("(")[1:]]
    assert shown == pytest.approx(wanted, rel=0.05)  # of two digits


def test_planted_faults_are_named_once_and_alike_on_any_number_of_processes(tmp_path):
    net = tmp_path / "net.py"
    net.write_text(NET)
    flags = [*FLAGS, "--model.name", f"{net}:Net"]
    alone = train(tmp_path / "alone", *flags)
    exact = train(tmp_path / "exact", *flags, processes=2)
    ddp = train(tmp_path / "ddp", *flags, "--batch.exact_sum", "false", processes=2)
    lines = warnings(alone)
    assert len(lines) == 3
    for line, (kind, layer) in zip(
        lines, [("exploding", "loud"), ("vanishing", "faint"), ("exactly 0", "dead")], strict=True
    ):
        assert kind in line and layer in line
        assert not any(other in line.split(";")[0] for other in
                       {"loud", "faint", "dead", "head"} - {layer})
    assert warnings(exact) == lines
    assert [line.split("(")[0] for line in warnings(ddp)] == [
        line.split("(")[0] for line in lines
    ]


def test_looking_changes_nothing(tmp_path):
    script = tmp_path / "unwatched.py"
    script.write_text(UNWATCHED.format(root=str(ROOT)))
    net = tmp_path / "net.py"
    net.write_text(NET)
    flags = [*FLAGS, "--model.name", f"{net}:Net"]
    looked = train(tmp_path / "looked", *flags)
    unwatched = train(tmp_path / "unwatched", *flags, script=str(script))
    assert warnings(looked) and not warnings(unwatched)
    assert_same_run(looked, unwatched)


@pytest.mark.parametrize("recipe", ["digits_multitask", "diabetes_regression", "digits_multilabel"])
def test_of_a_healthy_job_nothing_is_said(tmp_path, recipe):
    folder = train(tmp_path / "run", "--recipe", f"recipes/{recipe}.yaml", "--loop.duration",
                   f"{EVERY_STEPS} steps")
    assert warnings(folder) == []
