"""Averaged weights: an exponential moving average with a half-life in steps.

It starts as the plain mean, so the weights before training are forgotten at once, and how much a
step counts is a pure function of the step.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn

from trainlib import shards


class Ema:
    """The average of a module's parameters and floating buffers, at least in fp32.

    Integer buffers, such as BatchNorm's count of batches, stay the module's own. Of a model that is
    cut over the processes, so is the average.
    """

    def __init__(self, module: nn.Module, half_life_steps: float):
        """
        Args:
            module: on its device and prepared: its tensors are taken now, shared ones once.
            half_life_steps: after so many steps a step counts half as much.

        Raises:
            ValueError: the half-life is not above 0.
        """
        if not half_life_steps > 0:
            raise ValueError(f"the half-life is above 0 steps, got {half_life_steps}")
        self.is_sharded = shards.is_sharded(module)
        self.newest_share = -math.expm1(-math.log(2) / half_life_steps)
        self.weights = {
            name: tensor
            for name, tensor in chain(module.named_parameters(), module.named_buffers())
            if tensor.is_floating_point() or tensor.is_complex()
        }
        self.averages = {
            name: weight.detach().to(torch.promote_types(weight.dtype, torch.float32), copy=True)
            for name, weight in self.weights.items()
        }

    @torch.no_grad()
    def update(self, step: int, healthy: bool | Tensor) -> None:
        """Takes the weights after a step into the average.

        Args:
            step: 0 for the first, which makes the average a copy.
            healthy: False, or a device flag that is false, leaves no trace of the step.
        """
        if healthy is False or not self.averages:
            return
        weights, averages = list(self.weights.values()), list(self.averages.values())
        if self.is_sharded:
            weights, averages = ([shards.local(t) for t in both] for both in (weights, averages))
        share = max(self.newest_share, 1 / (step + 1)) * healthy
        differences = torch._foreach_sub(weights, averages)
        torch._foreach_mul_(differences, share)
        torch._foreach_add_(averages, differences)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it the module holds the averaged weights, in their own precision."""
        if self.is_sharded:
            with self._swapped():
                yield
            return
        held = [weight.data for weight in self.weights.values()]
        try:
            for name, weight in self.weights.items():
                weight.data = self.averages[name].to(weight.dtype)
            yield
        finally:
            for weight, data in zip(self.weights.values(), held, strict=True):
                weight.data = data

    @contextmanager
    def _swapped(self) -> Iterator[None]:
        """As ``applied``, in the parts' own memory, from which FSDP2 gathers them."""
        held = {name: shards.local(weight.data).clone() for name, weight in self.weights.items()}
        try:
            for name, weight in self.weights.items():
                shards.local(weight.data).copy_(shards.local(self.averages[name]))
            yield
        finally:
            for name, weight in self.weights.items():
                shards.local(weight.data).copy_(held[name])

    def tensors(self) -> dict[str, Tensor]:
        """The averages by name, for a checkpoint: all that an ``Ema`` has to keep."""
        return dict(self.averages)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Goes on from ``tensors()`` of an earlier run.

        Raises:
            ValueError: other names or shapes.
        """
        shapes = [{n: t.shape for n, t in named.items()} for named in (self.averages, tensors)]
        if shapes[0] != shapes[1]:
            raise ValueError("the averaged weights are those of another model")
        for name, average in self.averages.items():
            shards.fill(average, tensors[name])
