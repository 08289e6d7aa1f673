"""What a finished stage says of itself: ``stage.json``."""

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from greedy.base.commands import command
from greedy.base.errors import UserError
from greedy.base.files import file_digest, read_with_digest, with_digest
from greedy.base.text import legible
from greedy.cache import StoreSummary
from greedy.cache.files import write_whole
from greedy.recipes import Recipe
from greedy.runs.choices import Choices, Count, DataChoices, Size

FORMAT = 1
ENCODER, HEADS, HISTORY = "encoder.safetensors", "heads.safetensors", "history.jsonl"
FILES = "files.npz"  # of stage 0, see ``greedy.runs.file_table``
UNKNOWN = -1  # the generation of a store whose views are just being exchanged

Split = Annotated[str, Field(pattern=r"^(train|test)$")]
# Folders are named by anybody, also in bytes that are no text.
ClassName = Annotated[
    str, BeforeValidator(lambda name: legible(name) if isinstance(name, str) else name)
]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$", max_length=255)]


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Parent(_Document):
    """The stage before a stage, as it was when the stage was trained."""

    stage: Count
    lineage: str


class StoreRecord(_Document):
    """One stage's activation store, both splits together.

    ``generation`` counts the writings of the training split, ``bytes_written`` is what all of
    them wrote; ``digests`` are those of each split's contents; ``source`` is the stage from whose
    store it was written.
    """

    encoding: str
    compressor: str
    views: Size
    values: Size
    split_bytes: Annotated[dict[Split, Count], Field(min_length=2)]
    digests: Annotated[dict[Split, str], Field(min_length=2)]
    source: Count = 0
    generation: Annotated[int, Field(ge=UNKNOWN)] = 0
    bytes_written: Count

    @property
    def bytes(self) -> int:
        """Both splits on disk."""
        return sum(self.split_bytes.values())

    @classmethod
    def of(
        cls,
        written: dict[str, StoreSummary],
        encoding: str,
        compressor: str,
        views: int,
        source: int = 0,
    ) -> Self:
        """A new store, both splits written."""
        split_bytes = {split: summary.disk_bytes for split, summary in written.items()}
        return cls(
            encoding=encoding,
            compressor=compressor,
            views=views,
            values=sum(summary.values for summary in written.values()),
            split_bytes=split_bytes,
            digests={split: summary.digest for split, summary in written.items()},
            source=source,
            bytes_written=sum(split_bytes.values()),
        )


class Metrics(_Document):
    """Errors in percent; ``None`` where a stage has no local classifier."""

    train_error_percent: float | None = None
    test_error_percent: float | None = None
    train_loss: float | None = None


class StageRecord(_Document):
    """One complete stage.

    ``lineage`` names everything the stage's result follows from and decides staleness; it
    outlives a deleted store. ``source`` is the stage whose store it was trained from.
    ``row_shape`` is the shape of its output, ``network`` the names of all stages of the run,
    ``files`` the digests of the sibling files, ``written_before`` the bytes that went into the
    stores that this training of the stage replaced. A store deleted later stays recorded.
    ``layers`` are the kinds of module the stage consists of, ``recipe`` is the digest of the
    settings that decide the run's results; ``images_per_second`` counts training rows over all
    epochs.
    """

    format: int = FORMAT
    stage: Count
    name: str
    lineage: str
    recipe: str
    layers: list[str] = []
    parent: Parent | None = None
    source: Count | None = None
    row_shape: Annotated[tuple[Size, ...], Field(min_length=1, max_length=3)]
    class_names: list[ClassName]
    network: list[str]
    resolved: Choices | DataChoices
    metrics: Metrics = Metrics()
    store: StoreRecord | None = None
    written_before: Count = 0
    rows: Annotated[dict[Split, Size], Field(min_length=2)]
    seconds: float = 0.0
    images_per_second: float | None = None
    peak_memory_bytes: int | None = None
    versions: dict[str, str] = {}
    device: str = ""
    files: dict[FileName, str] = {}

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        earlier = [self.parent.stage] if self.parent else []
        if self.source is not None:
            earlier.append(self.source)
        if self.stage and self.store:
            earlier.append(self.store.source)
        if any(number >= self.stage for number in earlier):
            raise ValueError("it follows from a later stage")
        if self.stage and len(earlier) < 2:
            raise ValueError("what it follows from is missing")
        if isinstance(self.resolved, Choices) != (self.stage > 0):
            raise ValueError("its choices are those of another kind of stage")
        if isinstance(self.resolved, DataChoices):
            moments = self.resolved
            if {len(moments.mean), len(moments.std)} != {self.row_shape[0]}:
                raise ValueError("its moments are of other channels")
        return self

    @property
    def choices(self) -> Choices:
        """Of a stage that was trained."""
        assert isinstance(self.resolved, Choices)
        return self.resolved

    @property
    def data_choices(self) -> DataChoices:
        """Of stage 0."""
        assert isinstance(self.resolved, DataChoices)
        return self.resolved

    @property
    def bytes_written(self) -> int:
        """All that was ever written into stores of this stage."""
        return self.written_before + (self.store.bytes_written if self.store else 0)

    def follows(self, parent: "StageRecord") -> bool:
        """Whether ``parent`` is the stage before this one, as it was when this one was trained."""
        return self.parent == Parent(stage=parent.stage, lineage=parent.lineage)

    def write(self, directory: Path) -> Self:
        """Writes ``stage.json`` with the digests of its siblings and, last, of itself; returns
        the record as written."""
        own = (directory / name for name in (ENCODER, HEADS, HISTORY))
        files = {path.name: file_digest(path) for path in own if path.is_file()}
        record = self.model_copy(update={"files": files})
        write_whole(directory / "stage.json", with_digest(record.model_dump(mode="json")))
        return record

    def with_store(self, directory: Path, **changes: Any) -> Self:
        """Writes ``stage.json`` with changes in its store's record. The siblings' digests stay:
        those files are as they were, or damaged."""
        assert self.store is not None
        store = self.store.model_copy(update=changes)
        record = self.model_copy(update={"store": store})
        write_whole(directory / "stage.json", with_digest(record.model_dump(mode="json")))
        return record

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Reads and checks ``stage.json``. Raises ``UserError`` naming what is wrong with it."""
        path = directory / "stage.json"
        try:
            document = read_with_digest(path)
            if document.get("format") != FORMAT:
                raise ValueError(f"this version reads format {FORMAT}, not another")
            return cls.model_validate(document)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{path} is damaged ({_reason(error)}): delete {directory} and go on with "
                f"`greedy train`"
            ) from error

    def check_file(self, directory: Path, name: str) -> Path:
        """Returns the path of a sibling file whose bytes are those recorded. Raises ``UserError``
        if it is missing or another."""
        path = directory / name
        way = command("train", "--run", directory.parent, "--retrain", self.stage)
        try:
            intact = file_digest(path) == self.files.get(name)
        except (FileNotFoundError, IsADirectoryError):
            raise UserError(f"{path} is missing: train the stage again with {way}") from None
        if not intact:
            raise UserError(
                f"{path} is not the file that was written (its digest differs): train the stage "
                f"again with {way}"
            )
        return path


def _reason(error: Exception) -> str:
    """What is wrong with a document, in few words."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        return f"{place}: {first['msg']}" if place else str(first["msg"])
    return str(error).splitlines()[0]


def normalisation_of(recipe: Recipe, data: StageRecord) -> tuple[list[float], list[float]]:
    """Returns mean and deviation of each channel: the recipe's, which are of bytes scaled to
    [0, 1] where images are files, or those measured."""
    moments, given = data.data_choices, recipe.data
    if moments.pixels != "bytes" or given.mean is None or given.std is None:
        return moments.mean, moments.std
    return given.mean, given.std
