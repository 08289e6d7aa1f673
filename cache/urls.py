"""URLs of object storage, and the file that says that a store is there.

A store that is in object storage has a directory too: with ``LOCATION``, which holds its URL. So it
is found, renamed and exchanged as a local one is, whose directory holds its files.
"""

import json
from pathlib import Path
from urllib.parse import urlsplit

from greedy.cache.errors import StoreError
from greedy.cache.files import write_whole

SCHEMES = ("s3", "gs", "az", "file")
LOCATION = "location.json"
_MAX_BYTES = 2**16


def is_url(text: str) -> bool:
    """Returns whether a text is a URL and no path."""
    return "://" in text


def url_fault(url: str) -> str | None:
    """Returns what a URL must be instead of what it is, ``None`` if nothing is wrong with it. Never
    repeats the URL, which may hold a password."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "be a URL such as s3://bucket/prefix"
    if "@" in url or parts.query or parts.fragment:
        return "be a URL without credentials or a query, as those come from the environment alone"
    if parts.scheme not in SCHEMES or bool(parts.netloc) == (parts.scheme == "file"):
        return "be a URL such as s3://bucket/prefix, gs://…, az://container/prefix or file:///path"
    return None


def location_of(directory: Path) -> str | None:
    """Returns the URL of the store that a directory stands for, ``None`` if it holds the store
    itself.

    Raises:
        StoreError: the file with the URL is damaged.
    """
    path = directory / LOCATION
    try:
        with path.open("rb") as file:
            url = json.loads(file.read(_MAX_BYTES))["url"]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError, KeyError, RecursionError):
        url = None
    if not isinstance(url, str) or url_fault(url):
        raise StoreError(f"{path} does not hold a store's URL: drop the store and write it again")
    return url


def put_elsewhere(directory: Path, url: str) -> None:
    """Makes a directory stand for the store at a URL, unless it already does for one."""
    if location_of(directory) is None:
        directory.mkdir(parents=True, exist_ok=True)
        write_whole(directory / LOCATION, json.dumps({"url": url}).encode())
