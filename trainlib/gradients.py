"""The exact sum over micro-batches and processes, and what rides along with it.

Sums of fp32 values in float64 are exact unless their magnitudes span more than about 2^25, and
exact sums do not depend on their order: so the gradient of a step is the same, bit for bit,
however its micro-batches are spread. Forward, backward, clipping and the step stay in the script.
"""

import socket
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trainlib import agreement, shards
from trainlib.config import UserError
from trainlib.layer_gradients import LayerGradients
from trainlib.metrics import sum_dtype
from trainlib.pace import Pace

_NO_CONTEXT = nullcontext()
_SHOWN = 5  # names in a line


class StepSums:
    """The sums of one optimizer step, in one vector and so in one all-reduce.

    The vector holds named parts (losses, batch statistics, flags) and, for the exact sum, every
    gradient. The exact sum is skipped where a step is one micro-batch on one process.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        sizes: dict[str, int],
        exact: bool | None,
        micro_steps: int,
        say: Callable[[str], object] = lambda line: None,
        slow_factor: float | None = None,
    ):
        """
        Args:
            model: as prepared; its trainable parameters are taken now.
            sizes: length of each named part.
            exact: sum gradients here; otherwise DDP or FSDP2 averages them in fp32. None: on a
                CPU, unless the model is sharded.
            micro_steps: micro-batches a step on each process.
            say: told in a line of parameters that no gradient reached in the first step.
            slow_factor: of ``Pace``, whose slots ride along as a part "pace"; none: who is slow is
                not told. Nor under FSDP2, where already the forward waits for the others.
        """
        self.is_sharded = shards.is_sharded(model)
        if exact is None:
            exact = accelerator.device.type == "cpu" and not self.is_sharded
        self.accelerator, self.model = accelerator, model
        self._pace = None
        if slow_factor is not None and accelerator.num_processes > 1 and not self.is_sharded:
            hosts = agreement.from_all(socket.gethostname(), accelerator.device)
            self._pace = Pace(accelerator.process_index, hosts, accelerator.device.type == "cuda",
                              slow_factor, say)
            sizes = sizes | {"pace": len(hosts)}
        self.world_size = accelerator.num_processes
        inner = model.module if isinstance(model, DistributedDataParallel) else model
        trained = {name: p for name, p in inner.named_parameters() if p.requires_grad}
        self._names, self.parameters = list(trained), list(trained.values())
        self._say, self._is_first = say, True
        self.sums_gradients = exact and (self.world_size > 1 or micro_steps > 1)
        self.reduces_elsewhere = self.world_size > 1 and not self.sums_gradients
        self._ddp_reduces = self.reduces_elsewhere and not self.is_sharded
        # DDP reduces what the last micro-batch reached: what only earlier ones did must not pass.
        self._compares = self._ddp_reduces and micro_steps > 1
        gradients = self.parameters if self.sums_gradients else []
        num_flags = len(self.parameters) if self.sums_gradients or self.is_sharded else 0
        # A parameter may get no gradient in a step; the optimizer must then leave it alone, on
        # every process: one flag each says on how many processes it got one.
        lengths = [*sizes.values(), num_flags, *(p.numel() for p in gradients)]
        device = accelerator.device
        self.vector = torch.zeros(sum(lengths), dtype=sum_dtype(device), device=device)
        parts = self.vector.split(lengths)
        self.parts = dict(zip(sizes, parts, strict=False))
        self._used = parts[len(sizes)]
        # In each parameter's own memory order (channels_last, say), so that sums run along memory
        # and .grad lies as its parameter does, which the fused optimizers rely on.
        self._gradients = [
            part.as_strided(p.shape, torch.empty_like(p, device="meta").stride())
            for part, p in zip(parts[len(sizes) + 1 :], gradients, strict=True)
        ]
        self._reached = shards.Reached(model, self._names) if self.is_sharded else None
        self._layers: LayerGradients | None = None

    def watch_layers(
        self, module: nn.Module, layers: Mapping[str, str], step: Callable[[], int]
    ) -> None:
        """From now on has the main process tell of layers whose gradients explode or vanish.

        Not under FSDP2, where each norm would be one more message.

        Args:
            module: inside any wrapper.
            layers: of each of its parameters, by name.
            step: how many steps have been taken so far.
        """
        if self.accelerator.is_main_process and not self.is_sharded:
            by_parameter = {id(p): layers[name] for name, p in module.named_parameters()}
            self._layers = LayerGradients(
                [by_parameter[id(p)] for p in self.parameters], step, self._say,
                self.accelerator.scaler,
            )

    def __getitem__(self, name: str) -> Tensor:
        """One named part: this process's sum before ``reduce``, everyone's after it."""
        return self.parts[name]

    def clear(self) -> None:
        """Starts a step."""
        self.vector.zero_()
        self._has_all = False
        if self._reached is not None:
            self._reached.names.clear()
        if self._pace is not None:
            self._pace.begin()

    def no_sync(self, is_last: bool) -> AbstractContextManager:
        """Keeps DDP from reducing: always for the exact sum, else on all but the last backward, as
        FSDP2 is kept."""
        if is_last and self._compares:
            self._before = [_state(p.grad) for p in self.parameters]
        if self.is_sharded:  # on one process, too, where it has to write the parts
            return _NO_CONTEXT if is_last else shards.unsynced(self.model)
        if self.world_size == 1 or (is_last and self.reduces_elsewhere):
            return _NO_CONTEXT
        return self.accelerator.no_sync(self.model)

    def scaled(self, loss: Tensor, is_real: bool) -> Tensor:
        """The loss to go backward from: DDP and FSDP2 average over processes, this undoes it.

        A repeated micro-batch counts for nothing. Should its gradient be NaN, 0 * NaN stays NaN;
        but then the process that owns it has the same NaN, and the step is skipped in any case.
        """
        if self._reached is not None:
            self._reached.counts = is_real
        if not self.reduces_elsewhere:
            return loss
        if self._pace is not None:
            self._pace.mark()  # DDP waits for the others in the last backward
        return loss * (self.world_size if is_real else 0)

    def add(self, name: str, values: list[Tensor], is_real: bool) -> None:
        """Adds scalars to a named part, one an element; those of a repetition are left out."""
        if is_real:
            # One operation for all: each costs microseconds.
            self.parts[name].add_(values[0].detach() if len(values) == 1 else
                                  torch.stack([value.detach() for value in values]))

    def add_gradients(self, is_real: bool) -> None:
        """Moves one micro-batch's gradients into the exact sum; otherwise leaves them to DDP."""
        if not self.sums_gradients:
            return
        if is_real:
            gradients = [p.grad for p in self.parameters]
            if any(gradient is None for gradient in gradients):
                pairs = [(i, g) for i, g in enumerate(gradients) if g is not None]
                self._used[[i for i, _ in pairs]] = 1
                torch._foreach_add_([self._gradients[i] for i, _ in pairs], [g for _, g in pairs])
            else:
                self._used.fill_(1)
                self._has_all = True
                torch._foreach_add_(self._gradients, gradients)
        for parameter in self.parameters:
            parameter.grad = None

    def reduce(self) -> None:
        """Sums the vector over all processes and writes the exact gradients, cast once.

        Raises:
            UserError: no gradient reached a parameter for which DDP waits, or one reached it on
                some processes only, where torch's FSDP2 cannot sum that.
        """
        if self.is_sharded:
            self._reduce_sharded()
        else:
            self._reduce_whole()
        if self._layers is not None:
            self._layers.look(self.parameters)

    def _reduce_whole(self) -> None:
        if self._pace is not None:
            if not self.reduces_elsewhere:
                self._pace.mark()
            self._pace.add_to(self.parts["pace"])
        if not self.sums_gradients and (self._is_first or self._ddp_reduces):
            unused = {i for i, p in enumerate(self.parameters) if p.grad is None}
            if self._compares:
                unused |= {i for i, (p, before) in enumerate(
                    zip(self.parameters, self._before, strict=True)) if _state(p.grad) == before}
            self._look_for_unused(unused)
        if self.world_size > 1:
            torch.distributed.all_reduce(self.vector)
        if self._pace is not None:
            self._pace.take(self.parts["pace"])
        if not self.sums_gradients:
            return
        unused: set[int] = set()
        # Reading the flags waits for the device. One micro-batch of this process that reached
        # every parameter says enough.
        if not self._has_all:
            unused = set((self._used == 0).nonzero().flatten().tolist())
        if self._is_first:
            self._look_for_unused(unused)
        for index, (parameter, total) in enumerate(
            zip(self.parameters, self._gradients, strict=True)
        ):
            parameter.grad = None if index in unused else total.to(parameter.dtype)

    def _reduce_sharded(self) -> None:
        """FSDP2 has summed the gradients, with 0 where none was: that becomes none again."""
        fills = shards.fills_unused(self.model)
        if fills:
            used = [i for i, name in enumerate(self._names) if name in self._reached.names]
        else:
            used = [i for i, p in enumerate(self.parameters) if p.grad is not None]
        has_all = len(used) == len(self.parameters)
        if has_all:
            self._used.fill_(1)
        else:
            self._used[used] = 1
        if self.world_size > 1:
            torch.distributed.all_reduce(self.vector)
        if has_all and fills:
            self._is_first = False
            return
        numbers = self._used.tolist()
        if not fills:
            some = [name for name, n in zip(self._names, numbers, strict=True)
                    if 0 < n < self.world_size]
            if some:
                raise UserError(
                    f"FSDP2: a gradient reached {', '.join(some[:_SHOWN])} on some processes only, "
                    f"which torch {torch.__version__} adds up wrongly: take a newer torch, or use "
                    "every parameter in every micro-batch")
        unused = {i for i, number in enumerate(numbers) if number == 0}
        if self._is_first:
            self._look_for_unused(unused)
        for index in unused:
            self.parameters[index].grad = None

    def _look_for_unused(self, unused: set[int]) -> None:
        """Names parameters without a gradient: once, or where DDP would hang, in an error."""
        self._is_first = False
        if not unused:
            return
        names = [self._names[index] for index in sorted(unused)]
        more = f" and {len(names) - _SHOWN} more" * (len(names) > _SHOWN)
        shown = f"{', '.join(names[:_SHOWN])}{more}"
        freeze = f"--model.freeze '[{', '.join(names[:_SHOWN])}]'"
        if self._ddp_reduces:
            raise UserError(
                f"no gradient reached {shown}, and DDP waits for one of every parameter: use it in "
                f"the loss, freeze it ({freeze}), or set --batch.exact_sum true, which goes without"
            )
        self._say(f"no gradient reached {shown} in the first step: what gets none stays as it is; "
                  f"if that is meant, {freeze} says so")


def _state(gradient: Tensor | None) -> tuple[int, int]:
    """Changes whenever a backward adds to the gradient, which is kept alive by its parameter."""
    return (0, 0) if gradient is None else (id(gradient), gradient._version)
