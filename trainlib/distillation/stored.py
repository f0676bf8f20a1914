"""The teachers' outputs for every training sample, computed once and read from disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from trainlib import kd_losses
from trainlib.config import Options, UserError
from trainlib.distillation.cache import TeacherCache
from trainlib.distillation.objective import TopK
from trainlib.distillation.options import DistillOptions

if TYPE_CHECKING:
    from trainlib.data.reading import Split
    from trainlib.distillation.teachers import Teachers
    from trainlib.tasks import Task

_SAMPLES_OF_A_PART = 4096
_TOP_K = ("log_probs", "indices", "tail")


def check_cache(options: DistillOptions, augment: Options) -> None:
    """Refuses a cache of outputs for inputs that are others each time a sample is drawn.

    Raises:
        UserError: naming an augmentation.
    """
    for name, field in type(augment).model_fields.items():
        if options.cache and getattr(augment, name) != field.default:
            raise UserError(f"distill.cache: data.augment.{name} makes other inputs of a sample "
                            "each time it is drawn, so outputs for them cannot be kept; leave out "
                            "one of them")


class StoredOutputs:
    """What ``Teachers.taught`` gives, by sample; fp16, so the loss differs by that rounding."""

    def __init__(
        self, teachers: Teachers, options: DistillOptions, split: Split, data: str, batch_size: int
    ):
        """
        Args:
            split: whose samples are drawn.
            data: its fingerprint.
            batch_size: samples of a forward pass.
        """
        self.teachers, self.split, self.batch_size = teachers, split, batch_size
        self.device, self.top_k = teachers.accelerator.device, options.cache_top_k
        self.temperature = options.temperature
        identity = {
            "teachers": " ".join(teacher.fingerprint() for teacher in teachers.teachers),
            "data": data, "tasks": " ".join(task.name for task in teachers.tasks),
            "top_k": str(self.top_k), "precision": teachers.accelerator.mixed_precision,
            "batch.eval_size": str(batch_size),  # of a forward pass, which moves the last bits
        }
        if len(teachers.teachers) > 1 or self.top_k is not None:  # one alone has its own logits
            identity |= {"temperature": str(options.temperature), "average": options.average}
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        self.cache = TeacherCache(
            Path(options.cache_dir or f"runs/teacher_outputs/{key}"), identity, len(split),
            _SAMPLES_OF_A_PART,
        )

    def check(self) -> None:
        """Refuses a folder with other outputs, before anything is written.

        Raises:
            UserError: as said.
        """
        self.cache.check(self.device)

    def fill(self, rank: int, world_size: int, say: Callable[[str], object]) -> None:
        """Computes what is missing, each process its share; a killed one goes on there.

        Raises:
            UserError: the folder holds other outputs, or an output is not finite.
        """
        if self.cache.open(self.device):
            self.cache.fill(self._compute, rank, world_size, say)

    def _compute(self, samples: np.ndarray) -> dict[str, Tensor]:
        starts = range(0, len(samples), self.batch_size)
        batches = [samples[start : start + self.batch_size] for start in starts]
        parts: dict[str, list[Tensor]] = {}
        for inputs, targets in self.split.batches(batches, self.device):
            taught = self.teachers.taught(self.teachers.outputs(inputs), targets, self.temperature)
            for task in self.teachers.tasks:
                for name, tensor in self._packed(task, taught[task.name], len(inputs)).items():
                    parts.setdefault(name, []).append(tensor.cpu())
        return {name: torch.cat(tensors) for name, tensors in parts.items()}

    def _packed(self, task: Task, taught: Tensor, num_samples: int) -> dict[str, Tensor]:
        """By name, tensors whose first dimension are the samples."""
        if self.top_k is None:
            tensors = {task.name: taught}
        else:
            k = min(self.top_k, taught.shape[1])
            found = kd_losses.top_k(taught, k, self.temperature)
            tensors = {f"{task.name}.{name}": part
                       for name, part in zip(_TOP_K, found, strict=True)}
        # Rows of tokens belong to their sample.
        return {name: tensor.unflatten(0, (num_samples, -1)) if len(tensor) != num_samples
                or task.kind == "language_modeling" else tensor for name, tensor in tensors.items()}

    def read(self, samples: np.ndarray) -> dict[str, Any]:
        """By task, the form that ``SoftLoss`` takes, on the device."""
        stored = {name: tensor.to(self.device) for name, tensor in self.cache.read(samples).items()}
        taught: dict[str, Any] = {}
        for task in self.teachers.tasks:
            names = [task.name] if self.top_k is None else [f"{task.name}.{n}" for n in _TOP_K]
            parts = [stored[name] for name in names]
            if task.kind == "language_modeling":
                parts = [part.flatten(0, 1) for part in parts]
            if self.top_k is None:
                taught[task.name] = parts[0].float()
            else:
                log_probs, indices, tail = parts
                taught[task.name] = TopK(log_probs.float(), indices.long(), tail.float())
        return taught
