"""Training that leaves no trace: for a sweep before the run."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from trainlib.checkpoint.state import model_tensors

if TYPE_CHECKING:
    from trainlib.batchnorm import BatchStatistics
    from trainlib.ema import Ema


@contextmanager
def undone(
    module: nn.Module, optimizer: torch.optim.Optimizer, batch_statistics: "BatchStatistics",
    ema: "Ema | None", scaler: torch.amp.GradScaler | None,
) -> Iterator[None]:
    """After it weights, buffers, averages, optimizer, loss scale and random generators are what
    they were, bit for bit, whatever has been trained or raised within."""
    tensors = {name: tensor.clone() for name, tensor in model_tensors(module).items()}
    averages = {n: t.clone() for n, t in ema.tensors().items()} if ema is not None else {}
    optimizer_state = copy.deepcopy(optimizer.state_dict())
    scaler_state = scaler.state_dict() if scaler is not None else {}
    try:
        with torch.random.fork_rng():
            yield
    finally:
        with torch.no_grad():
            for name, tensor in model_tensors(module).items():
                tensor.copy_(tensors[name])
        module.zero_grad(set_to_none=True)
        optimizer.load_state_dict(optimizer_state)
        batch_statistics.count_again()
        if ema is not None:
            ema.load(averages)
        if scaler_state:
            scaler.load_state_dict(scaler_state)
