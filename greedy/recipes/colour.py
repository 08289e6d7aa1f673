"""Colours, by Pillow's names."""

from typing import Annotated

from PIL import ImageColor
from pydantic import AfterValidator


def _opaque(name: str) -> str:
    try:
        opaque = len(ImageColor.getrgb(name)) == 3
    except ValueError:
        opaque = False
    if not opaque:
        raise ValueError("be the name of a colour, such as black, or #rrggbb")
    return name


Colour = Annotated[str, AfterValidator(_opaque)]
"""The name of an opaque colour, or #rrggbb."""
