"""Temporary stores of random data, as the stages of a recipe would find them."""

import math
from pathlib import Path

import numpy as np
import torch

from greedy.base.disk_space import require_free_space, write_errors_explained
from greedy.base.seeds import numpy_generator
from greedy.cache import Encoding, Layout, Store, StoreWriter, fit_encoding, pixels, window_chunks
from greedy.data import Augmentation
from greedy.models import Shape, StageShapes
from greedy.recipes import Recipe
from greedy.recipes.per_stage import encoding
from greedy.stores.source import ImagePreparation, Source
from greedy.stores.stage0 import COMPRESSOR
from greedy.training.resolve import shuffle

STORE_BYTES = 128 * 2**20  # of a store, within the next two bounds
BATCHES = 4, 64
WINDOWS = 3  # one in use, one being read, one to come
BLOCK_VALUES = 2**20  # drawn once and repeated: chunks are compressed one by one


def random_source(
    place: Path,
    recipe: Recipe,
    number: int,
    shapes: StageShapes,
    classes: int,
    rows: int,
    device: torch.device,
) -> Source:
    """Writes, into an empty directory, what stage ``number`` of a run on ``rows`` training rows
    would train from: for stage 1 raw images, augmented on reading, else activations like those
    after a leaky ReLU, in the recipe's encoding and compressor. It has fewer rows, but is shuffled
    and read, from memory or disk, as the run's own would be.

    Raises ``TrainingError`` where the disk has no room for it.
    """
    images = number == 1
    block = _pixels(shapes.input) if images else _activations(number, shapes.input)
    form = pixels(shapes.input) if images else fit_encoding(encoding(recipe), block)
    views = 1 if images or recipe.views == "live" else recipe.views
    held = shuffle(recipe, views * rows * form.stored_row_bytes) == "rows"
    count = _rows(form, recipe.training.batch_size, held)
    what, needed = f"measuring stage {number}", count * form.stored_row_bytes
    require_free_space(place.parent, what, needed)
    with (
        write_errors_explained(place.parent, what, needed),
        StoreWriter(
            place / "train",
            rows=count,
            views=1,
            encoding=form,
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
        images=_reading(recipe, shapes.input[0]) if images else None,
        in_memory=held,
    )


def _rows(form: Encoding, batch_size: int, held: bool) -> int:
    """Whole batches: about ``STORE_BYTES`` of them, and where the store is read in windows more
    than are read at once."""
    fewest, most = (count * batch_size for count in BATCHES)
    if not held:
        chunk_rows = Layout.fit(1, 1, form).chunk_rows
        fewest = max(fewest, WINDOWS * window_chunks(chunk_rows) * chunk_rows)
    rows = max(fewest, min(most, STORE_BYTES // form.stored_row_bytes))
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


def _reading(recipe: Recipe, channels: int) -> ImagePreparation:
    data = recipe.data
    return ImagePreparation(
        data.mean or [0.5] * channels,
        data.std or [0.25] * channels,
        Augmentation.parse(data.augmentation, data.cutout_length),
    )
