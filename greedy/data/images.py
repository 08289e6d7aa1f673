"""Image files: decoded, or named in the error, and brought to one size."""

import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from greedy.errors import UserError

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@contextmanager
def opened(file: Path) -> Iterator[Image.Image]:
    """The image, turned upright if its camera says how; any failure to read it is a ``UserError``
    that names the file."""
    try:
        with Image.open(file) as image:
            image.load()
            turn = TURNS.get(_orientation(image))
            yield image if turn is None else image.transpose(turn)
    # What Pillow raises for a damaged file depends on the format.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read the image {file} ({reason}): replace or remove it") from error


def _orientation(image: Image.Image) -> int:
    """As Exif has it; 1 is upright. What cannot be read of it says nothing."""
    with suppress(TypeError, ValueError, SyntaxError, struct.error):
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    return 1


def converted(image: Image.Image, mode: str) -> Image.Image:
    """The image in one of Pillow's modes of a byte a channel; of 16 bits the upper 8, where Pillow
    would make white of all but the darkest."""
    if image.mode.startswith("I"):  # older versions of Pillow open them in 32
        upper = (np.asarray(image) >> 8).clip(0, 255)
        image = Image.fromarray(upper.astype(np.uint8))
    return image.convert(mode)


def fit(image: Image.Image, height: int, width: int) -> Image.Image:
    """The image resized (bilinear, antialiased) until it just covers the size in pixels, and its
    centre cut out. Of a square that is the short side resized and the centre cropped."""
    if image.width * height < image.height * width:
        covering = width, image.height * width // image.width
    else:
        covering = image.width * height // image.height, height
    left, top = round((covering[0] - width) / 2), round((covering[1] - height) / 2)
    resized = image.resize(covering, Image.Resampling.BILINEAR)
    return resized.crop((left, top, left + width, top + height))
