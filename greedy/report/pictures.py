"""Pictures inside a page: small PNG files as data URIs."""

import base64
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from greedy.results.similarity import Matrix

# From -1 through 0 to 1: blue, white, red.
SCALE = np.array([[33, 102, 172], [247, 247, 247], [178, 24, 43]], np.float64)


def picture(image: NDArray[np.generic]) -> str | None:
    """An image (C, H, W), of bytes or of floats, which are stretched to be seen; ``None`` for one
    that is no picture, having neither 1 nor 3 channels or being a single pixel."""
    channels, height, width = image.shape
    if channels not in (1, 3) or height * width == 1:
        return None
    if image.dtype != np.uint8:
        values = image.astype(np.float64)
        span = np.ptp(values) or 1.0
        image = np.rint(255 * (values - values.min()) / span).astype(np.uint8)
    return _data_uri(Image.fromarray(image[0] if channels == 1 else image.transpose(1, 2, 0)))


def matrix_picture(matrix: Matrix) -> str:
    """A matrix with values in [-1, 1], a pixel an entry."""
    places = (np.clip(np.nan_to_num(matrix), -1, 1) + 1) * 127
    drawn = Image.fromarray(np.rint(places).astype(np.uint8))
    drawn.putpalette(palette().tobytes())
    return _data_uri(drawn)


def palette() -> NDArray[np.uint8]:
    """The colours of ``matrix_picture``, (255, 3)."""
    places = np.linspace(0, 2, 255)
    channels = [np.interp(places, [0, 1, 2], SCALE[:, channel]) for channel in range(3)]
    return np.rint(np.stack(channels, axis=1)).astype(np.uint8)


def _data_uri(image: Image.Image) -> str:
    contents = io.BytesIO()
    image.save(contents, "png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(contents.getvalue()).decode()
