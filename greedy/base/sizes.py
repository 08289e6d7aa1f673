"""Sizes of memory and disk, and times, as people write them."""

import re

from greedy.base.errors import UserError

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {f"{letter}iB": 1024**power for power, letter in enumerate("KMGT", start=1)}


def parse_size(text: str) -> int:
    """Returns the bytes of a size such as ``512MiB`` or ``4 GB``. Raises ``UserError`` for anything
    else."""
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d+)?)\s*([KMGT]?i?B)\s*", text)
    if not match or match[2] not in UNITS:
        raise UserError(f"{text!r} is not a size: write one such as 512MiB or 4GiB")
    return int(float(match[1]) * UNITS[match[2]])


def format_size(size: float) -> str:
    """Returns a size in the largest binary unit that leaves at least 1: ``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def format_duration(seconds: float) -> str:
    """Returns a time in the largest unit that leaves at least 1: ``9.5 h``, ``38 min``."""
    value, unit = seconds, "s"
    for larger, factor in (("min", 60), ("h", 60), ("d", 24)):
        if value >= factor:
            value, unit = value / factor, larger
        else:
            break
    return f"{value:.1f} {unit}" if value < 9.95 else f"{value:.0f} {unit}"


def size(size_bytes: float | None) -> str:
    """Returns ``format_size`` of a number of bytes, or a dash where it is not known."""
    return "-" if size_bytes is None else format_size(size_bytes)


def duration(seconds: float | None) -> str:
    """Returns ``format_duration`` of a time, or a dash where it is not known."""
    return "-" if seconds is None else format_duration(seconds)


def percent(value: float | None) -> str:
    """Returns an error in percent, or a dash where it is not known."""
    return "-" if value is None else f"{value:.2f} %"
