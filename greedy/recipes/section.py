"""What the sections of a recipe share: strictness, and types of numbers."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0)]
Counts = Annotated[list[Count], Field(min_length=1)]
Rates = Annotated[list[Rate], Field(min_length=1)]


class Section(BaseModel):
    """A section: unknown fields, other types and infinite numbers are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
