"""Nets from timm, torchvision and transformers, and of the user's own, through train.py."""

import importlib
import json
import shutil
import sys

import pyarrow
import pyarrow.parquet
import pytest
import torch
from launching import weights
from safetensors.torch import save_file
from warm import fork

import train as script
from trainlib import models
from trainlib.checkpoint import Checkpoints
from trainlib.config import UserError
from trainlib.evaluate import eval_mode
from trainlib.models import ModelOptions

NETS = '''
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, in_channels, num_classes, img_size, width=4):
        super().__init__()
        self.img_size = img_size
        self.conv = nn.Conv2d(in_channels, width, 3)
        self.head = nn.Linear(width, num_classes)

    def forward(self, images):
        return self.head(self.conv(images).mean((2, 3)))

def linear(input_dim, num_labels):
    return nn.Sequential(nn.Flatten(), nn.Linear(input_dim, num_labels))

def anything(**settings):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, settings.get("classes", 10)))

class Recomputes(Net):
    recomputes = False

    def set_grad_checkpointing(self, enable=True):
        self.recomputes = enable

class CannotRecompute(Net):
    def set_grad_checkpointing(self, enable=True):
        assert not enable, "cannot"

class Raises(Net):
    def __init__(self, **settings):
        self.width = [1, 2][7]

class RaisesInForward(Net):
    def forward(self, images):
        return self.head(images)

class Pair(Net):
    def forward(self, images):
        return super().forward(images), None

class Transposed(Net):
    def forward(self, images):
        return super().forward(images).T

class Plain:
    pass

class Scales(Net):
    def __init__(self, **settings):
        super().__init__(**settings)
        self.register_buffer("input_mean", torch.zeros(1))

class Exits(Net):
    def __init__(self, **settings):
        raise SystemExit("no data")

def lazy():
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(10))

made = nn.Linear(64, 10)
'''
SIZES = "{in_channels: 1, num_classes: 10, img_size: 8}"
VIT = {"model_type": "vit", "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
       "intermediate_size": 16, "patch_size": 4}
BERT = {"model_type": "bert", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 16, "vocab_size": 20, "max_position_embeddings": 8}
IMAGES = "transformers:AutoModelForImageClassification"
TEXTS = "transformers:AutoModelForSequenceClassification"


def arguments(folder, *flags):
    return ["--run_dir", str(folder), "--log.trackers", "[]", "--loop.duration", "4 steps", *flags]


@pytest.fixture
def nets(tmp_path):
    """The path of the file above."""
    (tmp_path / "nets.py").write_text(NETS)
    return f"{tmp_path}/nets.py"


@pytest.fixture
def loads_back(monkeypatch):
    """Trains in this process and loads ``best/`` and ``final/``, whose outputs must be those of
    the model that was exported, bit for bit; returns the module of ``final/``."""

    def check(folder, inputs, *flags, before_loading=lambda: None):
        outputs, export = {}, Checkpoints.export

        def keep_outputs(checkpoints, name, model, *rest):
            export(checkpoints, name, model, *rest)
            with torch.no_grad(), eval_mode(model):
                outputs[name] = logits(model(inputs))

        monkeypatch.setattr(Checkpoints, "export", keep_outputs)
        script.main(arguments(folder, *flags))
        before_loading()
        assert set(outputs) == {"best", "final"}
        for name, output in outputs.items():
            model = models.load_model(folder / name)
            with torch.no_grad():
                assert logits(model(inputs)).equal(output)
        return model

    return check


def logits(output):
    return output if isinstance(output, torch.Tensor) else output.logits


def complete(name, shape=(1, 8, 8), classes=10, **args):
    return models.complete(ModelOptions(name=name, args=args), shape, classes)


def need(package):
    """The package; skips where it is missing or, as torchvision beside another torch, broken."""
    try:
        module = importlib.import_module(package)
        if package == "transformers":  # imports its models when they are asked for
            assert module.ViTForImageClassification and module.BertForSequenceClassification
        return module
    except Exception as error:
        pytest.skip(f"{package} cannot be imported here: {type(error).__name__}: {error}")


# ---- of the user's own ----


def test_classes_and_functions_of_files_and_packages_train_and_load_back(
    nets, loads_back, tmp_path, monkeypatch
):
    (tmp_path / "own_package").mkdir()
    (tmp_path / "own_package" / "nets.py").write_text(NETS)
    monkeypatch.syspath_prepend(tmp_path)
    for number, name in enumerate((f"{nets}:Net", f"{nets}:linear", "own_package.nets:Net")):
        model = loads_back(tmp_path / str(number), torch.rand(3, 1, 8, 8), "--model.name", name)
        assert model.run_config["model"]["name"] == name
    assert model.img_size == 8 and model.conv.in_channels == 1


def test_what_only_the_data_knows_is_filled_in_by_its_common_names(nets):
    assert complete(f"{nets}:Net", (3, 4, 4), 7).args == {
        "in_channels": 3, "num_classes": 7, "img_size": 4}
    assert complete(f"{nets}:Net", (3, 4, 6), 7, num_classes=2).args == {
        "in_channels": 3, "num_classes": 2, "img_size": [4, 6]}
    assert complete(f"{nets}:linear", (5,), 7).args == {"input_dim": 5, "num_labels": 7}
    assert complete("torch.nn:Linear", (5,), 7).args == {"in_features": 5, "out_features": 7}
    assert complete(f"{nets}:anything", (5,), 7, other=1).args == {"other": 1}


def test_a_net_of_the_users_own_recomputes_by_its_method(nets):
    options = complete(f"{nets}:Recomputes").model_copy(update={"gradient_checkpointing": True})
    assert models.build_model(options).recomputes


# ---- transformers ----


def test_a_vision_transformer_trains_and_loads_back(loads_back, tmp_path):
    transformers = need("transformers")
    model = loads_back(tmp_path / "run", torch.rand(3, 1, 8, 8), "--model.name", IMAGES,
                       "--model.args.config", json.dumps(VIT), "--model.gradient_checkpointing")
    assert type(model) is transformers.ViTForImageClassification
    config = model.run_config["model"]["args"]["config"]
    assert config == VIT | {"num_labels": 10, "num_channels": 1, "image_size": 8}
    torch.manual_seed(0)
    fresh = models.build_model(ModelOptions(**model.run_config["model"])).state_dict()
    trained = weights(tmp_path / "run")
    moved = [name for name in fresh if not trained[name].equal(fresh[name])]
    # The keys' bias adds the same number to all scores of a query: the softmax drops it.
    still = {name for name in fresh if name not in moved}
    assert all(name.endswith("k_proj.bias") or "key.bias" in name for name in still), still


def test_a_text_transformer_trains_on_lists_of_token_numbers_and_loads_back(loads_back, tmp_path):
    transformers = need("transformers")
    tokens = torch.randint(20, (64, 6), generator=torch.Generator().manual_seed(0))
    table = {"tokens": tokens.tolist(), "label": (tokens[:, 0] % 3).tolist()}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "texts.parquet")
    model = loads_back(
        tmp_path / "run", tokens[:5], "--data.source", str(tmp_path / "texts.parquet"),
        "--data.normalize", "false", "--model.name", TEXTS, "--model.args.config", json.dumps(BERT),
    )
    assert type(model) is transformers.BertForSequenceClassification
    assert model.config.num_labels == 3 and "input_mean" not in model.state_dict()


@pytest.fixture
def pretrained(tmp_path):
    """A folder with a ViT of 3 classes in bfloat16, and its weights."""
    transformers = need("transformers")
    torch.manual_seed(5)
    config = transformers.AutoConfig.for_model(**VIT, num_labels=3, num_channels=1, image_size=8)
    model = transformers.AutoModelForImageClassification.from_config(config).bfloat16()
    folder = tmp_path / "pretrained"
    folder.mkdir()
    config.architectures, config.dtype = ["ViTForImageClassification"], torch.bfloat16
    config.to_json_file(folder / "config.json", use_diff=False)
    state = model.state_dict()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder, state


def test_a_pretrained_folder_gives_its_weights_in_fp32_with_a_new_head(pretrained):
    folder, state = pretrained
    options = complete(IMAGES, (3, 16, 16), pretrained=str(folder))
    config = options.args["config"]
    # What the weights are for stays as it is; what the classes are called does not.
    assert (config["num_channels"], config["image_size"], config["num_labels"]) == (1, 8, 10)
    assert not {"id2label", "label2id", "dtype"} & set(config)
    model = models.build_model(options)
    assert model.training and model.classifier.weight.shape == (10, 8)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        if not name.startswith("classifier"):
            assert parameter.equal(state[name].float()), name


def test_a_run_from_a_pretrained_folder_loads_back_without_it(pretrained, loads_back, tmp_path):
    folder, _ = pretrained
    model = loads_back(
        tmp_path / "run", torch.rand(3, 1, 8, 8), "--model.name", IMAGES,
        "--model.args.pretrained", str(folder), "--model.args.config.hidden_dropout_prob", "0.1",
        "--model.freeze", "[vit.*]", before_loading=lambda: shutil.rmtree(folder),
    )
    assert model.config.hidden_dropout_prob == 0.1 and model.config.num_labels == 10
    assert all(model.state_dict()[name].equal(tensor.float())
               for name, tensor in pretrained[1].items() if name.startswith("vit."))


def test_gradient_checkpointing_of_transformers_gives_the_same_gradients():
    need("transformers")
    gradients, inputs = [], torch.rand(4, 1, 8, 8)
    for enable in (False, True):
        options = complete(IMAGES, config=VIT | {"hidden_dropout_prob": 0.3})
        torch.manual_seed(0)
        model = models.build_model(options.model_copy(update={"gradient_checkpointing": enable}))
        models.start_weights(model, None, ["vit.embeddings.*"])  # no gradient enters the layers
        calls = []
        layer = next(m for m in model.modules() if type(m).__name__ == "ViTLayer")
        layer.layernorm_before.register_forward_pre_hook(lambda *_, c=calls: c.append(1))
        model(inputs).logits.square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
        assert len(calls) == 1 + enable
    assert all(a.equal(b) for a, b in zip(*gradients, strict=True))


def test_a_config_may_choose_how_attention_is_computed():
    need("transformers")
    model = models.build_model(complete(IMAGES, config=VIT | {"attn_implementation": "eager"}))
    assert model.config._attn_implementation == "eager"


# ---- timm and torchvision ----


def test_nets_of_timm_take_channels_classes_and_where_they_can_the_image_size():
    need("timm")
    inputs = torch.rand(2, 1, 16, 24)
    options = complete("timm:resnet10t", (1, 16, 24), 7)
    assert options.args == {"in_chans": 1, "num_classes": 7}
    assert models.build_model(options)(inputs).shape == (2, 7)
    options = complete("timm:vit_tiny_patch16_224", (1, 16, 24), 7, patch_size=8, depth=1)
    assert options.args["img_size"] == [16, 24]
    options = options.model_copy(update={"gradient_checkpointing": True})
    model = models.build_model(options)
    assert model(inputs).shape == (2, 7) and model.grad_checkpointing


def test_a_net_of_timm_trains_and_loads_back(loads_back, tmp_path):
    need("timm")
    loads_back(tmp_path / "run", torch.rand(2, 1, 8, 8), "--model.name", "timm:resnet10t",
               "--model.freeze", "[conv1*, bn1*]")


def test_pretrained_weights_of_torchvision_get_a_new_head(tmp_path, monkeypatch):
    torchvision = need("torchvision")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    torch.manual_seed(3)
    trained = torchvision.models.squeezenet1_1().state_dict()
    url = torchvision.models.SqueezeNet1_1_Weights.DEFAULT.url
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    file = tmp_path / "hub" / "checkpoints" / url.rpartition("/")[2]
    torch.save(trained, file)
    options = complete("torchvision:squeezenet1_1", (3, 32, 32), 7, weights="DEFAULT")
    model = models.build_model(options)
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 7)
    assert all(t.equal(trained[n]) for n, t in model.state_dict().items() if t.shape[:1] != (7,))
    file.unlink()  # a run loads back without them
    again = options.model_copy(update={"args": models.external.without_pretrained(options)})
    models.build_model(again)


@pytest.mark.parametrize("package, name, near", [
    ("timm", "timm:resnet1", "resnet18"), ("torchvision", "torchvision:resnett18", "resnet18"),
])
def test_an_unknown_net_of_a_library_is_refused_with_the_nearest(package, name, near):
    need(package)
    with pytest.raises(ValueError, match=f"{package} has no 'resnet.*; nearest: .*{near}"):
        ModelOptions(name=name)


@pytest.mark.parametrize("name, package", [
    ("timm:resnet18", "timm"), ("torchvision:resnet18", "torchvision"),
    (IMAGES, "transformers"), ("broken_package:Net", "broken_package"),
])
def test_a_package_that_is_missing_or_broken_is_named(name, package, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f"'{package}' is not installed: pip install {package}"):
        ModelOptions(name=name)
    monkeypatch.delitem(sys.modules, package)
    (tmp_path / f"{package}.py").write_text("x = 1\nraise RuntimeError('no nms')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=rf"RuntimeError: no nms \({package}.py, line 2: raise"):
        ModelOptions(name=name)


# ---- mistakes ----


def config_of(**changes):
    return ["--model.args.config", json.dumps(VIT | changes)]


MISTAKES = [
    (["--model.name", "transformer"], "model.name: unknown; did you mean 'transformers:Auto"),
    (["--model.name", "not_there:Net"], "'not_there' is not installed: pip install not_there"),
    (["--model.name", "torch.not_there:Net"], "there is no module 'torch.not_there'"),
    (["--model.name", "{dir}/nope.py:Net"], "model.name: there is no file {dir}/nope.py"),
    (["--model.name", "{nets}:Nett"], "has no 'Nett'; it has Net, "),
    (["--model.name", "{nets}:made"], "model.name: this is a Linear; give a class or function"),
    (["--model.name", "{nets}:Exits"], "SystemExit: no data (nets.py, line 57: raise SystemExit"),
    (["--model.name", "{nets}:lazy"], "{nets}:lazy has lazy layers, which cannot be loaded back"),
    (["--model.name", "{nets}:Scales", "--model.args", SIZES], "has an attribute 'input_mean'"),
    (["--model.name", "{nets}:Scales", "--model.args", SIZES, "--data.normalize", "false"],
     "has an attribute 'input_mean'"),
    (["--model.name", "{nets}:Plain"], "returned a Plain, not a torch.nn.Module"),
    (["--model.name", "{dir}/raises.py:Net"],
     "cannot be imported: ZeroDivisionError: division by zero (raises.py, line 2: y = 1 / 0)"),
    (["--model.name", "{nets}:Raises"],
     "IndexError: list index out of range (nets.py, line 33: self.width = [1, 2][7])"),
    (["--model.name", "{nets}:RaisesInForward"], "(nets.py, line 37: return self.head(images))"),
    (["--model.name", "{nets}:Pair"], "the model's output is a tuple, task 'digit' needs (2, 10)"),
    (["--model.name", "{nets}:Transposed"], "output is (10, 2), task 'digit' needs (2, 10)"),
    (["--model.name", "{nets}:Net", "--model.args.widht", "3"],
     "model.args: {nets}:Net does not take 'widht'; did you mean 'width'?"),
    (["--model.name", "{nets}:Net", "--model.args.width", "[3]"], "Net refuses {'in_channels': 1"),
    (["--model.name", "{nets}:Net", "--model.gradient_checkpointing"],
     "model.gradient_checkpointing: {nets}:Net has no method set_grad_checkpointing()"),
    (["--model.name", "{nets}:CannotRecompute", "--model.gradient_checkpointing"],
     "model.gradient_checkpointing: {nets}:CannotRecompute: AssertionError: cannot (nets.py"),
    (["--model.compile", "induktor"], "model.compile: unknown; did you mean 'inductor'?"),
    (["--model.init_from", "{dir}"], "model.init_from: {dir}: no .safetensors file"),
    (["--model.freeze", "[2.*]"], "no parameter matches '2.*'; the model has 1, 4, 7"),
    (["--model.name", "transformers:AutoModelForImages", *config_of()],
     "transformers has no 'AutoModelForImages'; nearest: AutoModelForImage"),
    (["--model.name", "transformers:ViTForImageClassification", *config_of()],
     "nearest: AutoModelForImageClassification"),
    (["--model.name", IMAGES], "model.args: give config, a mapping with model_type"),
    (["--model.name", IMAGES, "--model.args.config", "vit"],
     "model.args.config: a mapping with model_type is needed, got 'vit'"),
    (["--model.name", IMAGES, "--model.args.hidden_size", "8"],
     "takes config or pretrained, not 'hidden_size'; options of the model stand inside config"),
    (["--model.name", IMAGES, *config_of(model_type="vitt")],
     "model.args.config.model_type: unknown 'vitt'; nearest: vit"),
    (["--model.name", IMAGES, *config_of(hiden_size=8)],
     "model.args.config: vit does not take 'hiden_size'; nearest: hidden_size"),
    (["--model.name", IMAGES, *config_of(dtype="bfloat16")], "vit does not take 'dtype'"),
    (["--model.name", IMAGES, *config_of(hidden_size="wide")], "'hidden_size' expected int"),
    (["--model.name", IMAGES, *config_of(model_type="bert", patch_size=None)],
     "bert does not take 'patch_size'"),
    (["--model.name", TEXTS, *config_of()], "Unrecognized configuration class"),
    (["--model.name", IMAGES, *config_of(patch_size=16)], "the model cannot take inputs of shape"),
    (["--model.name", "transformers:AutoModel", *config_of()],
     "the model's output is a mapping of last_hidden_state"),
    (["--model.name", IMAGES, "--model.args.pretrained", "{dir}/nowhere"],
     "model.args.pretrained: {dir}/nowhere is no folder, and no id on the Hugging Face Hub"),
    (["--model.name", IMAGES, "--model.args.pretrained", "google/vit-base-patch16-224"],
     "google/vit-base-patch16-224 is no folder, and no id on the Hugging Face Hub that can be"),
    (["--model.name", IMAGES, "--model.args.pretrained", "{dir}"],
     "model.args.pretrained: {dir} cannot be read: "),
    (["--model.name", IMAGES, "--model.args.pretrained", "[1]"],
     "model.args.pretrained: an id or folder is needed, got [1]"),
]


@pytest.mark.parametrize("flags, message", MISTAKES, ids=[message for _, message in MISTAKES])
def test_a_mistake_is_told_in_one_line_before_anything_is_written(nets, tmp_path, flags, message):
    if any("transformers:" in flag for flag in flags):
        need("transformers")
    (tmp_path / "raises.py").write_text("x = 1\ny = 1 / 0\n")

    def fill(text):
        return text.replace("{nets}", nets).replace("{dir}", str(tmp_path))

    with pytest.raises(UserError) as caught:
        script.main(arguments(tmp_path / "run", *map(fill, flags)))
    assert fill(message) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["{nets}:RaisesInForward", "{dir}/exits.py:Net"])
def test_code_that_fails_ends_with_code_2_and_no_traceback(nets, tmp_path, name):
    (tmp_path / "exits.py").write_text("import argparse\nargparse.ArgumentParser().parse_args()\n")
    name = name.replace("{nets}", nets).replace("{dir}", str(tmp_path))
    result = fork(arguments(tmp_path / "run", "--model.name", name))
    assert result.returncode == 2 and "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("train.py: ") and ".py, line " in last
    assert not (tmp_path / "run").exists()
