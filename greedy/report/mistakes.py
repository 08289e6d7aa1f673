"""The test images of a run as its network classifies them, and the worst mistakes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from greedy.results.evaluation import classified
from greedy.runs.directory import RunDirectory
from greedy.runs.state import RunState

SHOWN = 20  # mistakes


@dataclass(frozen=True)
class Mistake:
    """A test image that the network classifies wrongly.

    Attributes:
        row: its number in the test split of the run's stores.
        index: its number in the data set.
        label: its class.
        predicted: the class that the network gives it.
        confidence: the softmax of the predicted class, from 0 to 1.
        image: the image as stage 0 has it, (C, H, W).
    """

    row: int
    index: int
    label: int
    predicted: int
    confidence: float
    image: NDArray[np.generic]


@dataclass(frozen=True)
class TestResult:
    """The network's classification of all test images.

    Attributes:
        confusion: int64 (classes, classes), numbers of images by class (row) and predicted class
            (column).
        mistakes: the mistakes with the highest confidence, in descending order.
    """

    confusion: NDArray[np.int64]
    mistakes: Sequence[Mistake]

    @property
    def images(self) -> int:
        """The number of images."""
        return int(self.confusion.sum())

    @property
    def wrong(self) -> int:
        """The number of images that are classified wrongly."""
        return self.images - int(np.trace(self.confusion))

    @property
    def error_percent(self) -> float:
        """The network's test error in percent."""
        return 100 * self.wrong / self.images


def classify_test_images(
    run: RunDirectory, network: nn.Sequential, device: torch.device
) -> TestResult:
    """Classifies the raw test images with a network of ``assemble``, as ``evaluate`` does."""
    store = run.open_store(0, "test")
    batches = []
    for logits, _ in classified(run, network, "test", device):
        best = logits.softmax(dim=1).max(dim=1)
        batches.append((best.values.cpu().numpy(), best.indices.cpu().numpy()))
    confidence, predicted = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    classes = len(RunState.read(run).complete_record(0).class_names)
    confusion = np.zeros((classes, classes), np.int64)
    np.add.at(confusion, (store.labels, predicted), 1)
    wrong = np.flatnonzero(predicted != store.labels)
    worst = wrong[np.argsort(-confidence[wrong], kind="stable")][:SHOWN]
    mistakes = [
        Mistake(
            row=row,
            index=int(store.index[row]),
            label=int(store.labels[row]),
            predicted=int(predicted[row]),
            confidence=float(confidence[row]),
            image=store.read_rows(0, row, row + 1)[0],
        )
        for row in worst.tolist()
    ]
    return TestResult(confusion, mistakes)
