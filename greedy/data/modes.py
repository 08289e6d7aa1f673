"""The values of a Pillow image of any mode, with transparent parts over a background."""

import re
import sys
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor
from PIL.ImageFile import ImageFile

Kind = Literal["bytes", "integers", "floats"]

KINDS: dict[Kind, str] = {
    "bytes": "8 bits a channel",
    "integers": "integers of 16 or 32 bits",
    "floats": "floating-point numbers",
}
WHITE = "white"
WHITE_16 = 65535
_GREY = ("1", "L", "LA", "La")


def kind_of(image: Image.Image) -> Kind:
    """Returns the kind of an image's numbers, by its mode in Pillow."""
    if image.mode.startswith("I"):
        return "integers"
    return "floats" if image.mode == "F" else "bytes"


def pixel_values(image: Image.Image, background: str = WHITE) -> NDArray[Any]:
    """Returns an image as (C, H, W), grey or RGB, its transparent parts over the background: uint8
    for modes of 8 bits, float32 with the same values for the others.

    Raises ``ValueError``, with the rest of a sentence about it, for an image that Pillow would read
    with fewer bits than it has.
    """
    if loses_bits(image):
        raise ValueError(
            "holds colour in 16 bits, of which Pillow reads 8: give it as an array or a tensor"
        )
    parts = flattened([image], background)
    return stacked([part.convert("L") for part in parts] if image.mode in _GREY else parts)


def loses_bits(image: Image.Image) -> bool:
    """Returns whether an image, opened and not yet loaded, has more bits of colour than Pillow
    reads."""
    if image.mode.startswith("I"):
        return False
    if image.format == "JPEG2000":
        return _jpeg2000_bits(image) > 8
    for codec, _, _, arguments in getattr(image, "tile", ()):
        first, *others = _arguments(arguments)
        if str(first).endswith((";16L", ";16B", ";16N")) or codec == "SGI16":
            return True
        # The largest value of a portable pixmap, of which those of one bit have none; the bytes a
        # channel of SGI's compression.
        if codec.startswith("ppm") and others and others[0] > 255:
            return True
        if codec == "sgi_rle" and others[1] > 1:
            return True
    return False


def flattened(parts: Sequence[Image.Image], background: str) -> list[Image.Image]:
    """Returns an image without transparency: one part in L or RGB for 8 bits, else one part in F
    for each channel. ``parts`` are the image, or channels of 16 bits each, the fourth being the
    opacity."""
    if len(parts) > 1:
        return _deep_colour(parts, background)
    (image,) = parts
    if kind_of(image) != "bytes":
        return [_deep_grey(image, background)]
    if not image.has_transparency_data:
        mode = "L" if image.mode in _GREY else "RGB"
        return [image if image.mode == mode else image.convert(mode)]  # convert copies
    if image.mode == "La":  # Pillow only converts it to LA
        image = image.convert("LA")
    below = Image.new("RGBA", image.size, background)
    return [Image.alpha_composite(below, image.convert("RGBA")).convert("RGB")]


def stacked(parts: Sequence[Image.Image]) -> NDArray[Any]:
    """Returns the parts that ``flattened`` gives as (C, H, W)."""
    arrays = [np.asarray(part) for part in parts]
    if arrays[0].ndim == 3:
        return arrays[0].transpose(2, 0, 1)
    return np.stack(arrays)


def channels_16(image: ImageFile, again: ImageFile) -> list[Image.Image]:
    """Returns the channels of an RGB image of 16 bits, the opacity last. Pillow gives the upper
    byte of each number; from ``again``, the same image opened once more with the opposite byte
    order set, it gives the lower.

    Raises ``ValueError`` for formats in which that does not work.
    """
    forms = {str(_arguments(tile.args)[0]) for tile in image.tile}
    if (
        image.format not in ("PNG", "TIFF")
        or image.mode not in ("RGB", "RGBA")
        or not all(re.fullmatch(r"([RGBA]|RGB|RGBA|RGBX);16[LBN]", form) for form in forms)
    ):
        raise ValueError("16 bits a channel, which are read from PNG and TIFF in RGB or RGBA alone")
    again.tile = [tile._replace(args=_swapped(tile.args)) for tile in again.tile]
    image.load()
    again.load()
    upper, lower = (np.asarray(half).astype(np.uint16) for half in (image, again))
    pixels = upper << 8 | lower
    key = image.info.get("transparency")
    if key is not None and image.mode == "RGB":
        opaque = (pixels != np.array(key)).any(axis=2, keepdims=True)
        pixels = np.concatenate([pixels, opaque * np.uint16(WHITE_16)], axis=2)
    return [Image.fromarray(channel) for channel in np.moveaxis(pixels, 2, 0)]


def _swapped(arguments: Any) -> Any:
    """Returns a decoder's arguments with the opposite byte order."""
    form, *others = _arguments(arguments)
    order = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}[form[-1]]
    swapped = form[:-1] + order
    return swapped if isinstance(arguments, str) else (swapped, *others)


def _deep_grey(image: Image.Image, background: str) -> Image.Image:
    values = np.asarray(image).astype(np.float32)
    key = image.info.get("transparency")
    if isinstance(key, int) and image.mode != "F":
        values[np.asarray(image) == key] = 257 * ImageColor.getcolor(background, "L")
    return Image.fromarray(values)


def _deep_colour(parts: Sequence[Image.Image], background: str) -> list[Image.Image]:
    channels = np.stack([np.asarray(part) for part in parts]).astype(np.float32)
    if len(parts) == 4:
        opacity = channels[3] / WHITE_16
        below = 257 * np.array(ImageColor.getrgb(background), np.float32)[:, None, None]
        channels = channels[:3] * opacity + below * (1 - opacity)
    return [Image.fromarray(channel) for channel in channels.astype(np.float32, copy=False)]


def _arguments(arguments: Any) -> tuple[Any, ...]:
    """Returns a decoder's arguments; the first is the format of the pixels."""
    return (arguments,) if isinstance(arguments, str) else tuple(arguments or ("",))


def _jpeg2000_bits(image: Image.Image) -> int:
    """Returns the bits of the first channel, from the marker SIZ (ISO/IEC 15444-1, A.5.1)."""
    file = getattr(image, "fp", None)
    if file is None:  # loaded already
        return 8
    position = file.tell()
    file.seek(0)
    start = file.read(65536)
    file.seek(position)
    at = start.find(b"\xff\x4f\xff\x51") + 42
    return (start[at] & 0x7F) + 1 if 42 <= at < len(start) else 8
