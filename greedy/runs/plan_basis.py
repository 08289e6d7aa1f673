"""What a run's stores were planned from when it began: the room on its disk, and the speed of its
machine. It is kept, since both change, and with other stores the same command would train other
weights."""

import json
import shutil
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from greedy.base.errors import UserError
from greedy.base.files import bytes_below, read_document
from greedy.cache.files import write_whole
from greedy.runs.directory import SET_ASIDE, RunDirectory
from greedy.runs.disk_demand import ByteOperations

BASIS_FILE = "plan.json"  # in the run directory
FREE_DISK_SHARE = 0.7  # of the room on the file system, for ``store.disk_budget = "auto"``
Operations = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class PlanBasis(BaseModel):
    """What stores are planned from where the recipe leaves it open.

    Attributes:
        budget: bytes that the run may use, ``None`` for any number.
        read, written: multiply-adds that take as long as a byte of a store, ``None`` where every
            stage has a store.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    budget: Annotated[int, Field(ge=0)] | None
    read: Operations | None
    written: Operations | None

    @classmethod
    def of_run(cls, run: RunDirectory, byte_operations: ByteOperations | None) -> Self:
        """Returns what the run has kept, else what is so now. Raises ``UserError`` if the file is
        damaged."""
        try:
            return cls.model_validate(read_document(run.path / BASIS_FILE))
        except (FileNotFoundError, NotADirectoryError):
            room = disk_room(run)
            budget = None if room is None else int(FREE_DISK_SHARE * room)
            read, written = byte_operations or (None, None)
            return cls(budget=budget, read=read, written=written)
        except (ValueError, ValidationError) as error:
            raise UserError(
                f"{run.path / BASIS_FILE} is damaged: delete it, after which stores are planned "
                f"from the room that there is now"
            ) from error

    @property
    def byte_operations(self) -> ByteOperations | None:
        """``read`` and ``written`` together."""
        if self.read is None or self.written is None:
            return None
        return ByteOperations(self.read, self.written)

    def keep(self, run: Path) -> None:
        """Writes this into the run directory, unless there is one."""
        if not (run / BASIS_FILE).exists():
            write_whole(run / BASIS_FILE, json.dumps(self.model_dump()).encode())


def disk_room(run: RunDirectory) -> int | None:
    """Returns the bytes that a run could use; ``None`` in object storage, which has no end. The
    files that it has now count as free, except trainings that were set aside, which are never
    deleted."""
    if run.recipe.store.stores:
        return None
    path = run.path.absolute()
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    aside = sum(bytes_below(training) for training in path.glob(f"*{SET_ASIDE}*"))
    return shutil.disk_usage(existing).free + bytes_below(path) - aside
