"""RandAugment with the operations and strengths of torchvision's, a group of images at a time."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torchvision.transforms.functional as F
from torch import Tensor

from greedy.base.errors import UserError

FURTHEST = 150 / 331  # of the image's side, by which it is moved at most


def _strength(most: float) -> float:
    """Returns magnitude 9 of 0 to 30, for an operation whose largest strength is ``most``, with
    torchvision's last digits."""
    return float(torch.linspace(0.0, most, 31)[9])


def _affine(images: Tensor, **values: Any) -> Tensor:
    still: dict[str, Any] = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]}
    return F.affine(images, **(still | values))


def _shear_x(images: Tensor, sign: int) -> Tensor:
    angle = math.degrees(math.atan(sign * _strength(0.3)))
    return _affine(images, shear=[angle, 0.0], center=[0, 0])


def _shear_y(images: Tensor, sign: int) -> Tensor:
    angle = math.degrees(math.atan(sign * _strength(0.3)))
    return _affine(images, shear=[0.0, angle], center=[0, 0])


def _translate_x(images: Tensor, sign: int) -> Tensor:
    return _affine(images, translate=[int(sign * _strength(FURTHEST * images.shape[3])), 0])


def _translate_y(images: Tensor, sign: int) -> Tensor:
    return _affine(images, translate=[0, int(sign * _strength(FURTHEST * images.shape[2]))])


def _factor(change: Callable[[Tensor, float], Tensor], images: Tensor, sign: int) -> Tensor:
    return change(images, 1 + sign * _strength(0.9))


OPERATIONS: tuple[Callable[[Tensor, int], Tensor], ...] = (
    lambda images, sign: images,
    _shear_x,
    _shear_y,
    _translate_x,
    _translate_y,
    lambda images, sign: F.rotate(images, sign * _strength(30.0)),
    partial(_factor, F.adjust_brightness),
    partial(_factor, F.adjust_saturation),
    partial(_factor, F.adjust_contrast),
    partial(_factor, F.adjust_sharpness),
    lambda images, sign: F.posterize(images, 7),
    lambda images, sign: F.solarize(images, 255.0 - _strength(255.0)),
    lambda images, sign: F.autocontrast(images),
    lambda images, sign: F.equalize(images),
)


@dataclass(frozen=True)
class RandAugment:
    """Two of fourteen operations, one after the other: ``RandAugment`` with its defaults."""

    name: ClassVar[str] = "randaugment"
    place: ClassVar[str] = "flipped"

    def draw(self, rows: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        """Draws two operations and their directions, -1 or 1, as (rows, 4)."""
        which = torch.randint(len(OPERATIONS), (rows, 2), generator=generator)
        signs = 1 - 2 * torch.randint(2, (rows, 2), generator=generator)
        return torch.cat((which, signs), dim=1)

    def require_values(self, images: Tensor) -> None:
        """Raises ``UserError`` unless images are of bytes."""
        if images.dtype != torch.uint8:
            raise UserError(
                f"{self.name} takes images of bytes, and these are of floats: leave it out of "
                f"data.augmentation"
            )

    def apply(self, images: Tensor, table: Tensor) -> Tensor:
        """Applies each operation to all images, of bytes, that have it in the same direction."""
        self.require_values(images)
        images = images.clone()
        for position in range(2):
            which, signs = table[:, position], table[:, 2 + position]
            for number, operation in enumerate(OPERATIONS):
                for sign in (-1, 1):
                    rows = ((which == number) & (signs == sign)).nonzero().flatten()
                    if number and len(rows):
                        at = rows.to(images.device)
                        images[at] = operation(images[at], sign)
        return images
