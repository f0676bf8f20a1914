"""Histograms of a model's parameters and of the gradients that an optimizer is about to use."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from trainlib.schedule import is_time

_NUM_BINS = 64

Histogram = tuple[np.ndarray, np.ndarray]


def histogram(values: Tensor) -> Histogram | None:
    """Counts [bins] and edges [bins + 1] of what a tensor, maybe a sparse one, holds; none where
    that is nothing or not finite, or lies too close together for bins."""
    values = values.detach().coalesce().values() if values.is_sparse else values.detach()
    # On the host: torch.histc of a GPU is refused among deterministic algorithms.
    # In double, because numpy refuses bins between two neighbouring numbers.
    numbers = values.cpu().double().numpy().ravel()
    if numbers.size == 0 or not np.isfinite(numbers).all():
        return None
    try:
        return np.histogram(numbers, bins=_NUM_BINS)
    except ValueError:  # neighbouring doubles
        return None


class Histograms:
    """Takes histograms every few steps, of what the optimizer finds: gradients summed over all
    processes and clipped, and the parameters before the update."""

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, every: int, total_steps: int,
        step: Callable[[], int], is_wanted: Callable[[], object] = lambda: True,
    ):
        """
        Args:
            optimizer: unwrapped.
            every: steps between them.
            step: how many steps have been taken so far.
            is_wanted: whether there is anyone left to take them.
        """
        self._is_wanted = is_wanted
        self._module, self._every, self._total_steps, self._step = module, every, total_steps, step
        self._taken: dict[int, dict[str, Histogram]] = {}
        optimizer.register_step_pre_hook(lambda *_: self._take())

    def pop(self, step: int) -> dict[str, Histogram]:
        """What was taken in the update that led to ``step``."""
        return self._taken.pop(step, {})

    def _take(self) -> None:
        step = self._step() + 1
        if not (is_time(step, self._every, self._total_steps) and self._is_wanted()):
            return
        found = {}
        for name, parameter in self._module.named_parameters():
            found[f"parameters/{name}"] = histogram(parameter)
            if parameter.grad is not None:
                found[f"gradients/{name}"] = histogram(parameter.grad)
        self._taken[step] = {name: value for name, value in found.items() if value is not None}
