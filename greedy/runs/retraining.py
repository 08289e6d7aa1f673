"""The stages that a retraining has left to do, kept in a file so that it can resume."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from greedy.base.errors import UserError
from greedy.base.files import read_document
from greedy.cache.files import write_whole

RETRAINING_FILE = "retraining.json"  # in the run directory, until the retraining is complete
Number = Annotated[int, Field(ge=1)]


class Retraining(BaseModel):
    """A retraining of all stages from ``first`` on, of which those from ``left`` on remain."""

    model_config = ConfigDict(extra="forbid")

    first: Number
    left: Number

    @classmethod
    def plan(cls, run: Path, wanted: int | None, is_stale: Callable[[int], bool]) -> Self | None:
        """Returns the retraining that a run has to do, ``None`` if there is none.

        Args:
            run: the run directory.
            wanted: the first stage that the user asks to train again. If it is ``None``, or the
                first stage of an interrupted retraining, that one resumes.
            is_stale: whether a stage is stale; a stage that was done and is stale is done again.

        Raises:
            UserError: the file of the interrupted retraining is damaged.
        """
        interrupted = cls._read(run)
        if interrupted and wanted in (None, interrupted.first):
            done = range(interrupted.first, interrupted.left)
            left = next((number for number in done if is_stale(number)), interrupted.left)
            return interrupted.model_copy(update={"left": left})
        if wanted is None:
            return None
        return cls(first=wanted, left=min(wanted, interrupted.left) if interrupted else wanted)

    @classmethod
    def _read(cls, run: Path) -> Self | None:
        try:
            return cls.model_validate(read_document(run / RETRAINING_FILE))
        except FileNotFoundError:
            return None
        except (ValueError, ValidationError) as error:
            raise UserError(
                f"{run / RETRAINING_FILE} is damaged: delete it and give --retrain with the first "
                f"stage that is to be trained again"
            ) from error

    def mark_done(self, number: int, run: Path, *, last: bool) -> None:
        """Writes that a stage is done; removes the file after the ``last`` one."""
        if last:
            (run / RETRAINING_FILE).unlink()
        else:
            self.model_copy(update={"left": number + 1}).write(run)

    def write(self, run: Path) -> None:
        """Writes ``retraining.json`` into the run directory."""
        write_whole(run / RETRAINING_FILE, json.dumps(self.model_dump()).encode())
