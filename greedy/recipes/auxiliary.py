"""The layers of prediction heads that a recipe names."""

import re


def downstream_layers(auxiliary: str) -> int:
    """Returns the d of ``downstream:d``, and 0 for ``none``. Raises ``ValueError`` for any other
    text, with what it must be."""
    if auxiliary == "none":
        return 0
    if match := re.fullmatch(r"downstream:([1-9][0-9]{0,3})", auxiliary):
        return int(match[1])
    raise ValueError("be none, or downstream: and a number of layers, such as downstream:2")
