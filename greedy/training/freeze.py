"""Writing a frozen stage's output for the whole data set."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from greedy.cache import NonFiniteActivation, StoreSummary, StoreWriter, fit_encoding
from greedy.errors import TrainingError
from greedy.models import Shape
from greedy.reporting import Reporter
from greedy.runs import SPLITS
from greedy.seeds import torch_generator
from greedy.source import Source
from greedy.training.step import Learner

SAMPLE_ROWS = 2048  # rows of view 0 from which an integer encoding takes its ranges
SAMPLE_POSITIONS = 64  # of a large feature map, enough for 131,072 values a channel
WRITE_BYTES = 32 * 2**20


def write_batch(hidden: Shape) -> int:
    """Rows computed at a time while a store is written: fixed, since the last digit of an
    activation may depend on it. From 16 to 1024, about 32 MiB of float32 activations."""
    rows = WRITE_BYTES // (4 * math.prod(hidden))
    return min(1024, 1 << max(rows.bit_length() - 1, 4))


def write_store(
    path: Path,
    learner: Learner,
    source: Source,
    *,
    row_shape: Shape,
    views: int,
    encoding: str,
    compressor: str,
    batch: int,
    seed: int,
    reporter: Reporter,
) -> dict[str, StoreSummary]:
    """Writes both splits of the stage's store: ``views`` views of the training rows, one of the
    test rows, in batches of ``batch`` rows. Raises ``TrainingError`` for a value that is not
    finite, naming stage and channel."""
    learner.eval()
    written = {}
    number = learner.stage.number
    try:
        fitted = fit_encoding(encoding, _sample(learner, source, batch, seed))
        fitted = replace(fitted, row_shape=row_shape)
        for split in SPLITS:
            count = views if split == "train" else 1
            store = source.stores[split]
            reporter.writing_started(number, split, count * store.rows)
            with StoreWriter(
                path / split,
                rows=store.rows,
                views=count,
                encoding=fitted,
                compressor=compressor,
                labels=store.labels,
                index=store.index,
            ) as writer:
                for view in range(count):
                    for out in _outputs(learner, source, split, view, batch):
                        writer.append(out.cpu().numpy())
                        reporter.batch_finished(len(out))
            written[split] = writer.summary
    except NonFiniteActivation as error:
        raise TrainingError(f"stage {number}: {error}") from error
    return written


@torch.no_grad()
def _outputs(
    learner: Learner, source: Source, split: str, view: int, batch: int
) -> Iterator[Tensor]:
    """The frozen stage's output for a view of its source, batch by batch, in float32."""
    for x, _ in source.view(split, view, batch):
        with learner.autocast():
            out = learner.stage(x)
        yield out.float()


def _sample(learner: Learner, source: Source, batch: int, seed: int) -> np.ndarray:
    """Outputs of the first rows of view 0 (rows are in random order), at all positions of small
    feature maps and some of large ones, drawn anew for each batch."""
    parts: list[np.ndarray] = []
    rows = 0
    for out in _outputs(learner, source, "train", 0, batch):
        sample = out.cpu()
        if sample.dim() == 4 and sample[0, 0].numel() > SAMPLE_POSITIONS:
            generator = torch_generator(seed, "sample", learner.stage.number, rows)
            positions = torch.randperm(sample[0, 0].numel(), generator=generator)
            sample = sample.flatten(2)[:, :, positions[:SAMPLE_POSITIONS], None]
        parts.append(sample.numpy())
        rows += len(out)
        if rows >= SAMPLE_ROWS:
            break
    return np.concatenate(parts)[:SAMPLE_ROWS]
