"""Evaluation of the assembled network on raw images."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from greedy.base.devices import full_float32, to_device
from greedy.base.errors import UserError
from greedy.cache import Store
from greedy.memory.choice import memory_budget as budget_of_recipe
from greedy.memory.forward import Forward, fit_forward
from greedy.runs.directory import SPLITS, RunDirectory
from greedy.runs.state import RunState

TOP = 5


@dataclass(frozen=True)
class ClassError:
    """The error of a network on the images of one class; ``None`` without images."""

    name: str
    samples: int
    error_percent: float | None


@dataclass(frozen=True)
class Evaluation:
    """The evaluation of a network on a split.

    Attributes:
        split: the name of the split.
        samples: number of its images.
        error_percent: the share of images whose likeliest class is wrong.
        loss: the mean cross-entropy.
        balanced_error_percent: the mean of the errors of all classes that have images.
        top5_error_percent: the share of images whose class is not among the five likeliest;
            ``None`` with five classes or fewer.
        by_class: the error of each class, in order.
    """

    split: str
    samples: int
    error_percent: float
    loss: float
    balanced_error_percent: float
    top5_error_percent: float | None
    by_class: Sequence[ClassError]


def evaluate(
    run: RunDirectory,
    network: nn.Sequential,
    split: str,
    device: torch.device,
    memory_budget: int | None = None,
) -> Evaluation:
    """Evaluates a network on the raw images of a split, in float32 and evaluation mode. Activation
    stores are not read, and the network is neither changed nor moved.

    Args:
        network: from ``greedy.runs.network.assemble``, or one with the same input and output.
        split: ``train`` or ``test``.
        memory_budget: bytes to use on the device at most, by default those of the run's recipe.

    Raises:
        UserError: there is no such split, or the budget is too small.
    """
    names = RunState.read(run).complete_record(0).class_names
    tally = Tally.of(len(names))
    for logits, labels in classified(run, network, split, device, memory_budget):
        tally.add(logits, labels)
    return tally.evaluation(split, names)


@dataclass
class Tally:
    """Sums over the images of a split: of each class how many there are and are wrong, the loss,
    and how often the right class is not among the likeliest."""

    samples: NDArray[np.int64]
    wrong: NDArray[np.int64]
    loss: float = 0.0
    beyond: int = 0

    @classmethod
    def of(cls, classes: int) -> Self:
        """Returns the tally of no image."""
        return cls(np.zeros(classes, int), np.zeros(classes, int))

    @property
    def rows(self) -> int:
        """The number of images."""
        return int(self.samples.sum())

    @property
    def error_percent(self) -> float:
        """The share of images whose likeliest class is wrong."""
        return 100 * int(self.wrong.sum()) / self.rows

    @property
    def mean_loss(self) -> float:
        """The mean cross-entropy."""
        return self.loss / self.rows

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Adds images, given their logits (rows, classes) and labels (rows,)."""
        self.loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        wrong, classes = labels[logits.argmax(dim=1) != labels], len(self.samples)
        self.samples += np.bincount(labels.cpu(), minlength=classes)
        self.wrong += np.bincount(wrong.cpu(), minlength=classes)
        likeliest = logits.topk(min(TOP, logits.shape[1]), dim=1).indices
        self.beyond += int((likeliest != labels[:, None]).all(dim=1).sum())

    def evaluation(self, split: str, names: Sequence[str]) -> Evaluation:
        """Returns what the sums say of the split, whose classes have these names."""
        counts = zip(names, self.samples.tolist(), self.wrong.tolist(), strict=True)
        by_class = [
            ClassError(n, total, 100 * w / total if total else None) for n, total, w in counts
        ]
        errors = [each.error_percent for each in by_class if each.error_percent is not None]
        return Evaluation(
            split,
            self.rows,
            error_percent=self.error_percent,
            loss=self.mean_loss,
            balanced_error_percent=sum(errors) / len(errors),
            top5_error_percent=100 * self.beyond / self.rows if len(names) > TOP else None,
            by_class=by_class,
        )


def classified(
    run: RunDirectory,
    network: nn.Sequential,
    split: str,
    device: torch.device,
    memory_budget: int | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields logits (rows, classes) and labels (rows,) on the device, batch by batch of a split, in
    the order of its store. Arguments and errors are those of ``evaluate``."""
    require_split(split)
    RunState.read(run).complete_record(0)
    store = run.open_store(0, split)
    budget = budget_or_own(run, device, memory_budget)
    forward = fit_forward(network, store.row_shape, budget, device.type)
    for images, labels in image_batches(store, forward.rows, device):
        yield _logits(forward, images), labels


def require_split(split: str) -> None:
    """Raises ``UserError`` for a name that is not a split's."""
    if split not in SPLITS:
        raise UserError(f"{split!r} is not a split: use {' or '.join(SPLITS)}")


def budget_or_own(run: RunDirectory, device: torch.device, budget: int | None) -> int:
    """Returns a memory budget in bytes, by default that of the run's recipe."""
    return budget_of_recipe(run.recipe, device) if budget is None else budget


def image_batches(store: Store, size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields all images of a split as floats and their labels, both on the device, ``size`` at a
    time, in the order of the store."""
    starts = range(0, store.rows, size)
    for start, images in zip(starts, store.batches(0, size), strict=True):
        labels = torch.from_numpy(store.labels[start : start + len(images)]).to(device)
        yield raw_to_float(images, device), labels


@full_float32()
def _logits(forward: Forward, x: Tensor) -> Tensor:
    return forward(x)


def raw_to_float(images: np.ndarray, device: torch.device) -> torch.Tensor:
    """Returns raw rows as the assembled network takes them: bytes become floats in [0, 1]."""
    values = to_device(images, device)
    return values.float() / 255 if values.dtype == torch.uint8 else values
