"""A task: from outputs and targets to losses and additive statistics.

Statistics are two vectors, integers and sums. Those of batches are added up, and say what a
split's metrics are; the first of each is the number of items and the sum of their losses. Which
samples, and the division by a count, are not a task's business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from trainlib import metrics
from trainlib.augment import Mix
from trainlib.config import UserError
from trainlib.losses import is_valid


@dataclass(frozen=True)
class Task:
    """One prediction; each kind is a subclass."""

    name: str
    label_names: list[str]
    weight: float
    loss: partial
    loss_name: str
    """Of a loss in ``losses``; none: the user's own, which is not shown missing targets."""
    may_miss: bool = False
    """Whether any sample lacks an entry of the target."""
    takes_all: bool = True
    """Whether an output that is not named belongs to this task: all tasks have one target."""

    kind = ""
    monitor = "loss"
    """The metric that decides which weights are best, where this is the only task."""
    headline = ()
    """The metrics that the terminal shows."""
    may_fuse = False
    num_extra_counts = 0
    num_extra_sums = 0

    # ---- training ----

    @property
    def num_outputs(self) -> int:
        """Numbers that the model gives for an item."""
        return len(self.label_names)

    def output(self, output: Any, target: Tensor) -> Tensor:
        """This task's part of what a model returned, in the form that its loss takes."""
        return self.pick(output)

    def pick(self, output: Any) -> Any:
        """This task's part of a tensor, a mapping, or a Hugging Face output."""
        if not isinstance(output, Mapping):
            return output
        for key in (self.name, "logits", "out"):  # the last is torchvision's
            if key in output and (self.takes_all or key == self.name):
                return output[key]
        return output

    def prepare(self, target: Tensor) -> Tensor:
        """The target in the form that the loss takes."""
        return target

    def losses(self, output: Any, targets: dict[str, Tensor], mix: Mix | None = None) -> Tensor:
        """Unreduced losses in fp32, one for each entry of the target or for each sample.

        Those of missing targets are 0.

        Args:
            mix: how MixUp or CutMix has blended the inputs; the losses are blended likewise, which
                for the cross entropy is its loss on the blended target.
        """
        target = targets[self.name]
        output, target = self.output(output, target), self.prepare(target)
        losses = self.entry_losses(output, target)
        return losses if mix is None else mix.blend(
            losses, self.entry_losses(output, target[mix.partner])
        )

    def entry_losses(self, output: Tensor, target: Tensor) -> Tensor:
        """The losses of a picked output against a prepared target; those of missing ones are 0."""
        if self.loss_name:
            return self.loss(output, target)
        if not self.may_miss:
            return self.loss(output, target).float()
        valid = is_valid(target)
        losses = self.loss(output, target.where(valid, 0)).float()
        if losses.ndim < valid.ndim:
            valid = valid.flatten(1).any(1)
        return losses.where(valid, 0)

    @cached_property
    def is_per_sample(self) -> bool:
        """Whether the loss is one a sample, not one an entry of the target."""
        target = self.prepare(self.blank_target())
        return target.ndim > 1 and self.loss(self.blank_output(), target).ndim == 1

    def items(self, num_valid: Tensor) -> Tensor:
        """[samples] int64: how many losses of each sample count.

        Args:
            num_valid: [samples] how many entries of the target are there.
        """
        return (num_valid > 0).long() if self.is_per_sample else num_valid

    # ---- checks ----

    def blank_target(self) -> Tensor:
        """A target of two samples."""
        return torch.zeros(2, dtype=torch.int64)

    def blank_output(self) -> Tensor:
        """An output for two samples."""
        return torch.zeros(2, self.num_outputs)

    def check_loss(self, name: str, describe: Callable[[Exception], str]) -> None:
        """Tries the loss once, on blanks.

        Args:
            name: of the loss, for messages.
            describe: makes a line of what it raises.

        Raises:
            UserError: it refuses its arguments, or gives something else than a loss an item.
        """
        target = self.prepare(self.blank_target())
        try:
            tried = self.loss(self.blank_output(), target)
        except Exception as error:  # whatever a loss of the user's own raises
            option = "loss_args" if self.loss.keywords else "loss"
            raise UserError(f"tasks.{self.name}.{option}: {name}: {describe(error)}") from error
        shapes = (target.shape, target.shape[:1])
        if not isinstance(tried, Tensor) or tried.shape not in shapes:
            shape = list(tried.shape) if isinstance(tried, Tensor) else type(tried).__name__
            needed = " or ".join(dict.fromkeys(str(list(shape)) for shape in shapes))
            raise UserError(
                f"tasks.{self.name}.loss: {name} returns {shape} for two items; return one loss an "
                f"item, unreduced, here {needed}, and leave the mean to the script"
            )

    def fits(self, output: Tensor, target: Tensor) -> bool:
        """Whether an output has the shape that the target needs."""
        return output.shape == (len(target), self.num_outputs)

    def needs(self, target: Tensor) -> str:
        """The shape of outputs that the target needs, in words."""
        return f"{(len(target), self.num_outputs)}: one logit for each of its {self.num_outputs}" \
               " classes"

    def check_output(self, output: Any, targets: dict[str, Tensor], tasks: list[str]) -> None:
        """Refuses an output that does not fit the target.

        Args:
            tasks: the names of all tasks.

        Raises:
            UserError: with what is given and the shape that is needed.
        """
        target, given = targets[self.name], self.pick(output)
        if isinstance(given, Mapping):
            what = f"a mapping of {', '.join(map(str, given))}"
        elif not isinstance(given, Tensor):
            what = f"a {type(given).__name__}"
        elif not self.takes_all and given is output:
            what = f"one tensor, {tuple(given.shape)}"
        elif given.is_floating_point() and self.fits(given, target):
            return
        else:
            what = f"{tuple(given.shape)}"
            what += "" if given.is_floating_point() else f" of {given.dtype}"
        all_tasks = f"; the tasks are {', '.join(tasks)}" if len(tasks) > 1 else ""
        raise UserError(
            f"the model's output is {what}, task {self.name!r} needs {self.needs(target)} (in a "
            f"mapping by the name of the task, or 'logits'){all_tasks}; leave the number of "
            "outputs to the data"
        )

    # ---- evaluation ----

    @property
    def num_counts(self) -> int:
        """Length of the vector of counts."""
        return 1 + self.num_extra_counts

    @property
    def num_sums(self) -> int:
        """Length of the vector of sums."""
        return 1 + self.num_extra_sums

    def statistics(self, output: Any, targets: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The counts [num_counts] and sums [num_sums] of one batch."""
        target = targets[self.name]
        losses = self.losses(output, targets)
        dtype = metrics.sum_dtype(losses.device)
        valid = is_valid(target)
        items = self.items(valid.flatten(1).sum(1) if valid.ndim > 1 else valid.long()).sum()
        counts, sums = self.extra(output, target, losses, dtype)
        return (torch.cat([items.view(1), *(part.flatten() for part in counts)]),
                torch.cat([losses.to(dtype).sum().view(1), *(part.flatten() for part in sums)]))

    def extra(
        self, output: Any, target: Tensor, losses: Tensor, dtype: torch.dtype
    ) -> tuple[list[Tensor], list[Tensor]]:
        """What a kind counts and sums besides items and losses."""
        return [], []

    def result(self, counts: Tensor, sums: Tensor) -> dict:
        """What counts and sums over all samples mean: ``loss`` and the metrics of the kind.

        Args:
            sums: [num_sums], or of each batch, [batches, num_sums].
        """
        counts, sums = counts.cpu(), sums.cpu().view(-1, self.num_sums).sum(0)
        items, loss_sum = counts[0].item(), sums[0].item()
        loss = loss_sum / items if items else float("nan")
        return {"loss": loss} | self.interpret(counts[1:].long(), sums[1:], int(items))

    def interpret(self, counts: Tensor, sums: Tensor, num_items: int) -> dict:
        """The metrics of the kind."""
        return {}

    def logged(self, result: dict) -> dict[str, float]:
        """What of a result is logged, besides the loss."""
        return {}

    def report(self, result: dict) -> str:
        """The result as the text that people know."""
        raise NotImplementedError
