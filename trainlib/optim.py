"""Optimizers by name, parameter groups, and the learning rate of a step.

Options of the optimizer and of the schedule live here; the schedule's shapes are in
``schedule``. Nothing here steps anything.
"""

import inspect
import os
import re
from typing import Annotated, Any

import torch
from pydantic import Field, field_serializer, field_validator, model_validator
from torch import nn
from torch.optim import Optimizer

from trainlib import shards
from trainlib.config import Options, UserError, nearest, one_of
from trainlib.muon import MuonWithAdamW
from trainlib.schedule import SHAPES, Duration, check_args, duration_steps, resolve_args
from trainlib.user_code import describe_error, import_object, is_object_spec

_REFUSED = {
    "lbfgs": "LBFGS evaluates the loss several times a step; here a step evaluates it once",
    "sparseadam": "SparseAdam takes sparse gradients only; here they are dense",
}
OPTIMIZERS: dict[str, type[Optimizer]] = {
    name.lower(): value
    for name, value in vars(torch.optim).items()
    if isinstance(value, type) and issubclass(value, Optimizer)
    and value is not Optimizer and name.lower() not in _REFUSED
} | {"muon": MuonWithAdamW}
# Of a model that is cut over the processes: what torch (2.13) has no rule for, whole or fused.
_WHOLE_ONLY = ("adafactor", "rprop")
_FUSED_ON_PARTS = (torch.optim.Adam, torch.optim.AdamW, MuonWithAdamW)
_SET_ELSEWHERE = ("params", "lr", "weight_decay")


def find_optimizer(name: str) -> type[Optimizer]:
    """The class that a name of ``OPTIMIZERS``, ``file.py:Class`` or ``module:Class`` stands for.

    Raises:
        ValueError: there is no such class, or it is no optimizer for this loop.
    """
    if name in OPTIMIZERS:
        return OPTIMIZERS[name]
    if reason := _REFUSED.get(name.rpartition(":")[2].lower()):
        raise ValueError(reason)
    if not is_object_spec(name):
        raise ValueError(f"unknown{nearest(name, OPTIMIZERS)}")
    found = import_object(name)
    if not (isinstance(found, type) and issubclass(found, Optimizer)):
        raise ValueError("an optimizer is a subclass of torch.optim.Optimizer")
    return found


def _arguments_of(optimizer_class: type[Optimizer]) -> tuple[list[str], bool]:
    """The names that a class takes, and whether it takes any other, too."""
    parameters = inspect.signature(optimizer_class).parameters
    return list(parameters), any(p.kind is p.VAR_KEYWORD for p in parameters.values())


class OptimOptions(Options):
    name: str = "adamw"
    """Which optimizer: a class of torch.optim in lower case, or your own as file.py:Class or
    package.module:Class. Muon leaves all but the hidden matrices to AdamW."""
    lr: float | None = Field(1e-3, gt=0)
    """Peak learning rate; never scaled by the number of processes. auto: found by a sweep before
    the first step, as lr_find.py does."""
    layer_decay: float | None = Field(None, gt=0, le=1)
    """Each layer learns at this times the rate of the layer above it; none: all at one rate."""
    weight_decay: float = Field(0.01, ge=0)
    """Weight decay of matrices and kernels; biases and norms have none."""
    args: dict[str, Any] = {}
    """Further arguments of the optimizer, such as betas or momentum."""
    max_grad_norm: float | None = Field(1.0, gt=0)
    """Gradients are scaled down to this global norm; none: never."""
    max_grad_value: float | None = Field(None, gt=0)
    """Then each element of a gradient is clamped to plus or minus this; none: never."""
    ema_half_life: Duration | None = None
    """Half-life of the averaged weights, which are then evaluated and exported, as "100 steps",
    "1 epoch" or "5%" of the run; none: no average."""

    @field_validator("lr", mode="before")
    @classmethod
    def _auto_is_none(cls, lr: Any) -> Any:
        return None if lr == "auto" else lr

    @field_serializer("lr")
    def _none_is_auto(self, lr: float | None) -> float | str:
        return "auto" if lr is None else lr

    @field_validator("name")
    @classmethod
    def _name_is_known(cls, name: str) -> str:
        find_optimizer(name)
        return name

    @model_validator(mode="after")
    def _optimizer_takes_args(self) -> "OptimOptions":
        takes, takes_any = _arguments_of(find_optimizer(self.name))
        if self.weight_decay and "weight_decay" not in takes and not takes_any:
            raise UserError(f"weight_decay: {self.name} has none; set it to 0")
        takes = [name for name in takes if name not in _SET_ELSEWHERE]
        for name in self.args:
            if name in _SET_ELSEWHERE:
                raise UserError(f"args: set {name!r} as --optim.{name}")
            if name not in takes and not takes_any:
                raise UserError(f"args: {self.name} does not take {name!r}{nearest(name, takes)}")
        return self


class ScheduleOptions(Options):
    name: Annotated[str, one_of(SHAPES)] = "cosine"
    """How the learning rate falls after warm-up: constant, linear, cosine, polynomial, exponential,
    step, multistep, one_cycle, wsd, or plateau, which waits for loop.monitor to stop improving."""
    warmup: Duration = "5%"
    """How long it rises first, as "100 steps", "1 epoch" or a share of the run."""
    final_fraction: float = Field(0.0, ge=0, le=1)
    """The share of the peak that it falls to just after the last step; of step, multistep,
    exponential and plateau the share that it does not fall below."""
    args: dict[str, Any] = {}
    """Arguments of the schedule: power of polynomial; factor and every of step and exponential;
    factor and at of multistep; start_fraction of one_cycle; decay and shape (linear, cosine, sqrt)
    of wsd; factor, patience, threshold and cooldown of plateau."""

    @model_validator(mode="after")
    def _schedule_takes_args(self) -> "ScheduleOptions":
        check_args(self.name, self.args)
        return self


def resolve_lengths(
    schedule: ScheduleOptions, optim: OptimOptions, num_samples: int, global_size: int,
    total_steps: int, warmup_steps: int,
) -> tuple[dict[str, Any], int | None]:
    """The schedule's arguments and the average's half-life, lengths in steps.

    Raises:
        UserError: phases that do not fit into the run.
    """
    try:
        args = resolve_args(
            schedule.name, schedule.args, num_samples, global_size, total_steps, warmup_steps
        )
    except ValueError as error:
        raise UserError(f"schedule.{error}") from error
    args["final_fraction"] = schedule.final_fraction
    if optim.ema_half_life is None:
        return args, None
    half_life = duration_steps(optim.ema_half_life, num_samples, global_size, total_steps)
    return args, max(1, half_life)


# "3", and "layer_3" as in torchvision's transformers.
_NUMBERED = re.compile(r"(.*_)?[0-9]+")


def parameter_layers(model: nn.Module) -> dict[str, str]:
    """The layer of each parameter, by name, in the order of ``named_parameters()``.

    A layer is a module: the outermost one with a number, such as ``blocks.0``; without a number
    the first below the modules that also hold numbered ones, such as ``vit.embeddings``, ``head``.
    """
    paths = {name: tuple(name.split(".")[:-1]) for name, _ in model.named_parameters()}
    depths = {
        path: next((i for i, part in enumerate(path, 1) if _NUMBERED.fullmatch(part)), 0)
        for path in paths.values()
    }
    # What holds everything, such as a wrapper, is no layer either.
    shared = os.path.commonprefix(list(depths))
    holders = {shared[:i] for i in range(len(shared) + 1)}
    holders |= {path[:i] for path, depth in depths.items() for i in range(depth)}

    def layer(path: tuple[str, ...]) -> str:
        depth = depths[path]
        if not depth:
            depth = 1 + max(i for i in range(len(path) + 1) if path[:i] in holders)
        return ".".join(path[:depth])

    return {name: layer(path) for name, path in paths.items()}


def hidden_matrices(model: nn.Module) -> set[str]:
    """Names of the two-dimensional weights that are neither embeddings nor in the last layer.

    Source: Jordan 2024 (kellerjordan.github.io/posts/muon): the output layer is left out, too.
    """
    layers = parameter_layers(model)
    output = list(layers.values())[-1:]
    embeddings = {
        id(parameter)
        for module in model.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag)
        for parameter in module.parameters()
    }
    return {
        name for name, parameter in model.named_parameters()
        if parameter.ndim == 2 and id(parameter) not in embeddings and layers[name] not in output
        and "embed" not in name.rpartition(".")[2]
    }


def parameter_groups(
    model: nn.Module, weight_decay: float | None, layer_decay: float | None = None,
    use_muon: bool = False,
) -> list[dict]:
    """Trainable parameters in groups of equal settings.

    Args:
        weight_decay: of matrices and kernels; biases and norms have 0; none: no such key.
        layer_decay: the key ``lr_scale`` is its power by the number of layers above, so that the
            last layer has 1. Source: Clark et al. 2020 (ELECTRA), arXiv:2003.10555, appendix B;
            Bao et al. 2022 (BEiT), arXiv:2106.08254.
        use_muon: adds the key ``use_muon``, true for hidden matrices.
    """
    layers = parameter_layers(model)
    order = list(dict.fromkeys(layers.values()))[::-1]
    hidden = hidden_matrices(model)
    groups: dict[tuple, dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        settings: dict[str, Any] = {}
        if weight_decay is not None:
            settings["weight_decay"] = weight_decay if parameter.ndim >= 2 else 0.0
        if layer_decay is not None:
            settings["lr_scale"] = layer_decay ** order.index(layers[name])
        if use_muon:
            settings["use_muon"] = name in hidden
        group = groups.setdefault(tuple(settings.values()), {"params": []} | settings)
        group["params"].append(parameter)
    return list(groups.values())


def build_optimizer(options: OptimOptions, model: nn.Module) -> Optimizer:
    """The optimizer over the model's trainable parameters, fused where torch has it.

    Raises:
        UserError: arguments that the class refuses, an optimizer that needs whole parameters where
            the model is cut over the processes, or nothing to train.
    """
    is_sharded = shards.is_sharded(model)
    if is_sharded and options.name in _WHOLE_ONLY:
        raise UserError(f"optim.name: torch has no {options.name} for parameters that FSDP2 has "
                        "cut; use adamw or another one, or a config without FSDP2")
    lr = OptimOptions().lr if options.lr is None else options.lr  # which every step sets anew
    optimizer_class = find_optimizer(options.name)
    takes, takes_any = _arguments_of(optimizer_class)
    uses_muon = optimizer_class is MuonWithAdamW
    weight_decay = options.weight_decay if "weight_decay" in takes or takes_any else None
    groups = parameter_groups(model, weight_decay, options.layer_decay, uses_muon)
    if not groups:
        raise UserError("the model has no trainable parameters")
    if uses_muon and not any(group["use_muon"] for group in groups):
        raise UserError(
            "optim.name: muon is for hidden matrices, and this model has none to train besides "
            "embeddings and its last layer; use adamw"
        )
    device = groups[0]["params"][0].device
    fused = _can_be_fused(optimizer_class, options.args, device, is_sharded)
    try:
        optimizer = optimizer_class(
            groups, lr=lr, **(({"fused": True} if fused else {}) | options.args)
        )
    except Exception as error:  # whatever an optimizer of the user's own raises
        raise UserError(f"optim: {options.name} refuses its arguments: {describe_error(error)}"
                        ) from error
    if optimizer_class is torch.optim.SGD:
        _begin_momentum(optimizer)
    set_learning_rate(optimizer, lr)
    return optimizer


def _can_be_fused(
    optimizer_class: type[Optimizer], args: dict[str, Any], device: torch.device, is_sharded: bool
) -> bool:
    """Whether torch has one kernel for this optimizer's step, with these arguments and there."""
    if optimizer_class not in OPTIMIZERS.values():
        return False
    if "fused" not in _arguments_of(optimizer_class)[0]:
        return False
    if {"foreach", "capturable", "differentiable"} & args.keys():
        return False
    if is_sharded and optimizer_class not in _FUSED_ON_PARTS:
        return False
    # Dampening makes an SGD's first step another one, for which it makes its buffers then.
    if optimizer_class is torch.optim.SGD and args.get("dampening"):
        return False
    return device.type in ("cpu", "cuda")


def _begin_momentum(optimizer: torch.optim.SGD) -> None:
    """Gives each parameter a momentum of 0, of which the first step makes the very same bits.

    Fused, torch (2.13) makes them in that step: of parameters that get their first gradient later
    it has none, and dies; where found_inf skips the step it goes on with what nobody has written.
    """
    for group in optimizer.param_groups:
        if group["momentum"] and not group["dampening"]:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Gives every group the rate, times its ``lr_scale`` where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
