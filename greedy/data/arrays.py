"""Images of data sets as arrays with their channels first."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from greedy.data.modes import pixel_values

CHANNELS = (1, 3, 4)  # lengths of an axis that is taken for channels


def as_image(image: Any, background: str) -> NDArray[Any]:
    """Returns an image as (C, H, W). Raises ``ValueError`` with the rest of a sentence about it."""
    if isinstance(image, Image.Image):
        return pixel_values(image, background)
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu().to_dense()
        array = _pixels((image.float() if image.is_floating_point() else image).numpy())
        return _channels_first(array) if array.ndim == 3 else _with_channels(array)
    try:
        array = np.asarray(image)
    except ValueError:  # rows of several lengths
        array = np.asarray(None)
    if array.dtype.kind not in "biufc":
        kind = type(image).__name__
        raise ValueError(f"is of type {kind}: give a PIL image, a tensor or an array of numbers")
    array = _pixels(array)
    return _to_channels_first(array) if array.ndim == 3 else _with_channels(array)


def _pixels(array: NDArray[Any]) -> NDArray[Any]:
    """Returns the values of an array as uint8 or float32."""
    if not array.size:
        raise ValueError(f"is empty, of shape {array.shape}: leave it out")
    if array.dtype == np.uint8:
        return array
    if array.dtype == bool:
        return array.astype(np.uint8) * np.uint8(255)
    if np.issubdtype(array.dtype, np.floating) or array.dtype.str[1:] in ("i2", "u2"):
        with np.errstate(over="ignore"):  # infinite values are refused with their sample
            return array.astype(np.float32, copy=False)
    raise ValueError(
        f"is of type {array.dtype}, which leaves open what black and white are: convert it to "
        f"uint8 (0 to 255) or to floats"
    )


def _with_channels(array: NDArray[Any]) -> NDArray[Any]:
    """Returns a grey image (H, W) or a vector of floats (F,) with axes for channels, height and
    width."""
    if array.ndim == 2:
        return array[None]
    if array.ndim == 1 and array.dtype != np.uint8:
        return array[:, None, None]
    raise ValueError(
        f"is of shape {array.shape}: give a tensor (C, H, W), a grey image (H, W) or a vector of "
        f"floats (F,)"
    )


def _channels_first(array: NDArray[Any]) -> NDArray[Any]:
    """Returns a tensor's values (C, H, W). Raises ``ValueError`` where its shape looks like
    (H, W, C)."""
    first, middle, last = array.shape
    if last in CHANNELS and first not in CHANNELS and last != middle:
        raise ValueError(
            f"is a tensor of shape {array.shape}, which looks like (H, W, C): give (C, H, W), as "
            f"image.permute(2, 0, 1) does, or image.mT where {first} is the number of channels"
        )
    return array


def _to_channels_first(array: NDArray[Any]) -> NDArray[Any]:
    """Returns an array (H, W, C) or (C, H, W), whichever its shape says, as (C, H, W)."""
    first, middle, last = array.shape
    if (first in CHANNELS) == (last in CHANNELS) or (first not in CHANNELS and last == middle):
        raise ValueError(
            f"is an array of shape {array.shape}, which leaves open where its channels are: give a "
            f"tensor (C, H, W), as torch.from_numpy(image) is where channels are first"
        )
    return array.transpose(2, 0, 1) if last in CHANNELS else array
