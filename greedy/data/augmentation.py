"""The augmentation of training images, drawn as tables over all rows and applied by batch.

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
from greedy.data.operations import ColorJitter, Erasing, Operation, ResizedCrop
from greedy.data.randaugment import RandAugment
from greedy.recipes.schema import AUGMENTATIONS, CROPS

PADDINGS = {"jitter2": 2, "crop4": 4}
OPERATIONS: dict[str, Operation] = {
    operation.name: operation
    for operation in (ResizedCrop(), RandAugment(), ColorJitter(), Erasing())
}  # in the order in which they are applied
NAMES = ("none", *PADDINGS, "hflip", *OPERATIONS)
AT_ONCE = 2**20  # values of the images that an operation takes at a time


@dataclass(frozen=True)
class Draws:
    """The random numbers of the augmentation of N rows, on the CPU."""

    shifts: Tensor
    """(N, 2): output pixel (y, x) shows pixel (y + shift 0, x + shift 1), zero outside."""
    flips: Tensor
    """(N,), bool."""
    centres: Tensor
    """(N, 2): y and x of the hole's centre."""
    tables: tuple[Tensor, ...] = ()
    """(N, ...) for each other operation."""

    def __getitem__(self, rows: Tensor | np.ndarray[Any, Any] | slice) -> "Draws":
        """Returns the draws of the given rows, in their order."""
        rows = torch.from_numpy(rows) if isinstance(rows, np.ndarray) else rows
        tables = tuple(table[rows] for table in self.tables)
        return Draws(self.shifts[rows], self.flips[rows], self.centres[rows], tables)


@dataclass(frozen=True)
class Augmentation:
    """The augmentation of training images, in this order: a random crop of the image zero-padded by
    ``padding`` pixels, a horizontal flip with probability 1/2 if ``flip``, and, after
    normalisation, a square hole of side ``hole`` pixels; and other operations, each before, between
    or after these as its ``place`` says."""

    padding: int = 0
    flip: bool = False
    hole: int = 0
    operations: tuple[Operation, ...] = ()

    @classmethod
    def parse(cls, text: str, cutout_length: int = 0) -> "Augmentation":
        """Reads names joined by ``+``: ``none``, or one of ``jitter2``, ``crop4`` and
        ``random-resized-crop``, ``hflip``, ``randaugment``, ``color-jitter``, ``random-erasing``.

        Raises ``UserError`` for an unknown name, or names that exclude each other.
        """
        names = [name.strip() for name in text.split("+")]
        for name in names:
            if name not in NAMES:
                raise unknown("augmentation", name, NAMES)
        crops = CROPS.intersection(names)
        if len(set(names)) < len(names) or len(crops) > 1 or ("none" in names and names[1:]):
            raise UserError(f"augmentation {text!r} repeats or contradicts itself: {AUGMENTATIONS}")
        if cutout_length < 0:
            raise UserError(f"cutout_length is {cutout_length}: give 0 or more pixels")
        padding = sum(PADDINGS.get(name, 0) for name in names)
        others = tuple(OPERATIONS[name] for name in OPERATIONS if name in names)
        return cls(padding, "hflip" in names, cutout_length, others)

    def require_image_size(self, height: int, width: int) -> None:
        """Raises ``UserError`` for images that are no larger than their padding."""
        if self.padding >= min(height, width):
            raise UserError(
                f"images of {height}x{width} are too small to be shifted by {self.padding} pixels: "
                "set data.augmentation without a crop"
            )

    def require_channels(self, channels: int) -> None:
        """Raises ``UserError`` for images that are neither grey nor in three colours where an
        operation needs to know their colours."""
        names = [each.name for each in self.operations if each.place == "flipped"]
        if names and channels not in (1, 3):
            raise UserError(
                f"{names[0]} changes colours, and images of {channels} channels have none that it "
                f"knows: leave it out of data.augmentation"
            )

    def require_values(self, images: Tensor) -> None:
        """Raises ``UserError`` for images whose values an operation does not know."""
        for operation in self.operations:
            operation.require_values(images)

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
        centres = torch.stack((uniform(0, height), uniform(0, width)), dim=1)
        tables = (each.draw(rows, height, width, generator) for each in self.operations)
        return Draws(shifts, flips, centres, tuple(tables))

    def apply(self, images: Tensor, draws: Draws) -> Tensor:
        """Returns the images (B, C, H, W) of any dtype, cropped, flipped and in other colours, by
        their B draws."""
        images = self._operated(images, draws, "raw")
        if self.padding or self.flip:
            images = self._shifted(images, draws)
        return self._operated(images, draws, "flipped")

    def _operated(self, images: Tensor, draws: Draws, place: str) -> Tensor:
        """Applies the operations of a place, each to a few images at a time, so that their
        intermediate results take little memory."""
        rows = max(1, AT_ONCE // images[0].numel())
        for operation, table in zip(self.operations, draws.tables, strict=True):
            if operation.place == place:
                pairs = zip(images.split(rows), table.split(rows), strict=True)
                parts = [operation.apply(*pair) for pair in pairs]
                images = torch.cat(parts) if len(parts) > 1 else parts[0]
        return images

    def _shifted(self, images: Tensor, draws: Draws) -> Tensor:
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
        the pixels [c - L // 2, c + L // 2) around the drawn centre c, clipped at the border; and
        with what other operations erase."""
        if self.hole:
            images = self._with_hole(images, draws)
        return self._operated(images, draws, "normalised")

    def _with_hole(self, images: Tensor, draws: Draws) -> Tensor:
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
