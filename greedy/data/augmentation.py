"""Random crop, horizontal flip and cutout, drawn as tables over all rows and applied by batch.

Since draws are indexed by row, a row's augmentation does not depend on the order of reading.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from greedy.base.errors import UserError, unknown

PADDINGS = {"jitter2": 2, "crop4": 4}
NAMES = ("none", *PADDINGS, "hflip")


@dataclass(frozen=True)
class Draws:
    """The random numbers of the augmentation of N rows, on the CPU."""

    shifts: Tensor
    """(N, 2): output pixel (y, x) shows pixel (y + shift 0, x + shift 1), zero outside."""
    flips: Tensor
    """(N,), bool."""
    centres: Tensor
    """(N, 2): y and x of the hole's centre."""

    def __getitem__(self, rows: Tensor | np.ndarray[Any, Any] | slice) -> "Draws":
        """Returns the draws of the given rows, in their order."""
        rows = torch.from_numpy(rows) if isinstance(rows, np.ndarray) else rows
        return Draws(self.shifts[rows], self.flips[rows], self.centres[rows])


@dataclass(frozen=True)
class Augmentation:
    """The augmentation of training images, in this order: a random crop of the image zero-padded by
    ``padding`` pixels, a horizontal flip with probability 1/2 if ``flip``, and, after
    normalisation, a square hole of side ``hole`` pixels."""

    padding: int = 0
    flip: bool = False
    hole: int = 0

    @classmethod
    def parse(cls, text: str, cutout_length: int = 0) -> "Augmentation":
        """Reads names joined by ``+``: ``none``, ``jitter2`` or ``crop4``, ``hflip``.

        Raises ``UserError`` for an unknown name, or names that exclude each other.
        """
        names = [name.strip() for name in text.split("+")]
        for name in names:
            if name not in NAMES:
                raise unknown("augmentation", name, NAMES)
        paddings = [PADDINGS[name] for name in names if name in PADDINGS]
        if len(set(names)) < len(names) or len(paddings) > 1 or ("none" in names and names[1:]):
            raise UserError(
                f"augmentation {text!r} repeats or contradicts itself: "
                "give none, or one of jitter2, crop4 and hflip joined by +"
            )
        if cutout_length < 0:
            raise UserError(f"cutout_length is {cutout_length}: give 0 or more pixels")
        return cls(sum(paddings), "hflip" in names, cutout_length)

    def require_image_size(self, height: int, width: int) -> None:
        """Raises ``UserError`` for images that are no larger than their padding."""
        if self.padding >= min(height, width):
            raise UserError(
                f"images of {height}x{width} are too small to be shifted by {self.padding} pixels: "
                "set data.augmentation without a crop"
            )

    def draw(self, rows: int, height: int, width: int, generator: torch.Generator) -> Draws:
        """Draws independently for ``rows`` images of ``height`` x ``width``.

        Raises ``UserError`` where the image is no larger than its padding.
        """
        self.require_image_size(height, width)

        def uniform(low: int, high: int) -> Tensor:
            return torch.randint(low, high, (rows,), generator=generator)

        reach = (-self.padding, self.padding + 1)
        shifts = torch.stack((uniform(*reach), uniform(*reach)), dim=1)
        flips = uniform(0, 1 + self.flip).bool()
        return Draws(shifts, flips, torch.stack((uniform(0, height), uniform(0, width)), dim=1))

    def apply(self, images: Tensor, draws: Draws) -> Tensor:
        """Returns the images (B, C, H, W) of any dtype, cropped, then flipped, by their B draws."""
        if not (self.padding or self.flip):
            return images
        channels, height, width = images.shape[1:]
        shifts = draws.shifts.to(images.device, non_blocking=True)
        flips = draws.flips.to(images.device, non_blocking=True)
        y = torch.arange(height, device=images.device)
        x = torch.arange(width, device=images.device)
        x = torch.where(flips[:, None], x.flip(0), x)
        y, x = y + shifts[:, :1] + self.padding, x + shifts[:, 1:] + self.padding
        pixels = y[:, :, None] * (width + 2 * self.padding) + x[:, None, :]
        padded = F.pad(images, [self.padding] * 4).flatten(2)
        pixels = pixels.flatten(1)[:, None].expand(-1, channels, -1)
        return padded.gather(2, pixels).view(images.shape)

    def cutout(self, images: Tensor, draws: Draws) -> Tensor:
        """Returns the normalised images (B, C, H, W) with one hole of zeros in each: on each axis
        the pixels [c - L // 2, c + L // 2) around the drawn centre c, clipped at the border."""
        if not self.hole:
            return images
        half = self.hole // 2
        centres = draws.centres.to(images.device, non_blocking=True)

        def covered(axis: int) -> Tensor:
            pixel = torch.arange(images.shape[2 + axis], device=images.device)
            centre = centres[:, axis, None]
            return (pixel >= centre - half) & (pixel < centre + half)

        hole = covered(0)[:, :, None] & covered(1)[:, None, :]
        return images.masked_fill(hole[:, None], 0.0)


def normalise(
    images: Tensor, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor
) -> Tensor:
    """Returns (image - mean) / std, channel by channel: images (B, C, H, W), mean and std (C,)."""

    def channelwise(values: Sequence[float] | Tensor) -> Tensor:
        return torch.as_tensor(values, dtype=images.dtype, device=images.device).view(-1, 1, 1)

    return (images - channelwise(mean)).div_(channelwise(std))


def prepare(
    images: Tensor,
    mean: Sequence[float] | Tensor,
    std: Sequence[float] | Tensor,
    augmentation: Augmentation | None = None,
    draws: Draws | None = None,
) -> Tensor:
    """Returns a raw batch (B, C, H, W) as the network's input, float32 on the batch's device:
    cropped and flipped, uint8 scaled to [0, 1], normalised, with cutout. Float images are not
    scaled.

    Training gives an augmentation and the B rows' draws, evaluation neither. Raises ``ValueError``
    where one is given without the other.
    """
    if (augmentation is None) != (draws is None):
        raise ValueError("an augmentation and its draws belong together: give both or neither")
    if augmentation is not None and draws is not None:
        images = augmentation.apply(images, draws)
    images = images.float().div_(255) if images.dtype == torch.uint8 else images.float()
    images = normalise(images, mean, std)
    if augmentation is not None and draws is not None:
        images = augmentation.cutout(images, draws)
    return images
