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
    """A retraining of all stages from ``first`` on, of which those from ``left`` on remain.

    Attributes:
        seconds: that the last training of stage ``left`` took when this was written, 0 without one;
            once they differ, the stage is done. ``None`` in files of older versions.
    """

    model_config = ConfigDict(extra="forbid")

    first: Number
    left: Number
    seconds: float | None = None

    @classmethod
    def plan(
        cls,
        run: Path,
        wanted: int | None,
        is_stale: Callable[[int], bool],
        seconds: Callable[[int], float],
    ) -> Self | None:
        """Returns the retraining that a run has to do, ``None`` if there is none.

        Args:
            run: the run directory.
            wanted: the first stage that the user asks to train again. If it is ``None``, or the
                first stage of an interrupted retraining, that one resumes.
            is_stale: whether a stage is stale; a stage that was done and is stale is done again.
            seconds: that the last training of a stage took, 0 without one.

        Raises:
            UserError: the file of the interrupted retraining is damaged.
        """
        interrupted, left = cls._read(run), wanted
        if interrupted and interrupted.seconds not in (None, seconds(interrupted.left)):
            interrupted.left += 1  # the run stopped between the end of the stage and the note of it
        if interrupted and wanted in (None, interrupted.first):
            wanted, left = interrupted.first, interrupted.left
            left = next((number for number in range(wanted, left) if is_stale(number)), left)
        elif interrupted and wanted:
            left = min(wanted, interrupted.left)
        if wanted is None or left is None:
            return None
        return cls(first=wanted, left=left, seconds=seconds(left))

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

    def mark_done(self, number: int, run: Path, seconds: float) -> None:
        """Writes that a stage is done; the last training of the next one took ``seconds``."""
        self.model_copy(update={"left": number + 1, "seconds": seconds}).write(run)

    def end(self, run: Path) -> None:
        """Removes the file, after the last stage."""
        (run / RETRAINING_FILE).unlink()

    def write(self, run: Path) -> None:
        """Writes ``retraining.json`` into the run directory."""
        write_whole(run / RETRAINING_FILE, json.dumps(self.model_dump()).encode())
