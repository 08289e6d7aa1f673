"""Writing a frozen stage's output for the whole data set."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from greedy.base.errors import TrainingError
from greedy.base.seeds import torch_generator
from greedy.cache import Encoding, NonFiniteActivation, StoreSummary, StoreWriter, fit_encoding
from greedy.models import Shape, StageShapes
from greedy.runs.events import Reporter
from greedy.stores.source import WRITE_ROWS, Source

SAMPLE_ROWS = 2048  # rows of view 0 from which an integer encoding takes its ranges
SAMPLE_POSITIONS = 64  # of a large feature map, enough for 131,072 values a channel
WRITE_BYTES = 32 * 2**20


def write_batch(shapes: StageShapes) -> int:
    """Rows computed at a time while a store is written: fixed, since the last digit of an
    activation may depend on it. From 16 to 1024, about 32 MiB of float32 on the larger side."""
    rows = WRITE_BYTES // (4 * max(math.prod(shapes.input), math.prod(shapes.hidden)))
    return min(WRITE_ROWS, 1 << max(rows.bit_length() - 1, 4))


def write_split(
    path: Path,
    source: Source,
    split: str,
    *,
    views: int,
    generation: int,
    encoding: Encoding,
    compressor: str,
    batch: int,
    reporter: Reporter,
    stage: int,
) -> StoreSummary:
    """Writes views of a split, the source's outputs, in batches of ``batch`` rows. What is in
    ``path`` already was begun for the same views: its whole shards stay. Raises
    ``TrainingError`` for a value that the encoding cannot hold, naming stage and channel."""
    store = source.stores[split]
    reporter.writing_started(stage, split, views * store.rows)
    try:
        with StoreWriter(
            path,
            rows=store.rows,
            views=views,
            encoding=encoding,
            compressor=compressor,
            labels=store.labels,
            index=store.index,
            resume=True,
        ) as writer:
            if writer.appended:
                reporter.resumed(writer.appended)
            for view in range(writer.appended // store.rows, views):
                start = writer.appended - view * store.rows
                for outputs in outputs_from(source, split, view, start, batch, generation):
                    writer.append(outputs)
                    reporter.batch_finished(len(outputs))
        return writer.summary
    except NonFiniteActivation as error:
        raise TrainingError(f"stage {stage}: {error}") from error


def outputs_from(
    source: Source, split: str, view: int, start: int, batch: int, generation: int
) -> Iterator[np.ndarray]:
    """A source's outputs for a view's rows from ``start`` on, computed in the same batches as
    from row 0: the last digit of an activation may depend on the batch it is in."""
    skip = start % batch
    aligned = source.view(split, view, batch, generation=generation, start=start - skip)
    for rows in aligned:
        yield rows.inputs()[skip:].cpu().numpy()
        skip = 0


def fit(name: str, source: Source, row_shape: Shape, batch: int, seed: int, stage: int) -> Encoding:
    """The encoding for a source's outputs, its ranges taken from the first rows of view 0 (rows
    are in random order): at all positions of small feature maps and some of large ones, drawn
    anew for each batch; likewise of tokens."""
    parts: list[np.ndarray] = []
    rows = 0
    for read in source.view("train", 0, batch):
        sample = read.inputs().cpu()
        if sample.dim() == 4 and sample[0, 0].numel() > SAMPLE_POSITIONS:
            generator = torch_generator(seed, "sample", stage, rows)
            positions = torch.randperm(sample[0, 0].numel(), generator=generator)
            sample = sample.flatten(2)[:, :, positions[:SAMPLE_POSITIONS], None]
        elif sample.dim() == 3 and sample.shape[1] > SAMPLE_POSITIONS:
            generator = torch_generator(seed, "sample", stage, rows)
            sample = sample[:, torch.randperm(sample.shape[1], generator=generator)]
            sample = sample[:, :SAMPLE_POSITIONS].contiguous()
        parts.append(sample.numpy())
        rows += len(sample)
        if rows >= SAMPLE_ROWS:
            break
    try:
        fitted = fit_encoding(name, np.concatenate(parts)[:SAMPLE_ROWS])
    except NonFiniteActivation as error:
        raise TrainingError(f"stage {stage}: {error}") from error
    return replace(fitted, row_shape=row_shape)
