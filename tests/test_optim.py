"""Optimizers by name, which parameters decay, and each layer's learning rate."""

import copy

import pytest
import torch
from torch import nn

from trainlib import optim
from trainlib.config import UserError
from trainlib.models.mlp import MLP
from trainlib.models.resnet import ResNet
from trainlib.optim import OptimOptions

NET = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 3))


def build(**options):
    return optim.build_optimizer(OptimOptions(**options), NET)


def test_biases_and_norms_do_not_decay():
    groups = build(weight_decay=0.3).param_groups
    decaying = {id(p) for g in groups if g["weight_decay"] == 0.3 for p in g["params"]}
    assert decaying == {id(NET[0].weight), id(NET[3].weight)}
    still = {id(p) for g in groups if g["weight_decay"] == 0.0 for p in g["params"]}
    assert decaying | still == {id(p) for p in NET.parameters()}


def test_frozen_parameters_are_left_out():
    model = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2, bias=False))
    [group] = optim.build_optimizer(OptimOptions(), model).param_groups
    assert [id(p) for p in group["params"]] == [id(model[1].weight)]
    with pytest.raises(UserError, match="no trainable parameters"):
        optim.build_optimizer(OptimOptions(), nn.Linear(2, 2).requires_grad_(False))


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "adagrad"])
def test_the_fused_form_is_used_where_torch_has_one(name):
    optimizer = build(name=name)
    assert type(optimizer) is optim.OPTIMIZERS[name]
    assert all(group["fused"] for group in optimizer.param_groups)
    assert not build(name=name, args={"fused": False}).param_groups[0]["fused"]


def momentum_steps(optimizer, model, starts, skips=()):
    """Five steps on fixed gradients; parameter i has its first one in step ``starts[i]``."""
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        for parameter, start in zip(model.parameters(), starts, strict=True):
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = gradient if step >= start else None
        if skips:
            optimizer.found_inf, optimizer.grad_scale = torch.tensor(float(step in skips)), None
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_made_beforehand_changes_no_bit(nesterov):
    ends = []
    args = {"momentum": 0.9, "nesterov": nesterov}
    for is_ours in (True, False):
        torch.manual_seed(0)
        model = small_net()
        optimizer = optim.build_optimizer(
            OptimOptions(name="sgd", lr=0.1, args=args, weight_decay=0.1), model)
        if not is_ours:
            optimizer = torch.optim.SGD(optimizer.param_groups, **args, fused=True)
        ends.append(momentum_steps(optimizer, model, [0] * 6))
    assert all(ours.equal(torchs) for ours, torchs in zip(*ends, strict=True))


@pytest.mark.parametrize("args", [{}, {"dampening": 0.5}], ids=["fused", "dampened"])
def test_sgd_has_momentum_for_gradients_that_come_late(args):
    starts, ends = [0, 2, 0, 1, 3, 9], []
    args = {"momentum": 0.9} | args
    for is_ours in (True, False):
        torch.manual_seed(0)
        model = small_net()
        optimizer = optim.build_optimizer(
            OptimOptions(name="sgd", lr=0.1, args=args, weight_decay=0.0), model)
        assert bool(optimizer.param_groups[0].get("fused")) == ("dampening" not in args)
        if not is_ours:
            optimizer = torch.optim.SGD(model.parameters(), 0.1, **args, foreach=False)
        ends.append(momentum_steps(optimizer, model, starts))
    for ours, torchs in zip(*ends, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=0, atol=1e-6)


def test_a_first_step_that_is_skipped_on_the_device_leaves_no_momentum():
    ends = []
    for skips in ((), (0,)):
        torch.manual_seed(0)
        model = small_net()
        optimizer = optim.build_optimizer(
            OptimOptions(name="sgd", lr=0.1, args={"momentum": 0.9}, weight_decay=0.0), model)
        ends.append(momentum_steps(optimizer, model, [0 if skips else 1] * 6, skips))
    assert all(skipped.equal(without) for skipped, without in zip(*ends, strict=True))


def test_arguments_reach_the_class_and_the_rate_reaches_every_group():
    optimizer = build(name="sgd", args={"momentum": 0.9})
    optim.set_learning_rate(optimizer, 0.5)
    assert [(g["momentum"], g["lr"]) for g in optimizer.param_groups] == [(0.9, 0.5)] * 2


@pytest.mark.parametrize("options, message", [
    ({"name": "adanw"}, "unknown; did you mean 'adamw'"),
    ({"args": {"momentun": 0.9}, "name": "sgd"}, "did you mean 'momentum'"),
    ({"args": {"lr": 0.9}}, "set 'lr' as --optim.lr"),
    ({"args": {"betas": [2, 2]}}, "adamw refuses"),
    ({"name": "rprop"}, "rprop has none; set it to 0"),
    ({"name": "muon", "args": {"adjust_lr_fn": "original"}}, "muon does not take 'adjust_lr_fn'"),
    ({"name": "lbfgs"}, "evaluates the loss several times a step"),
    ({"name": "sparseadam"}, "sparse gradients only"),
    ({"name": "torch.optim:SparseAdam"}, "sparse gradients only"),
    ({"name": "torch.nn:Linear"}, "a subclass of torch.optim.Optimizer"),
    ({"name": "nowhere.py:Own"}, "no file nowhere.py"),
    ({"layer_decay": 1.5}, "less than or equal to 1"),
    ({"ema_half_life": "long"}, "a duration reads like"),
])
def test_what_an_optimizer_cannot_take_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)
    assert type(build(name="rprop", weight_decay=0)) is torch.optim.Rprop


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
    )


def train(model, optimizer, num_steps):
    """Steps on one fixed batch; the loss before each."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(24, 1, 4, 4, generator=generator)
    target = torch.randint(3, (24,), generator=generator)
    losses = []
    for _ in range(num_steps):
        loss = nn.functional.cross_entropy(model(inputs), target)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_every_optimizer_trains_matrices_biases_and_kernels(name):
    model = small_net()
    before = [p.clone() for p in model.parameters()]
    options = OptimOptions(name=name, lr=1e-2, weight_decay=0.0)
    losses = train(model, optim.build_optimizer(options, model), 31)
    assert torch.tensor(losses).isfinite().all() and losses[-1] < losses[0]
    for old, new in zip(before, model.parameters(), strict=True):
        assert new.isfinite().all() and not new.equal(old)


def test_every_optimizer_of_torch_is_there():
    assert set(optim.OPTIMIZERS) >= set(
        "asgd adadelta adafactor adagrad adam adamw adamax muon nadam radam rmsprop rprop sgd"
        .split()
    )


# ---- the user's own ----


OWN = """
import torch

class Own(torch.optim.SGD):
    def __init__(self, params, lr, twist=1.0):
        self.twist = twist
        super().__init__(params, lr)

class TakesAnything(torch.optim.AdamW):
    def __init__(self, params, **rest):
        super().__init__(params, **rest)

helper = 1
"""


def test_an_optimizer_of_the_users_own(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(OWN)
    optimizer = build(name=f"{file}:Own", weight_decay=0, args={"twist": 2.0}, layer_decay=0.5)
    assert type(optimizer).__name__ == "Own" and optimizer.twist == 2.0
    assert sorted(g["lr"] for g in optimizer.param_groups) == [0.00025, 0.0005, 0.001]
    assert not any(group["fused"] for group in optimizer.param_groups)
    with pytest.raises(ValueError, match="has none; set it to 0"):
        build(name=f"{file}:Own")
    with pytest.raises(ValueError, match="did you mean 'twist'"):
        build(name=f"{file}:Own", weight_decay=0, args={"twists": 2.0})
    with pytest.raises(ValueError, match="a subclass of torch.optim.Optimizer"):
        build(name=f"{file}:helper")
    anything = build(name=f"{file}:TakesAnything", weight_decay=0.3, args={"amsgrad": True})
    assert [(g["amsgrad"], g["weight_decay"]) for g in anything.param_groups] == [
        (True, 0.3), (True, 0.0)
    ]
    with pytest.raises(UserError, match="refuses its arguments"):
        build(name=f"{file}:TakesAnything", args={"twist": 2.0})
    assert type(build(name="torch.optim:Adam")) is torch.optim.Adam


# ---- Muon ----


class Transformer(nn.Module):
    """The names and shapes of one; nothing runs."""

    def __init__(self):
        super().__init__()
        body = nn.ModuleDict({"embeddings": nn.ModuleDict({"words": nn.Embedding(7, 4)})})
        body["embeddings"].position_embeddings = nn.Parameter(torch.zeros(5, 4))
        body["encoder"] = nn.ModuleDict({"layer": nn.ModuleList([
            nn.ModuleDict({
                "attention": nn.MultiheadAttention(4, 2),
                "mlp": nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)), "norm": nn.LayerNorm(4),
            })
            for _ in range(2)
        ])})
        body["norm"] = nn.LayerNorm(4)
        self.vit = body
        self.classifier = nn.Linear(4, 3)


def test_muon_takes_hidden_matrices_and_adamw_the_rest():
    matrices = [f"vit.encoder.layer.{i}.{name}" for i in range(2) for name in (
        "attention.in_proj_weight", "attention.out_proj.weight", "mlp.0.weight", "mlp.1.weight"
    )]
    model = Transformer()
    assert optim.hidden_matrices(model) == set(matrices)
    optimizer = optim.build_optimizer(OptimOptions(name="muon", weight_decay=0.3), model)
    found = {id(p) for g in optimizer.param_groups if g["use_muon"] for p in g["params"]}
    assert found == {id(model.get_parameter(name)) for name in matrices}
    assert optim.hidden_matrices(small_net()) == {"3.weight"}
    assert optim.hidden_matrices(MLP(4, 2, (3, 3))) == {"1.weight", "4.weight"}
    with pytest.raises(UserError, match="use adamw"):
        optim.build_optimizer(OptimOptions(name="muon"), ResNet(1, 2))
    with pytest.raises(UserError, match="muon refuses"):
        optim.build_optimizer(OptimOptions(name="muon", args={"betas": [2, 2]}), model)


def test_muon_is_torchs_muon_and_torchs_adamw_side_by_side():
    model, twin = small_net(), small_net()
    optimizer = optim.build_optimizer(
        OptimOptions(name="muon", weight_decay=0.1, args={"momentum": 0.8, "eps": 1e-6}), model
    )
    matrix = twin[3].weight
    kernels = [twin[0].weight, twin[5].weight]
    biases = [twin[i].bias for i in (0, 3, 5)]
    muon = torch.optim.Muon(
        [matrix], weight_decay=0.1, momentum=0.8, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(
        [{"params": kernels, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}],
        betas=(0.9, 0.95), eps=1e-6, fused=True,
    )

    class Both:
        param_groups = [*muon.param_groups, *adamw.param_groups]

        def step(self):
            muon.step()
            adamw.step()

        def zero_grad(self):
            twin.zero_grad()

    for lr in (1e-2, 3e-3):
        optim.set_learning_rate(optimizer, lr)
        optim.set_learning_rate(Both, lr)
        assert train(model, optimizer, 5) == train(twin, Both(), 5)
    assert all(p.equal(q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_muon_goes_on_from_its_state_bit_for_bit():
    options = OptimOptions(name="muon", lr=1e-2, layer_decay=0.5)
    model = small_net()
    optimizer = optim.build_optimizer(options, model)
    train(model, optimizer, 5)
    other = copy.deepcopy(model)
    resumed = optim.build_optimizer(options, other)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.load_state_dict(optimizer.state_dict())  # as accelerate.prepare does
    assert len(resumed.state) == len(list(other.parameters()))
    assert train(model, optimizer, 5) == train(other, resumed, 5)
    assert all(p.equal(q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


# ---- learning rates by layer ----


def rates(model, layer_decay):
    optimizer = optim.build_optimizer(OptimOptions(layer_decay=layer_decay), model)
    optim.set_learning_rate(optimizer, 2.0)
    by_parameter = {id(p): g["lr"] / 2 for g in optimizer.param_groups for p in g["params"]}
    return {name: by_parameter[id(p)] for name, p in model.named_parameters()}


def by_layer(model, layer_decay):
    found = {}
    layers = optim.parameter_layers(model)
    for name, rate in rates(model, layer_decay).items():
        assert found.setdefault(layers[name], rate) == rate
    return found


def test_each_layer_learns_slower_than_the_one_above():
    assert by_layer(MLP(4, 2, (3, 3)), 0.5) == {"1": 0.25, "4": 0.5, "7": 1.0}
    assert by_layer(ResNet(1, 2), 0.5) == {
        "stem": 2**-5, "stem_norm": 2**-4, "blocks.0": 2**-3, "blocks.1": 2**-2, "blocks.2": 2**-1,
        "head": 1.0,
    }
    assert by_layer(Transformer(), 0.5) == {
        "vit.embeddings": 2**-4, "vit.encoder.layer.0": 2**-3, "vit.encoder.layer.1": 2**-2,
        "vit.norm": 2**-1, "classifier": 1.0,
    }
    assert by_layer(nn.Linear(2, 2), 0.5) == {"": 1.0}
    assert set(by_layer(MLP(4, 2, (3, 3)), 1.0).values()) == {1.0}


def test_a_wrapper_is_no_layer():
    plain = nn.Sequential()
    for name in ("first", "second"):
        plain.add_module(name, nn.Sequential(nn.Linear(2, 2)))
    wrapped = nn.ModuleDict({"net": nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})})
    assert by_layer(wrapped, 0.5) == {"net.a": 0.5, "net.b": 1.0}
    assert by_layer(nn.ModuleDict({"net": plain}), 0.5) == {
        "net.first.0": 0.5, "net.second.0": 1.0
    }


def test_frozen_layers_still_count():
    model = MLP(4, 2, (3, 3))
    model[1].requires_grad_(False)
    model[7].requires_grad_(False)
    [scale] = {g["lr_scale"] for g in optim.build_optimizer(
        OptimOptions(layer_decay=0.5), model).param_groups}
    assert scale == 0.5


def test_an_optimizer_of_the_users_own_that_raises_is_told_with_its_place(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from torch.optim import SGD\n\nclass Broken(SGD):\n    def __init__(self, params, lr, "
        "weight_decay=0.0):\n        raise KeyError('gone')\n"
    )
    options = optim.OptimOptions(name=f"{tmp_path}/mine.py:Broken")
    with pytest.raises(ValueError, match=r"KeyError: 'gone' \(mine.py, line 5: raise KeyError"):
        optim.build_optimizer(options, torch.nn.Linear(2, 2))
