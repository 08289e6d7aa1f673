"""Image files: decoded, or named in the error, and brought to one size."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from greedy.errors import UserError


@contextmanager
def opened(file: Path) -> Iterator[Image.Image]:
    """The image with its header read; any failure inside to read more of it is a ``UserError``
    that names the file."""
    try:
        with Image.open(file) as image:
            yield image
    # What Pillow raises for a damaged file depends on the format.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read the image {file} ({reason}): replace or remove it") from error


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
