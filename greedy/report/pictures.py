"""Pictures in a page: small PNG files as data URIs."""

import base64
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from greedy.results.similarity import Matrix

# From -1 through 0 to 1: blue, white, red.
SCALE = np.array([[33, 102, 172], [247, 247, 247], [178, 24, 43]], np.float64)


def picture(image: NDArray[np.generic]) -> str | None:
    """Draws an image (C, H, W) of bytes, or of floats, which are scaled from least to largest.
    Returns ``None`` if it has neither 1 nor 3 channels, or is a single pixel."""
    channels, height, width = image.shape
    if channels not in (1, 3) or height * width == 1:
        return None
    if image.dtype != np.uint8:
        values = image.astype(np.float64)
        span = np.ptp(values) or 1.0
        image = np.rint(255 * (values - values.min()) / span).astype(np.uint8)
    return _data_uri(Image.fromarray(image[0] if channels == 1 else image.transpose(1, 2, 0)))


def matrix_picture(matrix: Matrix) -> str:
    """Draws a matrix with values in [-1, 1], one pixel for each entry."""
    indexes = (np.clip(np.nan_to_num(matrix), -1, 1) + 1) * 127
    image = Image.fromarray(np.rint(indexes).astype(np.uint8))
    image.putpalette(palette().tobytes())
    return _data_uri(image)


def palette() -> NDArray[np.uint8]:
    """Returns the colours of ``matrix_picture``, uint8 (255, 3)."""
    positions = np.linspace(0, 2, 255)
    channels = [np.interp(positions, [0, 1, 2], SCALE[:, channel]) for channel in range(3)]
    return np.rint(np.stack(channels, axis=1)).astype(np.uint8)


def _data_uri(image: Image.Image) -> str:
    contents = io.BytesIO()
    image.save(contents, "png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(contents.getvalue()).decode()
