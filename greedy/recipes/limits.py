"""Limits of memory and disk, sizes such as 4GiB; URLs of object storage."""

from typing import Annotated

from pydantic import AfterValidator, BeforeValidator

from greedy.base.errors import UserError
from greedy.base.sizes import parse_size


class Unshown(ValueError):
    """What a value must be that may hold a secret, and so is never repeated."""


A_SIZE = "a size such as 4GiB or 768MiB"


def _as_text(value: object) -> object:
    """Returns a number without a unit as text, so that it is refused as no size."""
    return str(value) if isinstance(value, int | float) else value


def _is_size(text: str) -> bool:
    try:
        parse_size(text)
    except UserError:
        return False
    return True


def _size(text: str) -> str:
    if not _is_size(text):
        raise ValueError(f"be {A_SIZE}")
    return text


def _auto_or_size(text: str) -> str:
    if text != "auto" and not _is_size(text):
        raise ValueError(f"be auto, or {A_SIZE}")
    return text


def _url(text: str) -> str:
    from greedy.cache.urls import url_fault  # noqa: PLC0415 - takes a while

    if fault := url_fault(text):
        raise Unshown(fault)
    return text


Limit = Annotated[str, BeforeValidator(_as_text), AfterValidator(_size)]
"""A size."""

AutoLimit = Annotated[str, BeforeValidator(_as_text), AfterValidator(_auto_or_size)]
"""A size, or ``auto``."""

StoresURL = Annotated[str, AfterValidator(_url)]
"""A URL of object storage, without credentials."""
