"""Writing the output of a frozen stage for the whole data set."""

import math
import secrets
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from greedy.base.errors import TrainingError
from greedy.base.ranks import ALONE, Ranks
from greedy.base.seeds import torch_generator
from greedy.cache import (
    Encoding,
    NonFiniteActivation,
    StoreSummary,
    StoreWriter,
    fit_encoding,
    put_elsewhere,
)
from greedy.models import Shape, StageShapes
from greedy.models.memory_format import usual_layout
from greedy.runs.directory import SPLITS
from greedy.runs.events import Reporter
from greedy.stores.source import WRITE_ROWS, Source

SAMPLE_ROWS = 2048  # of view 0, from which the ranges of an integer encoding are computed
SAMPLE_POSITIONS = 64  # of a large feature map, enough for 131,072 values a channel
WRITE_BYTES = 32 * 2**20  # of activations at a time
CACHED_BYTES = 8 * 2**20  # on a CPU, whose caches hold them from one module to the next


def write_batch(shapes: StageShapes, device_type: str) -> int:
    """Returns the rows computed at a time while a store is written on a ``cpu``, ``cuda`` or
    ``mps`` device: 16 to 1024, about 8 or 32 MiB of float32 inputs or activations. The number is
    fixed for a store, since the last digit of an activation may depend on it."""
    most = CACHED_BYTES if device_type == "cpu" else WRITE_BYTES
    rows = most // (4 * max(math.prod(shapes.input), math.prod(shapes.hidden)))
    return min(WRITE_ROWS, 1 << max(rows.bit_length() - 1, 4))


def place_store(path: Path, stores: str | None, number: int) -> None:
    """Decides where the new store of stage ``number`` is: in its directory ``path`` or, with the
    URL ``stores``, below that under a new name, for which the directory then stands."""
    if stores is None:
        return
    name = f"stage{number}-{secrets.token_hex(6)}"
    for split in SPLITS:
        put_elsewhere(path / split, f"{stores.rstrip('/')}/{name}/{split}")


class SplitWriter:
    """Writes a source's outputs for views of a split, some rows at a time; a context manager that
    finishes the store when it is left without error.

    Args:
        path: of the split's store. Complete shards that an interrupted writer left there are kept.
        source: computes the rows.
        split: ``train`` or ``test``.
        numbers: of the views. A source of images draws each by its number, any other has it.
        encoding: of the store.
        compressor: of the store.
        batch: rows computed at a time.
        stage: the number of the stage, for errors.
        share: as for ``StoreWriter``.

    Attributes:
        rows: of all views together.
        summary: set when the store is finished.
    """

    summary: StoreSummary

    def __init__(
        self,
        path: Path,
        source: Source,
        split: str,
        *,
        numbers: Sequence[int],
        encoding: Encoding,
        compressor: str,
        batch: int,
        stage: int,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        store = source.stores[split]
        self.rows = len(numbers) * store.rows
        self._stage = stage
        self._writer = StoreWriter(
            path,
            rows=store.rows,
            views=len(numbers),
            encoding=encoding,
            compressor=compressor,
            labels=store.labels,
            index=store.index,
            resume=True,
            share=share,
        )
        self._outputs = self._all_outputs(source, split, numbers, batch)

    def __enter__(self) -> Self:
        self._writer.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._outputs.close()
        with self._errors_named():
            self._writer.__exit__(*error)
        if error[0] is None and hasattr(self._writer, "summary"):
            self.summary = self._writer.summary

    @property
    def first(self) -> int:
        """The number of the first row of this writer's share."""
        return self._writer.first

    @property
    def written(self) -> int:
        """The number of the next row, over all views: those before it are written, or another's
        share."""
        return self._writer.appended

    @property
    def stop(self) -> int:
        """The number after the last row of this writer's share."""
        return self._writer.stop

    def finish(self, ranks: Ranks) -> StoreSummary:
        """Finishes a store of which each process has written its share, once all have, and returns
        its summary."""
        if ranks.size == 1:
            return self._writer.finish()
        shards = list(chain(*ranks.all_told(self._writer.finish_part())))
        summary = asdict(self._writer.finish(shards)) if ranks.leads else None
        told = ranks.told(summary)
        return StoreSummary(**told | {"shards": tuple(told["shards"])})

    def write(self, rows: int) -> Iterator[int]:
        """Writes until at least ``rows`` rows of all views are written; yields the number of rows
        in each batch.

        Raises:
            TrainingError: the encoding cannot hold a value; it names stage and channel.
        """
        while self.written < rows:
            with self._errors_named():
                outputs = next(self._outputs)[: self._writer.stop - self.written]
                self._writer.append(outputs)
            yield len(outputs)

    def _all_outputs(
        self, source: Source, split: str, numbers: Sequence[int], batch: int
    ) -> Generator[np.ndarray]:
        rows = source.stores[split].rows
        first, start = divmod(self._writer.appended, rows)
        for number in numbers[first:]:
            yield from output_batches(source, split, number, start, batch)
            start = 0

    @contextmanager
    def _errors_named(self) -> Iterator[None]:
        try:
            yield
        except NonFiniteActivation as error:
            raise TrainingError(f"stage {self._stage}: {error}") from error


def write_split(
    path: Path,
    source: Source,
    split: str,
    *,
    numbers: Sequence[int],
    encoding: Encoding,
    compressor: str,
    batch: int,
    reporter: Reporter,
    stage: int,
    ranks: Ranks = ALONE,
) -> StoreSummary:
    """Writes the source's outputs for all rows of views of a split, see ``SplitWriter``. Of several
    processes each writes some shards.

    The ``reporter`` gets ``writing_started``, ``resumed`` and ``batch_finished``.
    """
    with SplitWriter(
        path,
        source,
        split,
        numbers=numbers,
        encoding=encoding,
        compressor=compressor,
        batch=batch,
        stage=stage,
        share=(ranks.rank, ranks.size),
    ) as writer:
        first = writer.first
        reporter.writing_started(stage, split, writer.stop - first)
        if writer.written > first:
            reporter.resumed(writer.written - first)
        for rows in writer.write(writer.stop):
            reporter.batch_finished(rows)
    return writer.finish(ranks)


def output_batches(
    source: Source, split: str, view: int, start: int, batch: int, stop: int | None = None
) -> Iterator[np.ndarray]:
    """Yields a source's outputs for a view's rows from ``start`` on, until the batch of the row
    before ``stop``. They are computed in the same batches as from row 0, since the last digit of an
    activation may depend on its batch."""
    skip = start % batch
    if stop is not None:
        stop = min(-(-stop // batch) * batch, source.stores[split].rows)
    for rows in source.view_batches(split, view, batch, start=start - skip, stop=stop):
        yield usual_layout(rows.inputs()[skip:]).cpu().numpy()  # arranged where that is fastest
        skip = 0


def fit_output_encoding(
    name: str, source: Source, row_shape: Shape, batch: int, seed: int, stage: int
) -> Encoding:
    """Returns the encoding for a source's outputs.

    The ranges of an integer encoding are computed from the first rows of view 0, which are in
    random order: from all positions of small feature maps, and of large ones from positions drawn
    for each batch. Tokens are positions too.

    Args:
        name: of the encoding.
        source: computes the rows.
        row_shape: of the store.
        batch: rows computed at a time.
        seed: of the run.
        stage: the number of the stage, for the draws and errors.

    Raises:
        TrainingError: a value is not finite; it names stage and channel.
    """
    parts: list[np.ndarray] = []
    rows = 0
    for rows_of_view in source.view_batches("train", 0, batch):
        sample = rows_of_view.inputs().cpu()
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
        encoding = fit_encoding(name, np.concatenate(parts)[:SAMPLE_ROWS])
    except NonFiniteActivation as error:
        raise TrainingError(f"stage {stage}: {error}") from error
    return replace(encoding, row_shape=row_shape)
