"""The named data sets: the sample that ships with the package, and torchvision's, in torchvision's
file layout."""

import importlib.util
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import numpy as np

from greedy.base.errors import UserError, missing_packages
from greedy.data import idx
from greedy.data.splits import ArraySplit, Dataset, JoinedSplit, Split

SAMPLE = "fashion-mnist-sample"
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
IDX_CLASSES = {
    SAMPLE: "FashionMNIST",
    "fashion-mnist": "FashionMNIST",
    "mnist": "MNIST",
    "kmnist": "KMNIST",
}
CIFAR_10 = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta")
STL_10 = ("train_X.bin", "train_y.bin", "test_X.bin", "test_y.bin", "class_names.txt")
FILES = {
    "cifar10": [f"cifar-10-batches-py/{name}" for name in CIFAR_10],
    "cifar100": [f"cifar-100-python/{name}" for name in ("train", "test", "meta")],
    "svhn": [f"{split}_32x32.mat" for split in ("train", "extra", "test")],
    "stl10": [f"stl10_binary/{name}" for name in STL_10],
}


def is_present(name: str, root: Path) -> bool:
    """Returns whether the files of a named data set exist; their content is not checked."""
    if name in IDX_CLASSES:
        return _idx_folder(name, root) is not None
    return all((root / file).is_file() for file in FILES[name])


def load_vision(name: str, root: Path, download: bool) -> Dataset:
    """Returns a named data set from torchvision's directory ``root``.

    Raises ``UserError`` if files are missing and ``download`` is not allowed or fails, if they are
    damaged, or if SVHN is asked for without SciPy.
    """
    if name == "svhn" and importlib.util.find_spec("scipy") is None:
        raise missing_packages("svhn", ["scipy"], "svhn")
    if not (download or is_present(name, root)):
        raise UserError(
            f"{name} is not in {root}: allow the download with --download, "
            f"or fetch it with `greedy data prepare {name} --download`"
        )
    try:
        return _load_idx(name, root) if name in IDX_CLASSES else _load_arrays(name, root, download)
    except (RuntimeError, OSError) as error:
        if download:
            reason = " ".join(str(error).split())
            raise UserError(
                f"cannot download {name} to {root} ({reason}): try again, or name another folder "
                f"with --data-dir"
            ) from error
        raise UserError(
            f"the files of {name} in {root} are damaged or cannot be read: "
            f"fetch them again with `greedy data prepare {name} --download`"
        ) from error


def _idx_folder(name: str, root: Path) -> Traversable | None:
    folders: dict[str, list[Traversable]] = {
        SAMPLE: [files("greedy.data") / "fashion_mnist_sample"],
        "fashion-mnist": [root / "FashionMNIST/raw", DEBIAN_FASHION_MNIST],
    }
    candidates = folders.get(name, [root / IDX_CLASSES[name] / "raw"])
    return next(filter(idx.is_complete, candidates), None)


def _load_idx(name: str, root: Path) -> Dataset:
    import torchvision.datasets  # noqa: PLC0415 - takes seconds, and few data sets need it

    kind = getattr(torchvision.datasets, IDX_CLASSES[name])
    folder = _idx_folder(name, root)
    if folder is None:
        kind(root, download=True)
        folder = root / IDX_CLASSES[name] / "raw"
    train, test = idx.read_splits(folder)
    return Dataset(name, train, test, list(kind.classes))


def _load_arrays(name: str, root: Path, download: bool) -> Dataset:
    import torchvision.datasets as tv  # noqa: PLC0415 - as above

    if name == "svhn":
        train, extra, test = (
            _as_split(tv.SVHN(root, split, download=download))
            for split in ("train", "extra", "test")
        )
        return Dataset(name, JoinedSplit(train, extra), test, [str(digit) for digit in range(10)])
    if name == "stl10":
        # Without this torchvision needs the 2.8 GB of unlabelled images, and hashes them twice.
        labelled = type("STL10", (tv.STL10,), {"train_list": tv.STL10.train_list[:2]})
        train, test = (labelled(root, split, download=download) for split in ("train", "test"))
    else:
        kind = {"cifar10": tv.CIFAR10, "cifar100": tv.CIFAR100}[name]
        train, test = (kind(root, train=train, download=download) for train in (True, False))
    return Dataset(name, _as_split(train), _as_split(test), list(train.classes))


def _as_split(images: Any) -> Split:
    pixels = np.asarray(images.data)
    if pixels.shape[-1] == 3:
        pixels = pixels.transpose(0, 3, 1, 2)
    return ArraySplit(pixels, images.targets if hasattr(images, "targets") else images.labels)
