"""The multilayer perceptron."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint_sequential

from trainlib.models.heads import make_head


class MLP(nn.Sequential):
    """Fully connected layers with ReLU and dropout, over the flattened input.

    Args:
        inputs: numbers in one sample.
        classes: outputs, by task if there are several.
        hidden: width of each hidden layer; none makes a linear classifier.
        dropout: share of a hidden layer's outputs set to 0 in training.
    """

    def __init__(
        self, inputs: int, classes: int | Mapping[str, int], hidden: Sequence[int] = (256, 128),
        dropout: float = 0.3,
    ):
        layers: list[nn.Module] = [nn.Flatten()]
        width = inputs
        for next_width in hidden:
            layers += [nn.Linear(width, next_width), nn.ReLU(), nn.Dropout(dropout)]
            width = next_width
        super().__init__(*layers, make_head(width, classes))
        self.num_segments = len(hidden) + 1
        self.recomputes = False

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute hidden layers in the backward pass, or not."""
        self.recomputes = enable

    def forward(self, inputs: Tensor) -> Tensor | dict[str, Tensor]:
        """[batch, ...] -> [batch, classes], by task if there are several."""
        if self.recomputes and torch.is_grad_enabled():
            return checkpoint_sequential(self, self.num_segments, inputs, use_reentrant=False)
        return super().forward(inputs)
