"""The files of a store in object storage, read and written with obstore.

Credentials come from the environment, as the libraries of each provider read them. Messages name
URLs, which have none, and never repeat those of obstore, which may.
"""

import hashlib
import os
import re
import secrets
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote, urlsplit

import numpy as np
from numpy.typing import NDArray

from greedy.cache.errors import DamagedStore, StoreError, UnreachableStore
from greedy.cache.urls import url_fault

if TYPE_CHECKING:
    from obstore import GetResult
    from obstore.store import ObjectStore

# A request that fails is repeated with growing pauses, for as long as a server takes to restart.
RETRIES: Final[dict[str, Any]] = {
    "max_retries": 1000,
    "retry_timeout": timedelta(minutes=2),
    "backoff": {
        "init_backoff": timedelta(seconds=0.2),
        "max_backoff": timedelta(seconds=10),
        "base": 2,
    },
}
# A shard of 128 MiB is one request.
_TIMEOUTS = {"connect_timeout": "10s", "read_timeout": "60s", "timeout": "10m"}
# The answers of a server far away are waited for side by side.
_REQUESTS = 16
_ALLOW_HTTP = ("AWS_ALLOW_HTTP", "AZURE_ALLOW_HTTP", "GOOGLE_ALLOW_HTTP")
# The keys of a store's files: nothing else is ever deleted.
_OWN_KEYS = re.compile(r"zarr\.json|(activations|labels|index)/(zarr\.json|c(\.\d+)+)")

_Opened = tuple[int, str | None]  # the length and the tag of an object


class Objects:
    """The files of one store in object storage: a ``ByteSource`` that also writes.

    An object that was opened by its ``tail`` is read as it was then: if another has taken its place
    since, reading it raises ``DamagedStore``, and after ``forget`` the new one is read.

    Args:
        client: a store of obstore.
        prefix: of all keys in it.
        url: for messages.
    """

    requests = _REQUESTS

    def __init__(self, client: "ObjectStore", prefix: str, url: str) -> None:
        self._client = client
        self._prefix = prefix
        self._url = url
        self._opened: dict[str, _Opened] = {}
        self._replaced: dict[tuple[str, int], _Opened] = {}  # as a thread's failed read expected

    @classmethod
    def at(cls, url: str) -> "Objects":
        """Returns the files below a URL.

        Raises:
            StoreError: it is no URL of object storage, or obstore is not installed.
            UnreachableStore: the environment lacks what is needed to reach it.
        """
        if fault := url_fault(url):
            raise StoreError(f"the location of a store must {fault}")
        parts = urlsplit(url)
        return cls(_client(parts.scheme, parts.netloc), unquote(parts.path).strip("/"), url)

    def __str__(self) -> str:
        return self._url

    def whole(self, key: str) -> bytes | None:
        import obstore  # noqa: PLC0415

        with self._explained():
            try:
                return bytes(obstore.get(self._client, self._path(key)).bytes())
            except FileNotFoundError:
                return None

    def tail(self, key: str, size: int) -> bytes | None:
        opened, data = self._open(key, size)
        return data if opened else None

    def _open(self, key: str, size: int) -> tuple[_Opened | None, bytes]:
        with self._explained():
            try:
                found = self._get_tail(self._path(key), size)
            except FileNotFoundError:
                return None, b""
            opened = self._opened[key] = found.meta["size"], found.meta["e_tag"]
            return opened, bytes(found.bytes())

    def _get_tail(self, path: str, size: int) -> "GetResult":
        import obstore  # noqa: PLC0415
        from obstore.exceptions import NotSupportedError  # noqa: PLC0415

        options: Any = {"range": {"suffix": size}}
        with suppress(NotSupportedError):
            return obstore.get(self._client, path, options=options)
        while True:  # Azure has to be asked for the length before
            length = obstore.head(self._client, path)["size"]
            options = {"range": (max(length - size, 0), length)} if length else {}
            found = obstore.get(self._client, path, options=options)
            if found.meta["size"] == length:  # else the object was replaced in between
                return found

    def part(self, key: str, offset: int, size: int) -> NDArray[np.uint8] | None:
        import obstore  # noqa: PLC0415
        from obstore.exceptions import PreconditionError  # noqa: PLC0415

        opened = self._opened.get(key) or self._open(key, 1)[0]
        if opened is None:
            return None
        length, tag = opened
        if offset + size > length:
            return None
        options: Any = {"range": (offset, offset + size), "if_match": tag}
        with self._explained():
            try:
                found = obstore.get(self._client, self._path(key), options=options)
                data = np.frombuffer(memoryview(found.bytes()), np.uint8)
            except FileNotFoundError:
                return None
            except PreconditionError:
                self._replaced[key, threading.get_ident()] = opened
                problem = f"{self._url}/{key} was replaced while it was read"
                raise DamagedStore(problem) from None
        return data if len(data) == size else None

    def forget(self, key: str, offset: int) -> bool:
        expected = self._replaced.pop((key, threading.get_ident()), None)
        if expected is None:
            return False
        if self._opened.get(key) == expected:  # else another thread has opened the new one
            self._opened.pop(key, None)
        return True

    def version(self, key: str) -> str | None:
        """Returns a name of an opened object's contents, ``None`` if they have none."""
        size, tag = self._opened.get(key, (0, None))
        return tag and f"{size} {tag}"

    def total_bytes(self) -> int:
        return sum(size for _, size in self._all())

    def size(self, key: str) -> int | None:
        """Returns the bytes of a file, ``None`` where it is absent."""
        import obstore  # noqa: PLC0415

        with self._explained():
            try:
                return obstore.head(self._client, self._path(key))["size"]
            except FileNotFoundError:
                return None

    def digest(self, key: str) -> bytes:
        """Computes the digest of a file as ``shards.shard_digest`` does."""
        return hashlib.blake2b(self.whole(key) or b"").digest()

    def put(self, key: str, data: bytes | Path) -> None:
        """Writes a file, or uploads one, in one request: it is there as a whole or not at all."""
        import obstore  # noqa: PLC0415

        with self._explained():
            obstore.put(self._client, self._path(key), data, use_multipart=False)

    def copy(self, key: str, other: "Objects", other_key: str) -> None:
        """Puts a copy of another store's file, in the same bucket, in the place of a file."""
        import obstore  # noqa: PLC0415

        with self._explained():
            try:
                obstore.copy(self._client, other._path(other_key), self._path(key))
            except FileNotFoundError:
                raise DamagedStore(f"{other}/{other_key} is missing") from None

    def remove(self, key: str) -> None:
        """Deletes a file, if it exists."""
        self._remove([key])

    def remove_all(self) -> None:
        """Deletes all files of the store, first the one without which it is not a store."""
        own = sorted(key for key, _ in self._all() if _OWN_KEYS.fullmatch(key))
        self._remove(["zarr.json"])
        self._remove([key for key in own if key != "zarr.json"])

    def _remove(self, keys: Sequence[str]) -> None:
        import obstore  # noqa: PLC0415

        with self._explained(), suppress(FileNotFoundError):
            if keys:
                obstore.delete(self._client, [self._path(key) for key in keys])

    def _all(self) -> Iterator[tuple[str, int]]:
        import obstore  # noqa: PLC0415

        with self._explained():
            for batch in obstore.list(self._client, self._prefix or None):
                for found in batch:
                    key = found["path"].removeprefix(self._prefix).lstrip("/")
                    yield key, found["size"]

    def _path(self, key: str) -> str:
        return f"{self._prefix}/{key}" if self._prefix else key

    @contextmanager
    def _explained(self) -> Iterator[None]:
        from obstore import exceptions  # noqa: PLC0415

        try:
            yield
        except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError):
            raise UnreachableStore(
                f"{self._url} may not be read or written with the credentials in the environment: "
                f"check these and what they permit, and give the same command again"
            ) from None
        except FileNotFoundError:
            raise UnreachableStore(
                f"{self._url} is in a bucket or folder that does not exist: make it first"
            ) from None
        except (exceptions.BaseError, OSError):
            raise UnreachableStore(
                f"{self._url} cannot be reached: check the network, the server and the settings in "
                f"the environment, and give the same command again; all that is finished is kept"
            ) from None


def require_writable(url: str) -> None:
    """Writes an object below a URL and deletes it again, to know beforehand that stores can be
    written there.

    Raises:
        StoreError: obstore is not installed.
        UnreachableStore: they cannot.
    """
    objects, key = Objects.at(url), f"writable-{secrets.token_hex(6)}"
    objects.put(key, b"")
    objects.remove(key)


@cache
def _client(scheme: str, bucket: str) -> "ObjectStore":
    """Returns the client of a bucket; for ``file`` that of the whole file system."""
    try:
        from obstore.exceptions import BaseError  # noqa: PLC0415
        from obstore.store import LocalStore, from_url  # noqa: PLC0415
    except ImportError as error:
        raise StoreError(
            "stores on object storage need obstore: install with pip install '.[remote]' in the "
            "checkout of greedy"
        ) from error
    if scheme == "file":
        return LocalStore("/")
    allowed = any(os.environ.get(name, "").lower() == "true" for name in _ALLOW_HTTP)
    options: Any = _TIMEOUTS | {"allow_http": allowed}
    retries: Any = RETRIES
    try:
        return from_url(f"{scheme}://{bucket}", client_options=options, retry_config=retries)
    except BaseError:
        raise UnreachableStore(
            f"{scheme}://{bucket} cannot be reached with the settings in the environment: it lacks "
            f"some, such as the account's name, or some are wrong"
        ) from None
