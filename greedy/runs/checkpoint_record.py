"""The JSON documents of an interrupted training, in the stage's ``training/checkpoint``.

``start.json`` identifies the training by what it started with; ``progress.json`` says how far it
got.
"""

from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from greedy.base.errors import UserError
from greedy.base.files import file_digest, read_with_digest, with_digest
from greedy.cache.files import write_whole
from greedy.runs.choices import Choices, Count
from greedy.runs.events import EpochReport
from greedy.runs.exchange import CHECKPOINT, identities
from greedy.runs.record import RecipeDigest, same_kinds

START_FILE, PROGRESS_FILE = "start.json", "progress.json"
Document = TypeVar("Document", bound=BaseModel)


class StartRecord(BaseModel):
    """The inputs that determine the training of a stage, and the choices made for it."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    stage: Count
    recipe_digest: RecipeDigest
    parent_lineage: Annotated[str, Field(validation_alias="parent", serialization_alias="parent")]
    source: Count
    layers: list[str]
    resolved: Choices
    torch: str | None = None  # whose release decides how layers are written

    @classmethod
    def read(cls, training: Path) -> Self | None:
        """Returns the record in the directory ``training``, ``None`` if no training was started
        there. Raises ``UserError`` if it is damaged."""
        return _read(training, START_FILE, cls)

    def write(self, training: Path) -> None:
        """Writes ``start.json``, the first file of a training."""
        (training / CHECKPOINT).mkdir(parents=True, exist_ok=True)
        write_whole(
            training / CHECKPOINT / START_FILE,
            with_digest(self.model_dump(mode="json", by_alias=True)),
        )

    def has_same_inputs(self, other: Self) -> bool:
        """Returns whether the two trainings differ at most in their choices."""
        is_other_torch = self.torch != other.torch
        if not same_kinds(self.layers, other.layers, classes_only=is_other_torch):
            return False
        changed = {"resolved": other.resolved, "layers": other.layers, "torch": other.torch}
        return self.model_copy(update=changed) == other


class Progress(BaseModel):
    """How far a training got: ``epoch`` complete epochs and ``position`` batches of the current
    one.

    Attributes:
        rows: trained in the current epoch.
        seconds: spent in the current epoch.
        before: seconds spent in the epochs before it.
        processes: the numbers of processes that trained the current epoch together, in order.
        finished: whether no epoch is left.
        reports: of the complete epochs, a list of one report per stage for each.
    """

    model_config = ConfigDict(extra="forbid")

    epoch: Count = 0
    position: Count = 0
    rows: Count = 0
    seconds: float = 0.0
    before: float = 0.0
    processes: list[Count] = []
    finished: bool = False
    reports: list[list[EpochReport]] = []

    def __str__(self) -> str:
        if self.position:
            return f"step {self.position} of epoch {self.epoch + 1}"
        return f"epoch {self.epoch}"


class CheckpointRecord(BaseModel):
    """A checkpoint without its tensors, whose file is named by the digest ``tensors``."""

    model_config = ConfigDict(extra="forbid")

    progress: Progress
    schedule: dict[str, float]
    optimizers: list[Any]
    tensors: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]

    @classmethod
    def read(cls, training: Path) -> Self | None:
        """Returns the latest checkpoint in the directory ``training``, ``None`` before the first.
        Raises ``UserError`` if it is damaged."""
        return _read(training, PROGRESS_FILE, cls)

    def checked_tensors(self, training: Path) -> Path:
        """Returns the path of the tensors in the directory ``training``. Raises ``UserError`` if it
        is not the file that was written."""
        path = training / CHECKPOINT / f"{self.tensors}.safetensors"
        if not path.is_file() or file_digest(path) != self.tensors:
            raise damaged_checkpoint(path, training, "it is not the file that was written")
        return path


def checkpoint_damage(training: Path) -> UserError | OSError | None:
    """Returns the error for the checkpoint in the directory ``training``, also while another
    process writes the next; ``None`` if it is intact or there is none."""
    while True:
        before = identities([training / CHECKPOINT])
        try:
            StartRecord.read(training)
            if checkpoint := CheckpointRecord.read(training):
                checkpoint.checked_tensors(training)
        except (UserError, OSError) as error:
            if identities([training / CHECKPOINT]) == before:
                return error
        else:
            return None


def describe_progress(training: Path) -> str | None:
    """Returns how far the training in a directory got, such as ``epoch 4``; ``None`` if unknown."""
    try:
        document = CheckpointRecord.read(training)
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
        raise damaged_checkpoint(path, training, str(error).splitlines()[0]) from error


def damaged_checkpoint(path: Path, training: Path, reason: str) -> UserError:
    """Returns the error for a checkpoint from which training cannot resume."""
    return UserError(
        f"{path} is damaged ({reason}): delete {training} and give the same command again, which "
        f"starts the stage again"
    )
