"""The last layer of a net, for one task or several."""

from collections.abc import Mapping

from torch import Tensor, nn


def make_head(width: int, classes: int | Mapping[str, int]) -> nn.Module:
    """A linear layer from ``width`` features to so many outputs, or one for each task."""
    return Heads(width, classes) if isinstance(classes, Mapping) else nn.Linear(width, classes)


class Heads(nn.Module):
    """A linear layer for each task.

    Args:
        width: features.
        classes: outputs by task.
    """

    def __init__(self, width: int, classes: Mapping[str, int]):
        super().__init__()
        self.tasks = list(classes)
        for task, outputs in classes.items():
            self.add_module(f"to_{task}", nn.Linear(width, outputs))

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """[batch, width] -> by task [batch, outputs]."""
        return {task: getattr(self, f"to_{task}")(features) for task in self.tasks}
