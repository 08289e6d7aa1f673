"""Evaluation of the assembled network on raw images."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from greedy.base.devices import full_float32, to_device
from greedy.base.errors import UserError
from greedy.memory.choice import memory_budget as memory_budget_of
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
    tally = _Tally(np.zeros(len(names), int), np.zeros(len(names), int))
    for logits, labels in classified(run, network, split, device, memory_budget):
        tally.add(logits, labels)
    return tally.evaluation(split, names)


@dataclass
class _Tally:
    """Sums over the images of a split: of each class how many there are and are wrong, the loss,
    and how often the right class is not among the likeliest."""

    samples: NDArray[np.int64]
    wrong: NDArray[np.int64]
    loss: float = 0.0
    beyond: int = 0

    def add(self, logits: Tensor, labels: Tensor) -> None:
        self.loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        wrong, classes = labels[logits.argmax(dim=1) != labels], len(self.samples)
        self.samples += np.bincount(labels.cpu(), minlength=classes)
        self.wrong += np.bincount(wrong.cpu(), minlength=classes)
        likeliest = logits.topk(min(TOP, logits.shape[1]), dim=1).indices
        self.beyond += int((likeliest != labels[:, None]).all(dim=1).sum())

    def evaluation(self, split: str, names: Sequence[str]) -> Evaluation:
        counts = zip(names, self.samples.tolist(), self.wrong.tolist(), strict=True)
        by_class = [
            ClassError(n, total, 100 * w / total if total else None) for n, total, w in counts
        ]
        errors = [each.error_percent for each in by_class if each.error_percent is not None]
        rows = int(self.samples.sum())
        return Evaluation(
            split,
            rows,
            error_percent=100 * int(self.wrong.sum()) / rows,
            loss=self.loss / rows,
            balanced_error_percent=sum(errors) / len(errors),
            top5_error_percent=100 * self.beyond / rows if len(names) > TOP else None,
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
    if split not in SPLITS:
        raise UserError(f"{split!r} is not a split: use {' or '.join(SPLITS)}")
    RunState.read(run).complete_record(0)
    store = run.open_store(0, split)
    budget = memory_budget_of(run.recipe, device) if memory_budget is None else memory_budget
    forward = fit_forward(network, store.row_shape, budget, device.type)
    starts = range(0, store.rows, forward.rows)
    for start, images in zip(starts, store.batches(0, forward.rows), strict=True):
        labels = torch.from_numpy(store.labels[start : start + len(images)]).to(device)
        yield _logits(forward, raw_to_float(images, device)), labels


@full_float32()
def _logits(forward: Forward, x: Tensor) -> Tensor:
    return forward(x)


def raw_to_float(images: np.ndarray, device: torch.device) -> torch.Tensor:
    """Returns raw rows as the assembled network takes them: bytes become floats in [0, 1]."""
    values = to_device(images, device)
    return values.float() / 255 if values.dtype == torch.uint8 else values
