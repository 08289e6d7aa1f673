"""`greedy cache repair` restores damaged stores byte for byte, or says that it did not."""

import random
import shutil
from pathlib import Path

import pytest
import torch
from command_line import answer, greedy, said, small_recipe, train

from greedy.stores import repair
from greedy.stores.writing import output_batches

RECIPE = small_recipe(data={"augmentation": "jitter2"}, training={"epochs": 2}, store={"views": 2})


@pytest.fixture(scope="module", params=[0, 1], ids=["stored", "refreshed"])
def finished(tmp_path_factory, request):
    return train(tmp_path_factory.mktemp("finished"), RECIPE, "--reuse", request.param)


def files(directory):
    return {p: p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def flip(path: Path, place: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= 16
    path.write_bytes(data)


def test_every_file_of_a_store_is_restored(run):
    before, choose = files(run), random.Random(0)
    stores = [p for p in before if "activations.zarr" in p.parts and "stage0" not in p.parts]
    for path in stores:
        if choose.random() < 0.3:
            path.unlink()
        else:
            flip(path, choose.random())
        damaged = greedy("cache", "verify", run).exit_code == 1
        result = greedy("cache", "repair", run)
        assert result.exit_code == 0, result.output
        assert ("as before" in result.output) == damaged
        if damaged:
            assert files(run) == before
        path.write_bytes(before[path])


@pytest.mark.parametrize("gone", ["train", "train/activations", "test/labels"])
def test_a_deleted_directory_is_restored(run, gone):
    before = files(run)
    shutil.rmtree(run / "stage2/activations.zarr" / gone)
    result = greedy("cache", "repair", run)
    assert result.exit_code == 0, result.output
    assert files(run) == before


def test_without_its_source_a_whole_view_is_computed_again(run):
    record = (run / "stage2/stage.json").read_bytes()
    shard = run / "stage2/activations.zarr/train/activations/c.1.0.0"
    greedy("cache", "drop", run / "stage1")
    flip(shard, 0.3)
    result = greedy("cache", "repair", run / "stage2")
    assert result.exit_code == 0, result.output
    refreshed = "reuse = 1" in (run / "run.toml").read_text()  # from images, always
    assert ("its content changed" in result.output) != refreshed
    assert ((run / "stage2/stage.json").read_bytes() == record) == refreshed
    assert greedy("cache", "verify", run).exit_code == 0
    assert greedy("train", "--run", run).exit_code == 0


def test_a_dropped_store_is_written_again(run):
    before = {p: data for p, data in files(run / "stage2").items() if p.name != "stage.json"}
    greedy("cache", "drop", run / "stage2")
    assert "nothing is damaged" in greedy("cache", "repair", run).output
    assert not (run / "stage2/activations.zarr").exists()
    result = greedy("cache", "repair", run / "stage2")
    assert "stage 2, train: 10 chunks computed again, as before" in result.output
    after = files(run / "stage2")
    assert {p: data for p, data in after.items() if p.name != "stage.json"} == before
    assert greedy("cache", "verify", run).exit_code == 0
    assert {each["state"] for each in answer("status", "--run", run)["stages"]} == {"complete"}


def test_files_that_cannot_be_computed_are_named(run):
    for path in (
        run / "stage1/encoder.safetensors",
        run / "stage0/activations.zarr/train/activations/c.0.0.0.0.0",
    ):
        before = path.read_bytes()
        flip(path, 0.5)
        result = greedy("cache", "repair", run)
        assert result.exit_code == 1
        assert str(path) in result.output
        path.write_bytes(before)


@pytest.mark.parametrize("deterministic", [True, False])
def test_operators_are_those_of_the_training(deterministic, tmp_path, monkeypatch):
    """On a GPU others give other digits."""
    run = train(tmp_path, small_recipe(training={"epochs": 1, "deterministic": deterministic}))
    flip(run / "stage1/activations.zarr/train/activations/c.0.0.0", 0.3)
    found = []

    def outputs(*arguments):
        found.append(torch.are_deterministic_algorithms_enabled())
        return output_batches(*arguments)

    monkeypatch.setattr(repair, "output_batches", outputs)
    torch.use_deterministic_algorithms(not deterministic)
    try:
        assert "as before" in said("cache", "repair", run)
    finally:
        torch.use_deterministic_algorithms(False)
    assert found
    assert set(found) == {deterministic}
