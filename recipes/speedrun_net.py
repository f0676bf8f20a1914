"""The net of recipes/cifar10_speedrun.yaml: small, wide early, and quick to learn.

    --model.name recipes/speedrun_net.py:SpeedNet
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


class SpeedNet(nn.Module):
    """A fixed transform of 2x2 patches, three stages of two 3x3 convolutions, a scaled head.

    Args:
        channels: of the input image, which is at least 17 pixels high and wide.
        classes: outputs.
        widths: channels of the three stages.
        head_scale: factor of the logits.
        bias_scale: the norms' biases are multiplied by it; under SGD they so learn at its square
            times the rate.
        momentum: of the norms' running statistics.
        mirrors: in evaluation, average the logits of an image and of its mirror image.

    Shape, pooling, identity kernels, fast biases and the small head follow Jordan 2024 (airbench94,
    arXiv:2404.00498), whose first layer whitens patches by their covariance on the data. Here that
    needs no data: the cosine transform of a patch over rows, columns and colours nearly
    decorrelates natural images (Ahmed et al. 1974, doi:10.1109/T-C.1974.223784), and a norm gives
    each coefficient deviation 1.
    """

    def __init__(
        self, channels: int, classes: int, widths: tuple[int, int, int] = (64, 256, 256),
        head_scale: float = 1 / 9, bias_scale: float = 8.0, momentum: float = 0.4,
        mirrors: bool = True,
    ):
        super().__init__()
        self.head_scale, self.mirrors = head_scale, mirrors
        patches = 4 * channels
        rows = cosines(2)
        transform = torch.einsum("ax,by,cz->abcxyz", cosines(channels), rows, rows)
        kernels = transform.reshape(patches, channels, 2, 2)
        self.register_buffer("kernels", kernels, persistent=False)
        self.whiten = nn.BatchNorm2d(patches, momentum=momentum, affine=False)
        self.bias = nn.Parameter(torch.zeros(2 * patches))
        inner = (2 * patches, *widths)
        self.stages = nn.Sequential(*(
            Stage(before, after, bias_scale, momentum)
            for before, after in zip(inner[:-1], inner[1:], strict=True)))
        self.head = nn.Linear(widths[-1], classes, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """[batch, channels, height, width] -> [batch, classes]."""
        if self.training or not self.mirrors:
            return self._logits(images)
        return (self._logits(images) + self._logits(images.flip(3))) / 2

    def _logits(self, images: Tensor) -> Tensor:
        patches = self.whiten(functional.conv2d(images, self.kernels))
        features = torch.cat((patches, -patches), 1) + self.bias[:, None, None]
        features = self.stages(functional.gelu(features))
        # Not amax, whose backward looks for the maximum again: compiled, in bf16, it finds none
        # where the values were rounded otherwise, and divides 0 by 0.
        largest = functional.max_pool2d(features, features.shape[2:])
        return self.head(largest.flatten(1)) * self.head_scale


class Stage(nn.Module):
    """Two convolutions, each with norm and GELU; the first halves height and width."""

    def __init__(self, in_width: int, out_width: int, bias_scale: float, momentum: float):
        super().__init__()
        self.conv1, self.conv2 = identity(in_width, out_width), identity(out_width, out_width)
        self.norm1 = BiasedNorm(out_width, bias_scale, momentum)
        self.norm2 = BiasedNorm(out_width, bias_scale, momentum)

    def forward(self, features: Tensor) -> Tensor:
        features = functional.gelu(self.norm1(functional.max_pool2d(self.conv1(features), 2)))
        return functional.gelu(self.norm2(self.conv2(features)))


class BiasedNorm(nn.Module):
    """BatchNorm with a bias that learns fast, and without a factor."""

    def __init__(self, width: int, bias_scale: float, momentum: float):
        super().__init__()
        self.norm = nn.BatchNorm2d(width, momentum=momentum, affine=False)
        self.bias, self.bias_scale = nn.Parameter(torch.zeros(width)), bias_scale

    def forward(self, features: Tensor) -> Tensor:
        normed = self.norm(features)
        return normed + (self.bias * self.bias_scale).to(normed.dtype)[:, None, None]


def identity(in_width: int, out_width: int) -> nn.Conv2d:
    """A 3x3 convolution whose first kernels hand their channel on as it is."""
    convolution = nn.Conv2d(in_width, out_width, 3, padding=1, bias=False)
    with torch.no_grad():
        nn.init.dirac_(convolution.weight[: min(in_width, out_width)])
    return convolution


def cosines(size: int) -> Tensor:
    """[size, size]: the rows are the orthonormal cosine transform's (DCT-II)."""
    places = (torch.arange(size) + 0.5) * (math.pi / size)
    rows = torch.cos(torch.arange(size)[:, None] * places) * math.sqrt(2 / size)
    rows[0] /= math.sqrt(2)
    return rows
