"""Nets that only benchmarks need."""

from torch import Tensor, nn
from torch.nn import functional


class ResNet50(nn.Module):
    """The residual net of 50 layers for images of 224x224.

    Args:
        channels: of the input image.
        classes: outputs.
        blocks: of the four stages.
        width: channels inside the blocks of the first stage; each later one has twice as many.

    Source: He et al. 2015, arXiv:1512.03385, table 1, with the stride in the 3x3 convolution
    ("v1.5"), as all measure it today.
    """

    def __init__(
        self, channels: int, classes: int, blocks: tuple[int, ...] = (3, 4, 6, 3), width: int = 64
    ):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(channels, width, 7, 2, padding=3, bias=False),
                                  nn.BatchNorm2d(width), nn.ReLU(inplace=True),
                                  nn.MaxPool2d(3, 2, padding=1))
        layers, in_width = [], width
        for stage, number in enumerate(blocks):
            for block in range(number):
                stride = 2 if stage > 0 and block == 0 else 1
                layers.append(Bottleneck(in_width, width * 2**stage, stride))
                in_width = 4 * width * 2**stage
        self.blocks = nn.Sequential(*layers)
        self.head = nn.Linear(in_width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """[batch, channels, height, width] -> [batch, classes]."""
        return self.head(self.blocks(self.stem(images)).mean((2, 3)))


class Bottleneck(nn.Module):
    """1x1 down to ``width``, 3x3, 1x1 up to four times that, and a shortcut."""

    def __init__(self, in_width: int, width: int, stride: int):
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(in_width, width, 1, bias=False), nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, stride, padding=1, bias=False), nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width))
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_width != 4 * width:
            self.shortcut = nn.Sequential(nn.Conv2d(in_width, 4 * width, 1, stride, bias=False),
                                          nn.BatchNorm2d(4 * width))

    def forward(self, features: Tensor) -> Tensor:
        return functional.relu(self.residual(features) + self.shortcut(features))
