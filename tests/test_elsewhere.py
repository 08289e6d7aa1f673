"""Stores that are not in the run directory: those in object storage, here a folder and memory."""

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import obstore
import pytest
import zarr
from command_line import answer, greedy, refused, said, small_recipe, train
from numpy.typing import NDArray
from obstore.store import MemoryStore
from small_training import TEST, TRAIN, files, new_trainer, same, weights
from stored import write_store
from zarr.storage import ObjectStore

from greedy import UserError
from greedy.cache import (
    DamagedStore,
    Layout,
    Store,
    StoreError,
    exchange_view,
    location_of,
    put_elsewhere,
    verify,
)
from greedy.cache.objects import Objects

ROWS = 50
LAYOUT = Layout(2, ROWS, chunk_rows=4, shard_rows=16)  # 4 shards a view
VALUES = np.random.default_rng(0).integers(0, 9, (2, ROWS, 30)).astype(np.float32)


def url_of(folder: Path) -> str:
    return f"file://{quote(str(folder))}"


def write(place: Path, values: NDArray[np.float32] = VALUES) -> tuple[Path, Path]:
    """Writes a store elsewhere. Returns the directory that stands for it, and its files."""
    put_elsewhere(place / "here", url_of(place / "there"))
    layout = Layout(len(values), ROWS, 4, 16)
    return write_store(place / "here", values, layout=layout, resume=True), place / "there"


@pytest.fixture
def local(tmp_path: Path) -> Path:
    return write_store(tmp_path / "local", VALUES, layout=LAYOUT)


def test_it_has_the_files_of_a_local_store(tmp_path: Path, local: Path) -> None:
    here, there = write(tmp_path / "a place")
    assert files(there) == files(local)
    assert not list(here.rglob("c.*.0"))  # nothing that was uploaded stays
    for location in (here, str(here), url_of(there)):
        store = Store(location)
        assert np.array_equal(store.load(), VALUES)
        assert store.disk_bytes == Store(local).disk_bytes
        batches = np.concatenate(list(store.batches(1, 7)))
        assert np.array_equal(batches, VALUES[1])
    assert verify(here) == []


def test_any_zarr_library_opens_it(tmp_path: Path) -> None:
    _, there = write(tmp_path)
    group = zarr.open_group(ObjectStore(obstore.store.LocalStore(there)), mode="r")
    assert np.array_equal(group["activations"][:], VALUES)


def test_a_store_of_obstore_is_read(local: Path) -> None:
    memory = MemoryStore()
    for name, data in files(local).items():
        obstore.put(memory, f"below/{name}", data)
    root = zarr.storage.StorePath(ObjectStore(memory), "below")
    assert np.array_equal(Store(root).load(), VALUES)
    obstore.delete(memory, "below/activations/c.1.2.0")
    with pytest.raises(DamagedStore, match=r"chunk 8 of view 1 is in a missing shard"):
        Store(root).read_chunk(1, 8)


def test_a_writer_that_was_stopped_goes_on_after_its_last_upload(
    tmp_path: Path, local: Path
) -> None:
    put_elsewhere(tmp_path / "here", url_of(tmp_path / "there"))
    values = VALUES.copy()
    values[1, 20:] = np.nan  # in the sixth shard
    with pytest.raises(StoreError):
        write_store(tmp_path / "here", values, layout=LAYOUT, resume=True)
    uploaded = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "there").rglob("c.*.0")}
    assert 4 <= len(uploaded) <= 5
    with pytest.raises(StoreError, match="not a finished activation store"):
        Store(tmp_path / "here")
    name, *_ = uploaded
    left = shutil.copy(tmp_path / "there/activations" / name, tmp_path / "here/activations" / name)
    unfinished = write_rest(tmp_path / "here")
    assert not left.exists()  # by a kill between the upload's note and this
    assert unfinished == 2 * ROWS - (ROWS + (len(uploaded) - 4) * 16)
    assert files(tmp_path / "there") == files(local)
    for name, time in uploaded.items():
        assert (tmp_path / "there/activations" / name).stat().st_mtime_ns == time


def write_rest(path: Path) -> int:
    """Resumes a writer of the values; returns the rows that were left to it."""
    from greedy.cache import StoreWriter, fit_encoding

    with StoreWriter(
        path,
        rows=ROWS,
        views=2,
        encoding=fit_encoding("float32", VALUES[0]),
        compressor="lz4",
        labels=np.arange(ROWS) % 3,
        index=np.arange(ROWS),
        layout=LAYOUT,
        resume=True,
    ) as writer:
        kept = writer.appended
        writer.append(VALUES.reshape(2 * ROWS, -1)[kept:])
    return 2 * ROWS - kept


def test_damage_is_found_and_its_place_named(tmp_path: Path) -> None:
    here, there = write(tmp_path)
    shard = there / "activations/c.0.1.0"
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    (damage,) = verify(here)
    assert damage.path == here / "activations/c.0.1.0"
    assert "chunk 4 of view 0 does not match its checksum" in damage.problem
    assert url_of(there) in damage.problem
    with pytest.raises(DamagedStore, match=f"{there}/activations/c.0.1.0: chunk 4 of view 0"):
        Store(here).read_chunk(0, 4)


def test_a_reader_sees_a_view_that_took_the_place_of_another(tmp_path: Path) -> None:
    here, there = write(tmp_path / "a")
    _, other = write(tmp_path / "b", VALUES[:1] + 1)
    store = Store(here)
    assert np.array_equal(store.read_rows(1, 0, ROWS), VALUES[1])
    exchange_view(url_of(there), 1, url_of(other), [])
    assert np.array_equal(store.read_rows(1, 0, ROWS), VALUES[0] + 1)
    assert np.array_equal(store.read_rows(0, 0, ROWS), VALUES[0])


def test_threads_read_a_view_that_took_the_place_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = write(tmp_path / "a")
    _, other = write(tmp_path / "b", VALUES[:1] + 1)
    store = Store(here)
    store.read_chunk(1, 0)
    exchange_view(url_of(there), 1, url_of(other), [])
    both_failed, part = threading.Barrier(2), Objects.part

    def part_together(objects: Objects, key: str, offset: int, size: int) -> Any:
        try:
            return part(objects, key, offset, size)
        except DamagedStore:
            both_failed.wait(60)
            raise

    monkeypatch.setattr(Objects, "part", part_together)
    with ThreadPoolExecutor(2) as pool:
        read = list(pool.map(partial(store.read_chunk, 1), (0, 1)))
    assert np.array_equal(np.concatenate(read), VALUES[0, :8] + 1)


def test_a_shard_that_another_thread_has_opened_again_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first read has the old shard's index when the second one opens the new shard."""
    here, there = write(tmp_path / "a")
    _, other = write(tmp_path / "b", VALUES[:1] * 1.1)
    store = Store(here)
    store.read_chunk(1, 0)
    exchange_view(url_of(there), 1, url_of(other), [])
    part = Objects.part

    def part_after_another(objects: Objects, key: str, offset: int, size: int) -> Any:
        monkeypatch.setattr(Objects, "part", part)
        store.read_chunk(1, 0)
        return part(objects, key, offset, size)

    monkeypatch.setattr(Objects, "part", part_after_another)
    assert np.array_equal(store.read_chunk(1, 2), VALUES[0, 8:12] * np.float32(1.1))


# Runs

RING = {"augmentation": "hflip", "views": 2, "reuse": 1, "epochs": 4, "ram_budget": "1B"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trains a run with local stores, and the same with stores elsewhere."""
    place = tmp_path_factory.mktemp("runs")
    new_trainer(place / "local", **RING).fit(TRAIN, TEST)
    new_trainer(place / "run", **RING, stores=url_of(place / "there")).fit(TRAIN, TEST)
    return place


@pytest.fixture
def place(runs: Path, tmp_path: Path) -> Path:
    """Returns copies of these two runs, with their stores."""
    shutil.copytree(runs, tmp_path / "runs")
    for path in (tmp_path / "runs").rglob("location.json"):
        path.write_text(path.read_text().replace(str(runs), str(tmp_path / "runs")))
    return tmp_path / "runs"


def train_split(run: Path, stage: int) -> Path:
    return run / f"stage{stage}/activations.zarr/train"


def record(run: Path, stage: int) -> dict:
    return json.loads((run / f"stage{stage}/stage.json").read_text())


def test_it_learns_the_same_from_them(runs: Path) -> None:
    for stage in (1, 2, 3):
        assert same(weights(runs / "local", stage), weights(runs / "run", stage))
    for stage in (1, 2):
        here, there = (record(runs / name, stage)["store"] for name in ("local", "run"))
        assert here == there
        assert np.array_equal(
            Store(train_split(runs / "local", stage)).load(),
            Store(train_split(runs / "run", stage)).load(),
        )
        assert location_of(train_split(runs / "run", stage))
    assert location_of(train_split(runs / "run", 0)) is None
    assert said("cache", "verify", runs / "run") == "everything is as it was written\n"
    shown = answer("cache", "info", runs / "run")["stores"]
    assert shown == answer("cache", "info", runs / "local")["stores"]
    names = {path.name.partition("-")[0] for path in (runs / "there").iterdir()}
    assert names == {"stage1", "stage2"}  # no view that was drawn is left


def test_a_stage_is_trained_again_from_one(place: Path) -> None:
    before = weights(place / "run", 2)
    old = location_of(train_split(place / "run", 2))
    new_trainer(place / "run", **RING, stores=url_of(place / "there")).train_stage(2, again=True)
    assert same(weights(place / "run", 2), before)
    new = location_of(train_split(place / "run", 2))
    assert old != new
    assert len(list((place / "there").glob("stage2-*/train/zarr.json"))) == 1


def test_repair_and_drop(place: Path) -> None:
    run, there = place / "run", place / "there"
    (place / "there/mine.txt").write_text("mine")
    (stage,) = there.glob("stage2-*")
    before = files(stage)
    shard = stage / "train/activations/c.0.0.0"
    shard.write_bytes(b"0" * 100)
    (stage / "test/zarr.json").unlink()
    trainer = new_trainer(run, **RING)
    repairs, damages = trainer.repair([2])
    assert not damages and all(repair.identical for repair in repairs)
    assert files(stage) == before
    (stage / "train/notes.txt").write_text("mine")
    said("cache", "drop", run)
    assert {path.name for path in there.rglob("*") if path.is_file()} == {"mine.txt", "notes.txt"}
    assert not (run / "stage2/activations.zarr").exists()


def test_a_view_whose_exchange_was_stopped_is_exchanged_again(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    expected = weights(place / "local", 2)
    trainer = new_trainer(place / "run", **RING, stores=url_of(place / "there"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("greedy.stores.ring.exchange_view", stopped)
        trainer.train_stage(2, again=True)
    assert -1 in record(place / "run", 1)["store"]["ring"]["numbers"]
    new_trainer(place / "run", **RING).train_stage(2, again=True)
    assert same(weights(place / "run", 2), expected)


def test_a_budget_is_that_of_the_bucket(tmp_path: Path) -> None:
    recipe = small_recipe(store={"stores": url_of(tmp_path / "there")})
    (tmp_path / "small.toml").write_text(recipe)
    disk = answer("plan", "--recipe", tmp_path / "small.toml")["disk"]
    assert disk["budget_bytes"] is None
    assert any("without a limit" in line for line in disk["plan"])
    local = answer("plan", "--recipe", tmp_path / "small.toml", "--disk-budget", "1GiB")["disk"]
    assert local["budget_bytes"] == 2**30
    message = refused(
        "train", "--recipe", tmp_path / "small.toml", "--disk-budget", "1KiB", "--keep", "all",
        "--run", tmp_path / "run",
    )  # fmt: skip
    assert "the disk budget is 1.0 KiB" in message


def test_the_command_line_and_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    options = (
        "--stores",
        url_of(tmp_path / "there"),
        "--store-cache",
        "1MiB",
        "--ram-budget",
        "1B",
    )
    run = train(tmp_path, small_recipe(), *options)
    assert list((tmp_path / "caches/greedy/chunks").rglob("*.*"))
    output = said("train-stage", "--stage", 2, "--from-cache", run / "stage1", "--retrain")
    assert "trained from stage 1's store" in output
    message = refused("train-stage", "--stage", 2, "--from-cache", "s3://key:word@b/stage1")
    assert "give that, not a URL" in message
    assert "word" not in message


@pytest.mark.parametrize(
    "url",
    ["s3://key:word@bucket/p", "s3://b/p?password=word", "http://word/p", "word", "file://word/x"],
)
def test_a_url_that_is_refused_is_not_repeated(url: str, tmp_path: Path) -> None:
    message = refused("train", "--recipe", "demo", "--stores", url, "--run", tmp_path / "run")
    assert message.startswith("Error: demo: store.stores must be a URL ")
    assert "word" not in message
    with pytest.raises(UserError) as caught:
        new_trainer(tmp_path / "run", stores=url)
    assert "word" not in str(caught.value)
    with pytest.raises(StoreError) as of_store:
        Store(url if "://" in url else f"{url}://")
    assert "key:word" not in str(of_store.value)
    assert not (tmp_path / "run").exists()


def test_a_file_that_names_no_store_is_refused(place: Path) -> None:
    path = train_split(place / "run", 1) / "location.json"
    for text in ("", "[]", '{"url": 3}', '{"url": "s3://a:b@c/d"}'):
        path.write_text(text)
        result = greedy("cache", "info", place / "run")
        assert result.exit_code == 2
        assert f"{path} does not hold a store's URL: drop the store" in result.output
    weights = place / "run/stage2/encoder.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    result = greedy("cache", "verify", place / "run")
    assert result.exit_code == 1
    assert f"{path}: does not hold a store's URL" in result.output
    stage = place / "run/stage1"
    remedy = f"`greedy cache drop {stage}` and then `greedy cache repair {stage}` write a store"
    assert remedy in result.output
    _, left = new_trainer(place / "run", **RING).repair(range(4))
    assert [damage.path for damage in left] == [path, weights]
    said("cache", "drop", stage)
    assert not path.parent.parent.exists()
    again = new_trainer(place / "run", **RING, stores=url_of(place / "there"))
    _, left = again.repair([1], dropped=True)
    assert not left and path.is_file()
