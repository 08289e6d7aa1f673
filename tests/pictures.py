"""Image files of noise."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

RNG = np.random.default_rng(0)


def write_image(
    path: Path, width: int = 8, height: int = 8, mode: str = "RGB", **options: Any
) -> NDArray[np.uint8]:
    """Writes an image, in the format that its name says unless one is given. Returns its colours
    (3, height, width)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    bands = len(Image.new(mode, (1, 1)).getbands())
    pixels = RNG.integers(0, 256, (height, width, bands), dtype=np.uint8)
    image = Image.fromarray(pixels.squeeze(2) if bands == 1 else pixels)
    image.save(path, **options)
    return np.asarray(image.convert("RGB")).transpose(2, 0, 1)


def write_classes(
    folder: Path, each: int, classes: Iterable[str] = ("ant", "bird"), **options: Any
) -> Path:
    """Writes a folder with a number of images for each class. Returns it."""
    for name in classes:
        for number in range(each):
            write_image(folder / name / f"{number}.png", **options)
    return folder
