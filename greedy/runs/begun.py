"""The documents of an interrupted training, in the stage's ``training/checkpoint``.

``start.json`` says what the training began with, by which another one is told from it;
``progress.json`` how far it is.
"""

from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from greedy.base.errors import UserError
from greedy.base.files import read_with_digest, with_digest
from greedy.cache.files import write_whole
from greedy.runs.choices import Choices, Count
from greedy.runs.events import EpochReport
from greedy.runs.exchange import CHECKPOINT

START, PROGRESS = "start.json", "progress.json"
Document = TypeVar("Document", bound=BaseModel)


class Start(BaseModel):
    """What the training of a stage follows from, and the choices made for it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    stage: Count
    recipe: str
    parent: str
    source: Count
    layers: list[str]
    resolved: Choices

    @classmethod
    def read(cls, training: Path) -> Self | None:
        """Reads that of the stage in the directory ``training``, ``None`` where none was begun.
        Raises ``UserError`` if it is damaged."""
        return _read(training, START, cls)

    def write(self, training: Path) -> None:
        """The first thing to be written."""
        (training / CHECKPOINT).mkdir(parents=True, exist_ok=True)
        write_whole(training / CHECKPOINT / START, with_digest(self.model_dump(mode="json")))

    def is_of(self, other: Self) -> bool:
        """Whether the two trainings come to the same, whatever was chosen."""
        return self.model_copy(update={"resolved": other.resolved}) == other


class Progress(BaseModel):
    """How far a stage is: ``epoch`` epochs and ``position`` batches of the next. ``rows`` and
    ``seconds`` are those of that next one, ``before`` the seconds of the stage till then."""

    model_config = ConfigDict(extra="forbid")

    epoch: Count = 0
    position: Count = 0
    rows: Count = 0
    seconds: float = 0.0
    before: float = 0.0
    finished: bool = False
    reports: list[list[EpochReport]] = []

    def __str__(self) -> str:
        if self.position:
            return f"step {self.position} of epoch {self.epoch + 1}"
        return f"epoch {self.epoch}"


class Kept(BaseModel):
    """A checkpoint but for its tensors, which it names by their digest."""

    model_config = ConfigDict(extra="forbid")

    progress: Progress
    schedule: dict[str, float]
    optimizers: list[Any]
    tensors: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]

    @classmethod
    def read(cls, training: Path) -> Self | None:
        """Reads that of the stage in the directory ``training``, ``None`` where there is none yet.
        Raises ``UserError`` if it is damaged."""
        return _read(training, PROGRESS, cls)


def progress_of(training: Path) -> str | None:
    """Returns how far the training in a directory is, in words; ``None`` if that is not known."""
    try:
        document = Kept.read(training)
    except UserError:
        return None
    return str(document.progress) if document else None


def _read(training: Path, name: str, kind: type[Document]) -> Document | None:
    path = training / CHECKPOINT / name
    if not path.is_file():
        return None
    try:
        return kind.model_validate(read_with_digest(path))
    except (ValueError, RecursionError) as error:
        raise damaged(path, training, str(error).splitlines()[0]) from error


def damaged(path: Path, training: Path, reason: str) -> UserError:
    """The error for a checkpoint that cannot be gone on from."""
    return UserError(
        f"{path} is damaged ({reason}): delete {training} and give the same command again, which "
        f"begins the stage anew"
    )
