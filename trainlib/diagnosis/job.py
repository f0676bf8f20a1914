"""The job that is diagnosed: its parts, its micro-batches, and steps that leave no trace."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from trainlib import plan
from trainlib.diagnosis.findings import Deadline
from trainlib.diagnosis.pace import Pace

if TYPE_CHECKING:
    from trainlib.data import Dataset
    from trainlib.tasks import Task

_MICRO_BATCHES = 4  # of a step that is only tried
_AUTO_SIZE = 32


@contextmanager
def keeping_modes(module: nn.Module) -> Iterator[None]:
    """After it every part is in the mode, of training or of evaluation, that it was in."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        yield
    finally:
        for part, was_training in modes:
            part.training = was_training


class Batch(NamedTuple):
    """Training samples as the model is given them."""

    samples: np.ndarray
    inputs: Tensor
    targets: dict[str, Tensor]

    def first(self, size: int) -> Batch:
        """Of so many samples."""
        targets = {name: target[:size] for name, target in self.targets.items()}
        return Batch(self.samples[:size], self.inputs[:size], targets)


@dataclass(frozen=True)
class Job:
    """What a script has built; nothing of it is prepared by Accelerate."""

    options: Any
    """A script's: ``seed``, ``data``, ``model``, ``tasks``, ``batch`` and ``optim`` are read."""
    module: nn.Module
    optimizer: torch.optim.Optimizer
    dataset: Dataset
    tasks: list[Task]
    augment: Callable
    arguments: Callable[[dict[str, Tensor]], dict[str, Any]]
    """From targets to what the model is given besides the inputs."""
    layers: dict[str, str]
    """The layer of each parameter, by name."""
    device: torch.device
    pace: Pace = field(default_factory=Pace)

    @property
    def wanted_size(self) -> int:
        """Samples of a micro-batch, if time is of no account."""
        size = self.options.batch.micro_size
        return min(_AUTO_SIZE, self.options.batch.global_size) if size == "auto" else size

    @property
    def micro_size(self) -> int:
        """Samples of a micro-batch that is tried."""
        return self.pace.micro_size(self.wanted_size)

    @cached_property
    def items(self) -> dict[str, Tensor]:
        """By task: [samples] how many losses of each training sample count."""
        return {task.name: task.items(self.dataset.train.num_valid[task.name])
                for task in self.tasks}

    def is_pretrained(self) -> bool:
        """Whether the weights are not those of chance."""
        args = self.options.model.args
        names = ("pretrained", "checkpoint_path", "weights", "weights_backbone")
        return self.options.model.init_from is not None or any(args.get(name) for name in names)

    # ---- data ----

    def first_batches(self, most: int, deadline: Deadline) -> list[Batch]:
        """The first micro-batches of the run, without augmentation: at least one, and as many as
        there is time for."""
        size = self.micro_size
        order = plan.BatchPlan(len(self.dataset.train), size, self.options.seed)
        chosen = [order.samples(step) for step in range(min(most, -(-len(self.dataset.train)
                                                                    // size)))]
        batches, read = self.dataset.train.batches(chosen, self.device), []
        for samples, batch in zip(chosen, batches, strict=True):
            read.append(Batch(samples, *batch))
            if deadline.is_over:
                break
        return read

    def steps(self) -> Iterator[list[np.ndarray]]:
        """The samples of each step's micro-batches, of which at most a few are taken."""
        batch, number = self.options.batch, 0
        order = plan.BatchPlan(len(self.dataset.train), batch.global_size, self.options.seed)
        while True:
            samples = order.samples(number)
            size = self.micro_size
            most = self.pace.micro_batches(_MICRO_BATCHES, size)
            # The rest of a step that was divided for want of time is none that the run has.
            end = len(samples) if size == self.wanted_size else len(samples) // size * size
            yield [samples[start : start + size] for start in range(0, end, size)[:most]]
            number += 1

    # ---- model ----

    def loss(
        self, inputs: Tensor, targets: dict[str, Tensor], samples: list[np.ndarray],
        mix: Any = None,
    ) -> Tensor:
        """A micro-batch's share of the loss over some samples, as in a step of the script.

        Args:
            samples: of all micro-batches of the step, whose items are the divisor.
        """
        output = self.module(inputs, **self.arguments(targets))
        chosen = torch.from_numpy(np.concatenate(samples))
        return sum(
            task.losses(output, targets, mix).sum()
            * (task.weight / max(1, int(self.items[task.name][chosen].sum())))
            for task in self.tasks
        )

    def logits(self, batch: Batch) -> Any:
        """The output for a micro-batch; of a model that is spared it, that for two samples."""
        is_spared = any(self.arguments(batch.targets))
        return self.module(batch.inputs[:2] if is_spared else batch.inputs)

    def update(self, factor: float, decays: bool = True) -> None:
        """Clips as the script does, and steps at a multiple of the job's learning rate, with or
        without its weight decay."""
        trained = [p for p in self.module.parameters() if p.grad is not None]
        optim = self.options.optim
        if optim.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(trained, optim.max_grad_norm)
        if optim.max_grad_value is not None:
            torch.nn.utils.clip_grad_value_(trained, optim.max_grad_value)
        groups = self.optimizer.param_groups
        before = [dict(group) for group in groups]
        for group in groups:
            group["lr"] *= factor
            if not decays and "weight_decay" in group:
                group["weight_decay"] = 0.0
        try:
            self.optimizer.step()
        finally:
            for group, former in zip(groups, before, strict=True):
                group |= {name: former[name] for name in ("lr", "weight_decay") if name in former}
        self.optimizer.zero_grad(set_to_none=True)

    @property
    def weight_decay(self) -> float:
        """The largest of all parameters."""
        return max(float(group.get("weight_decay") or 0) for group in self.optimizer.param_groups)

    def seed(self, number: int) -> None:
        """Makes what is random from here on depend on the job's seed alone."""
        torch.manual_seed(plan.forward_seed(self.options.seed, number, 0))

    @contextmanager
    def untouched(self, uses_dropout: bool = False) -> Iterator[None]:
        """Training mode for a while; weights, buffers and optimizer are then what they were.

        Args:
            uses_dropout: else layers of dropout let everything through.
        """
        tensors = [*self.module.parameters(), *self.module.buffers()]
        before = [tensor.detach().clone() for tensor in tensors]
        state = copy.deepcopy(self.optimizer.state_dict())
        try:
            with keeping_modes(self.module):
                for module in self.module.modules():
                    if isinstance(module, _DropoutNd) and not uses_dropout:
                        module.eval()
                yield
        finally:
            self.optimizer.zero_grad(set_to_none=True)
            self.optimizer.load_state_dict(state)
            with torch.no_grad():
                for tensor, value in zip(tensors, before, strict=True):
                    tensor.copy_(value)
