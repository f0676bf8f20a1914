"""The residual network for small images."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from trainlib.models.heads import make_head


class ResNet(nn.Module):
    """Three stages of basic blocks over a 3x3 stem, with a projection where the width changes.

    Args:
        channels: of the input image.
        classes: outputs, by task if there are several.
        depth: 6n + 2 layers, n blocks a stage.
        width: channels of the first stage; the others have 2 and 4 times as many.

    Raises:
        ValueError: no such depth.

    Source: He et al. 2016, arXiv:1512.03385, section 4.2, with projection shortcuts (option B).
    """

    def __init__(
        self, channels: int, classes: int | Mapping[str, int], depth: int = 8, width: int = 16
    ):
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"depth is 6n + 2 (8, 14, 20, ...), got {depth}")
        self.stem = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(width)
        blocks = []
        in_width = width
        for stage in range(3):
            out_width = width * 2**stage
            for block in range((depth - 2) // 6):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(BasicBlock(in_width, out_width, stride))
                in_width = out_width
        self.blocks = nn.Sequential(*blocks)
        self.head = make_head(in_width, classes)
        self.recomputes = False

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass, or not."""
        self.recomputes = enable

    def forward(self, images: Tensor) -> Tensor | dict[str, Tensor]:
        """[batch, channels, height, width] -> [batch, classes], by task if there are several."""
        features = functional.relu(self.stem_norm(self.stem(images)))
        for block in self.blocks:
            if self.recomputes and torch.is_grad_enabled():
                features = checkpoint(block, features, use_reentrant=False)
            else:
                features = block(features)
        return self.head(features.mean((2, 3)))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, in_width: int, out_width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_width, out_width, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_width)
        self.conv2 = nn.Conv2d(out_width, out_width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_width != out_width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_width, out_width, 1, stride, bias=False), nn.BatchNorm2d(out_width)
            )

    def forward(self, features: Tensor) -> Tensor:
        residual = functional.relu(self.norm1(self.conv1(features)))
        residual = self.norm2(self.conv2(residual))
        return functional.relu(residual + self.shortcut(features))
