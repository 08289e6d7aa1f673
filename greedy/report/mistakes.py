"""How a trained network classifies the test images of its run, and where it is most wrong."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from greedy.results.evaluation import classified
from greedy.runs.directory import RunDirectory

SHOWN = 20  # of the mistakes


@dataclass(frozen=True)
class Mistake:
    """A test image that is taken for what it is not.

    Attributes:
        row: in the test split of the run's stores.
        index: in the data set itself.
        label, said: its class, and the one that the network gives it.
        confidence: the probability of that class, from the softmax.
        image: as stage 0 has it, (C, H, W).
    """

    row: int
    index: int
    label: int
    said: int
    confidence: float
    image: NDArray[np.generic]


@dataclass(frozen=True)
class TestResult:
    """What has become of all test images.

    Attributes:
        confusion: images by class (row) and by what the network says (column).
        mistakes: the most confident ones, the worst first.
    """

    confusion: NDArray[np.int64]
    mistakes: Sequence[Mistake]

    @property
    def images(self) -> int:
        """The number of images."""
        return int(self.confusion.sum())

    @property
    def wrong(self) -> int:
        """The number of images taken for what they are not."""
        return self.images - int(np.trace(self.confusion))

    @property
    def error_percent(self) -> float:
        """The network's test error."""
        return 100 * self.wrong / self.images


def classify_test_images(
    run: RunDirectory, network: nn.Sequential, device: torch.device
) -> TestResult:
    """Runs a network of ``assemble`` on the raw test images, as ``evaluate`` does."""
    store = run.open_store(0, "test")
    batches = []
    for logits, _ in classified(run, network, "test", device):
        best = logits.softmax(dim=1).max(dim=1)
        batches.append((best.values.cpu().numpy(), best.indices.cpu().numpy()))
    confidence, said = (np.concatenate(each) for each in zip(*batches, strict=True))
    classes = len(run.complete_record(0).class_names)
    confusion = np.zeros((classes, classes), np.int64)
    np.add.at(confusion, (store.labels, said), 1)
    wrong = np.flatnonzero(said != store.labels)
    worst = wrong[np.argsort(-confidence[wrong], kind="stable")][:SHOWN]
    mistakes = [
        Mistake(
            row=row,
            index=int(store.index[row]),
            label=int(store.labels[row]),
            said=int(said[row]),
            confidence=float(confidence[row]),
            image=store.read_rows(0, row, row + 1)[0],
        )
        for row in worst.tolist()
    ]
    return TestResult(confusion, mistakes)
