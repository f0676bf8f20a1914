"""Training features leave the curve one: optimizers, averages, compiling, layout, recomputing."""

import json

import pytest
import torch
from launching import assert_same_run, losses, train, weights

from trainlib.optim import OPTIMIZERS

SHORT = ["--loop.duration", "20 steps", "--log.every", "1", "--batch.micro_size", "16"]
RESNET = ["--model.name", "resnet"]
LEARNING_RATES = {"adadelta": 1.0, "sgd": 0.1, "asgd": 0.1, "adagrad": 0.01, "adafactor": 0.01,
                  "radam": 0.01}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_trains_digits(tmp_path, name):
    import train as script

    lr = LEARNING_RATES.get(name, 2e-3)
    arguments = ["--run_dir", str(tmp_path), "--log.trackers", "[]", "--log.every", "1",
                 "--loop.duration", "30 steps", "--loop.eval_every", "30 steps", "--optim.name",
                 name, "--optim.lr", str(lr), "--schedule.name", "constant"]
    if name == "rprop":
        arguments += ["--optim.weight_decay", "0"]
    script.main(arguments)
    curve = losses(tmp_path)
    assert len(curve) == 30 and sum(curve[-5:]) < 0.9 * sum(curve[:5])


@pytest.mark.parametrize("flags", [
    pytest.param([*RESNET, "--optim.ema_half_life", "5 steps"], id="ema"),
    pytest.param(["--model.compile", "aot_eager"], id="compile"),
    pytest.param(["--model.name", "resnet", "--model.channels_last"], id="channels_last"),
    pytest.param([*RESNET, "--model.gradient_checkpointing"], id="checkpointing"),
    pytest.param(["--optim.name", "muon", "--optim.layer_decay", "0.7"], id="muon_layer_decay"),
    pytest.param([*RESNET, "--data.augment",
                  "{rotation: 10, crop: 1, flip: 0.5, brightness: 0.2, contrast: 0.2, cutout: 3, "
                  "mixup: 0.2, cutmix: 1.0}"], id="augment"),
    pytest.param(["--optim.max_grad_value", "0.01", "--schedule.name", "plateau", "--schedule.args",
                  "{patience: 0, threshold: 0.5}", "--loop.eval_every", "2 steps"],
                 id="clip_value_plateau"),
])
def test_features_give_the_same_bits_on_two_processes(tmp_path, flags):
    assert_same_run(train(tmp_path / "1", *SHORT, *flags),
                    train(tmp_path / "2", *SHORT, *flags, processes=2))


@pytest.mark.parametrize("flags", [
    RESNET, [*RESNET, "--batch.micro_size", "64"], ["--model.args.dropout", "0.5"],
], ids=["resnet", "resnet_one_micro_batch", "mlp_dropout"])
def test_recomputing_activations_changes_no_bit(tmp_path, flags):
    assert_same_run(train(tmp_path / "off", *SHORT, *flags),
                    train(tmp_path / "on", *SHORT, *flags, "--model.gradient_checkpointing"))


def test_compiling_eagerly_changes_no_loss_beyond_rounding(tmp_path):
    plain = losses(train(tmp_path / "plain", *SHORT))
    compiled = losses(train(tmp_path / "compiled", *SHORT, "--model.compile", "aot_eager"))
    assert compiled == pytest.approx(plain, abs=1e-6)


def test_the_average_is_what_is_evaluated_and_exported(tmp_path):
    flags = [*SHORT, "--schedule.name", "constant", "--schedule.warmup", "0 steps",
             "--loop.eval_every", "10 steps"]
    plain = train(tmp_path / "plain", *flags)
    averaged = train(tmp_path / "averaged", *flags, "--optim.ema_half_life", "1000 steps")
    assert losses(plain) == losses(averaged)  # the training weights never see the average
    # So long a half-life makes it the plain mean of the weights after each step.
    snapshots = [
        weights(train(tmp_path / str(steps), *flags, "--loop.duration", f"{steps} steps"))
        for steps in (1, 2, 3)
    ]
    mean = train(tmp_path / "mean", *flags, "--optim.ema_half_life", "1000 steps",
                 "--loop.duration", "3 steps")
    for name, value in weights(mean).items():
        expected = sum(snapshot[name].double() for snapshot in snapshots) / 3
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-7)
    last = json.loads((averaged / "final" / "evaluation.json").read_text())["digit"]
    from trainlib.models import load_model

    assert last["loss"] != json.loads(
        (plain / "final" / "evaluation.json").read_text())["digit"]["loss"]
    from launching import load

    validation = load().validation
    with torch.no_grad():
        output = load_model(averaged / "final")(validation.inputs)
    loss = torch.nn.functional.cross_entropy(output, validation.targets["digit"]).item()
    assert last["loss"] == pytest.approx(loss, rel=1e-5)


def test_gradients_are_clamped_to_the_value(tmp_path):
    """With SGD of rate 1 and no warm-up the first step moves no weight by more than the value."""
    flags = ["--optim.name", "sgd", "--optim.lr", "1", "--optim.weight_decay", "0",
             "--optim.max_grad_norm", "null", "--schedule.name", "constant", "--schedule.warmup",
             "0 steps", "--log.every", "1", "--optim.max_grad_value"]
    tiny, one = (
        weights(train(tmp_path / str(steps), *flags, "1e-3", "--loop.duration", f"{steps} steps"))
        for steps in (1, 2)
    )
    moved = torch.cat([(one[name] - tiny[name]).abs().flatten() for name in tiny])
    assert 0.99e-3 < moved.max() <= 1e-3 * (1 + 1e-4)
