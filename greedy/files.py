"""Digests of files and documents; sizes."""

import hashlib
import json
from pathlib import Path
from typing import Any


def digest(data: bytes) -> str:
    """The hash that names contents everywhere in a run: 128 bits of BLAKE2b, in hex."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def file_digest(path: Path) -> str:
    """The digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def bytes_below(directory: Path) -> int:
    """Bytes of all files in a directory and below; 0 where there is none."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def canonical(document: Any) -> bytes:
    """The one JSON text of a document that digests are taken of."""
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
