"""The soft loss of each kind of task: what a teacher's outputs ask of the student's.

Items without a target do not count, for either loss: they have one divisor, which is known before
the first backward. Whole batches of logits over a vocabulary are never held: tokens are taken in
chunks, whose logits are made again in the backward pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from trainlib import kd_losses
from trainlib.config import UserError
from trainlib.distillation.options import TERMS, DistillOptions, TermOptions
from trainlib.losses import is_valid
from trainlib.user_code import describe_error

if TYPE_CHECKING:
    from trainlib.augment import Mix
    from trainlib.tasks import Task

# Of one chunk's logits in fp32. Half as much lies below the size from which glibc gives memory
# back, and leaves holes that make the peak 1.9 times as high (measured: 32,000 tokens).
_CHUNK_BYTES = 2**26
_FIT = {
    "classification": tuple(kd_losses.CLASS_TERMS),
    "segmentation": tuple(name for name in kd_losses.CLASS_TERMS if name != "dist"),
    "language_modeling": tuple(name for name in kd_losses.CLASS_TERMS if name != "dist"),
    "multilabel": tuple(kd_losses.BINARY_TERMS),
    "regression": tuple(kd_losses.NUMBER_TERMS),
}


class TopK(NamedTuple):
    """A teacher's outputs cut down to the most probable classes."""

    log_probs: Tensor
    """[items, k, ...]"""
    indices: Tensor
    """[items, k, ...] int64."""
    tail_log_prob: Tensor
    """[items, ...]"""


class Hidden(NamedTuple):
    """Teachers whose logits are made chunk by chunk: by teacher, hidden states and matrix."""

    hidden: list[Tensor]
    """[batch, tokens, width] each."""
    heads: list[Tensor]
    """[vocab_size, width] each."""
    average: Callable[[list[Tensor]], Tensor]
    """From logits [tokens, vocab_size] by teacher to those of all."""

    def logits(self) -> Tensor:
        """[tokens, vocab_size] of all, from hidden states [tokens, width]."""
        return self.average([functional.linear(hidden.to(head.dtype), head)
                             for hidden, head in zip(self.hidden, self.heads, strict=True)])


class SoftLoss:
    """The losses of one task: against its targets, and against the teachers' outputs."""

    def __init__(self, task: Task, options: DistillOptions):
        """
        Raises:
            UserError: a soft loss that is not for this kind of task.
        """
        self.task, self.temperature = task, options.temperature
        chosen = options.tasks.get(task.name, TermOptions())
        chosen = chosen if chosen.loss is not None else options
        kind = "multilabel" if getattr(task, "is_binary", False) else task.kind
        where = f"distill.tasks.{task.name}.loss" if chosen is not options else "distill.loss"
        self.name = chosen.loss or _FIT[kind][0]
        if self.name not in _FIT[kind]:
            raise UserError(f"{where}: {self.name} is not for {task.kind}, task {task.name!r}; use "
                            f"{' or '.join(_FIT[kind])}, by distill.tasks.{task.name}.loss")
        if options.cache_top_k is not None and self.name != "kl":
            raise UserError(f"distill.cache_top_k: keeps what kl needs, task {task.name!r} has "
                            f"{self.name}; use kl, or leave out cache_top_k")
        term = partial(TERMS[self.name], temperature=options.temperature, **chosen.loss_args)
        if options.standardize:
            if kind in ("multilabel", "regression"):
                raise UserError(f"distill.standardize: is over classes, task {task.name!r} has "
                                "none; leave it out")
            term = partial(_standardized, term)
        self.term = term
        try:
            blank = task.blank_output()
            self.term(blank, blank, task.prepare(task.blank_target()))
        except (ValueError, TypeError) as error:
            raise UserError(f"{where}_args: {describe_error(error)}") from error

    def losses(
        self, output: Any, taught: Any, targets: dict[str, Tensor], mix: Mix | None = None
    ) -> tuple[Tensor, Tensor]:
        """Both losses, unreduced, in fp32; those of missing targets are 0.

        Args:
            output: of the student.
            taught: the teachers' output in the form that the task's loss takes, a ``TopK``, or
                ``Hidden`` where the student gives its hidden states, too.
        """
        task, target = self.task, targets[self.task.name]
        if task.kind == "language_modeling":
            return self._token_losses(output, taught, target)
        hard, student = task.losses(output, targets, mix), task.output(output, target)
        target = task.prepare(target)
        soft = self._soft(student, taught, target)
        if mix is not None:  # each of the two targets has its share, as of the hard loss
            soft = mix.blend(soft, self._soft(student, taught, target[mix.partner]))
        return hard, soft

    def _soft(self, student: Tensor, taught: Tensor | TopK, target: Tensor) -> Tensor:
        if isinstance(taught, TopK):
            soft = kd_losses.top_k_kl(student, *taught, temperature=self.temperature)
        else:
            soft = self.term(student, taught, target)
        return soft.where(is_valid(target), 0)

    def _token_losses(self, output: Any, taught: Any, target: Tensor) -> tuple[Tensor, Tensor]:
        """Chunk by chunk; [batch, tokens] each."""
        target_rows = target.flatten()
        hidden, head, taught = token_rows(self.task, output, taught)
        hard, soft = [], []
        for rows in token_chunks(len(target_rows), self.task.vocab_size):
            of_chunk = checkpoint(
                self._chunk_losses, hidden[rows], head, rows_of(taught, rows), target_rows[rows],
                use_reentrant=False, preserve_rng_state=False,
            )
            hard.append(of_chunk[0])
            soft.append(of_chunk[1])
        return torch.cat(hard).view_as(target), torch.cat(soft).view_as(target)

    def _chunk_losses(
        self, hidden: Tensor, head: Tensor | None, taught: Any, target: Tensor
    ) -> tuple[Tensor, Tensor]:
        student = hidden if head is None else functional.linear(hidden, head)
        if isinstance(taught, Hidden):
            with torch.no_grad():
                taught = taught.logits()
        hard = self.task.entry_losses(student, target)
        # A net may have room for more tokens than there are, of which no teacher says anything.
        return hard, self._soft(student[:, : self.task.vocab_size], taught, target)


def token_rows(task: Task, output: Any, taught: Any) -> tuple[Tensor, Tensor | None, Any]:
    """With a row for each token: the student's hidden states and their matrix, or its logits and
    None where it gives those only; and what the teachers say."""
    if isinstance(output, Mapping) and "hidden" in output:
        hidden, head = output["hidden"].flatten(0, 1), output["head"]
    else:
        hidden, head = task.pick(output).flatten(0, 1), None
    if isinstance(taught, Hidden):
        taught = taught._replace(hidden=[one.flatten(0, 1) for one in taught.hidden])
    return hidden, head, taught


def token_chunks(num_tokens: int, vocab_size: int) -> Iterator[slice]:
    """The rows of tokens whose logits are made at a time: the same on any machine."""
    at_a_time = max(1, _CHUNK_BYTES // (4 * vocab_size))
    for start in range(0, num_tokens, at_a_time):
        yield slice(start, min(start + at_a_time, num_tokens))


def gives_hidden(module: nn.Module) -> bool:
    """Whether a language model can give hidden states and their matrix instead of logits."""
    return "hidden_only" in inspect.signature(module.forward).parameters


def rows_of(taught: Any, rows: slice) -> Any:
    """Of what teachers say to tokens, by rows, that to some of them."""
    if isinstance(taught, Hidden):
        return taught._replace(hidden=[one[rows] for one in taught.hidden])
    if isinstance(taught, TopK):
        return TopK(*(part[rows] for part in taught))
    return taught[rows]


def _standardized(
    term: Callable[..., Tensor], student: Tensor, teacher: Tensor, target: Tensor
) -> Tensor:
    return term(kd_losses.standardize(student), kd_losses.standardize(teacher), target)
