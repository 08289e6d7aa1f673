"""Image files: decoded upright, resized and cropped; errors name the file."""

import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image
from PIL.ImageFile import ImageFile as PillowFile

from greedy.base.errors import UserError
from greedy.data.modes import WHITE, Kind, channels_16, flattened, kind_of, loses_bits, stacked
from greedy.recipes.schema import Data

MODES = {1: "L", 3: "RGB"}  # Pillow's, by the number of channels
LONG = 4  # a resized image with more than 4 times the pixels wanted is cropped first
LARGE = 2**25  # images with more pixels are decoded one at a time, to save memory
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_large, _unlimited = Lock(), Lock()


class UnreadableImage(UserError):
    """An image file that cannot be read.

    Attributes:
        reason: why, in a few words.
    """

    def __init__(self, file: Path, reason: object) -> None:
        self.reason = str(reason)
        super().__init__(f"cannot read the image {file} ({self.reason}): replace or remove it")


@dataclass(frozen=True)
class Reading:
    """The settings for reading image files.

    Attributes:
        background: the colour behind transparent parts, as Pillow names colours.
        max_pixels: the most pixels that an image may have.
    """

    background: str = WHITE
    max_pixels: int = Data.model_fields["max_pixels"].default

    @classmethod
    def of(cls, data: Data) -> Self:
        """Returns the settings of a recipe's data section."""
        return cls(data.background, data.max_pixels)


DEFAULT_READING = Reading()


@dataclass(frozen=True)
class ImageFile:
    """An image file, decoded and upright.

    Attributes:
        kind: of its numbers.
        size: (width, height) in pixels.
        animated: whether the file holds several pictures; this is the first.
        parts: of the form that ``greedy.data.modes.flattened`` takes.
    """

    kind: Kind
    size: tuple[int, int]
    animated: bool
    parts: list[Image.Image]

    def values(
        self, channels: int, background: str, size: tuple[int, int] | None = None
    ) -> NDArray[Any]:
        """Returns (C, H, W), uint8 for 8 bits and else float32. With ``size`` (H, W) the image is
        resized (bilinear, antialiased) until it just covers that, and the centre cropped."""
        if size is None:
            parts = flattened(self.parts, background)
        else:
            parts = fit(self.parts, background, size)
        if self.kind == "bytes":
            return stacked([part.convert(MODES[channels]) for part in parts])
        return stacked(parts * channels if len(parts) == 1 else parts)


@contextmanager
def open_image(file: Path, reading: Reading) -> Iterator[ImageFile]:
    """Yields the decoded image of a file. Turns any failure to read it, also inside the block, into
    ``UnreadableImage``, and lack of memory into ``UserError``."""
    try:
        with _header(file) as image:
            if (pixels := image.width * image.height) > reading.max_pixels:
                raise UnreadableImage(
                    file,
                    f"{image.width} x {image.height} pixels, more than data.max_pixels = "
                    f"{reading.max_pixels}",
                )
            with _large if pixels > LARGE else nullcontext():
                yield _decoded(image, file)
    except MemoryError as error:
        raise UserError(
            f"there is not enough memory to decode the image {file}: scale it down, or set "
            f"data.max_pixels below its size to have all such images named"
        ) from error
    except UserError:
        raise
    except Exception as error:  # the class depends on the format of the damaged file
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UnreadableImage(file, reason) from error


def _header(file: Path) -> PillowFile:
    with _no_limit():  # Pillow's warns from half of max_pixels on
        return Image.open(file)


@contextmanager
def _no_limit() -> Iterator[None]:
    with _unlimited:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _decoded(image: PillowFile, file: Path) -> ImageFile:
    deep, codings = loses_bits(image), [str(tile.args) for tile in image.tile]
    unsigned = image.format == "TIFF" and any(
        "I;32" in coding and "S" not in coding for coding in codings
    )
    if deep:
        with _header(file) as again:
            parts = channels_16(image, again)
    else:
        image.load()
        parts = [image]
    if unsigned and image.mode == "I":  # read as signed
        values = np.asarray(image).view(np.uint32).astype(np.float32)
        parts = [Image.fromarray(values)]
    elif image.mode == "F" and not np.isfinite(np.asarray(image)).all():
        raise ValueError("values that are not finite")
    kind: Kind = "integers" if deep or unsigned else kind_of(image)
    turn = TURNS.get(_orientation(image))
    if turn is not None:
        parts = [part.transpose(turn) for part in parts]
    # In photos the other pictures are previews and depth maps, in drawings layers.
    animated = image.format not in ("MPO", "PSD") and getattr(image, "is_animated", False)
    return ImageFile(kind, parts[0].size, animated, parts)


def _orientation(image: Image.Image) -> int:
    """Returns the orientation in the Exif data; 1, upright, where that is missing or unreadable."""
    with suppress(TypeError, ValueError, SyntaxError, struct.error):
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    return 1


def fit(parts: list[Image.Image], background: str, size: tuple[int, int]) -> list[Image.Image]:
    """Returns the parts of an image, flattened, resized (bilinear, antialiased) until they just
    cover ``size`` (H, W), and the centre cropped: for a square, torchvision's ``Resize`` and
    ``CenterCrop``. Of long images only the part that remains is resized, which may differ from
    these in the last bit."""
    (width, height), (high, wide) = parts[0].size, size
    if width * high < height * wide:
        covering = wide, height * wide // width
    else:
        covering = width * high // height, high
    left, top = round((covering[0] - wide) / 2), round((covering[1] - high) / 2)
    if covering[0] * covering[1] <= LONG * wide * high:
        edges = left, top, left + wide, top + high
        return [
            part.resize(covering, Image.Resampling.BILINEAR).crop(edges)
            for part in flattened(parts, background)
        ]
    x, across = _source_range(width, covering[0], left, wide)
    y, down = _source_range(height, covering[1], top, high)
    with _no_limit():  # Pillow's counts the pixels before the crop
        cut = [part.crop((x[0], y[0], x[1], y[1])) for part in parts]
    region = across[0], down[0], across[1], down[1]
    return [
        part.resize((wide, high), Image.Resampling.BILINEAR, region)
        for part in flattened(cut, background)
    ]


def _source_range(
    length: int, covering: int, start: int, side: int
) -> tuple[tuple[int, int], tuple[float, float]]:
    """Returns, along an axis resized from ``length`` to ``covering`` pixels, the range of source
    pixels that the ``side`` pixels from ``start`` on depend on, and the region within it that they
    cover."""
    scale = length / covering
    first, last = start * scale, min((start + side) * scale, length)
    reach = math.ceil(max(scale, 1)) + 1  # the filter's reach beyond the region
    low, high = max(0, math.floor(first) - reach), min(length, math.ceil(last) + reach)
    return (low, high), (first - low, last - low)
