"""Image files: decoded, or named in the error, and brought to one size."""

import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from greedy.errors import UserError


@contextmanager
def opened(file: Path) -> Iterator[Image.Image]:
    """The image with its header read, turned upright if its camera says how; any failure inside to
    read more of it is a ``UserError`` that names the file."""
    try:
        with Image.open(file) as image:
            # What of a header cannot be read says nothing: the image is as it is.
            with suppress(TypeError, struct.error):
                ImageOps.exif_transpose(image, in_place=True)
            yield image
    # What Pillow raises for a damaged file depends on the format.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read the image {file} ({reason}): replace or remove it") from error


def converted(image: Image.Image, mode: str) -> Image.Image:
    """The image in one of Pillow's modes of a byte a channel; of 16 bits the upper 8, where Pillow
    would make white of all but the darkest."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
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
