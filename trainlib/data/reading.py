"""Reading splits: the micro-batches that the plan names, and the batches of an evaluation.

In memory or from disk by worker processes, the same samples give the same bits. Nothing is
augmented or normalised here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trainlib.data.decoding import Decoder
from trainlib.data.workers import Rows, decoded
from trainlib.plan import Assignment, BatchPlan

SHARE_OF_MEMORY = 0.25  # that a data set may take without being asked to


@dataclass(frozen=True)
class Split:
    """One split, in memory or behind a decoder."""

    inputs: Tensor | None
    """[samples, ...] uint8 for images, else fp32 or integers; none: read from disk."""
    targets: dict[str, Tensor]
    """By task: [samples, ...] of those that are in memory."""
    rows: Tensor
    """[samples] int64: each sample's row in its source, for messages."""
    decode: Decoder | None = None
    target_decoders: Mapping[str, Decoder] = field(default_factory=dict)
    """By task: of targets that are read from disk along with the inputs."""
    workers: int = 0
    """Processes that decode, where the split is read from disk."""
    classes: Mapping[str, Tensor] = field(default_factory=dict)
    """By task with masks: [257] int64, the class number, or IGNORED, of each value and of -1."""
    num_valid: Mapping[str, Tensor] = field(default_factory=dict)
    """By task: [samples] int64, how many entries of each sample's target are there."""

    def __len__(self) -> int:
        return len(self.rows)

    def to(self, device: torch.device) -> Split:
        """The split with its tensors on a device, if they fit in a quarter of its free memory."""
        tensors = [*self.targets.values(), *([] if self.inputs is None else [self.inputs])]
        if device.type == "cuda":
            free = torch.cuda.mem_get_info(device)[0]
            if sum(tensor.nbytes for tensor in tensors) > SHARE_OF_MEMORY * free:
                return self

        def move(stored: Tensor) -> Tensor:
            is_double = stored.dtype == torch.float64 and device.type == "mps"  # it has none
            return stored.to(device, torch.float32 if is_double else stored.dtype)

        return replace(
            self, inputs=None if self.inputs is None else move(self.inputs),
            targets={name: move(stored) for name, stored in self.targets.items()},
            classes={name: table.to(device) for name, table in self.classes.items()},
        )

    def is_on(self, device: torch.device) -> bool:
        """Whether the inputs lie on a device, which Accelerate may name without its index."""
        return self.inputs is not None and self.inputs.device.type == device.type

    def read(self, samples: np.ndarray) -> tuple[Tensor, dict[str, Tensor]]:
        """The stored inputs and targets of samples [n], decoded here and now if need be."""
        targets = self._in_memory(samples)
        if self.inputs is None:
            rows_of = Rows(self.decode, self.target_decoders)
            inputs, read = rows_of.read(self.rows.numpy()[samples])
            return inputs, targets | read
        return self.inputs[torch.from_numpy(samples).to(self.inputs.device)], targets

    def batches(
        self, index_lists: Iterable[np.ndarray], device: torch.device
    ) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """The model's inputs and the targets of each list of samples, on a device."""
        if self.inputs is None:
            index_lists, mine = itertools.tee(index_lists)
            chosen_rows = (self.rows.numpy()[samples] for samples in index_lists)
            stored = decoded(self.decode, chosen_rows, self.workers, device.type == "cuda",
                             self.target_decoders)
            stored = ((inputs, read | self._in_memory(samples))
                      for (inputs, read), samples in zip(stored, mine, strict=True))
        else:
            stored = map(self.read, index_lists)
        for inputs, targets in stored:
            targets = {name: t.to(device, non_blocking=True) for name, t in targets.items()}
            yield (model_inputs(inputs.to(device, non_blocking=True)), self.task_targets(targets))

    def _in_memory(self, samples: np.ndarray) -> dict[str, Tensor]:
        chosen = torch.from_numpy(samples)
        return {name: stored[chosen.to(stored.device)] for name, stored in self.targets.items()}

    def task_targets(self, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        """What tasks are given: class numbers in int64, numbers in floating point."""
        given = {}
        for name, target in stored.items():
            table = self.classes.get(name)
            if table is not None:
                target = table.to(target.device)[target.int()]
            given[name] = target if target.is_floating_point() else target.long()
        return given


def model_inputs(stored: Tensor) -> Tensor:
    """What a model is given: images in fp32 from 0 to 1, integers in int64, numbers as they are."""
    if stored.dtype == torch.uint8:
        return stored.float().div_(255)
    return stored if stored.is_floating_point() else stored.long()


class MicroBatch(NamedTuple):
    """What one forward gets."""

    number: int
    """Its number in the global batch: with seed and step, the key of its randomness."""
    is_real: bool
    """False for a repetition that keeps this process in step with the others, uncounted."""
    is_last: bool
    """Whether this process's next backward belongs to another step."""
    samples: np.ndarray
    """[samples] int64: which of the split's they are."""
    inputs: Tensor
    targets: dict[str, Tensor]


class Reader:
    """This process's micro-batches of any step, on its device."""

    def __init__(
        self, split: Split, plan: BatchPlan, assignments: list[Assignment], device: torch.device,
        items: Mapping[str, Tensor] | None = None,
    ):
        """
        Args:
            items: by task, [samples] int64 how many losses of each sample count.
        """
        self.split, self.plan, self.assignments = split.to(device), plan, assignments
        self.device, self.items = device, items or {}
        self._constant_counts = {
            name: int(counts[0]) * plan.global_size for name, counts in self.items.items()
            if (counts == counts[0]).all()
        }
        self._block_number, self._block, self._on_device = -1, np.empty(0), torch.empty(0)
        self._stream: Iterator = iter(())
        self._next_step = -1

    def take(self, step: int) -> list[MicroBatch]:
        """The micro-batches of one step; steps may be asked for in any order."""
        drawn, on_device = self._drawn(step)
        if not self.split.is_on(self.device):
            batches = self._from_stream(step)
        else:
            batches = []
            for assignment in self.assignments:
                chosen = on_device[assignment.slots]
                targets = {name: stored.index_select(0, chosen)
                           for name, stored in self.split.targets.items()}
                batches.append((model_inputs(self.split.inputs.index_select(0, chosen)),
                                self.split.task_targets(targets)))
        last = len(self.assignments) - 1
        return [
            MicroBatch(assignment.micro_batch, assignment.is_real, index == last,
                       drawn[assignment.slots], *batch)
            for index, (assignment, batch) in enumerate(zip(self.assignments, batches, strict=True))
        ]

    def item_counts(self, step: int) -> dict[str, int]:
        """By task: how many losses of a step's global batch count, over all processes.

        The plan tells every process the whole batch, so that nothing need be communicated.
        """
        if len(self._constant_counts) == len(self.items):
            return self._constant_counts
        samples = torch.from_numpy(self.plan.samples(step))
        return {name: self._constant_counts.get(name) or int(counts[samples].sum())
                for name, counts in self.items.items()}

    def _drawn(self, step: int) -> tuple[np.ndarray, Tensor]:
        """[global_size] samples of a step, on the host and on the device, planned and copied in
        blocks."""
        number, offset = divmod(step, self.plan.steps_per_block)
        if number != self._block_number:
            self._block, self._block_number = self.plan.block(number), number
            planned = torch.from_numpy(self._block)
            if self.device.type == "cuda":  # from pinned memory alone a copy does not wait
                planned = planned.pin_memory()
            self._on_device = planned.to(self.device, non_blocking=True)
        return self._block[offset], self._on_device[offset]

    def _from_stream(self, step: int) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """The next step of a stream that decodes ahead; another step than the next restarts it."""
        if step != self._next_step:
            index_lists = _planned(self.plan, self.assignments, step)
            self._stream = self.split.batches(index_lists, self.device)
        self._next_step = step + 1
        return list(itertools.islice(self._stream, len(self.assignments)))

    def rows(self, step: int) -> list[int]:
        """The source rows of one step's global batch, in its order."""
        return self.split.rows[torch.from_numpy(self.plan.samples(step))].tolist()


def _planned(
    plan: BatchPlan, assignments: list[Assignment], first_step: int
) -> Iterator[np.ndarray]:
    """The samples of one process's micro-batches from a step on.

    Not a method of Reader: a reader that its own stream refers to is freed late, and its workers
    then take seconds to end.
    """
    for step in itertools.count(first_step):
        number, offset = divmod(step, plan.steps_per_block)
        if step == first_step or offset == 0:
            block = plan.block(number)
        for assignment in assignments:
            yield block[offset][assignment.slots]


class EvalReader:
    """This process's batches of one pass over a split: batch ``j`` is process ``j % W``'s."""

    def __init__(
        self, split: Split, batch_size: int, rank: int, world_size: int, device: torch.device
    ):
        self.split, self.device = split.to(device), device
        self.num_batches = -(-len(split) // batch_size)
        self.numbers = range(rank, self.num_batches, world_size)
        self.batch_size = batch_size

    def first_batch(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The split's first inputs and targets, whoever's they are."""
        chosen = np.arange(min(self.batch_size, len(self.split)))
        return next(iter(self.split.batches([chosen], self.device)))

    def __iter__(self) -> Iterator[tuple[int, Tensor, dict[str, Tensor]]]:
        """Each batch's number, the model's inputs and the targets."""
        inputs, size = self.split.inputs, self.batch_size
        if self.split.is_on(self.device):
            for number in self.numbers:
                chosen = slice(number * size, (number + 1) * size)
                targets = {name: stored[chosen] for name, stored in self.split.targets.items()}
                yield number, model_inputs(inputs[chosen]), self.split.task_targets(targets)
            return
        index_lists = (np.arange(number * size, min((number + 1) * size, len(self.split)))
                       for number in self.numbers)
        batches = self.split.batches(index_lists, self.device)
        for number, (inputs, targets) in zip(self.numbers, batches, strict=True):
            yield number, inputs, targets
