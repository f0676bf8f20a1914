"""Optimizers by name, parameter groups, and the learning rate of a step.

Options of the optimizer and of the schedule live here; the schedule's shapes are in
``schedule``. Nothing here steps anything.
"""

import inspect
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, Field, model_validator
from torch import nn

from trainlib.config import Options, UserError, nearest, one_of
from trainlib.schedule import SHAPES, check_duration

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    name.lower(): value
    for name, value in vars(torch.optim).items()
    # LBFGS evaluates the loss several times a step, SparseAdam takes sparse gradients only, and
    # Muon matrices only.
    if isinstance(value, type) and issubclass(value, torch.optim.Optimizer)
    and name not in ("Optimizer", "LBFGS", "SparseAdam", "Muon")
}
_SET_ELSEWHERE = ("params", "lr", "weight_decay")


class OptimOptions(Options):
    name: Annotated[str, one_of(OPTIMIZERS)] = "adamw"
    """Which optimizer: a class of torch.optim, in lower case."""
    lr: float = Field(1e-3, gt=0)
    """Peak learning rate; never scaled by the number of processes."""
    weight_decay: float = Field(0.01, ge=0)
    """Weight decay of matrices and kernels; biases and norms have none."""
    args: dict[str, Any] = {}
    """Further arguments of the optimizer, such as betas or momentum."""
    max_grad_norm: float | None = Field(1.0, gt=0)
    """Gradients are scaled down to this global norm; none: never."""

    @model_validator(mode="after")
    def _optimizer_takes_args(self) -> "OptimOptions":
        signature = inspect.signature(OPTIMIZERS[self.name]).parameters
        if self.weight_decay and "weight_decay" not in signature:
            raise UserError(f"weight_decay: {self.name} has none; set it to 0")
        takes = [name for name in signature if name not in _SET_ELSEWHERE]
        for name in self.args:
            if name in _SET_ELSEWHERE:
                raise UserError(f"args: set {name!r} as --optim.{name}")
            if name not in takes:
                raise UserError(f"args: {self.name} does not take {name!r}{nearest(name, takes)}")
        return self


class ScheduleOptions(Options):
    name: Annotated[str, one_of(SHAPES)] = "cosine"
    """How the learning rate falls after warm-up: constant, linear or cosine."""
    warmup: Annotated[str, AfterValidator(check_duration)] = "5%"
    """How long it rises first, as "100 steps", "1 epoch" or a share of the run."""
    final_fraction: float = Field(0.0, ge=0, le=1)
    """The share of the peak that it falls to just after the last step."""


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Trainable parameters in two groups: matrices and kernels decay, biases and norms do not."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(options: OptimOptions, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer over the model's trainable parameters, fused where torch has it.

    Raises:
        UserError: arguments that the class refuses, or nothing to train.
    """
    optimizer_class = OPTIMIZERS[options.name]
    takes = inspect.signature(optimizer_class).parameters
    groups = parameter_groups(model, options.weight_decay)
    if not groups:
        raise UserError("the model has no trainable parameters")
    if "weight_decay" not in takes:
        groups = [{"params": group["params"]} for group in groups]
    fused = {}
    if "fused" in takes and not {"foreach", "capturable", "differentiable"} & set(options.args):
        device = groups[0]["params"][0].device.type
        # On a GPU the fused SGD that skips its first step by found_inf goes on with momentum
        # buffers nobody has written (torch 2.13); unfused, the guard skips on the host.
        uses_momentum = options.name == "sgd" and options.args.get("momentum")
        if device == "cpu" or (device == "cuda" and not uses_momentum):
            fused = {"fused": True}
    try:
        return optimizer_class(groups, lr=options.lr, **(fused | options.args))
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        raise UserError(f"optim: {options.name} refuses its arguments: {error}") from error


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> float:
    """Gives every group the rate and returns it."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr
