"""Names that others chose, as text that can be written and shown."""

import json
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

SHOWN = 3  # names in a message
_SURROGATE = re.compile("[\ud800-\udfff]")
# Control characters, which a terminal obeys, and separators of lines and paragraphs.
_UNSHOWN = {"Cc", "Zl", "Zp"}


def listed(names: Sequence[object]) -> str:
    """Returns the first three of some names, and whether there are more."""
    return ", ".join(map(str, names[:SHOWN])) + (", …" if len(names) > SHOWN else "")


def legible(text: str) -> str:
    """Returns text that UTF-8 can hold: each byte of a file name that is none becomes ``\\xe9``."""
    return _SURROGATE.sub(_escaped, text)


def shown(text: str) -> str:
    """Returns text as one line that a terminal shows as it is: what it would obey, such as escape
    sequences and line breaks, is written as Python writes it."""
    text = legible(text)
    if text.isprintable():
        return text
    return "".join(
        each.encode("unicode_escape").decode() if unicodedata.category(each) in _UNSHOWN else each
        for each in text
    )


def legible_json(document: Any) -> str:
    """Returns a JSON document as text in which letters are letters, as ``legible`` has them."""
    text = json.dumps(document, indent=2, ensure_ascii=False)
    return _SURROGATE.sub(lambda found: _escaped(found).replace("\\", "\\\\"), text)


def _escaped(found: re.Match[str]) -> str:
    number = ord(found[0])
    is_byte = 0xDC80 <= number <= 0xDCFF  # as os.fsdecode has them
    return f"\\x{number - 0xDC00:02x}" if is_byte else f"\\u{number:04x}"
