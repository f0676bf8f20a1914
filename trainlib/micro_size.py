"""``batch.micro_size: auto``: the largest micro-batch that fits, found before the first step.

The global batch is cut into 1, 2, 4, ... micro-batches for each process until one fits on all of
them. A trial is what a step does with a micro-batch, at its size and in its precision, with all
that a step holds besides: gradients and optimizer state are really there, and what comes later
(exact sum, DDP's buckets, averaged weights) is stood in for, as is a share that stays free.
Weights, buffers, optimizer and torch's generators are afterwards what they were, bit for bit.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from accelerate.utils import convert_to_fp32
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from trainlib import agreement, plan, shards
from trainlib.config import Options, UserError, flatten, parse_yaml
from trainlib.memory import SHARD, OutOfMemory, is_out_of_memory
from trainlib.user_code import describe_error

if TYPE_CHECKING:
    from accelerate import Accelerator

_FREE_SHARE = 0.05
"""Of a GPU's memory, kept free: for what fragments in a long run, and for the libraries."""


def settle_micro_size(
    options: Options, run_dir: Path, accelerator: Accelerator, module: nn.Module,
    optimizer: torch.optim.Optimizer, example: tuple[Tensor, dict[str, Tensor]],
    augment: Callable, arguments: Callable[[dict[str, Tensor]], dict[str, Any]],
    losses_of: Callable[..., list[Tensor]], let_go: Callable[[], object] = lambda: None,
) -> tuple[Options, list[str]]:
    """The options with a number in place of ``batch.micro_size: auto``; others as they are.

    A run that goes on keeps the number in its config.yaml; nothing is tried then.

    Args:
        options: a script's; ``batch``, ``optim``, ``model`` and ``data.augment`` are read.
        module, optimizer: on their device, not prepared yet.
        example: inputs and targets of a few samples, repeated to any size.
        augment: from inputs and targets to both and how they were mixed.
        arguments: from targets to what the model is given besides the inputs.
        losses_of: from output, inputs, targets and mix to unreduced losses.
        let_go: called after a trial, to forget tensors that hooks have kept.

    Returns:
        The options, and lines for the log.

    Raises:
        OutOfMemory: not even the smallest micro-batch fits.
        UserError: the model communicates in its forward pass.
    """
    batch = options.batch
    if batch.micro_size != "auto":
        return options, []

    def with_size(size: int) -> Options:
        return options.replaced({"batch.micro_size": size})

    for is_so, what in ((shards.is_sharded(module), "FSDP2"),
                        (options.model.sync_batch_norm, "model.sync_batch_norm")):
        if is_so:  # a process that runs out would leave the others waiting within a forward
            raise UserError(f"batch.micro_size: auto does not go with {what}, whose processes "
                            "wait for each other in every forward; give a number")
    # Before the first trial, so that what the processes need to speak is taken, too.
    former = agreement.from_main(_former_size(run_dir, accelerator), accelerator.device)
    if former is not None:
        return with_size(former), [f"batch.micro_size auto: {former}, as found before "
                                   f"({run_dir / 'config.yaml'})"]
    trials = _Trials(options, accelerator, module, optimizer, example, augment, arguments,
                     losses_of, let_go)
    size, too_large = trials.largest()
    depending = _what_depends_on_it(module, options.data.augment)
    line = f"batch.micro_size auto: {size}, the first that fits" + (
        f"; {', '.join(map(str, too_large))} did not" if too_large else "")
    if depending:
        line += f"; with {' and '.join(depending)} the curve depends on it, and so on this machine"
    return with_size(size), [line]


def _what_depends_on_it(module: nn.Module, augment: Options) -> list[str]:
    """What gives other results at another micro size, beyond rounding."""
    modules = list(module.modules())
    # Attention and recurrent nets have a share for dropout, not a module.
    shares = [float(m.p) if isinstance(m, _DropoutNd) else getattr(m, "dropout", None)
              for m in modules]
    found = ["dropout"] if any(isinstance(s, float) and s > 0 for s in shares) else []
    found += ["BatchNorm"] if any(isinstance(m, _BatchNorm) for m in modules) else []
    return found + (["augmentation"] if augment != type(augment)() else [])


def candidates(global_size: int, world_size: int) -> list[int]:
    """Micro sizes that make 1, 2, 4, ... micro-batches for each process, falling to 1.

    None leaves a last micro-batch of a single sample, which BatchNorm cannot take, but 1 itself.
    """
    sizes, number = [], 1
    while not sizes or sizes[-1] > 1:
        size = -(-global_size // (world_size * number))
        if size not in sizes and (size == 1 or global_size % size != 1):
            sizes.append(size)
        number *= 2
    return sizes


def _former_size(run_dir: Path, accelerator: Accelerator) -> int | None:
    """Of the run in the folder, if there is one; what is no run is refused later."""
    if not accelerator.is_main_process:
        return None
    try:
        recipe = flatten(parse_yaml((run_dir / "config.yaml").read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError):
        return None
    size = recipe.get("batch.micro_size")
    return size if isinstance(size, int) and size >= 1 else None


class _Trials:
    """What a step does with a micro-batch, at any size, without a trace."""

    def __init__(
        self, options: Options, accelerator: Accelerator, module: nn.Module,
        optimizer: torch.optim.Optimizer, example: tuple[Tensor, dict[str, Tensor]],
        augment: Callable, arguments: Callable, losses_of: Callable, let_go: Callable,
    ):
        self.options, self.accelerator, self.module = options, accelerator, module
        self.optimizer, self.example, self.augment = optimizer, example, augment
        self.arguments, self.losses_of, self.let_go = arguments, losses_of, let_go
        self.trained = [p for p in module.parameters() if p.requires_grad]
        self.device, self.world_size = accelerator.device, accelerator.num_processes
        self.has_state, self.refusal = False, ""

    def largest(self) -> tuple[int, list[int]]:
        """The first size that fits on every process, and the larger ones that did not.

        Raises:
            OutOfMemory: none does.
        """
        too_large: list[int] = []
        # On the host: the device is to hold what it holds in a step.
        self.weights = [p.detach().cpu().clone() for p in self.trained]
        buffers = [buffer.detach().cpu().clone() for buffer in self.module.buffers()]
        optimizer_state = copy.deepcopy(self.optimizer.state_dict())
        on_gpu = [self.device] if self.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(on_gpu):
                for size in candidates(self.options.batch.global_size, self.world_size):
                    # One answer of all: each has a memory of its own.
                    if all(agreement.from_all(self._fits(size, not too_large), self.device)):
                        return size, too_large
                    too_large.append(size)
        finally:
            self.optimizer.load_state_dict(optimizer_state)
            with torch.no_grad():
                self._restore_weights()
                for buffer, before in zip(self.module.buffers(), buffers, strict=True):
                    buffer.copy_(before)
            self._clean()
        raise OutOfMemory(
            f"batch.micro_size auto: a micro-batch of {too_large[-1]} does not fit on the device "
            f"beside the model, its gradients and the optimizer's state{self.refusal}; {SHARD}, "
            "set --model.gradient_checkpointing, where the net has it, or take a smaller model")

    def _fits(self, size: int, is_first: bool) -> bool:
        try:
            self._try(size)
        except Exception as error:
            if is_first and not is_out_of_memory(error):
                raise
            if not is_out_of_memory(error):  # such as BatchNorm's of one sample
                self.refusal = f" ({size}: {describe_error(error)})"
            return False
        finally:
            self._clean()
        return True

    def _try(self, size: int) -> None:
        """One micro-batch after another as in a step, without the update."""
        for parameter in self.trained:
            parameter.grad = torch.zeros_like(parameter)
        if not self.has_state:
            try:
                self.optimizer.step()  # the state of any optimizer is known when it is there
            finally:
                with torch.no_grad():
                    self._restore_weights()
            self.has_state = True
        micro_steps = -(-plan.num_micro_batches(self.options.batch.global_size, size)
                        // self.world_size)
        ballast = torch.empty(self._later_bytes(micro_steps), dtype=torch.uint8,
                              device=self.device)
        inputs, targets = self.example
        chosen = torch.arange(size) % len(inputs)
        example = inputs[chosen].to(self.device), {
            name: target[chosen].to(self.device) for name, target in targets.items()}
        is_lower = self.accelerator.mixed_precision != "no"
        # A second one finds the first one's output and gradients still there, as it does in a step.
        for _ in range(min(2, micro_steps)):
            inputs, targets, mix = self.augment(*example)
            with self.accelerator.autocast():
                output = self.module(inputs, **self.arguments(targets))
            output = convert_to_fp32(output) if is_lower else output
            losses = self.losses_of(output, inputs, targets, mix)
            loss = sum((each.sum() for each in losses[1:]), start=losses[0].sum())
            loss.backward()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        del ballast

    def _later_bytes(self, micro_steps: int) -> int:
        """Of what a step holds and is not there yet, and of what is to stay free."""
        numbers = sum(p.numel() for p in self.trained)
        exact = self.options.batch.exact_sum
        exact = self.device.type == "cpu" if exact is None else exact
        held = 8 * numbers if exact and (self.world_size > 1 or micro_steps > 1) else 0
        if self.world_size > 1:
            held += sum(p.nbytes for p in self.trained)  # DDP's buckets
        if self.options.optim.ema_half_life is not None:
            held += sum(t.numel() * max(4, t.element_size())
                        for t in (*self.module.parameters(), *self.module.buffers()))
        if self.device.type == "cuda":
            total = torch.cuda.get_device_properties(self.device).total_memory
            held += int(_FREE_SHARE * total)
        return held

    def _restore_weights(self) -> None:
        for parameter, before in zip(self.trained, self.weights, strict=True):
            parameter.copy_(before)

    def _clean(self) -> None:
        self.module.zero_grad(set_to_none=True)
        self.let_go()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
