"""Evaluation of the assembled network on raw images."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from greedy.base.devices import full_float32, to_device
from greedy.base.errors import UserError
from greedy.memory.choice import memory_budget as memory_budget_of
from greedy.memory.forward import Forward, fit_forward
from greedy.runs.directory import SPLITS, RunDirectory
from greedy.runs.state import RunState


@dataclass(frozen=True)
class Evaluation:
    """Error in percent and mean cross-entropy of a network on a split."""

    split: str
    samples: int
    error_percent: float
    loss: float


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
    samples, loss, wrong = 0, 0.0, 0
    for logits, labels in classified(run, network, split, device, memory_budget):
        samples += len(labels)
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        wrong += int((logits.argmax(dim=1) != labels).sum())
    return Evaluation(split, samples, 100 * wrong / samples, loss / samples)


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
