"""A note in a run of what a retraining still has to do, so that one that is cut short goes on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from greedy.base.errors import UserError
from greedy.base.files import read_document
from greedy.cache.files import write_whole

NOTE = "retraining.json"  # in the run directory, until all is done
Number = Annotated[int, Field(ge=1)]


class Retraining(BaseModel):
    """Stages from ``first`` on are trained again; those from ``left`` on are not done yet."""

    model_config = ConfigDict(extra="forbid")

    first: Number
    left: Number

    @classmethod
    def of(cls, run: Path, wanted: int | None, is_stale: Callable[[int], bool]) -> Self | None:
        """What is to be trained again if that is ``wanted`` from a stage on: what is left if it is
        what was begun before, and at least that; a stage that was done and ``is_stale`` since is
        left too. Raises ``UserError`` for a damaged note."""
        begun = cls._read(run)
        if begun and wanted in (None, begun.first):
            stale = (number for number in range(begun.first, begun.left) if is_stale(number))
            return begun.model_copy(update={"left": next(stale, begun.left)})
        if wanted is None:
            return None
        return cls(first=wanted, left=min(wanted, begun.left) if begun else wanted)

    @classmethod
    def _read(cls, run: Path) -> Self | None:
        try:
            return cls.model_validate(read_document(run / NOTE))
        except FileNotFoundError:
            return None
        except (ValueError, ValidationError) as error:
            raise UserError(
                f"{run / NOTE} is damaged: delete it and give --retrain with the first stage that "
                f"is to be trained again"
            ) from error

    def finished(self, number: int, run: Path, *, last: bool) -> None:
        """A stage is done; after the last one nothing is to be noted."""
        if last:
            (run / NOTE).unlink()
        else:
            self.model_copy(update={"left": number + 1}).note(run)

    def note(self, run: Path) -> None:
        """Writes down what is left."""
        write_whole(run / NOTE, json.dumps(self.model_dump()).encode())
