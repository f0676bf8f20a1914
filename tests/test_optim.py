"""Optimizers by name, and which parameters decay."""

import pytest
import torch
from torch import nn

from trainlib import optim
from trainlib.config import UserError
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


def test_arguments_reach_the_class_and_the_rate_reaches_every_group():
    optimizer = build(name="sgd", args={"momentum": 0.9})
    assert optim.set_learning_rate(optimizer, 0.5) == 0.5
    assert [(g["momentum"], g["lr"]) for g in optimizer.param_groups] == [(0.9, 0.5)] * 2


@pytest.mark.parametrize("options, message", [
    ({"name": "adanw"}, "unknown; did you mean 'adamw'"),
    ({"args": {"momentun": 0.9}, "name": "sgd"}, "did you mean 'momentum'"),
    ({"args": {"lr": 0.9}}, "set 'lr' as --optim.lr"),
    ({"args": {"betas": [2, 2]}}, "adamw refuses"),
    ({"name": "rprop"}, "rprop has none; set it to 0"),
])
def test_what_an_optimizer_cannot_take_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)
    assert type(build(name="rprop", weight_decay=0)) is torch.optim.Rprop
