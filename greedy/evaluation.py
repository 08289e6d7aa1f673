"""How well the assembled network does on raw data."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from greedy.cache import Store
from greedy.devices import to_device
from greedy.errors import UserError
from greedy.runs import SPLITS, RunDirectory

BATCH = 256


@dataclass(frozen=True)
class Evaluation:
    """Error in percent and mean cross-entropy of a split."""

    split: str
    samples: int
    error_percent: float
    loss: float


@torch.inference_mode()
def evaluate(
    run: RunDirectory, network: nn.Sequential, split: str, device: torch.device
) -> Evaluation:
    """Evaluates a network of :func:`greedy.network.assemble` on the raw images of a split, in
    float32; activation stores take no part in it."""
    if split not in SPLITS:
        raise UserError(f"{split!r} is not a split: use {' or '.join(SPLITS)}")
    run.complete(0)
    store = Store(run.store(0) / split)
    network = network.to(device)
    loss, wrong = 0.0, 0
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32 here
    for start, images in zip(range(0, store.rows, BATCH), store.batches(0, BATCH), strict=True):
        labels = torch.from_numpy(store.labels[start : start + len(images)]).to(device)
        logits = network(raw_to_float(images, device))
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        wrong += int((logits.argmax(dim=1) != labels).sum())
    return Evaluation(split, store.rows, 100 * wrong / store.rows, loss / store.rows)


def raw_to_float(images: np.ndarray, device: torch.device) -> torch.Tensor:
    """Raw rows as the assembled network takes them: bytes become floats in [0, 1]."""
    values = to_device(images, device)
    return values.float() / 255 if values.dtype == torch.uint8 else values
