"""How well the assembled network does on raw data."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from greedy.cache import Store
from greedy.devices import full_float32, to_device
from greedy.errors import UserError
from greedy.memory.choice import memory_budget as memory_budget_of
from greedy.memory.forward import fit_forward
from greedy.runs import SPLITS, RunDirectory


@dataclass(frozen=True)
class Evaluation:
    """Error in percent and mean cross-entropy of a split."""

    split: str
    samples: int
    error_percent: float
    loss: float


@full_float32()
@torch.inference_mode()
def evaluate(
    run: RunDirectory,
    network: nn.Sequential,
    split: str,
    device: torch.device,
    memory_budget: int | None = None,
) -> Evaluation:
    """Evaluates a network of :func:`greedy.network.assemble` on the raw images of a split, in
    float32; activation stores take no part in it. On the device at most ``memory_budget`` bytes
    are taken, by default those of the run's recipe.

    Raises ``UserError`` for a split or a budget that cannot be.
    """
    if split not in SPLITS:
        raise UserError(f"{split!r} is not a split: use {' or '.join(SPLITS)}")
    run.complete(0)
    store = Store(run.store(0) / split)
    budget = memory_budget_of(run.recipe, device) if memory_budget is None else memory_budget
    forward = fit_forward(network, store.row_shape, budget, device.type)
    loss, wrong = 0.0, 0
    starts = range(0, store.rows, forward.rows)
    for start, images in zip(starts, store.batches(0, forward.rows), strict=True):
        labels = torch.from_numpy(store.labels[start : start + len(images)]).to(device)
        logits = forward(network, raw_to_float(images, device))
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        wrong += int((logits.argmax(dim=1) != labels).sum())
    return Evaluation(split, store.rows, 100 * wrong / store.rows, loss / store.rows)


def raw_to_float(images: np.ndarray, device: torch.device) -> torch.Tensor:
    """Raw rows as the assembled network takes them: bytes become floats in [0, 1]."""
    values = to_device(images, device)
    return values.float() / 255 if values.dtype == torch.uint8 else values
