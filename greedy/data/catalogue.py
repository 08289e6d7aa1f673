"""The data sets known by name."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """A named data set.

    Attributes:
        shape: (C, H, W) of an image.
        classes: the number of classes.
        train: the number of training images.
        test: the number of test images.
        description: for tables.
    """

    name: str
    shape: tuple[int, int, int]
    classes: int
    train: int
    test: int
    description: str


DATASETS = (
    Entry("fashion-mnist-sample", (1, 28, 28), 10, 5_000, 1_000, "ships with greedy, no download"),
    Entry("mnist", (1, 28, 28), 10, 60_000, 10_000, "handwritten digits"),
    Entry("fashion-mnist", (1, 28, 28), 10, 60_000, 10_000, "clothes, shoes and bags"),
    Entry("kmnist", (1, 28, 28), 10, 60_000, 10_000, "handwritten Japanese characters"),
    Entry("cifar10", (3, 32, 32), 10, 50_000, 10_000, "photographs of animals and vehicles"),
    Entry("cifar100", (3, 32, 32), 100, 50_000, 10_000, "photographs of a hundred kinds"),
    Entry("svhn", (3, 32, 32), 10, 604_388, 26_032, "house numbers, train and extra together"),
    Entry("stl10", (3, 96, 96), 10, 5_000, 8_000, "photographs, the labelled images alone"),
)
"""All named data sets."""
