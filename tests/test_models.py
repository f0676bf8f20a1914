"""Nets, what is filled in from the data, and loading a run."""

import pytest
import torch
from safetensors.torch import load_file

from trainlib import checkpoint, models
from trainlib.config import UserError
from trainlib.models import ModelOptions


def build(name, **arguments):
    return models.build_model(
        models.complete(ModelOptions(name=name, args=arguments), (1, 8, 8), 10)
    )


def test_what_only_the_data_knows_is_filled_in_where_the_net_takes_it():
    options = models.complete(ModelOptions(), (3, 4, 5), 7)
    assert options.args == {"inputs": 60, "classes": 7}
    options = models.complete(ModelOptions(name="resnet", args={"classes": 2}), (3, 4, 5), 7)
    assert options.args == {"channels": 3, "classes": 2}


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
                  and isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
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


def test_an_export_loads_back_bit_for_bit_and_replaces_the_one_before(tmp_path):
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = build("resnet")
        config = "model:\n  name: resnet\n  args: {channels: 1, classes: 10}\n"
        checkpoint.export(tmp_path / "best", model, config, {"digit": list("0123456789")}, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best"]
    loaded = models.load_model(tmp_path)
    assert not loaded.training and loaded.label_names["digit"][3] == "3"
    assert loaded.run_config["model"]["name"] == "resnet"
    assert all(v.equal(loaded.state_dict()[k]) for k, v in model.state_dict().items())
    assert set(load_file(tmp_path / "best" / "model.safetensors")) == set(model.state_dict())


def test_best_is_loaded_where_it_exists_and_a_folder_without_a_model_is_refused(tmp_path):
    config = "model:\n  name: mlp\n  args: {inputs: 64, classes: 10, hidden: []}\n"
    with pytest.raises(UserError, match="no model.safetensors in best/, final/"):
        models.load_model(tmp_path)
    for name in ("final", "best"):
        model = build("mlp", hidden=[])
        checkpoint.export(tmp_path / name, model, config, {}, {})
    assert models.load_model(tmp_path)[1].weight.equal(model[1].weight)
    assert not models.load_model(tmp_path / "final")[1].weight.equal(model[1].weight)
