"""Stores on Azure Blob Storage, whose servers differ from S3's: also on Azurite, its emulator,
where that is installed."""

import base64
import hashlib
import hmac
import http.client
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from email.utils import formatdate
from pathlib import Path
from typing import Any

import numpy as np
import obstore
import pytest
from obstore.exceptions import NotSupportedError
from small_training import TEST, TRAIN, new_trainer, same, weights
from stored import write_store

from greedy.cache import Store, location_of, put_elsewhere, verify
from greedy.cache.objects import Objects, _client

AZURITE = shutil.which("azurite-blob")
# The emulator's own, which it publishes.
ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
RING = {"augmentation": "hflip", "views": 2, "reuse": 1, "epochs": [1, 3, 1], "ram_budget": "1B"}


def make_container(port: int, name: str) -> None:
    """Makes a container, which obstore cannot. Raises ``OSError`` if the server is not there."""
    date, path = formatdate(usegmt=True), f"/{ACCOUNT}/{name}"
    headers = {"x-ms-date": date, "x-ms-version": "2021-12-02"}
    signed = "PUT" + 12 * "\n" + "".join(f"{k}:{v}\n" for k, v in headers.items())
    signed += f"/{ACCOUNT}{path}\nrestype:container"
    digest = hmac.new(base64.b64decode(KEY), signed.encode(), hashlib.sha256).digest()
    headers["Authorization"] = f"SharedKey {ACCOUNT}:{base64.b64encode(digest).decode()}"
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("PUT", f"{path}?restype=container", headers=headers)
    assert connection.getresponse().status == 201
    connection.close()


@pytest.fixture
def azurite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs the emulator; gives the URL of a container."""
    assert AZURITE is not None
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [AZURITE, "--blobPort", str(port), "--location", str(tmp_path / "azurite")]
    options = ["--silent", "--skipApiVersionCheck", "--disableTelemetry"]
    process = subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL)
    try:
        for _ in range(600):
            with suppress(OSError):
                make_container(port, "activations")
                break
            time.sleep(0.1)
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", ACCOUNT)
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", KEY)
        monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", f"http://127.0.0.1:{port}/{ACCOUNT}")
        monkeypatch.setenv("AZURE_ALLOW_HTTP", "true")
        _client.cache_clear()
        yield "az://activations/a%20prefix"
    finally:
        _client.cache_clear()
        process.kill()
        process.wait()


@pytest.mark.skipif(AZURITE is None, reason="needs azurite (npm install --global azurite)")
def test_training_with_stores_on_azure_gives_the_same_bytes(azurite: str, tmp_path: Path) -> None:
    local, remote = tmp_path / "local", tmp_path / "remote"
    new_trainer(local, **RING).fit(TRAIN, TEST)
    trainer = new_trainer(remote, **RING, stores=azurite)
    trainer.fit(TRAIN, TEST)
    for split in ("train", "test"):
        here, there = (run / f"stage1/activations.zarr/{split}" for run in (local, remote))
        assert location_of(there)
        np.testing.assert_array_equal(Store(here).load(), Store(there).load())
        assert not verify(there)
    assert all(same(weights(local, stage), weights(remote, stage)) for stage in (1, 2, 3))
    trainer.run.drop_stores(1, 2)
    assert not list(Objects.at(azurite)._all())


def test_the_end_of_an_object_is_read_where_its_length_must_be_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_elsewhere(tmp_path / "store", (tmp_path / "elsewhere").as_uri())
    write_store(tmp_path / "store", np.zeros((1, 40, 3), np.float32))
    get = obstore.get

    def without_suffix(*arguments: Any, options: Any = None) -> Any:
        if options and "suffix" in options["range"]:
            raise NotSupportedError("as for Azure")
        return get(*arguments, options=options)

    read = Store(tmp_path / "store").load()
    monkeypatch.setattr("obstore.get", without_suffix)
    np.testing.assert_array_equal(Store(tmp_path / "store").load(), read)
