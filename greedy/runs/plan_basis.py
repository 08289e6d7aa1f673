"""What a run's stores were planned from when it began: the room on its disk, and the speed of its
machine. It is kept, since both change, and with other stores the same command would train other
weights."""

import shutil
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from greedy.base.errors import UserError
from greedy.base.files import bytes_below, read_with_digest, with_digest
from greedy.cache.files import write_whole
from greedy.runs.directory import SET_ASIDE, RunDirectory
from greedy.runs.disk_demand import ByteOperations

BASIS_FILE = "plan.json"  # in the run directory
FREE_DISK_SHARE = 0.7  # of the room on the file system, for ``store.disk_budget = "auto"``
FULL_DISK_SHARE = 0.9  # of the room there is later: weights and checkpoints take some, too
Operations = Annotated[float, Field(ge=0, le=1e30, allow_inf_nan=False)]


class PlanBasis(BaseModel):
    """What stores are planned from where the recipe leaves it open.

    Attributes:
        budget: bytes that the run may use, ``None`` for any number.
        read, written: multiply-adds that take as long as a byte of a store.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    budget: Annotated[int, Field(ge=0)] | None
    read: Operations
    written: Operations

    @classmethod
    def of_run(cls, run: RunDirectory, byte_operations: ByteOperations) -> Self:
        """Returns what the run has kept since it stored its images, else what is so now. Raises
        ``UserError`` if the file is damaged."""
        if (run.stage_dir(0) / "stage.json").exists() and (run.path / BASIS_FILE).exists():
            return cls.kept(run.path)
        room = disk_room(run)
        budget = None if room is None else int(FREE_DISK_SHARE * room)
        return cls(budget=budget, **byte_operations._asdict())

    @classmethod
    def kept(cls, run: Path) -> Self:
        """Reads what a run has kept. Raises ``UserError`` if the file is damaged."""
        try:
            return cls.model_validate(read_with_digest(run / BASIS_FILE))
        except (ValueError, ValidationError) as error:
            raise UserError(
                f"{run / BASIS_FILE} is damaged: delete it, after which stores are planned from "
                f"the room that there is now"
            ) from error

    @property
    def byte_operations(self) -> ByteOperations:
        """``read`` and ``written`` together."""
        return ByteOperations(self.read, self.written)

    def keep(self, run: Path) -> None:
        """Writes this into the run directory, unless there is one."""
        if not (run / BASIS_FILE).exists():
            write_whole(run / BASIS_FILE, with_digest(self.model_dump()))

    @staticmethod
    def forget(run: Path) -> None:
        """Deletes what a run has kept: one that stores its images anew is planned anew."""
        (run / BASIS_FILE).unlink(missing_ok=True)


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
