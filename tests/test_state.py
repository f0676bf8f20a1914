"""An optimizer that got its state back goes on as if nothing had happened."""

import json

import pytest
import torch
from torch import nn

from trainlib.checkpoint.state import describe, load_optimizer, model_tensors, optimizer_state
from trainlib.optim import OPTIMIZERS, OptimOptions, build_optimizer


class Net(nn.Module):
    """A hidden matrix for Muon, a tied weight, a frozen one, buffers of three kinds."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 5)
        self.hidden = nn.Linear(5, 5)
        self.norm = nn.BatchNorm1d(5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.image = nn.Conv2d(2, 2, 3).to(memory_format=torch.channels_last)
        self.register_buffer("mask", torch.full((2, 2), -torch.inf))
        self.register_buffer("scratch", torch.zeros(1), persistent=False)

    def forward(self, tokens):
        hidden = self.norm(torch.relu(self.hidden(self.embedding(tokens))))
        images = hidden[:, :1, None, None].expand(-1, 2, 3, 3) * torch.arange(9.0).view(3, 3)
        return self.head(hidden) + self.image(images).mean()


class Hoarder(torch.optim.SGD):
    """Keeps what optimizers keep: wide sums, lists of tensors, numbers, counts in groups."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
            group["pair"] = (0.5, group["k"])
            for p in group["params"]:
                if p.grad is not None:
                    own = self.state[p]
                    wide = own.get("wide", torch.zeros_like(p, dtype=torch.float64))
                    own["wide"] = wide + p.grad.double() / 3
                    own["parts"] = [own["wide"].sum(0), {"norm": p.grad.norm()}, None, "text"]
                    p.grad.add_(own["wide"].float(), alpha=0.1 * group["pair"][1])
        super().step(closure)


def build(name, **args):
    torch.manual_seed(0)
    net = Net()
    if name == "hoarder":
        return net, Hoarder(net.parameters(), lr=1e-2, momentum=0.9)
    options = OptimOptions(name=name, lr=1e-2, weight_decay=0.0, args=args)
    return net, build_optimizer(options, net)


def steps(net, optimizer, numbers):
    for number in numbers:
        tokens = torch.randint(0, 7, (12,), generator=torch.Generator().manual_seed(number))
        torch.manual_seed(number)
        nn.functional.cross_entropy(net(tokens), (tokens * 3) % 7).backward()
        optimizer.step()
        optimizer.zero_grad()


CASES = [(name, {}) for name in OPTIMIZERS] + [
    ("sgd", {"momentum": 0.9, "nesterov": True}), ("adam", {"amsgrad": True}),
    ("rmsprop", {"momentum": 0.9, "centered": True}), ("hoarder", {}),
]


@pytest.mark.parametrize("name, args", CASES, ids=["_".join([n, *a]) for n, a in CASES])
def test_state_through_json_and_back_changes_nothing(name, args):
    net, optimizer = build(name, **args)
    steps(net, optimizer, range(5))
    kept = {n: t.clone() for n, t in model_tensors(net).items()}
    tensors, packed = optimizer_state(optimizer, net)
    # A file knows no order in memory but one.
    kept_slots = {n: t.clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}
    packed = json.loads(json.dumps(packed))
    steps(net, optimizer, range(5, 10))

    other_net, other = build(name, **args)
    with torch.no_grad():
        for n, t in model_tensors(other_net).items():
            t.copy_(kept[n])
    load_optimizer(other, other_net, packed, kept_slots.__getitem__)
    again, packed_again = optimizer_state(other, other_net)
    assert packed_again == packed
    assert all(t.equal(kept_slots[n]) and t.dtype == kept_slots[n].dtype for n, t in again.items())
    steps(other_net, other, range(5, 10))
    assert all(t.equal(model_tensors(net)[n]) for n, t in model_tensors(other_net).items())


def test_tensors_are_named_by_parameter_and_slot():
    net, optimizer = build("adamw")
    assert optimizer_state(optimizer, net)[0] == {}
    steps(net, optimizer, [0])
    tensors, packed = optimizer_state(optimizer, net)
    slots = {name for name in tensors if name.startswith("hidden.weight|")}
    assert slots == {f"hidden.weight|{slot}" for slot in ("exp_avg", "exp_avg_sq", "step")}
    assert packed["groups"][0]["dict"]["weight_decay"] == 0.0
    net, optimizer = build("sgd")  # which keeps nothing
    steps(net, optimizer, [0])
    assert optimizer_state(optimizer, net)[0] == {}


def test_the_model_is_its_parameters_and_persistent_buffers_each_once():
    tensors = model_tensors(Net())
    assert "embedding.weight" in tensors and "head.weight" not in tensors
    assert {"frozen", "mask", "norm.running_mean", "norm.num_batches_tracked"} <= set(tensors)
    assert "scratch" not in tensors
    assert describe(tensors)["norm.num_batches_tracked"] == ["int64", []]
    assert json.loads(json.dumps(describe(tensors))) == describe(tensors)


def test_what_is_no_tensor_is_refused_by_name():
    class Odd(nn.Linear):
        def get_extra_state(self):
            return {"anything": object()}

    class Odder(nn.Linear):
        def get_extra_state(self):
            return torch.ones(1)

    with pytest.raises(ValueError, match="0._extra_state is a dict"):
        model_tensors(nn.Sequential(Odd(1, 1)))
    with pytest.raises(ValueError, match="_extra_state is a Tensor"):
        model_tensors(Odder(1, 1))
    net, optimizer = build("sgd")
    optimizer.param_groups[0]["callback"] = print
    with pytest.raises(ValueError, match=r"group 0\|callback is a builtin_function"):
        optimizer_state(optimizer, net)


def test_how_this_machine_computes_is_not_taken_over():
    net, optimizer = build("adamw")
    steps(net, optimizer, [0])
    tensors, packed = optimizer_state(optimizer, net)
    assert packed["groups"][0]["dict"]["fused"] is True
    net, optimizer = build("adamw", foreach=True)
    load_optimizer(optimizer, net, packed, tensors.__getitem__)
    assert optimizer.param_groups[0]["foreach"] is True and not optimizer.param_groups[0]["fused"]


def test_the_state_of_another_optimizer_is_refused():
    net, optimizer = build("adamw")
    tensors, packed = optimizer_state(optimizer, net)
    packed["groups"] *= 2
    with pytest.raises(ValueError, match="parameter groups there"):
        load_optimizer(optimizer, net, packed, tensors.__getitem__)
