"""Which data a run is trained on, as a short text, so that other data can be refused.

What loading has measured is taken as it is, and only some samples are read again, so it costs a
fraction of a second. Where the data lie, and how they are read, leaves no trace.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from trainlib.data.loading import Dataset
from trainlib.data.reading import Split
from trainlib.data.targets import TargetInfo

_LEAST_SAMPLES = 64  # of each split, evenly spaced, whose inputs are read again
_LEAST_BYTES = 2**22  # of inputs: samples that are small are read again in larger numbers
_STEPS = 2**20  # of a column's size: a target that moves by less than one need not show


def fingerprint(dataset: Dataset) -> str:
    """Hex digits that are others if samples, their order, their targets or the columns are.

    All texts count, and so do all targets but masks. Of masks and other inputs some samples count
    in full, the rest by their mean and deviation, or by how many pixels are not ignored.
    """
    digest = hashlib.sha256()
    tasks = {name: [info.label_names, info.vocab_size] for name, info in dataset.targets.items()}
    texts = [getattr(split.decode, "tokens", None) for split in (dataset.train, dataset.validation)]
    known = [dataset.inputs, dataset.token_range, dataset.pad_id, sorted(tasks.items()),
             [tokens and tokens.fingerprint for tokens in texts]]
    digest.update(json.dumps(known).encode())
    for tensor in _tensors(dataset):
        values = tensor.cpu().contiguous().numpy()
        values = values.astype(values.dtype.newbyteorder("<"), copy=False)
        # With its type and shape, as [1, 2] and [3] are not [1] and [2, 3].
        digest.update(json.dumps([values.dtype.str, values.shape]).encode())
        digest.update(values.reshape(-1).view(np.uint8))
    return digest.hexdigest()[:32]


def _tensors(dataset: Dataset) -> Iterator[Tensor]:
    """All that is told apart by its bytes."""
    if dataset.mean is not None:
        # Of inputs with mean 0 it is rounding alone, which the number of threads decides; in fp32
        # the sum has none of it left.
        yield from (dataset.deviation, dataset.mean + dataset.deviation)
    for split in (dataset.train, dataset.validation):
        yield split.rows
        read_along = []  # these are in memory or not, as the inputs are
        for name, info in sorted(dataset.targets.items()):
            if name in split.classes or info.vocab_size:
                read_along.append(name)
                yield split.num_valid[name]
            else:
                yield from _whole(split.targets[name], info)
        yield from _samples(split, read_along)


def _whole(targets: Tensor, info: TargetInfo) -> Iterator[Tensor]:
    """The targets of all samples; numbers as they were before they were scaled, and rounded.

    The last bits of their mean and deviation depend on the number of threads and the processor.
    """
    if info.mean:
        mean, deviation = np.array(info.mean), np.array(info.deviation)
        fraction, exponent = np.frexp(np.abs(mean) + deviation)
        size = torch.from_numpy(np.ldexp(np.round(fraction * 2**24), exponent - 24))
        yield size
        numbers = targets.cpu().double() * torch.from_numpy(deviation) + torch.from_numpy(mean)
        targets = (numbers / size * _STEPS).round() + 0.0  # which makes 0 of -0
    if targets.is_floating_point():
        targets = targets.nan_to_num(math.inf)  # what is missing; there are many NaNs
    yield targets


def _samples(split: Split, names: list[str]) -> Iterator[Tensor]:
    """Inputs and some targets of evenly spaced samples, the first and the last among them."""
    sample_bytes = split.read(np.zeros(1, np.int64))[0].nbytes
    at_once = max(1, _LEAST_BYTES // sample_bytes)
    count = min(len(split), max(_LEAST_SAMPLES, at_once))
    samples = np.arange(count) * (len(split) - 1) // max(1, count - 1)
    for start in range(0, count, at_once):
        inputs, targets = split.read(samples[start : start + at_once])
        yield inputs
        yield from (targets[name] for name in names)
