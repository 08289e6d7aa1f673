"""Image folders: ``train/CLASS/IMAGE`` and ``test/CLASS/IMAGE``, or ``CLASS/IMAGE`` alone; decoded
when they are read."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from greedy.data.images import converted, fit, opened
from greedy.data.splits import Dataset, Images, Labels, Rows, Shape
from greedy.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
HELD_OUT = 5  # one image in so many is for testing, where the user has not sorted them

Files = list[list[Path]]  # of each class


def load_folder(name: str, root: Path, image_size: int | None) -> Dataset:
    """The data set of the folders ``train`` and ``test`` under ``root``; classes in the order of
    their names. Where there is neither, or they are classes themselves, the classes stand in
    ``root`` itself and one image in ``HELD_OUT`` of each, evenly in the order of their names, is
    for testing.

    Raises UserError if a folder is missing, a class has no image or is in one split alone.
    """
    if not root.is_dir():
        what = "is a file" if root.exists() else "is missing"
        raise UserError(f"{root} {what}: name a folder that holds images as CLASS/IMAGE")
    folders = root / "train", root / "test"
    if any(folder.is_dir() and not _images_in(folder) for folder in folders):
        names, train, test = _sorted_by_user(*folders)
    else:
        names, train, test = _held_out(root)
    training, testing = (
        FolderSplit(files, root, train[0][0], image_size) for files in (train, test)
    )
    return Dataset(name, training, testing, names)


def _sorted_by_user(train: Path, test: Path) -> tuple[list[str], Files, Files]:
    for folder in (train, test):
        if not folder.is_dir():
            raise UserError(
                f"{folder} is missing: put images there as CLASS/IMAGE, or leave both train and "
                f"test out, and one image in {HELD_OUT} is for testing"
            )
    names, test_names = _class_names(train), _class_names(test)
    if alone := sorted(set(names) ^ set(test_names)):
        raise UserError(
            f"{train} and {test} must hold the same classes, but "
            f"{', '.join(map(repr, alone))} is in one of them alone"
        )
    if not names:
        raise UserError(f"{train} holds no class: put images there as CLASS/IMAGE")
    return names, _files(train, names), _files(test, names)


def _held_out(root: Path) -> tuple[list[str], Files, Files]:
    names = _class_names(root)
    if not names:
        raise UserError(f"{root} holds no class: put images there as CLASS/IMAGE")
    files = _files(root, names)
    for name, members in zip(names, files, strict=True):
        if len(members) < 2:
            raise UserError(
                f"{root / name} holds one image, and one is needed to train on and one to test "
                f"on: add some"
            )
    train = [[file for i, file in enumerate(members) if i % HELD_OUT] for members in files]
    return names, train, [members[::HELD_OUT] for members in files]


class FolderSplit:
    """Image files, a list for each class, as RGB.

    With ``image_size`` the short side is resized to it (bilinear, antialiased) and the centre cut
    out; without, every image must have the size of the image ``first``.

    Attributes:
        root: the folder that all files are in.
        files, labels: of the rows, in their order.
    """

    dtype: np.dtype[Any] = np.dtype(np.uint8)

    def __init__(self, files: Files, root: Path, first: Path, image_size: int | None) -> None:
        self.root = root
        self.files = [file for members in files for file in members]
        self.labels: Labels = np.repeat(np.arange(len(files)), [len(members) for members in files])
        self._first, self._image_size = first, image_size
        with opened(first) as image:
            width, height = (image_size, image_size) if image_size else image.size
        self.shape: Shape = (3, height, width)

    def __len__(self) -> int:
        return len(self.files)

    def read(self, indices: Rows) -> tuple[Images, Labels]:
        images = np.empty((len(indices), *self.shape), np.uint8)
        with ThreadPoolExecutor() as pool:
            # Exhausting the iterator raises the first failure and drops what has not begun.
            for _ in pool.map(self._decode, (self.files[i] for i in indices), images):
                pass
        return images, self.labels[indices]

    def _decode(self, file: Path, out: npt.NDArray[np.uint8]) -> None:
        height, width = self.shape[1:]
        with opened(file) as image:
            if self._image_size is None and image.size != (width, height):
                raise UserError(
                    f"{self._first} is {width}x{height} pixels and {file} "
                    f"{image.width}x{image.height}: set data.image_size to bring all images "
                    "to one size"
                )
            pixels = converted(image, "RGB")
        if self._image_size is not None:
            pixels = fit(pixels, height, width)
        out[:] = np.asarray(pixels).transpose(2, 0, 1)


def _class_names(folder: Path) -> list[str]:
    return sorted(
        entry.name
        for entry in folder.iterdir()
        if entry.is_dir() and entry.name[0] != "." and entry.name != "__MACOSX"
    )


def _files(folder: Path, names: list[str]) -> Files:
    return [_image_files(folder / name) for name in names]


def _image_files(folder: Path) -> list[Path]:
    if files := _images_in(folder):
        return files
    raise UserError(
        f"{folder} holds no image ({', '.join(SUFFIXES)}): add some, or remove the class"
    )


def _images_in(folder: Path) -> list[Path]:
    return sorted(
        file
        for file in folder.iterdir()
        if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")
    )
