"""Temporary stores of random data, like those from which the stages of a recipe train."""

import math
from pathlib import Path

import numpy as np
import torch

from greedy.base.disk_space import require_free_space, write_errors_explained
from greedy.base.seeds import numpy_generator
from greedy.cache import (
    Encoding,
    Layout,
    Store,
    StoreWriter,
    fit_encoding,
    pixel_encoding,
    window_chunks,
)
from greedy.data import Augmentation
from greedy.models import Shape, StageShapes
from greedy.recipes import Recipe
from greedy.recipes.per_stage import encoding
from greedy.runs.views import wanted_views
from greedy.stores.source import ImagePreparation, Source
from greedy.stores.stage0 import COMPRESSOR
from greedy.training.resolve import shuffle

STORE_BYTES = 128 * 2**20  # about, if these are between 4 and 64 batches
BATCHES = 4, 64
WINDOWS = 3  # at least: one in use, one being read, one not yet read
BLOCK_VALUES = 2**20  # drawn once and repeated, since each chunk is compressed by itself


def random_source(
    place: Path,
    recipe: Recipe,
    number: int,
    shapes: StageShapes,
    classes: int,
    rows: int,
    device: torch.device,
) -> Source:
    """Writes a store of random data like that from which a stage of a run would train, with fewer
    rows. It is shuffled and read, from memory or disk, as the run's would be.

    For stage 1 it has raw images, augmented on reading; for later stages it has activations like
    those after a leaky ReLU, in the recipe's encoding and compressor.

    Args:
        place: an empty directory.
        number: the number of the stage that trains from it.
        shapes: the shapes of that stage.
        classes: the number of classes.
        rows: the number of training rows of the run.

    Raises:
        TrainingError: the disk has no room for it.
    """
    images = number == 1
    block = _pixels(shapes.input) if images else _activations(number, shapes.input)
    fitted = pixel_encoding(shapes.input) if images else fit_encoding(encoding(recipe), block)
    views, _ = (1, 0) if images else wanted_views(recipe, number)
    views = 1 if views == "live" else views
    in_memory = shuffle(recipe, views * rows * fitted.stored_row_bytes) == "rows"
    count = _rows(fitted, recipe.training.batch_size, in_memory)
    what, needed = f"a store to measure stage {number} with", count * fitted.stored_row_bytes
    require_free_space(place.parent, what, needed)
    with (
        write_errors_explained(place.parent, what, needed),
        StoreWriter(
            place / "train",
            rows=count,
            views=1,
            encoding=fitted,
            compressor=COMPRESSOR if images else recipe.store.compressor,
            labels=numpy_generator(recipe.seed, "labels", number).integers(classes, size=count),
            index=np.arange(count),
            encoded=images,
        ) as writer,
    ):
        for start in range(0, count, len(block)):
            writer.append(block[: count - start])
    return Source(
        number - 1,
        place,
        {"train": Store(place / "train")},
        device,
        recipe.seed,
        images=_preparation(recipe, shapes.input[0]) if images else None,
        in_memory=in_memory,
    )


def _rows(encoding: Encoding, batch_size: int, in_memory: bool) -> int:
    """Returns the number of rows of the store: whole batches of about ``STORE_BYTES``, but at least
    ``WINDOWS`` windows of a store that is read from disk."""
    fewest, most = (count * batch_size for count in BATCHES)
    if not in_memory:
        chunk_rows = Layout.fit(1, 1, encoding).chunk_rows
        fewest = max(fewest, WINDOWS * window_chunks(chunk_rows) * chunk_rows)
    rows = max(fewest, min(most, STORE_BYTES // encoding.stored_row_bytes))
    return math.ceil(rows / batch_size) * batch_size


def _pixels(shape: Shape) -> np.ndarray:
    generator = numpy_generator(0, "pixels")
    return generator.integers(256, size=(_block_rows(shape), *shape), dtype=np.uint8)


def _activations(number: int, shape: Shape) -> np.ndarray:
    generator = numpy_generator(0, "activations", number)
    values = generator.standard_normal((_block_rows(shape), *shape), dtype=np.float32)
    return np.where(values > 0, values, 0.01 * values)


def _block_rows(shape: Shape) -> int:
    return max(1, BLOCK_VALUES // math.prod(shape))


def _preparation(recipe: Recipe, channels: int) -> ImagePreparation:
    data = recipe.data
    return ImagePreparation(
        data.mean or [0.5] * channels,
        data.std or [0.25] * channels,
        Augmentation.parse(data.augmentation, data.cutout_length),
    )
