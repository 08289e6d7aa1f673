"""Data sets that rarely draw at random, or for few of their images."""

import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
from small_training import CLASSES, new_trainer
from test_random_transforms import TEST, Drawn, content, fit, grey
from torch.utils.data import TensorDataset
from torchvision.transforms import v2

from greedy import RunDirectory
from greedy.data import dataset_from_torch, draws_at_random
from greedy.data.passes import read_batches

PLAIN = grey(500, 2)


def rarely(share: float) -> Drawn:
    return Drawn(PLAIN, v2.RandomHorizontalFlip(share))


class OfOneClass(Drawn):
    """Transforms the images of the last class alone, of which there are few."""

    def __getitem__(self, index: int):
        image, label = self.samples[index]
        return (self.transform(image) if label == CLASSES - 1 else image), label


def with_few_of_the_last_class() -> TensorDataset:
    images, labels = PLAIN.tensors
    last = torch.nonzero(labels == CLASSES - 1).flatten()
    kept = torch.cat([torch.nonzero(labels < CLASSES - 1).flatten(), last[:3]]).sort().values
    return TensorDataset(images[kept], labels[kept])


class Listed(OfOneClass):
    """Says which class each image has."""

    @property
    def targets(self) -> list[int]:
        return self.samples.tensors[1].tolist()


class OfTwo(Drawn):
    """Transforms two images alone, which nobody looks at."""

    def __getitem__(self, index: int):
        image, label = self.samples[index]
        return (self.transform(image) if index in (7, 9) else image), label


def is_random(train: Drawn) -> bool:
    return draws_at_random(dataset_from_torch(train, TEST))


@pytest.mark.parametrize("share", [0.5, 0.1, 0.02])
def test_rare_draws_are_noticed(share: float) -> None:
    assert all(is_random(rarely(share)) for _ in range(3))


def test_draws_of_a_rare_class_are_noticed() -> None:
    assert is_random(Listed(with_few_of_the_last_class(), v2.RandomHorizontalFlip()))


def test_what_draws_but_changes_nothing_is_not_random() -> None:
    assert not is_random(rarely(0.0))
    assert not draws_at_random(dataset_from_torch(PLAIN, rarely(0.0)))


def test_what_nobody_notices_is_the_same_in_every_run(tmp_path: Path) -> None:
    hardly = OfTwo(PLAIN, v2.RandomRotation(180))
    assert not is_random(hardly)
    for name in ("first", "second"):
        fit(tmp_path / name, hardly, epochs=1)
    assert content(tmp_path / "first") == content(tmp_path / "second")
    unchanged = fit(tmp_path / "third", PLAIN, epochs=1)
    assert content(unchanged.run.path) != content(tmp_path / "first")
    for _ in range(3):
        new_trainer(tmp_path / "first", epochs=1).fit(hardly, TEST)  # is not taken for other data
    assert not RunDirectory.open(tmp_path / "first").record(0).data_choices.fresh


def test_processes_that_read_have_ended_before_the_last_batch_is_used() -> None:
    """A signal that comes while they end would be lost in the end of a generator."""
    train = dataset_from_torch(PLAIN, TEST).train
    batches = [np.arange(i, i + 10) for i in range(0, 40, 10)]
    reading = read_batches(train, batches, 2)
    for _ in batches[:-1]:
        next(reading)
    assert multiprocessing.active_children()
    images, _ = next(reading)
    assert not multiprocessing.active_children()
    assert torch.equal(images, PLAIN.tensors[0][30:40])
