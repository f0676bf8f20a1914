"""Reading splits: the micro-batches that the plan names, and the batches of an evaluation.

In memory or from disk by worker processes, the same samples give the same bits. Nothing is
augmented or normalised here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from trainlib.config import UserError
from trainlib.data.decoding import Decoder
from trainlib.plan import Assignment, BatchPlan

SHARE_OF_MEMORY = 0.25  # that a data set may take without being asked to


@dataclass(frozen=True)
class Split:
    """One split, in memory or behind a decoder."""

    inputs: Tensor | None
    """[samples, ...] uint8 for images, else fp32 or int64; none: read from disk."""
    targets: dict[str, Tensor]
    """By column: [samples] int64 class numbers."""
    rows: Tensor
    """[samples] int64: each sample's row in its source, for messages."""
    decode: Decoder | None = None
    workers: int = 0
    """Processes that decode, where the split is read from disk."""

    def __len__(self) -> int:
        return len(self.rows)

    def to(self, device: torch.device) -> Split:
        """The split with its tensors on a device, if they fit in a quarter of its free memory."""
        inputs = self.inputs
        if inputs is not None and device.type == "cuda":
            free = torch.cuda.mem_get_info(device)[0]
            if inputs.numel() * inputs.element_size() > SHARE_OF_MEMORY * free:
                return self
        targets = {name: column.to(device) for name, column in self.targets.items()}
        inputs = None if inputs is None else inputs.to(device)
        return Split(inputs, targets, self.rows, self.decode, self.workers)

    def is_on(self, device: torch.device) -> bool:
        """Whether the inputs lie on a device, which Accelerate may name without its index."""
        return self.inputs is not None and self.inputs.device.type == device.type

    def read(self, samples: np.ndarray) -> Tensor:
        """The stored inputs of samples [n], decoded here and now if need be."""
        if self.inputs is None:
            return self.decode(self.rows.numpy()[samples])
        return self.inputs[torch.from_numpy(samples).to(self.inputs.device)]

    def batches(
        self, index_lists: Iterable[np.ndarray], device: torch.device
    ) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """The model's inputs and the targets of each list of samples, on a device."""
        index_lists, mine = itertools.tee(index_lists)
        if self.inputs is None:
            chosen_rows = (self.rows.numpy()[samples] for samples in index_lists)
            stored = decoded(self.decode, chosen_rows, self.workers, device.type == "cuda")
        else:
            stored = map(self.read, index_lists)
        for inputs, samples in zip(stored, mine, strict=True):
            chosen = torch.from_numpy(samples)
            targets = {
                name: column[chosen.to(column.device)].to(device, non_blocking=True)
                for name, column in self.targets.items()
            }
            yield model_inputs(inputs.to(device, non_blocking=True)), targets


def model_inputs(stored: Tensor) -> Tensor:
    """What a model is given: images in fp32 from 0 to 1, anything else as it is."""
    return stored.float().div_(255) if stored.dtype == torch.uint8 else stored


def decoded(
    decode: Decoder, row_lists: Iterable[np.ndarray], workers: int, pin_memory: bool = False
) -> Iterator[Tensor]:
    """The decoded rows of each list, in order, by worker processes if there are any."""
    if workers == 0:
        yield from map(decode, row_lists)
        return
    loader = DataLoader(
        _Rows(decode), sampler=row_lists, batch_size=None, num_workers=workers,
        pin_memory=pin_memory, generator=torch.Generator(),  # not the run's
    )
    for inputs in loader:
        if isinstance(inputs, UserError):
            raise inputs
        yield inputs


class _Rows(TorchDataset):
    """What a worker runs: a list of rows in, their inputs out."""

    def __init__(self, decode: Decoder):
        self.decode = decode

    def __getitem__(self, rows: np.ndarray) -> Tensor | UserError:
        try:
            return self.decode(rows)
        except UserError as error:  # as a value: raised here, it would arrive as a traceback
            return error


class MicroBatch(NamedTuple):
    """What one forward gets."""

    number: int
    """Its number in the global batch: with seed and step, the key of its randomness."""
    is_real: bool
    """False for a repetition that keeps this process in step with the others, uncounted."""
    is_last: bool
    """Whether this process's next backward belongs to another step."""
    inputs: Tensor
    targets: dict[str, Tensor]


class Reader:
    """This process's micro-batches of any step, on its device."""

    def __init__(
        self, split: Split, plan: BatchPlan, assignments: list[Assignment], device: torch.device
    ):
        self.split, self.plan, self.assignments = split.to(device), plan, assignments
        self.device = device
        self._block_number, self._block = -1, torch.empty(0)
        self._stream: Iterator = iter(())
        self._next_step = -1

    def take(self, step: int) -> list[MicroBatch]:
        """The micro-batches of one step; steps may be asked for in any order."""
        inputs = self.split.inputs
        if not self.split.is_on(self.device):
            batches = self._from_stream(step)
        else:
            samples = self._samples(step)
            batches = []
            for assignment in self.assignments:
                chosen = samples[assignment.slots]
                targets = {name: column.index_select(0, chosen)
                           for name, column in self.split.targets.items()}
                batches.append((model_inputs(inputs.index_select(0, chosen)), targets))
        last = len(self.assignments) - 1
        return [
            MicroBatch(assignment.micro_batch, assignment.is_real, index == last, *batch)
            for index, (assignment, batch) in enumerate(zip(self.assignments, batches, strict=True))
        ]

    def _samples(self, step: int) -> Tensor:
        """[global_size] samples of a step on the device, planned and copied in blocks."""
        number, offset = divmod(step, self.plan.steps_per_block)
        if number != self._block_number:
            self._block = torch.from_numpy(self.plan.block(number)).to(self.device)
            self._block_number = number
        return self._block[offset]

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

    def __iter__(self) -> Iterator[tuple[int, Tensor, dict[str, Tensor]]]:
        """Each batch's number, the model's inputs and the targets."""
        inputs, size = self.split.inputs, self.batch_size
        if self.split.is_on(self.device):
            for number in self.numbers:
                chosen = slice(number * size, (number + 1) * size)
                targets = {name: column[chosen] for name, column in self.split.targets.items()}
                yield number, model_inputs(inputs[chosen]), targets
            return
        index_lists = (np.arange(number * size, min((number + 1) * size, len(self.split)))
                       for number in self.numbers)
        batches = self.split.batches(index_lists, self.device)
        for number, (inputs, targets) in zip(self.numbers, batches, strict=True):
            yield number, inputs, targets
