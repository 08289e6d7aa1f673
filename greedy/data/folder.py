"""Image folders: ``train/CLASS/IMAGE`` and ``test/CLASS/IMAGE``, decoded when they are read."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from greedy.data.images import fit, opened
from greedy.data.splits import Dataset, Images, Labels, Rows, Shape
from greedy.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


def load_folder(name: str, root: Path, image_size: int | None) -> Dataset:
    """The data set of the folders ``train`` and ``test`` under ``root``; classes in the order of
    their names.

    Raises UserError if a folder is missing, a class has no image or is in one split alone.
    """
    folders = root / "train", root / "test"
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is missing: put images there as CLASS/IMAGE")
    names, test_names = (_class_names(folder) for folder in folders)
    if alone := sorted(set(names) ^ set(test_names)):
        raise UserError(
            f"{folders[0]} and {folders[1]} must hold the same classes, but "
            f"{', '.join(map(repr, alone))} is in one of them alone"
        )
    if not names:
        raise UserError(f"{folders[0]} holds no class: put images there as CLASS/IMAGE")
    first = _image_files(folders[0] / names[0])[0]
    train, test = (FolderSplit(folder, names, first, image_size) for folder in folders)
    return Dataset(name, train, test, names)


class FolderSplit:
    """The images ``folder/CLASS/IMAGE`` as RGB.

    With ``image_size`` the short side is resized to it (bilinear, antialiased) and the centre cut
    out; without, every image must have the size of the image ``first``.
    """

    dtype: np.dtype[Any] = np.dtype(np.uint8)

    def __init__(
        self, folder: Path, class_names: list[str], first: Path, image_size: int | None
    ) -> None:
        files = [_image_files(folder / name) for name in class_names]
        self._files = [file for members in files for file in members]
        self._labels = np.repeat(np.arange(len(files)), [len(members) for members in files])
        self._first, self._image_size = first, image_size
        with opened(first) as image:
            width, height = (image_size, image_size) if image_size else image.size
        self.shape: Shape = (3, height, width)

    def __len__(self) -> int:
        return len(self._files)

    def read(self, indices: Rows) -> tuple[Images, Labels]:
        images = np.empty((len(indices), *self.shape), np.uint8)
        with ThreadPoolExecutor() as pool:
            # Exhausting the iterator raises the first failure and drops what has not begun.
            for _ in pool.map(self._decode, (self._files[i] for i in indices), images):
                pass
        return images, self._labels[indices]

    def _decode(self, file: Path, out: npt.NDArray[np.uint8]) -> None:
        height, width = self.shape[1:]
        with opened(file) as image:
            if self._image_size is None and image.size != (width, height):
                raise UserError(
                    f"{self._first} is {width}x{height} pixels and {file} "
                    f"{image.width}x{image.height}: set data.image_size to bring all images "
                    "to one size"
                )
            pixels = image.convert("RGB")
        if self._image_size is not None:
            pixels = fit(pixels, height, width)
        out[:] = np.asarray(pixels).transpose(2, 0, 1)


def _class_names(folder: Path) -> list[str]:
    return sorted(
        entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != "."
    )


def _image_files(folder: Path) -> list[Path]:
    files = sorted(
        file
        for file in folder.iterdir()
        if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")
    )
    if not files:
        raise UserError(
            f"{folder} holds no image ({', '.join(SUFFIXES)}): add some, or remove the class "
            "from train and test"
        )
    return files
