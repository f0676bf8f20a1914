"""Batch augmentation on the device: pure functions of the inputs and torch's default generator.

Images are [batch, channels, height, width] fp32 in [0, 1], and each has its own draw, from the
generator of the device where the images are. Nothing here keeps state or waits for a GPU, and
every shape is fixed: seed the generator with the key of a micro-batch, and the result is the same
wherever that micro-batch runs. Of the targets only masks change, with the pixels they belong to.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class Mix(NamedTuple):
    """Whose target each sample of a mixed micro-batch has besides its own, and by how much."""

    partner: Tensor
    """[batch] int64: a row of the same micro-batch."""
    share: Tensor
    """[batch] fp32 in [0, 1]: the share of the sample's own target."""

    def blend(self, own: Tensor, other: Tensor) -> Tensor:
        """share * own + (1 - share) * other: [batch, ...] inputs, or losses, floating point.

        Of losses, ``other`` is the same output's against ``target[partner]``; so no loss needs
        soft labels, and the cross entropy equals the one with them.
        """
        # lerp, unlike the formula above, gives a sample that is mixed with itself back exactly.
        return torch.lerp(other, own, _over(self.share, own).to(own.dtype))


def _over(values: Tensor, inputs: Tensor) -> Tensor:
    """[batch] as [batch, 1, ...], to go with inputs of any shape."""
    return values.view(-1, *[1] * (inputs.ndim - 1))


def _uniform(inputs: Tensor, bound: float) -> Tensor:
    """[batch] fp32, uniform in [-bound, bound)."""
    return bound * (2 * torch.rand(len(inputs), device=inputs.device) - 1)


def shifted_crop(images: Tensor, pixels: int) -> Tensor:
    """Each image shifted by up to ``pixels`` each way, every shift as likely, with 0 behind it.

    The same as padding with 0 and cropping at random (He et al. 2016, arXiv:1512.03385,
    section 4.2: 4 pixels for CIFAR-10).
    """
    batch, _, height, width = images.shape
    padded = functional.pad(images, (pixels,) * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view: every shift of every image
    top, left = torch.randint(2 * pixels + 1, (2, batch), device=images.device)
    return windows[torch.arange(batch, device=images.device), :, top, left]


def flip(images: Tensor, probability: float) -> Tensor:
    """Each image mirrored left to right with a probability."""
    is_flipped = torch.rand(len(images), device=images.device) < probability
    return torch.where(_over(is_flipped, images), images.flip(3), images)


def rotate(images: Tensor, degrees: float) -> Tensor:
    """Each image turned about its centre by an angle uniform in [-degrees, degrees].

    Bilinear, with 0 beyond the border; positive is counterclockwise.
    """
    height, width = images.shape[2:]
    angle = _uniform(images, math.radians(degrees))[:, None, None]
    # In pixels from the centre, so that images that are not square keep their proportions. Not
    # affine_grid, whose matrix product may run in TF32, too coarse for coordinates.
    x = torch.arange(width, device=images.device) - (width - 1) / 2
    y = (torch.arange(height, device=images.device) - (height - 1) / 2)[:, None]
    source_x = angle.cos() * x - angle.sin() * y
    source_y = angle.sin() * x + angle.cos() * y
    grid = torch.stack((source_x * (2 / width), source_y * (2 / height)), dim=3)
    return functional.grid_sample(images, grid, align_corners=False)


def brightness_contrast(images: Tensor, brightness: float, contrast: float) -> Tensor:
    """Each image's distances from its mean grey, then its values, times a factor.

    The factors are uniform in [1 - contrast, 1 + contrast] and [1 - brightness, 1 + brightness];
    the mean is over channels and pixels; the result is clamped to [0, 1].
    """
    light = _over(1 + _uniform(images, brightness), images)
    spread = _over(1 + _uniform(images, contrast), images)
    mean = images.mean((1, 2, 3), keepdim=True)
    return (torch.lerp(mean, images, spread) * light).clamp(0, 1)


def _boxes(images: Tensor, *sides: Tensor) -> Tensor:
    """[batch, 1, height, width] bool: boxes of [batch] heights and widths, uniform centres."""
    spans = []
    for side, length in zip(sides, images.shape[2:], strict=True):
        first = torch.randint(length, side.shape, device=side.device) - side // 2
        offset = torch.arange(length, device=side.device) - first[:, None]
        spans.append((offset >= 0) & (offset < side[:, None]))
    return spans[0][:, None, :, None] & spans[1][:, None, None, :]


def cutout(images: Tensor, size: int) -> Tensor:
    """Each image with a square of ``size`` pixels blanked, its centre uniform over the image.

    It is cut off at the borders, and filled with the image's own mean of each channel: the source
    fills with 0 because its inputs are normalised, so that 0 is the mean there.

    Source: DeVries & Taylor 2017, arXiv:1708.04552, section 3.
    """
    side = torch.full((len(images),), size, device=images.device)
    is_cut = _boxes(images, side, side)
    return torch.where(is_cut, images.mean((2, 3), keepdim=True), images)


def _draw_mix(inputs: Tensor, alpha: float) -> Mix:
    """Each sample and its neighbour, with a share from Beta(alpha, alpha).

    The neighbour is as good as a random partner, since the plan's order is random already.

    Source: if 2x - 1 = c / sqrt(1 + c^2) and c * sqrt(2 alpha) has Student's t distribution of
    2 alpha degrees of freedom, x is Beta(alpha, alpha); such a c is sqrt(q^-1 - 1) cos(2 pi v)
    with q = u^(1/alpha), u and v uniform (Bailey 1994, "Polar Generation of Random Variates with
    the t-Distribution"). Two draws for any alpha, where samplers that reject need a loop.
    """
    u, v = torch.rand(2, len(inputs), device=inputs.device)
    q, angle = u ** (1 / alpha), 2 * math.pi * v
    # c / sqrt(1 + c^2) multiplied out: q may underflow to 0, c never appears.
    cosine = angle.cos() * ((1 - q) / (angle.cos() ** 2 + q * angle.sin() ** 2)).sqrt()
    partner = torch.arange(len(inputs), device=inputs.device).roll(1)
    return Mix(partner, ((1 + cosine) / 2).clamp(0, 1))


def mixup(inputs: Tensor, alpha: float) -> tuple[Tensor, Mix]:
    """Each sample blended with its partner; the share is from Beta(alpha, alpha).

    Args:
        inputs: [batch, ...] floating point.
        alpha: > 0; 1 is uniform, towards 0 almost nothing is mixed.

    Source: Zhang et al. 2018, arXiv:1710.09412, equation 1.
    """
    mix = _draw_mix(inputs, alpha)
    return mix.blend(inputs, inputs[mix.partner]), mix


def cutmix(images: Tensor, alpha: float) -> tuple[Tensor, Mix]:
    """Each image with a box pasted from the same place of its partner.

    The box has the image's proportions, 1 - share of its area, and a uniform centre. It is cut
    off at the borders, so the share returned is that of the pixels that are the image's own.

    Args:
        images: [batch, channels, height, width].
        alpha: > 0; the share that sizes the box is from Beta(alpha, alpha).

    Source: Yun et al. 2019, arXiv:1905.04899, section 3.1, equations 1 and 2.
    """
    height, width = images.shape[2:]
    mix = _draw_mix(images, alpha)
    scale = (1 - mix.share).sqrt()
    is_pasted = _boxes(images, *((scale * n).round().long() for n in (height, width)))
    share = 1 - is_pasted.sum((1, 2, 3)) / (height * width)
    return torch.where(is_pasted, images[mix.partner], images), Mix(mix.partner, share)


@dataclass(frozen=True, kw_only=True)
class Augment:
    """The augmentations that are on, in this order; with none on, the inputs as they are."""

    rotation: float = 0.0  # degrees
    crop: int = 0  # pixels
    flip: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    function: Callable[[Tensor], Tensor] | None = None
    """The user's own, inputs to inputs; it draws from torch's default generator alone."""
    cutout: int = 0  # pixels
    mixup: float = 0.0  # alpha; with cutmix too, a fair coin gives each sample one of them
    cutmix: float = 0.0  # alpha
    masks: tuple[str, ...] = ()
    """The targets that are masks [batch, height, width]: they are cropped and flipped like the
    images, and what a crop leaves is ignored. A step still divides by its pixels before that."""
    ignored: int = -100  # the class number of such pixels

    @cached_property
    def _is_on(self) -> bool:
        return any((self.rotation, self.crop, self.flip, self.brightness, self.contrast,
                    self.function, self.cutout, self.mixup, self.cutmix))

    def __call__(
        self, inputs: Tensor, targets: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor], Mix | None]:
        """A training micro-batch, augmented, and how its targets are mixed, if at all."""
        return self._augmented(inputs, targets) if self._is_on else (inputs, targets, None)

    @torch.no_grad()
    def _augmented(
        self, inputs: Tensor, targets: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor], Mix | None]:
        if self.masks and (self.crop or self.flip):
            # As further channels, so that pixels stay together; 0, which is behind a crop, is
            # the ignored class there.
            masks = torch.stack([targets[name] - self.ignored for name in self.masks], 1)
            both = self._moved(torch.cat((inputs, masks.to(inputs.dtype)), 1))
            inputs, masks = both.split((inputs.shape[1], len(self.masks)), 1)
            moved = (masks.long() + self.ignored).unbind(1)
            targets = targets | dict(zip(self.masks, moved, strict=True))
        else:
            inputs = self._moved(inputs)
        inputs, mix = self._changed(inputs)
        return inputs, targets, mix

    def _moved(self, images: Tensor) -> Tensor:
        if self.rotation:
            images = rotate(images, self.rotation)
        if self.crop:
            images = shifted_crop(images, self.crop)
        if self.flip:
            images = flip(images, self.flip)
        return images

    def _changed(self, inputs: Tensor) -> tuple[Tensor, Mix | None]:
        if self.brightness or self.contrast:
            inputs = brightness_contrast(inputs, self.brightness, self.contrast)
        if self.function is not None:
            inputs = self.function(inputs)
        if self.cutout:
            inputs = cutout(inputs, self.cutout)
        if self.mixup and self.cutmix:
            blended, blend = mixup(inputs, self.mixup)
            pasted, paste = cutmix(inputs, self.cutmix)
            is_pasted = torch.rand(len(inputs), device=inputs.device) < 0.5
            share = torch.where(is_pasted, paste.share, blend.share)  # both have one partner
            return torch.where(_over(is_pasted, inputs), pasted, blended), Mix(paste.partner, share)
        if self.mixup:
            return mixup(inputs, self.mixup)
        if self.cutmix:
            return cutmix(inputs, self.cutmix)
        return inputs, None

    def try_on(self, inputs: Tensor) -> None:
        """Refuses options that do not fit the inputs; these and the generator stay as they are.

        Args:
            inputs: [batch, ...], some samples of the data set.

        Raises:
            ValueError: an option does not fit, or the function returns another type or shape.
        """
        given = _kind(inputs)
        for name in ("rotation", "cutmix"):
            if self.masks and getattr(self, name):
                raise ValueError(f"data.augment.{name} is not for masks, which task "
                                 f"{self.masks[0]!r} has; set it to 0, and use crop and flip, "
                                 "which take them along")
        for name in ("rotation", "crop", "flip", "brightness", "contrast", "cutout", "cutmix"):
            if getattr(self, name) and (inputs.ndim != 4 or inputs.dtype != torch.float32):
                raise ValueError(f"data.augment.{name} is for images, float32 [batch, channels, "
                                 f"height, width]; these inputs are {given}; set it to 0")
        if self.mixup and not inputs.is_floating_point():
            raise ValueError("data.augment.mixup averages inputs, which takes floating point; "
                             f"these are {given}; set it to 0")
        for name in ("crop", "cutout"):
            if getattr(self, name) and getattr(self, name) >= (side := min(inputs.shape[2:])):
                raise ValueError(f"data.augment.{name} is less than the images' shorter side, or "
                                 f"nothing may be left of them; that is {side} pixels, got "
                                 f"{getattr(self, name)}; give at most {side - 1}")
        if (self.brightness or self.contrast) and not 0 <= inputs.min() <= inputs.max() <= 1:
            raise ValueError("data.augment.brightness and contrast are for images in [0, 1]; these "
                             f"reach from {inputs.min():.3g} to {inputs.max():.3g}; set both to 0")
        if self.function is None:
            return
        with torch.no_grad(), torch.random.fork_rng([inputs.device] if inputs.is_cuda else []):
            result = self.function(inputs.clone())
        if _kind(result) != given:
            raise ValueError("data.augment.function returns what it is given in type, shape and "
                             f"device; given {given}, it returned {_kind(result)}")


def _kind(value: object) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"{value.dtype} {list(value.shape)} on {value.device}".removeprefix("torch.")
