"""Data sources and the reader of micro-batches.

A source gives a training and a validation split as tensors; the reader gathers the rows that
the plan names. No augmentation and no normalisation beyond the source's own happens here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from trainlib.config import Options, UserError, one_of
from trainlib.plan import Assignment, BatchPlan

SOURCES: dict[str, Callable[[], "Dataset"]] = {}


class DataOptions(Options):
    source: Annotated[str, one_of(SOURCES)] = "builtin:digits"
    """Where the samples come from: builtin:digits (1,797 handwritten digits of 8x8 pixels)."""


class BatchOptions(Options):
    global_size: int = Field(64, ge=1)
    """Samples per optimizer step over all processes; the learning curve depends on it."""
    micro_size: int = Field(32, ge=1)
    """Samples per forward; equal sizes give bit-equal weights on any number of processes."""
    eval_size: int = Field(256, ge=1)
    """Samples per forward in evaluation."""
    exact_sum: bool | None = None
    """Sum gradients in float64, so that no bit depends on the processes; none: on for CPU only."""

    @model_validator(mode="after")
    def _micro_fits(self) -> "BatchOptions":
        if self.micro_size > self.global_size:
            raise ValueError(
                f"micro_size: {self.micro_size} is more than batch.global_size "
                f"{self.global_size}: a micro-batch is a part of the global batch; "
                "set --batch.micro_size, too"
            )
        return self


@dataclass(frozen=True)
class Split:
    """One split in memory."""

    inputs: Tensor
    """[samples, ...] fp32."""
    targets: dict[str, Tensor]
    """By column: [samples] int64 class numbers."""
    rows: Tensor
    """[samples] int64: each sample's row in its source, for messages."""

    def __len__(self) -> int:
        return len(self.inputs)

    def to(self, device: torch.device) -> "Split":
        """The split on a device; row numbers stay where they are."""
        targets = {name: column.to(device) for name, column in self.targets.items()}
        return Split(self.inputs.to(device), targets, self.rows)


@dataclass(frozen=True)
class Dataset:
    """A training and a validation split, and the names of their classes."""

    train: Split
    validation: Split
    label_names: dict[str, list[str]]
    """By target column."""

    @property
    def input_shape(self) -> tuple[int, ...]:
        return tuple(self.train.inputs.shape[1:])


def load(options: DataOptions) -> Dataset:
    """The data set that the options name, checked.

    Raises:
        UserError: an empty split, inputs that are not finite, or labels outside the classes.
    """
    dataset = SOURCES[options.source]()
    for name, split in (("training", dataset.train), ("validation", dataset.validation)):
        check(split, f"{options.source}, {name} split", dataset.label_names)
    return dataset


def check(split: Split, where: str, label_names: dict[str, list[str]]) -> None:
    """Refuses a split that cannot be trained on.

    Raises:
        UserError: no samples, inputs that are not finite, or labels outside the classes; with
            how many and the first row.
    """
    if len(split) == 0:
        raise UserError(f"{where}: is empty; training and validation need a sample each")

    def refuse(bad: Tensor, what: str) -> None:
        count = int(bad.sum())
        if count:
            first = int(split.rows[bad][0])
            raise UserError(f"{where}: {what} in {count} of {len(split)} samples, first in row "
                            f"{first}; mend or remove these rows")

    refuse(~split.inputs.flatten(1).isfinite().all(1), "NaN or infinite inputs")
    for column, names in label_names.items():
        target = split.targets[column]
        refuse((target < 0) | (target >= len(names)),
               f"labels of {column!r} outside 0..{len(names) - 1}")


def _digits() -> Dataset:
    """UCI "Optical Recognition of Handwritten Digits" (Alpaydin & Kaynak 1998), as in scikit-learn.

    Inputs are [1, 8, 8] in [0, 1]. The split is fixed, whatever the run's seed.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16  # 16 grey levels
    digits = torch.tensor(bunch.target, dtype=torch.int64)
    rows = torch.arange(len(digits))
    parts = train_test_split(rows, test_size=360, stratify=bunch.target, random_state=0)
    train, validation = (
        Split(images[part], {"digit": digits[part]}, part) for part in (p.sort()[0] for p in parts)
    )
    return Dataset(train, validation, {"digit": [str(name) for name in bunch.target_names]})


SOURCES["builtin:digits"] = _digits


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
    """This process's micro-batches of any step, gathered by index from a split in memory."""

    def __init__(
        self, split: Split, plan: BatchPlan, assignments: list[Assignment], device: torch.device
    ):
        self.split, self.plan, self.assignments = split.to(device), plan, assignments
        self.device = device
        self._block_number, self._block = -1, torch.empty(0)

    def take(self, step: int) -> list[MicroBatch]:
        """The micro-batches of one step; steps may be asked for in any order."""
        number, offset = divmod(step, self.plan.steps_per_block)
        if number != self._block_number:
            self._block = torch.from_numpy(self.plan.block(number)).to(self.device)
            self._block_number = number
        samples = self._block[offset]
        last = len(self.assignments) - 1
        micro_batches = []
        for index, assignment in enumerate(self.assignments):
            chosen = samples[assignment.slots]
            targets = {name: column.index_select(0, chosen)
                       for name, column in self.split.targets.items()}
            micro_batches.append(MicroBatch(
                assignment.micro_batch, assignment.is_real, index == last,
                self.split.inputs.index_select(0, chosen), targets,
            ))
        return micro_batches

    def rows(self, step: int) -> list[int]:
        """The source rows of one step's global batch, in its order."""
        return self.split.rows[torch.from_numpy(self.plan.samples(step))].tolist()
