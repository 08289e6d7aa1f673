"""Names that others chose, as text that can be written and displayed."""

import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any

SHOWN = 3  # names in a message
_SURROGATE = re.compile("[\ud800-\udfff]")
# Control characters, and separators of lines and paragraphs.
_UNSHOWN = {"Cc", "Zl", "Zp"}


def first_names(names: Sequence[object]) -> str:
    """Returns the first three of some names, joined by commas, with an ellipsis where there are
    more."""
    return ", ".join(map(str, names[:SHOWN])) + (", …" if len(names) > SHOWN else "")


def did_you_mean(word: str, words: Iterable[str], most: int = 1) -> str:
    """Returns a question that suggests up to ``most`` similar ``words``, empty where none is
    similar."""
    matches = get_close_matches(word, list(filter(None, words)), n=most)
    return f"did you mean {' or '.join(matches)}?" if matches else ""


def sides(shape: Sequence[int]) -> str:
    """Returns a shape such as ``3x32x32``."""
    return "x".join(map(str, shape))


def ranges(numbers: Iterable[int]) -> str:
    """Returns whole numbers in ascending order, such as ``0, 2 to 5``."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]} to {run[-1]}" if run[1:] else str(run[0]) for run in runs)


def legible(text: str) -> str:
    """Returns text that UTF-8 can encode: each byte of a file name that is not UTF-8 becomes
    ``\\xe9``."""
    return _SURROGATE.sub(_escaped, text)


def shown(text: str) -> str:
    """Returns text as one line that a terminal displays verbatim: control characters, such as
    escape sequences and line breaks, are written as Python escapes."""
    text = legible(text)
    if text.isprintable():
        return text
    return "".join(
        char.encode("unicode_escape").decode() if unicodedata.category(char) in _UNSHOWN else char
        for char in text
    )


def legible_json(document: Any) -> str:
    """Returns a JSON document as ``legible`` text in which letters stay letters."""
    text = json.dumps(document, indent=2, ensure_ascii=False)
    return _SURROGATE.sub(lambda match: _escaped(match).replace("\\", "\\\\"), text)


def _escaped(match: re.Match[str]) -> str:
    number = ord(match[0])
    is_byte = 0xDC80 <= number <= 0xDCFF  # as os.fsdecode encodes them
    return f"\\x{number - 0xDC00:02x}" if is_byte else f"\\u{number:04x}"
