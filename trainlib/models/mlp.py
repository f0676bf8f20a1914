"""The multilayer perceptron."""

from collections.abc import Sequence

from torch import nn


def mlp(
    inputs: int, classes: int, hidden: Sequence[int] = (256, 128), dropout: float = 0.3
) -> nn.Sequential:
    """Fully connected layers with ReLU and dropout, over the flattened input.

    Args:
        inputs: numbers in one sample.
        classes: outputs.
        hidden: width of each hidden layer; none makes a linear classifier.
        dropout: share of a hidden layer's outputs set to 0 in training.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    width = inputs
    for next_width in hidden:
        layers += [nn.Linear(width, next_width), nn.ReLU(), nn.Dropout(dropout)]
        width = next_width
    return nn.Sequential(*layers, nn.Linear(width, classes))
