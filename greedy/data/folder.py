"""Image folders: ``train/CLASS/IMAGE`` and ``test/CLASS/IMAGE``, or ``CLASS/IMAGE`` alone; files
are decoded when they are read."""

from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from greedy.base.errors import UserError
from greedy.data.images import DEFAULT_READING, ImageFile, Reading, UnreadableImage, open_image
from greedy.data.listing import Listing, first_paths
from greedy.data.modes import KINDS, Kind
from greedy.data.splits import Dataset, Images, Labels, Rows, Shape

TESTS = ("test", "val", "valid", "validation")  # folders to test on; the first one present counts
HELD_OUT = 5  # one image in 5 is for testing, where the user has not chosen them
CHANNELS = 3

Files = dict[str, list[Path]]  # by class


@contextmanager
def _read_errors_explained() -> Iterator[None]:
    """Turns a folder that cannot be read, inside the decorated function, into a ``UserError``."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{error.filename} cannot be read ({error.strerror}): permit reading it, or move it "
            f"out of the folder of images"
        ) from error


@_read_errors_explained()
def load_folder(
    name: str, root: Path, image_size: int | None, reading: Reading = DEFAULT_READING
) -> Dataset:
    """Returns the data set of the folders ``train`` and ``test``, or another of ``TESTS``, in
    ``root``; classes are sorted by name. Where there is neither ``train`` nor ``test``, or they are
    classes themselves, the classes are in ``root`` and one image in ``HELD_OUT`` of each, evenly in
    the order of their names, is for testing. ``Dataset.notes`` says what is left out.

    Raises ``UserError`` if a folder is missing or cannot be read, or a class has no image or none
    to train on.
    """
    if not root.is_dir():
        problem = "is a file" if root.exists() else "is missing"
        raise UserError(f"{root} {problem}: name a folder that holds images as CLASS/IMAGE")
    listing, notes = Listing(), []
    splits = _class_folders(root, listing)
    if {"train", "test"} & {*splits}:
        train, test = _user_splits(root, splits, listing)
        used, *unused = [folder for folder in TESTS if folder in splits]
        notes += [f"{root / folder} is not used, since {root / used} is" for folder in unused]
        for entry in root.iterdir():
            if entry.name not in splits:
                listing.ignore(entry)
    else:
        train, test = _split_classes(root, listing)
    if count := len(listing.ignored):
        named = first_paths(listing.ignored, root)
        notes.append(f"left out of {root}, not being images in class folders: {count:,} ({named})")
    first = _first_readable(train, root, image_size, reading)
    names = list(train)
    training, testing = (FolderSplit(files, names, root, first, reading) for files in (train, test))
    pixels = None if first.kind == "bytes" else first.kind
    return Dataset(name, training, testing, names, notes, pixels=pixels)


def _class_folders(root: Path, listing: Listing) -> list[str]:
    """Returns the folders that hold classes: those without images of their own; or those that also
    hold folders, where a training and a test folder do."""
    present = [folder for folder in ("train", *TESTS) if (root / folder).is_dir()]
    pure = [folder for folder in present if not listing.has_images(root / folder)]
    mixed = [folder for folder in present if folder in pure or listing.has_folders(root / folder)]
    return mixed if "train" in mixed and len(mixed) > 1 else pure


def _user_splits(root: Path, splits: list[str], listing: Listing) -> tuple[Files, Files]:
    tests = [root / folder for folder in TESTS if folder in splits]
    if "train" not in splits or not tests:
        raise UserError(
            f"{root / ('train' if tests else 'test')} is missing: put images there as CLASS/IMAGE, "
            f"or leave both train and test out, and one image in {HELD_OUT} is for testing"
        )
    train = _nonempty_classes(root / "train", listing)
    test = {name: files for name, files in listing.classes(tests[0]).items() if files}
    if unknown := [name for name in test if name not in train]:
        raise UserError(
            f"{tests[0]} has classes that {root / 'train'} lacks: {', '.join(map(repr, unknown))}; "
            f"put images of them there to train on, or leave them out"
        )
    return train, test


def _split_classes(root: Path, listing: Listing) -> tuple[Files, Files]:
    classes = _nonempty_classes(root, listing)
    if not {*classes} - {"train", *TESTS}:
        raise UserError(
            f"images in {' and '.join(str(root / name) for name in classes)} are of no class: put "
            f"them into a folder for each class, as {root / 'train'}/CLASS/IMAGE"
        )
    for name, members in classes.items():
        if len(members) < 2:
            raise UserError(
                f"{root / name} holds one image, and one is needed to train on and one to test "
                f"on: add some"
            )
    train = {
        name: [file for i, file in enumerate(members) if i % HELD_OUT]
        for name, members in classes.items()
    }
    return train, {name: members[::HELD_OUT] for name, members in classes.items()}


def _nonempty_classes(folder: Path, listing: Listing) -> Files:
    classes = listing.classes(folder)
    if not classes:
        raise UserError(f"{folder} holds no class: put images there as CLASS/IMAGE")
    for name, files in classes.items():
        if not files:
            raise UserError(
                f"{folder / name} holds no image that Pillow reads, such as JPEG, PNG, WebP or "
                f"TIFF: add some, or remove the class"
            )
    return classes


@dataclass(frozen=True)
class FirstImage:
    """The properties of the first readable image, which all images share.

    Attributes:
        size: (width, height) in pixels.
        resized: whether images are resized to ``size``; if not, each must have it.
    """

    file: Path
    kind: Kind
    size: tuple[int, int]
    resized: bool

    def require_like(self, file: Path, image: ImageFile) -> None:
        """Raises ``UserError`` for an image that differs from the first in kind or size."""
        if image.kind != self.kind:
            raise UserError(
                f"{self.file} holds {KINDS[self.kind]} and {file} {KINDS[image.kind]}, which have "
                f"no scale in common: bring all images to one of these"
            )
        if not self.resized and image.size != self.size:
            raise UserError(
                f"{self.file} is {'x'.join(map(str, self.size))} pixels and {file} "
                f"{'x'.join(map(str, image.size))}: set data.image_size to bring all images "
                "to one size"
            )


def _first_readable(
    files: Files, root: Path, image_size: int | None, reading: Reading
) -> FirstImage:
    for file in (file for members in files.values() for file in members):
        try:
            with open_image(file, reading) as image:
                size = (image_size, image_size) if image_size else image.size
                return FirstImage(file, image.kind, size, image_size is not None)
        except UnreadableImage as error:
            unreadable = error
    raise UserError(f"none of the images of {root} can be read; the last one: {unreadable}")


class FolderSplit:
    """Image files of classes as RGB: uint8, or float32 for files that hold more than 8 bits.

    Where ``first.resized``, the short side is resized (bilinear, antialiased) and the centre
    cropped; else every image must have its size.

    Attributes:
        root: the folder that all files are in.
        files: of the rows, in order.
        labels: (n,) of the rows.
        first: the properties that all images share.
    """

    def __init__(
        self, files: Files, class_names: list[str], root: Path, first: FirstImage, reading: Reading
    ) -> None:
        self.root, self.first, self.reading = root, first, reading
        self.files = [file for members in files.values() for file in members]
        numbers = [class_names.index(name) for name in files]
        self.labels = np.repeat(numbers, [len(members) for members in files.values()])
        width, height = first.size
        self.shape: Shape = (CHANNELS, height, width)
        self.dtype: np.dtype[Any] = np.dtype(np.uint8 if first.kind == "bytes" else np.float32)

    def __len__(self) -> int:
        return len(self.files)

    def read(self, indices: Rows) -> tuple[Images, Labels]:
        images = np.empty((len(indices), *self.shape), self.dtype)
        with ThreadPoolExecutor() as pool:
            # Exhausting the iterator raises the first failure and cancels pending files.
            for _ in pool.map(self._decode, (self.files[i] for i in indices), images):
                pass
        return images, self.labels[indices]

    def without(self, files: Collection[Path]) -> Self:
        """Returns the split without the given files."""
        kept = [i for i, file in enumerate(self.files) if file not in files]
        rest = copy(self)
        rest.files, rest.labels = [self.files[i] for i in kept], self.labels[kept]
        return rest

    def _decode(self, file: Path, out: NDArray[Any]) -> None:
        with open_image(file, self.reading) as image:
            self.first.require_like(file, image)
            size = self.shape[1:] if self.first.resized else None
            out[:] = image.values(CHANNELS, self.reading.background, size)
