"""The state of a model and of an optimizer as named tensors, and JSON for the rest.

Names are those of the model's parameters, so the state of a run on one process is the state of a
run on any number of processes.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainlib import shards

# How an optimizer computes on this machine; it changes no bit that another machine's would keep.
_OF_THE_MACHINE = ("fused", "foreach", "capturable", "differentiable")


def model_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and persistent buffers by name; a shared tensor once, by its first name.

    Raises:
        ValueError: the module keeps something else than tensors.
    """
    tensors, seen = {}, set()
    for name, value in module.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor) or name.endswith("_extra_state"):
            raise ValueError(f"{name} is a {type(value).__name__} of its module's own making; a "
                             "checkpoint holds parameters and buffers only")
        if id(value) not in seen:
            seen.add(id(value))
            tensors[name] = value.detach()
    return tensors


def optimizer_state(
    optimizer: Optimizer, module: nn.Module
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What ``optimizer.state_dict()`` holds, taken apart.

    Returns:
        The tensors as ``parameter|slot``, and a JSON value that says where each belongs.

    Raises:
        ValueError: the optimizer keeps something that is neither a tensor nor plain data.
    """
    names = _parameter_names(optimizer, module)
    given = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    slots = {
        names[key] if isinstance(key, int) else str(key): value
        for key, value in given["state"].items()
    }
    groups = [{k: v for k, v in group.items() if k != "params"} for group in given["param_groups"]]
    packed = {
        "state": {name: _pack(value, name, tensors) for name, value in slots.items()},
        "groups": [_pack(group, f"group {i}", tensors) for i, group in enumerate(groups)],
    }
    return tensors, packed


@torch.no_grad()
def load_optimizer(
    optimizer: Optimizer, module: nn.Module, packed: dict[str, Any],
    tensor: Callable[[str], Tensor],
) -> None:
    """Gives an optimizer the state that ``optimizer_state`` has taken.

    Args:
        tensor: from a name to its tensor.

    Raises:
        ValueError: the state is that of other parameters.
    """
    names = _parameter_names(optimizer, module)
    numbers = {name: number for number, name in enumerate(names)}
    parameters = dict(module.named_parameters())
    state = {}
    for name, value in packed["state"].items():
        taken = partial(_cut_as, tensor, parameters[name]) if name in parameters else tensor
        state[numbers.get(name, name)] = _unpack(value, taken)
    own = optimizer.state_dict()["param_groups"]
    if len(own) != len(packed["groups"]):
        raise ValueError(f"{len(packed['groups'])} parameter groups there, {len(own)} here")
    groups = [
        mine | {k: v for k, v in _unpack(theirs, tensor).items() if k not in _OF_THE_MACHINE}
        for mine, theirs in zip(own, packed["groups"], strict=True)
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    # torch casts a slot to its parameter's type, by which a wider sum would lose bits, and spoils
    # texts in lists; where it puts a tensor is right, but for counts that it expects on the host.
    # In memory a slot lies as its parameter does (channels_last, say): fused kernels rely on it.
    owners = [(group, p) for group in optimizer.param_groups for p in group["params"]]
    for number, (group, parameter) in enumerate(owners):
        counts_on_host = not (group.get("fused") or group.get("capturable"))
        for slot, value in state.get(number, {}).items():
            loaded = optimizer.state[parameter]
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
            elif isinstance(value, Tensor):
                is_count = slot == "step" and counts_on_host
                value = value.to("cpu" if is_count else loaded[slot].device)
            loaded[slot] = value


def describe(tensors: dict[str, Tensor]) -> dict[str, list]:
    """Each tensor's type and shape, as JSON."""
    return {name: [str(t.dtype).removeprefix("torch."), list(t.shape)]
            for name, t in tensors.items()}


def _cut_as(tensor: Callable[[str], Tensor], parameter: Tensor, name: str) -> Tensor:
    """A named tensor, of a parameter's shape cut as the parameter, so that it is whole only now."""
    value = tensor(name)
    return shards.cut(value, parameter) if value.shape == parameter.shape else value


def _parameter_names(optimizer: Optimizer, module: nn.Module) -> list[str]:
    """The name of each parameter in the order in which the optimizer numbers them."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[name] = value.detach()
        return {"tensor": name}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {k: _pack(v, f"{name}|{k}", tensors) for k, v in value.items()}}
    if isinstance(value, list | tuple):
        items = [_pack(v, f"{name}|{i}", tensors) for i, v in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"{name} is a {type(value).__name__}; a checkpoint holds tensors, numbers, "
                     "texts, lists and mappings of text")


def _unpack(packed: Any, tensor: Callable[[str], Tensor]) -> Any:
    if not isinstance(packed, dict):
        return packed
    [(kind, value)] = packed.items()
    if kind == "tensor":
        return tensor(value)
    if kind == "dict":
        return {k: _unpack(v, tensor) for k, v in value.items()}
    items = [_unpack(v, tensor) for v in value]
    return tuple(items) if kind == "tuple" else items
