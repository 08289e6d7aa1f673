"""Temporary stores that stand for those of a run."""

from dataclasses import FrozenInstanceError, replace

import pytest
import torch

from greedy.cache import Store, window_chunks
from greedy.forecasts.random_data import random_source
from greedy.models import StageShapes
from greedy.recipes import from_document

MAPS = StageShapes(input=(4, 6, 6), hidden=(8, 6, 6), output=(8, 6, 6), operations=1)
IMAGES = StageShapes(input=(1, 8, 8), hidden=(4, 8, 8), output=(4, 8, 8), operations=1)


def recipe(**store):
    return from_document(
        {
            "data": {"name": "mnist", "augmentation": "hflip", "mean": [0.5], "std": [0.25]},
            "model": {"network": "vgg8b"},
            "loss": {"name": "sim"},
            "training": {"epochs": 1, "batch_size": 24, "learning_rate": 1e-3},
            "store": {"encoding": "uint4", "compressor": "zstd", **store},
        },
        name="random",
    )


def source(place, number, shapes, rows=1000, **store):
    (place / "source").mkdir()
    device = torch.device("cpu")
    return random_source(place / "source", recipe(**store), number, shapes, 3, rows, device)


def test_activations_are_in_the_form_of_the_recipe(tmp_path):
    random = source(tmp_path, 2, MAPS)
    store = Store(tmp_path / "source" / "train")
    assert (store.encoding.name, store.compressor) == ("uint4", "zstd")
    assert random.in_memory
    batches = list(random.epoch_batches(2, 0, 24))
    assert {len(batch.labels) for batch in batches} == {24}
    assert len(batches) >= 4
    x = batches[0].inputs()
    assert x.shape == (24, 4, 6, 6)
    assert x.isfinite().all()
    assert x.std() > 0.1
    assert set(torch.cat([batch.labels for batch in batches]).tolist()) == {0, 1, 2}


def test_a_source_is_complete_when_it_is_made(tmp_path):
    random = source(tmp_path, 2, MAPS)
    with pytest.raises(FrozenInstanceError):
        random.held_out = 8
    fewer, rows = replace(random, held_out=8), random.stores["train"].rows
    assert sum(len(batch.labels) for batch in fewer.epoch_batches(2, 0, 24)) == rows - 8


def test_a_first_stage_reads_and_augments_images(tmp_path):
    random = source(tmp_path, 1, IMAGES)
    store = random.stores["train"]
    assert store.encoding.stored_dtype == "u1"
    batch = next(iter(random.epoch_batches(1, 0, 24)))
    x = batch.inputs()
    assert x.shape == (24, 1, 8, 8)
    assert -2 <= x.min() < -1.9 < 1.9 < x.max() <= 2  # (0 - 0.5) / 0.25 and (1 - 0.5) / 0.25


@pytest.mark.parametrize(("number", "shapes"), [(1, IMAGES), (2, MAPS)])
def test_what_a_run_would_read_from_disk_is_read_from_disk(tmp_path, number, shapes):
    """It is read in windows, of which there are more than are in memory at once."""
    random = source(tmp_path, number, shapes, ram_budget="1KiB")
    store = random.stores["train"]
    assert not random.in_memory
    assert store.rows > 2 * window_chunks(store.chunk_rows) * store.chunk_rows
    assert store.rows % 24 == 0


def test_whether_a_store_is_held_in_memory_is_decided_by_the_rows_of_the_run(tmp_path):
    """A row of 144 values takes 72 bytes, and a store has four views."""
    (tmp_path / "few").mkdir()
    (tmp_path / "many").mkdir()
    few = source(tmp_path / "few", 2, MAPS, rows=1000, views=4, ram_budget="400KiB")
    many = source(tmp_path / "many", 2, MAPS, rows=2000, views=4, ram_budget="400KiB")
    assert few.in_memory
    assert not many.in_memory
