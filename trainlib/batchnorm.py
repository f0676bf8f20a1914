"""BatchNorm's running statistics, blended once per optimizer step.

Left alone, BatchNorm blends once a forward, so the result depends on how many micro-batches a
process runs. Here every micro-batch's mean and variance are captured, averaged over the step's
micro-batches of all processes, and blended once with the module's own momentum.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from trainlib.metrics import sum_dtype


class BatchStatistics:
    """The running statistics of all BatchNorm modules that train.

    A forward that is run again for gradient checkpointing writes the same statistics again.
    """

    def __init__(self, model: nn.Module, num_micro_batches: int):
        """
        Args:
            model: in training mode; modules whose statistics are frozen (in eval mode, or not
                tracking) are left alone. The others' momentum is set to 1, which makes a forward
                write its batch's own statistics.
            num_micro_batches: of a step, on all processes together.
        """
        self.num_micro_batches = num_micro_batches
        self.modules = [
            module for module in model.modules()
            if isinstance(module, _BatchNorm) and module.track_running_stats and module.training
        ]
        self.running: list[Tensor] = []
        momenta: list[Tensor] = []
        self._has_cumulative = False
        for module in self.modules:
            buffers = [module.running_mean, module.running_var]
            self.running += buffers
            if module.momentum is None:  # torch's convention for a cumulative average
                self._has_cumulative = True
            fill = math.nan if module.momentum is None else module.momentum
            momenta += [torch.full_like(b, fill, dtype=sum_dtype(b.device)) for b in buffers]
            module.momentum = 1.0
        self.sizes = [buffer.numel() for buffer in self.running]
        self.size = sum(self.sizes)
        if self.modules:
            self._momentum = torch.cat(momenta)
            self._before = torch.cat(self.running)
            self._num_tracked = [module.num_batches_tracked for module in self.modules]
            self._num_steps = [count.clone() for count in self._num_tracked]

    def count_again(self) -> None:
        """Takes the modules' own counts of steps over, after they have been loaded."""
        if self.size:
            torch._foreach_copy_(self._num_steps, self._num_tracked)

    def begin(self) -> None:
        """Puts the running statistics aside for one step."""
        if self.size:
            torch.cat(self.running, out=self._before)
            torch._foreach_zero_(self.running)

    def add_to(self, sums: Tensor, is_real: bool) -> None:
        """Adds the last forward's statistics to ``sums``.

        Args:
            sums: [size], this step's.
            is_real: False leaves them out.
        """
        if not self.size:
            return
        if is_real:
            sums += torch.cat(self.running)
        # With momentum 1 the next forward computes 0 * old + batch: an infinite old would spoil it.
        torch._foreach_zero_(self.running)

    def finish(self, sums: Tensor, healthy: bool | Tensor) -> None:
        """Blends the step's average into the running statistics, or restores them.

        Args:
            sums: [size] over all micro-batches and processes.
            healthy: False, or a device flag that is false, leaves no trace of the step.
        """
        if not self.size:
            return
        blended = self._blend(sums)
        if isinstance(healthy, Tensor):
            blended = torch.where(healthy, blended, self._before)
        elif not healthy:
            blended = self._before
        torch._foreach_copy_(self.running, list(blended.split(self.sizes)))
        one = healthy.long() if isinstance(healthy, Tensor) else int(healthy)
        torch._foreach_add_(self._num_steps, one)
        torch._foreach_copy_(self._num_tracked, self._num_steps)

    def _blend(self, sums: Tensor) -> Tensor:
        momentum = self._momentum
        if self._has_cumulative:
            cumulative = torch.cat([
                (1 / (count.to(momentum.dtype) + 1)).expand(size)
                for count, size in zip(
                    (c for c in self._num_steps for _ in range(2)), self.sizes, strict=True
                )
            ])
            momentum = torch.where(momentum.isnan(), cumulative, momentum)
        return self._before + momentum * (sums / self.num_micro_batches - self._before)
