"""Random operations on images, with the distributions and values of torchvision's transforms.

Each draws one row of a table for every image, and changes an image by its row alone: a batch's
images do not depend on each other.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torchvision.transforms.functional import rgb_to_grayscale

from greedy.base.errors import UserError

TRIES = 10  # to find a box that is within the image
OVERSHOT = 0.5  # by which values may lie outside 0 to 1: a bicubic resizing gives -0.3 to 1.3
FEW = 0.2  # the share of values that may


class Operation(Protocol):
    """A random operation on images.

    Attributes:
        name: its name in a recipe.
        place: ``raw``, ``flipped`` or ``normalised``: whether it takes the image as stored, cropped
            and flipped, or normalised.
    """

    name: ClassVar[str]
    place: ClassVar[str]

    def draw(self, rows: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        """Draws for ``rows`` images of ``height`` x ``width``. Returns a table (rows, ...)."""

    def require_values(self, images: Tensor) -> None:
        """Raises ``UserError`` for images (B, C, H, W) of values that it does not know."""

    def apply(self, images: Tensor, table: Tensor) -> Tensor:
        """Returns images (B, C, H, W), each changed by its row of a table (B, ...) on the CPU."""


@dataclass(frozen=True)
class ResizedCrop:
    """A part of the image resized to the image's size: ``RandomResizedCrop`` with its defaults."""

    name: ClassVar[str] = "random-resized-crop"
    place: ClassVar[str] = "raw"

    def draw(self, rows: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        """Draws top, left, height and width of each part."""
        heights, widths = _sizes(rows, height * width, (0.08, 1), (3 / 4, 4 / 3), generator)
        fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
        boxes, found = _boxes(heights, widths, fits, height, width, generator)
        ratio = min(max(width / height, 3 / 4), 4 / 3)
        whole = min(height, round(width / ratio)), min(width, round(height * ratio))
        centre = [(height - whole[0]) // 2, (width - whole[1]) // 2, *whole]
        return torch.where(found[:, None], boxes, torch.tensor(centre))

    def require_values(self, images: Tensor) -> None:
        """Takes any values."""

    def apply(self, images: Tensor, table: Tensor) -> Tensor:
        """Crops each image to its box and resizes that, bilinearly, to the image's size."""
        floats = images.float() if images.dtype == torch.uint8 else images
        for dim, start, length in ((2, table[:, 0], table[:, 2]), (3, table[:, 1], table[:, 3])):
            floats = _stretched(floats, dim, start, length)
        return floats.round_().to(images.dtype) if images.dtype == torch.uint8 else floats


@dataclass(frozen=True)
class ColorJitter:
    """Brightness, contrast and saturation changed by factors, in random order:
    ``ColorJitter(0.4, 0.4, 0.4)``."""

    name: ClassVar[str] = "color-jitter"
    place: ClassVar[str] = "flipped"

    def draw(self, rows: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        """Draws the order of the three, and their factors, as (rows, 6)."""
        order, factors = torch.rand(2, rows, 3, generator=generator, dtype=torch.float64)
        return torch.cat((order.argsort(dim=1), 0.6 + 0.8 * factors), dim=1)

    def require_values(self, images: Tensor) -> None:
        """Raises ``UserError`` unless images are of bytes, or floats from 0 to 1: it clamps others,
        which does little to those that resizing a photo takes out of this range."""
        if images.dtype == torch.uint8 or not images.numel():
            return
        least, most = float(images.min()), float(images.max())
        outside = 0.0
        if least < 0 or most > 1:
            outside = float(((images < 0) | (images > 1)).float().mean())
        if not (-OVERSHOT <= least <= most <= 1 + OVERSHOT and outside <= FEW):
            raise UserError(
                f"{self.name} takes bytes, or floats from 0 to 1, and there are images with "
                f"values from {least:g} to {most:g}: leave it out of data.augmentation, or scale "
                f"them"
            )

    def apply(self, images: Tensor, table: Tensor) -> Tensor:
        """Blends each image with black, with its mean grey and with its own greys."""
        self.require_values(images)
        images = images.clone()
        others = [torch.zeros_like, _mean_grey, rgb_to_grayscale]
        if images.shape[1] == 1:  # grey has no saturation
            others.pop()
        for position in range(3):
            for which, other in enumerate(others):
                rows = (table[:, position] == which).nonzero().flatten()
                if len(rows):
                    at = rows.to(images.device)
                    part = images[at]
                    images[at] = _blend(part, other(part), table[rows, 3 + which])
        return images


@dataclass(frozen=True)
class Erasing:
    """A box of zeros in half of the normalised images: ``RandomErasing`` with its defaults."""

    name: ClassVar[str] = "random-erasing"
    place: ClassVar[str] = "normalised"

    def draw(self, rows: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        """Draws top, left, height and width of each box, all 0 for none."""
        widths, heights = _sizes(rows, height * width, (0.02, 0.33), (0.3, 3.3), generator)
        fits = (heights < height) & (widths < width)
        boxes, found = _boxes(heights, widths, fits, height, width, generator)
        found &= torch.rand(rows, generator=generator) < 0.5
        return boxes * found[:, None]

    def require_values(self, images: Tensor) -> None:
        """Takes any values."""

    def apply(self, images: Tensor, table: Tensor) -> Tensor:
        """Sets each image's box to 0."""

        def covered(axis: int) -> Tensor:
            pixel = torch.arange(images.shape[2 + axis], device=images.device)
            start, length = table[:, axis, None], table[:, 2 + axis, None]
            first, end = (edge.to(images.device) for edge in (start, start + length))
            return (pixel >= first) & (pixel < end)

        box = covered(0)[:, :, None] & covered(1)[:, None, :]
        return images.masked_fill(box[:, None], 0.0)


def _sizes(
    rows: int,
    area: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Draws two sides (rows, TRIES) of boxes: their share of the area and the logarithm of the
    second's ratio to the first are uniform."""
    share, shape = torch.rand(2, rows, TRIES, generator=generator, dtype=torch.float64)
    low, high = math.log(ratio[0]), math.log(ratio[1])
    areas = area * (scale[0] + (scale[1] - scale[0]) * share)
    ratios = (low + (high - low) * shape).exp()
    return (areas / ratios).sqrt().round().long(), (areas * ratios).sqrt().round().long()


def _boxes(
    heights: Tensor,
    widths: Tensor,
    fits: Tensor,
    height: int,
    width: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Takes the first box (rows, TRIES) of each row that fits, and draws its place in the image.
    Returns top, left, height and width (rows, 4), and whether there is one (rows,)."""
    first = fits.to(torch.uint8).argmax(dim=1, keepdim=True)
    h, w = heights.gather(1, first), widths.gather(1, first)
    places = torch.rand(len(h), 2, generator=generator, dtype=torch.float64)
    room = torch.cat((height - h, width - w), dim=1).clamp_(min=0)
    return torch.cat(((places * (room + 1)).long(), h, w), dim=1), fits.any(dim=1)


def _stretched(images: Tensor, dim: int, start: Tensor, length: Tensor) -> Tensor:
    """Returns images (B, C, H, W) whose pixels from ``start``, ``length`` of them (B,), fill the
    dimension ``dim``, interpolated linearly; no part is made smaller, so that no pixel is left
    out."""
    side = images.shape[dim]
    pixels = (torch.arange(side) + 0.5) * (length[:, None] / side) - 0.5
    below = pixels.clamp_(min=0).long()
    above = torch.minimum(below + 1, length[:, None] - 1)
    shape = [len(images), 1, 1, 1]
    shape[dim] = side

    def taken(index: Tensor) -> Tensor:
        places = (start[:, None] + index).to(images.device).view(shape)
        return images.gather(dim, places.expand_as(images))

    share = (pixels - below).to(images.device, images.dtype).view(shape)
    return taken(below) * (1 - share) + taken(above) * share


def _mean_grey(images: Tensor) -> Tensor:
    grey = rgb_to_grayscale(images)
    if images.dtype != torch.uint8:
        return grey.mean(dim=(1, 2, 3), keepdim=True)
    # Exact, so that it does not depend on the batch in which the image is.
    return grey.sum(dim=(1, 2, 3), keepdim=True).float() / grey[0].numel()


def _blend(images: Tensor, others: Tensor, factors: Tensor) -> Tensor:
    """Returns images, blended with others by factors (B,) as torchvision does it."""
    ours, theirs = (
        share.float().to(images.device).view(-1, 1, 1, 1) for share in (factors, 1 - factors)
    )
    largest = 255 if images.dtype == torch.uint8 else 1
    return (ours * images + theirs * others).clamp_(0, largest).to(images.dtype)
