"""What a model does with its inputs before its own first layer.

The scale of the inputs is part of a trained model: it lies in two buffers beside the weights, so
that whoever has the weights has it, and the names of the net's own parameters do not change.
"""

from typing import Any

import torch
from torch import Tensor, nn

from trainlib.config import UserError

INPUT_BUFFERS = ("input_mean", "input_deviation")


def prepare_inputs(
    model: nn.Module, mean: Tensor | None, deviation: Tensor | None, channels_last: bool
) -> None:
    """Makes the model scale its first argument to (inputs - mean) / deviation.

    Args:
        mean, deviation: broadcast against one sample; none: inputs are taken as they are.
        channels_last: also lay images [batch, channels, height, width] out with channels last.

    Raises:
        UserError: the model has something of its own by the names of the two buffers.
    """
    for name in INPUT_BUFFERS:
        if hasattr(model, name):
            raise UserError(f"model: the net has an attribute {name!r}, where the scale of the "
                            "inputs is kept; rename it")
    scale_inputs(model, mean, deviation, channels_last)


def scale_inputs(
    model: nn.Module, mean: Tensor | None, deviation: Tensor | None, channels_last: bool
) -> None:
    """What ``prepare_inputs`` does, unchecked."""
    if mean is not None:
        for name, value in zip(INPUT_BUFFERS, (mean, deviation), strict=True):
            model.register_buffer(name, value.clone())
        model.register_forward_pre_hook(_scale)
    if channels_last:
        model.register_forward_pre_hook(_lay_out)


def _scale(model: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return ((args[0] - model.input_mean) / model.input_deviation, *args[1:])


def _lay_out(model: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    inputs = args[0]
    if inputs.ndim == 4:
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    return (inputs, *args[1:])
