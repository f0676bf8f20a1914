"""Nets, their inputs, the weights they start from, and loading a run."""

import copy

import pytest
import torch
from launching import assert_same_run, export, losses, train, weights
from safetensors.torch import load_file, save_file, save_model
from torch import nn

import train as script
from trainlib import models
from trainlib.config import UserError, to_yaml
from trainlib.models import ModelOptions
from trainlib.optim import OPTIMIZERS, OptimOptions, build_optimizer

RESNET = ("--model.name", "resnet", "--model.args.width", "4")


def build(name, shape=(1, 8, 8), classes=10, mean=None, deviation=None, options=None, **arguments):
    """A net whose weights come from seed 0."""
    given = ModelOptions(name=name, args=arguments, **(options or {}))
    torch.manual_seed(0)
    return models.build_model(models.complete(given, shape, classes), mean, deviation)


def run(folder, *flags):
    """A finished run of 4 steps of one micro-batch, in this process."""
    script.main(["--run_dir", str(folder), "--log.trackers", "[]", "--loop.duration", "4 steps",
                 "--batch.global_size", "32", *flags])
    return folder


# ---- nets ----


def test_what_only_the_data_knows_is_filled_in_where_the_net_takes_it():
    options = models.complete(ModelOptions(), (3, 4, 5), 7)
    assert options.args == {"inputs": 60, "classes": 7}
    options = models.complete(ModelOptions(name="resnet", args={"classes": 2}), (3, 4, 5), 7)
    assert options.args == {"channels": 3, "classes": 2}
    assert models.complete(options, (3, 4, 5), 7) == options  # a run's config is a recipe


@pytest.mark.parametrize("name, arguments, num_parameters", [
    # The default: (64 + 1) 256 + (256 + 1) 128 + (128 + 1) 10.
    ("mlp", {}, 50826), ("mlp", {"hidden": []}, 650), ("mlp", {"hidden": [4], "dropout": 0}, 310),
    ("resnet", {}, None), ("resnet", {"depth": 14, "width": 4}, None),
])
def test_nets_map_images_to_one_logit_a_class(name, arguments, num_parameters):
    model = build(name, **arguments)
    assert model(torch.randn(3, 1, 8, 8)).shape == (3, 10)
    if num_parameters is not None:
        assert sum(p.numel() for p in model.parameters()) == num_parameters


def test_a_resnet_has_as_many_layers_as_its_depth_says():
    for depth in (8, 14, 20):
        model = build("resnet", depth=depth)
        layers = [m for name, m in model.named_modules() if "shortcut" not in name
                  and isinstance(m, nn.Conv2d | nn.Linear)]
        assert len(layers) == depth


@pytest.mark.parametrize("name, arguments, message", [
    ("mpl", {}, "did you mean 'mlp'"),
    ("mlp", {"hiden": [1]}, "does not take 'hiden'; did you mean 'hidden'"),
    ("resnet", {"depth": 9}, "depth is 6n"),
    ("mlp", {"hidden": "wide"}, "mlp refuses"),
    ("mlp", {"hidden": [-4]}, "mlp refuses"),
    ("mlp", {"dropout": 1.5}, "mlp refuses"),
])
def test_what_a_net_cannot_be_is_refused(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        build(name, **arguments)


# ---- inputs ----


def test_the_scale_of_the_inputs_is_part_of_the_model():
    mean, deviation = torch.randn(3, 1, 1), torch.rand(3, 1, 1) + 0.5
    bare = build("resnet", (3, 8, 8)).eval()
    scaled = build("resnet", (3, 8, 8), mean=mean, deviation=deviation).eval()
    inputs = torch.rand(4, 3, 8, 8)
    assert scaled(inputs).equal(bare((inputs - mean) / deviation))
    assert not scaled(inputs).equal(bare(inputs))
    assert [n for n, _ in scaled.named_parameters()] == [n for n, _ in bare.named_parameters()]
    assert set(scaled.state_dict()) - set(bare.state_dict()) == {"input_mean", "input_deviation"}
    again = copy.deepcopy(scaled)  # an averaged copy scales by its own buffers
    again.input_mean += 1
    assert not again(inputs).equal(scaled(inputs))


def test_channels_last_changes_the_layout_and_nothing_else():
    mean = torch.rand(3, 1, 1, dtype=torch.float64)
    models_by_layout = [
        build("resnet", (3, 8, 8), mean=mean, deviation=mean + 1, width=16,
              options={"channels_last": is_last}).double()
        for is_last in (False, True)
    ]
    layouts = []
    models_by_layout[1].stem.register_forward_pre_hook(lambda _, args: layouts.append(
        args[0].is_contiguous(memory_format=torch.channels_last)))
    inputs = torch.rand(4, 3, 8, 8, dtype=torch.float64)
    plain, last = (model(inputs) for model in models_by_layout)
    # 8 layers of at most 288 terms in float64, each relative to 2^-53.
    torch.testing.assert_close(plain, last, rtol=1e-12, atol=1e-12)
    assert layouts == [True]
    kernels = [p for p in models_by_layout[1].parameters() if p.ndim == 4]
    assert len(kernels) == 9
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)
    assert not models_by_layout[0].stem.weight.is_contiguous(memory_format=torch.channels_last)


def test_channels_last_is_refused_where_torch_writes_past_its_memory():
    last = {"channels_last": True}
    build("resnet", options=last, width=16)
    with pytest.raises(UserError, match="shortcut.0 is a convolution of 1x1 with stride 2 over 8"):
        build("resnet", options=last, width=8)


# ---- gradient checkpointing and compiling ----


@pytest.mark.parametrize("name, arguments, part", [
    ("mlp", {"hidden": [16, 8], "dropout": 0.5}, "1"),
    ("mlp", {"hidden": []}, None),  # one layer: nothing to recompute
    ("resnet", {"width": 4}, "blocks.1"),
])
def test_gradient_checkpointing_recomputes_the_same_gradients(name, arguments, part):
    inputs, gradients = torch.rand(6, 1, 8, 8), []
    for enable in (False, True):
        model = build(name, options={"gradient_checkpointing": enable}, **arguments)
        calls = []
        if part:
            model.get_submodule(part).register_forward_pre_hook(lambda *_, c=calls: c.append(1))
        torch.manual_seed(1)
        model(inputs).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
        assert not part or len(calls) == 1 + enable
        with torch.no_grad():
            model(inputs)
        assert not part or len(calls) == 2 + enable  # evaluation keeps nothing, recomputes nothing
    assert all(a.equal(b) for a, b in zip(*gradients, strict=True))


def test_gradient_checkpointing_trains_the_same_weights_and_statistics(tmp_path):
    flags = (*RESNET, "--batch.micro_size", "16")
    plain = run(tmp_path / "plain", *flags)
    assert_same_run(plain, run(tmp_path / "on", *flags, "--model.gradient_checkpointing"))


@pytest.mark.parametrize("given, backend", [
    (None, None), (False, None), (True, "inductor"), ("aot_eager", "aot_eager"),
])
def test_a_backend_is_a_name_that_torch_knows(given, backend):
    assert ModelOptions(compile=given).compile == backend


def test_an_unknown_backend_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="unknown; did you mean 'inductor'"):
        ModelOptions(compile="induktor")


def test_backends_are_looked_up_only_where_one_is_given(monkeypatch):
    monkeypatch.setattr(torch.compiler, "list_backends", None)  # imports the compiler: slow
    ModelOptions(compile=None)


# ---- weights to start from ----


def tensors(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def other(name, classes=10, seed=1, **arguments):
    """A net of other weights than ``build`` makes."""
    model = build(name, classes=classes, **arguments)
    torch.manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


def test_weights_start_from_a_file_and_from_a_folder(tmp_path):
    trained = other("resnet", width=4)
    config = to_yaml(script.TrainOptions())
    export(tmp_path / "run" / "final", trained, config, {}, {})
    for path in (tmp_path / "run", tmp_path / "run/final",
                 tmp_path / "run/final/model.safetensors"):
        model = build("resnet", width=4)
        lines = models.start_weights(model, str(path), [])
        num = len(trained.state_dict())
        file = tmp_path / "run/final/model.safetensors"
        assert lines == [f"model: {num} of {num} tensors from {file}"]
        assert all(t.equal(model.state_dict()[n]) for n, t in trained.state_dict().items())


def test_a_head_of_another_number_of_classes_is_listed_and_the_rest_loaded(tmp_path):
    trained = other("resnet", classes=3, width=4)
    surplus = {name: tensor.contiguous() for name, tensor in trained.state_dict().items()}
    surplus["extra.bias"] = torch.zeros(1)
    del surplus["stem.weight"]
    surplus["blocks.0.conv1.weight"] = surplus["blocks.0.conv1.weight"].view(2, 8, 3, 3)
    save_file(surplus, tmp_path / "w.safetensors")
    model = build("resnet", width=4)
    before = tensors(model)
    [line] = models.start_weights(model, str(tmp_path / "w.safetensors"), [])
    assert ("of another shape: blocks.0.conv1.weight [4, 4, 3, 3] (there [2, 8, 3, 3]), "
            "head.weight [10, 16] (there [3, 16]), head.bias [10] (there [3]);") in line
    assert "not there: stem.weight; there only: extra.bias" in line
    for name, tensor in model.state_dict().items():
        is_fresh = name in ("head.weight", "head.bias", "stem.weight", "blocks.0.conv1.weight")
        assert tensor.equal((before if is_fresh else trained.state_dict())[name]), name


class Tied(nn.Module):
    """Two layers of one weight."""

    def __init__(self):
        super().__init__()
        self.encode, self.decode = nn.Linear(4, 4), nn.Linear(4, 4)
        self.decode.weight = self.encode.weight


def test_a_tied_weight_is_stored_once_and_not_reported_as_missing(tmp_path):
    trained, model = Tied(), Tied()
    save_model(trained, str(tmp_path / "w.safetensors"))
    assert len(load_file(tmp_path / "w.safetensors")) == 3
    [line] = models.start_weights(model, str(tmp_path / "w.safetensors"), [])
    assert line == f"model: 3 of 4 tensors from {tmp_path}/w.safetensors"
    assert model.decode.weight.equal(trained.encode.weight)
    assert model.decode.weight is model.encode.weight


def test_the_scale_of_the_inputs_stays_that_of_the_data(tmp_path):
    zero, one = torch.zeros(1, 1, 1), torch.ones(1, 1, 1)
    save_model(build("mlp", mean=zero, deviation=one), str(tmp_path / "w.safetensors"))
    model = build("mlp", mean=zero + 5, deviation=one + 5)
    [line] = models.start_weights(model, str(tmp_path / "w.safetensors"), [])
    assert model.input_mean.item() == 5 and model.input_deviation.item() == 6
    assert line.startswith("model: 6 of 6 tensors") and "input_" not in line


@pytest.mark.parametrize("path, message", [
    ("nowhere", "model.init_from: .*nowhere: no .safetensors file, and no model.safetensors in"),
    ("text.pt", "model.init_from: .*text.pt is a pickle, which can run code; convert it"),
    ("text.safetensors", "model.init_from: .*text.safetensors cannot be read: "),
    ("mlp.safetensors", "none of the 6 tensors in .* has a name and shape of this model's; the "
                        "file has 1.bias, .*; the model has stem.weight, .* and 48 more"),
])
def test_weights_that_cannot_be_had_are_refused(tmp_path, path, message):
    for name in ("text.pt", "text.safetensors"):
        (tmp_path / name).write_text("weights")
    save_file(build("mlp").state_dict(), tmp_path / "mlp.safetensors")
    with pytest.raises(UserError, match=message) as caught:
        models.start_weights(build("resnet", width=4), str(tmp_path / path), [])
    assert "\n" not in str(caught.value)


class Code:
    """Unpickled, it makes a folder."""

    def __reduce__(self):
        import os

        return os.mkdir, ("ran",)


@pytest.mark.parametrize("wrap", [
    lambda state: state,
    lambda state: {"state_dict": state, "epoch": 3},
    lambda state: {"model": {f"module.{name}": tensor for name, tensor in state.items()}},
], ids=["plain", "nested", "ddp"])
def test_tensors_of_a_pickle_are_read_where_it_is_allowed(tmp_path, wrap):
    trained, model = other("resnet", width=4), build("resnet", width=4)
    torch.save(wrap(trained.state_dict()), tmp_path / "w.pt")
    with pytest.raises(UserError, match="w.pt is a pickle.*--model.allow_pickle"):
        models.start_weights(model, str(tmp_path / "w.pt"), [])
    [line] = models.start_weights(model, str(tmp_path / "w.pt"), [], allow_pickle=True)
    num = len(trained.state_dict())
    assert line == f"model: {num} of {num} tensors from {tmp_path}/w.pt"
    assert all(t.equal(model.state_dict()[name]) for name, t in trained.state_dict().items())


@pytest.mark.parametrize("content", [{"stem.weight": Code()}, Code(), [1, 2]],
                         ids=["inside", "alone", "a_list"])
def test_a_pickle_runs_nothing(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    torch.save(content, "w.pt")
    for allowed in (False, True):
        with pytest.raises(UserError) as caught:
            models.start_weights(build("resnet", width=4), "w.pt", [], allow_pickle=allowed)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


# ---- frozen weights ----


def test_patterns_freeze_parameters_and_the_norms_of_which_nothing_trains():
    model = build("resnet", width=4)
    [line] = models.start_weights(model, None, ["stem*", "blocks.0.*.weight"])
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"stem.weight", "stem_norm.weight", "stem_norm.bias",
                      *(f"blocks.0.{part}.weight" for part in ("conv1", "norm1", "conv2", "norm2"))}
    # 9 * 4 + 2 * 4 of the stem, 2 * (9 * 4 * 4 + 4) of the block.
    assert line == "model: 340 parameters frozen by stem*, blocks.0.*.weight"
    assert not model.stem_norm.training and model.blocks[0].norm1.training


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_optimizer_gets_what_is_frozen(name):
    model = build("mlp", hidden=[16, 8])
    models.start_weights(model, None, ["1.*", "4.bias"])
    optimizer = build_optimizer(OptimOptions(name=name, weight_decay=0), model)
    given = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(given) == sorted(map(id, (model[4].weight, model[7].weight, model[7].bias)))


@pytest.mark.parametrize("pattern, message", [
    ("hed.*", r"no parameter matches 'hed\.\*'; did you mean 'head\*'"),
    ("blocks.0.konv1.*", r"did you mean 'blocks\.0\.conv1\*'"),
    ("stem", r"did you mean 'stem\*'"),
    ("xyz*", "no parameter matches 'xyz.'; the model has stem, stem_norm, blocks, head"),
    ("*", r"model.freeze: \* leaves nothing to train"),
])
def test_a_pattern_that_freezes_nothing_or_everything_is_refused(pattern, message):
    with pytest.raises(UserError, match=message):
        models.start_weights(build("resnet", width=4), None, [pattern])


def test_what_is_frozen_keeps_its_weights_and_statistics_in_training(tmp_path):
    """Also from a run, and on two processes."""
    first = run(tmp_path / "first", *RESNET)
    flags = (*RESNET, "--model.init_from", str(first), "--model.freeze", "[stem*, blocks.0.*]",
             "--batch.micro_size", "16")
    second = run(tmp_path / "second", *flags)
    before, after = weights(first, "best"), weights(second)
    kept = {name for name in after if after[name].equal(before[name])}
    frozen = {name for name in after if name.startswith(("stem", "blocks.0."))}
    assert "stem_norm.running_mean" in frozen and "blocks.0.norm2.num_batches_tracked" in frozen
    assert kept >= frozen
    assert kept - frozen <= {"input_mean", "input_deviation"} | {
        name for name in after if name.endswith("num_batches_tracked")}
    both = train(tmp_path / "both", *flags, "--loop.duration", "4 steps",
                 "--batch.global_size", "32", processes=2)
    assert_same_run(second, both)


# ---- the table ----


def test_the_table_counts_parameters_trainable_ones_and_bytes():
    mean = torch.zeros(1, 1, 1)
    model = build("mlp", hidden=[8], mean=mean, deviation=mean + 1)
    models.start_weights(model, None, ["1.*"])
    assert models.parameter_table(model).splitlines() == [
        "model           parameters       trainable             bytes",
        "1 (Linear)             520               0             2,080",
        "4 (Linear)              90              90               360",
        "(own)                    0               0                 8",
        "total                  610              90             2,448",
    ]


def test_the_table_counts_what_is_shared_once_and_buffers_as_bytes():
    model = Tied()
    model.norm = nn.BatchNorm1d(4).half()
    model.half_weight = nn.Parameter(torch.zeros(5, dtype=torch.float16))
    rows = [line.split() for line in models.parameter_table(model).splitlines()[1:]]
    assert rows == [
        ["encode", "(Linear)", "20", "20", "80"],
        ["decode", "(Linear)", "4", "4", "16"],
        ["norm", "(BatchNorm1d)", "8", "8", "40"],  # 16 fp16 numbers and an int64
        ["(own)", "5", "5", "10"],
        ["total", "37", "37", "146"],
    ]


# ---- loading a run ----


def test_an_export_loads_back_bit_for_bit_and_replaces_the_one_before(tmp_path):
    for seed in (0, 1):
        model = build("resnet", mean=torch.rand(1, 1, 1), deviation=torch.rand(1, 1, 1) + 1)
        model.head.weight.data += seed
        config = "model:\n  name: resnet\n  args: {channels: 1, classes: 10}\n"
        export(tmp_path / "best", model, config, {"digit": list("0123456789")}, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best"]
    loaded = models.load_model(tmp_path)
    assert not loaded.training and loaded.label_names["digit"][3] == "3"
    assert loaded.run_config["model"]["name"] == "resnet"
    assert all(v.equal(loaded.state_dict()[k]) for k, v in model.state_dict().items())
    assert set(load_file(tmp_path / "best" / "model.safetensors")) == set(model.state_dict())
    inputs = torch.rand(3, 1, 8, 8)
    assert loaded(inputs).equal(model.eval()(inputs))


def test_best_is_loaded_where_it_exists_and_a_folder_without_a_model_is_refused(tmp_path):
    config = "model:\n  name: mlp\n  args: {inputs: 64, classes: 10, hidden: []}\n"
    with pytest.raises(UserError, match="no model.safetensors in best/, final/"):
        models.load_model(tmp_path)
    for seed, name in enumerate(("final", "best")):
        model = other("mlp", hidden=[], seed=seed)
        export(tmp_path / name, model, config, {}, {})
    assert models.load_model(tmp_path)[1].weight.equal(model[1].weight)
    assert not models.load_model(tmp_path / "final")[1].weight.equal(model[1].weight)


@pytest.mark.parametrize("name, text, message", [
    ("config.yaml", None, "no config.yaml and labels.json of a run beside model.safetensors"),
    ("config.yaml", "seed: 1", "no config.yaml and labels.json of a run beside"),
    ("config.yaml", "model: {name: mpl}", "config.yaml: model: .*did you mean 'mlp'"),
    ("config.yaml", "model: {name: mlp, args: {inputs: 64, classes: 5}}",
     "no weights of mlp as its code is now: .*size mismatch"),
    ("model.safetensors", "weights", "no weights of mlp as its code is now: SafetensorError"),
])
def test_a_folder_that_is_no_run_is_refused_in_a_line(tmp_path, name, text, message):
    config = "model: {name: mlp, args: {inputs: 64, classes: 10}}"
    export(tmp_path / "best", build("mlp"), config, {}, {})
    file = tmp_path / "best" / name
    file.write_text(text) if text else file.unlink()
    with pytest.raises(UserError, match=message) as caught:
        models.load_model(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_compiled_run_and_one_in_channels_last_are_the_same_to_rounding(tmp_path):
    # By SGD: Adam's first step, of the sign of a gradient, magnifies rounding.
    flags = ("--model.name", "resnet", "--optim.name", "sgd", "--optim.lr", "1e-3",
             "--log.every", "1")
    plain = run(tmp_path / "plain", *flags)
    compiled = run(tmp_path / "compiled", *flags, "--model.compile", "eager")
    last = run(tmp_path / "last", *flags, "--model.channels_last")
    for folder in (compiled, last):
        assert losses(folder) == pytest.approx(losses(plain), abs=1e-5)
        loaded = models.load_model(folder).state_dict()
        assert loaded.keys() == weights(plain, "best").keys()
        assert all(t.equal(loaded[n]) for n, t in weights(folder, "best").items())
