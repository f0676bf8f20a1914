"""The encoder and decoder for segmentation."""

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint


class UNet(nn.Module):
    """Stages at falling resolution and back, each joined to the features of its own size.

    Args:
        channels: of the input image.
        classes: outputs for each pixel.
        width: channels of the first stage; each stage below has twice as many.
        depth: number of times that height and width are halved; an image has at least 2^depth
            pixels each way.

    Source: Ronneberger et al. 2015, arXiv:1505.04597, section 2, with padding and batch norm.
    """

    def __init__(self, channels: int, classes: int, width: int = 16, depth: int = 2):
        super().__init__()
        widths = [width * 2**level for level in range(depth + 1)]
        pairs = zip([channels, *widths], widths, strict=False)
        self.down = nn.ModuleList(Stage(before, after) for before, after in pairs)
        self.up = nn.ModuleList(
            Stage(widths[level + 1] + widths[level], widths[level])
            for level in reversed(range(depth))
        )
        self.head = nn.Conv2d(width, classes, 1)
        self.recomputes = False

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each stage in the backward pass, or not."""
        self.recomputes = enable

    def forward(self, images: Tensor) -> Tensor:
        """[batch, channels, height, width] -> [batch, classes, height, width]."""
        features = self._run(self.down[0], images)
        skips = []
        for stage in self.down[1:]:
            skips.append(features)
            features = self._run(stage, functional.max_pool2d(features, 2))
        for stage in self.up:
            skip = skips.pop()
            # Nearest: the gradient of bilinear sums in no fixed order on a GPU.
            features = functional.interpolate(features, skip.shape[2:], mode="nearest")
            features = self._run(stage, torch.cat((skip, features), dim=1))
        return self.head(features)

    def _run(self, stage: nn.Module, features: Tensor) -> Tensor:
        if self.recomputes and torch.is_grad_enabled():
            return checkpoint(stage, features, use_reentrant=False)
        return stage(features)


class Stage(nn.Sequential):
    """Two 3x3 convolutions, each with batch norm and ReLU."""

    def __init__(self, in_width: int, out_width: int):
        super().__init__(
            nn.Conv2d(in_width, out_width, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_width), nn.ReLU(),
            nn.Conv2d(out_width, out_width, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_width), nn.ReLU(),
        )
