"""Digests of files and documents, limited reading of documents, files to write."""

import errno
import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Any

from greedy.base.errors import UserError
from greedy.base.text import legible

if TYPE_CHECKING:
    from torch import Tensor

MAX_DOCUMENT_BYTES = 64 * 2**20


def digest(data: bytes) -> str:
    """Returns the hash that names contents everywhere in a run: 128 bits of BLAKE2b, in hex."""
    return digest_of_parts([data])


def digest_of_parts(parts: Iterable[bytes | memoryview]) -> str:
    """Returns the ``digest`` of the concatenated parts."""
    hasher = hashlib.blake2b(digest_size=16)
    for data in parts:
        hasher.update(data)
    return hasher.hexdigest()


def file_digest(path: Path) -> str:
    """Returns the ``digest`` of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def read_tensors(path: Path) -> "dict[str, Tensor]":
    """Returns the tensors of a safetensors file, memory-mapped. The library takes no path that is
    not UTF-8; a file at such a path is read whole."""
    import safetensors.torch  # noqa: PLC0415

    if legible(str(path)) == str(path):
        return safetensors.torch.load_file(path)
    return safetensors.torch.load(path.read_bytes())


def require_writable(to: Path, overwrite: bool) -> None:
    """Raises ``UserError`` if the file ``to`` cannot be written: it is a folder, exists and
    ``overwrite`` is false, or its folder is missing or not writable."""
    if to.is_dir():
        raise UserError(f"{to} is a folder: give the name of a file in it as --to")
    if to.exists() and not overwrite:
        raise UserError(f"{to} exists already: choose another --to, or add --force")
    if not to.parent.is_dir():
        if os.path.lexists(to.parent):
            raise UserError(f"{to.parent} is no folder: choose another --to")
        raise UserError(f"the folder {to.parent} does not exist: create it first")
    if not os.access(to.parent, os.W_OK):
        raise UserError(f"the folder {to.parent} cannot be written: choose another --to")


def write_output(to: Path, data: bytes) -> None:
    """Writes the file that the user named with ``--to``, atomically and without touching any other
    file of that folder. Raises ``UserError`` where that fails; a full disk stays the system's
    error."""
    from greedy.cache.files import naming, rename  # noqa: PLC0415

    part = to.with_name(f".greedy-{token_hex(8)}.part")
    try:
        with naming(to), part.open("xb") as file:
            try:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                rename(part, to)
            finally:
                part.unlink(missing_ok=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            raise
        raise UserError(
            f"{to} cannot be written ({error.strerror}): choose another --to"
        ) from error


def bytes_below(directory: Path) -> int:
    """Returns the bytes of all files in a directory and below, 0 where it does not exist. Files
    that disappear meanwhile do not count."""
    total = 0
    for top, _, names in os.walk(directory):
        for name in names:
            with suppress(FileNotFoundError):
                total += Path(top, name).stat().st_size
    return total


def canonical_json(document: Any) -> bytes:
    """Returns the JSON text of a document that digests are taken of: sorted keys, no spaces."""
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def read_limited(path: Path) -> bytes:
    """Returns a small file's bytes. Raises ``ValueError`` above ``MAX_DOCUMENT_BYTES``."""
    with path.open("rb") as file:
        data = file.read(MAX_DOCUMENT_BYTES + 1)
    if len(data) > MAX_DOCUMENT_BYTES:
        raise ValueError("it is too large")
    return data


def read_document(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file from an untrusted source. Raises ``ValueError`` saying what
    is wrong with it."""
    try:
        document = json.loads(read_limited(path))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(document, dict):
        raise ValueError("it is not a JSON object")
    return document


def with_digest(document: dict[str, Any]) -> bytes:
    """Returns a document as JSON text with a ``digest`` of the rest of it."""
    whole = {**document, "digest": digest(canonical_json(document))}
    return json.dumps(whole, indent=2).encode()


def read_with_digest(path: Path) -> dict[str, Any]:
    """Returns a document that ``with_digest`` wrote, without its digest. Raises ``ValueError`` that
    says what is wrong with it."""
    document = read_document(path)
    try:
        intact = document.pop("digest", None) == digest(canonical_json(document))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not intact:
        raise ValueError("its digest does not match")
    return document
