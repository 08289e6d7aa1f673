"""The record of a finished stage: ``stage.json``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from greedy.base.commands import command
from greedy.base.errors import UserError
from greedy.base.files import file_digest, read_with_digest, with_digest
from greedy.base.text import legible
from greedy.cache import Layout, StoreSummary
from greedy.cache.files import write_whole
from greedy.recipes import Recipe
from greedy.runs.choices import Choices, Count, DataChoices, Size

FORMAT = 1
ENCODER, HEADS, HISTORY = "encoder.safetensors", "heads.safetensors", "history.jsonl"
STORE = "activations.zarr"
FILES = "files.npz"  # of stage 0, see ``greedy.runs.file_table``
UNKNOWN_VIEW = -1  # the number of a view while it is exchanged

Split = Annotated[str, Field(pattern=r"^(train|test)$")]
# The digest of the recipe's fields that decide results; ``recipe`` in the files.
RecipeDigest = Annotated[str, Field(validation_alias="recipe", serialization_alias="recipe")]
# Anybody names folders, even with bytes that are not text.
ClassName = Annotated[
    str, BeforeValidator(lambda name: legible(name) if isinstance(name, str) else name)
]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$", max_length=255)]


def same_kinds(recorded: Sequence[str], kinds: Sequence[str], *, classes_only: bool) -> bool:
    """Returns whether recorded kinds of modules, which in older records are classes alone, are
    those of other stages."""
    if classes_only or not any("(" in kind for kind in recorded):
        recorded, kinds = ([k.partition("(")[0] for k in each] for each in (recorded, kinds))
    return list(recorded) == list(kinds)


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class Parent(_Document):
    """The stage before a stage, as it was when the stage was trained."""

    stage: Count
    lineage: str


class RingRecord(_Document):
    """The views of a training split that are replaced one by one.

    Attributes:
        numbers: of the views, in the order of the store; ``UNKNOWN_VIEW`` while one is exchanged.
        shards: the digests of the split's shards, see ``StoreSummary``.
    """

    numbers: Annotated[list[Annotated[int, Field(ge=UNKNOWN_VIEW)]], Field(min_length=1)]
    shards: list[Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]]

    @model_validator(mode="after")
    def _views_have_as_many_shards(self) -> Self:
        if len(self.shards) % len(self.numbers):
            raise ValueError("its views have different numbers of shards")
        return self

    def with_view(self, place: int, number: int, shards: Sequence[str] | None = None) -> Self:
        """Returns the record with another view in a place, whose shards have the digests ``shards``
        unless these stay."""
        numbers, size = list(self.numbers), len(self.shards) // len(self.numbers)
        numbers[place] = number
        digests = list(self.shards)
        if shards is not None:
            digests[place * size : (place + 1) * size] = shards
        return self.model_copy(update={"numbers": numbers, "shards": digests})

    def known(self) -> Self:
        """Returns the record with the number that an unknown view had if it was the oldest."""
        views, newest = len(self.numbers), max(self.numbers)
        numbers = [
            place + views * max((newest - place) // views, 0) if number == UNKNOWN_VIEW else number
            for place, number in enumerate(self.numbers)
        ]
        return self.model_copy(update={"numbers": numbers})


class StoreRecord(_Document):
    """The activation store of one stage, both splits together.

    Attributes:
        values: stored in both splits.
        split_bytes: on disk, of each split.
        digests: of each split's contents.
        source: the stage from whose store it was written.
        generation: not 0 if an older version replaced its views all at once.
        ring: its views, if they are replaced one by one.
        bytes_written: since it was made, also for views that were replaced.
    """

    encoding: str
    compressor: str
    views: Size
    values: Size
    split_bytes: Annotated[dict[Split, Count], Field(min_length=2)]
    digests: Annotated[dict[Split, str], Field(min_length=2)]
    source: Count = 0
    generation: Annotated[int, Field(ge=-1)] = 0
    ring: RingRecord | None = None
    bytes_written: Count

    @model_serializer(mode="wrap")
    def _without_ring(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {k: value for k, value in dump(self).items() if k != "ring" or self.ring}

    @model_validator(mode="after")
    def _ring_has_its_views(self) -> Self:
        if self.ring and len(self.ring.numbers) != self.views:
            raise ValueError("its ring has another number of views")
        return self

    @property
    def view_numbers(self) -> Sequence[int]:
        """The number of each view of the training split, ``UNKNOWN_VIEW`` for one that is being
        exchanged. If ``generation`` is not 0 they are not known."""
        return self.ring.numbers if self.ring else range(self.views)

    def fits(self, train: Layout) -> bool:
        """Returns whether a training split has the recorded views and, in a ring, shards."""
        shards = len(self.ring.shards) if self.ring else train.views * train.shards
        return (self.views, shards) == (train.views, train.views * train.shards)

    @property
    def bytes(self) -> int:
        """The bytes of both splits on disk."""
        return sum(self.split_bytes.values())

    @classmethod
    def from_summaries(
        cls,
        written: dict[str, StoreSummary],
        encoding: str,
        compressor: str,
        views: int,
        source: int = 0,
        *,
        ring: bool = False,
    ) -> Self:
        """Returns the record of a new store from the summaries of both splits. ``ring`` says that
        its views will be replaced one by one."""
        split_bytes = {split: summary.disk_bytes for split, summary in written.items()}
        return cls(
            encoding=encoding,
            compressor=compressor,
            views=views,
            values=sum(summary.values for summary in written.values()),
            split_bytes=split_bytes,
            digests={split: summary.digest for split, summary in written.items()},
            source=source,
            ring=_first_ring(written["train"], views) if ring else None,
            bytes_written=sum(split_bytes.values()),
        )


def _first_ring(written: StoreSummary, views: int) -> RingRecord:
    return RingRecord(numbers=list(range(views)), shards=list(written.shards))


class Metrics(_Document):
    """The last loss and errors in percent, ``None`` for a stage without a local classifier."""

    train_error_percent: float | None = None
    test_error_percent: float | None = None
    train_loss: float | None = None


class StageRecord(_Document):
    """The record of one complete stage.

    Attributes:
        lineage: a digest of everything that determines the stage's result; it decides staleness.
        recipe_digest: of the recipe's fields that decide the run's results.
        layers: the kinds of module that the stage consists of.
        source: the stage from whose store it was trained.
        row_shape: of its output.
        network: the names of all stages of the run.
        resolved: the choices made for it, see ``Choices`` and ``DataChoices``.
        store: its activation store, also after that was deleted.
        written_before: bytes written into stores of this stage by earlier trainings of it.
        rows: of each split.
        images_per_second: training rows of all epochs by their time.
        processes: the numbers of processes that trained it together, in the order of epochs.
        files: the digests of the other files in the stage's directory.
    """

    format: int = FORMAT
    stage: Count
    name: str
    lineage: str
    recipe_digest: RecipeDigest
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
    processes: Annotated[list[Size], Field(min_length=1)] = [1]
    peak_memory_bytes: int | None = None
    versions: dict[str, str] = {}
    device: str = ""
    files: dict[FileName, str] = {}

    @model_serializer(mode="wrap")
    def _without_one_process(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {k: v for k, v in dump(self).items() if k != "processes" or v != [1]}

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        earlier = [self.parent.stage] if self.parent else []
        if self.source is not None:
            earlier.append(self.source)
        if self.stage and self.store:
            earlier.append(self.store.source)
        if any(number >= self.stage for number in earlier):
            raise ValueError("it depends on a later stage")
        if self.stage and len(earlier) < 2:
            raise ValueError("its parent or source is missing")
        if isinstance(self.resolved, Choices) != (self.stage > 0):
            raise ValueError("its choices are those of another kind of stage")
        if self.store and self.store.ring and (self.store.source or not self._replaces_views):
            raise ValueError("its views cannot be replaced")
        if isinstance(self.resolved, DataChoices):
            moments = self.resolved
            if {len(moments.mean), len(moments.std)} != {self.row_shape[0]}:
                raise ValueError("its mean and std are of another number of channels")
        return self

    @property
    def _replaces_views(self) -> bool:
        return isinstance(self.resolved, Choices) and self.resolved.reuse > 0

    @property
    def choices(self) -> Choices:
        """The choices of a stage that was trained."""
        assert isinstance(self.resolved, Choices)
        return self.resolved

    @property
    def data_choices(self) -> DataChoices:
        """The choices of stage 0."""
        assert isinstance(self.resolved, DataChoices)
        return self.resolved

    @property
    def bytes_written(self) -> int:
        """The bytes that all trainings of this stage wrote into its stores."""
        return self.written_before + (self.store.bytes_written if self.store else 0)

    def follows(self, parent: "StageRecord") -> bool:
        """Returns whether this stage was trained after ``parent`` as that is now."""
        return self.parent == Parent(stage=parent.stage, lineage=parent.lineage)

    def write(self, directory: Path) -> Self:
        """Writes ``stage.json`` with the digests of the other files and of itself; returns the
        record as written."""
        paths = (directory / name for name in (ENCODER, HEADS, HISTORY))
        files = {path.name: file_digest(path) for path in paths if path.is_file()}
        record = self.model_copy(update={"files": files})
        write_whole(
            directory / "stage.json", with_digest(record.model_dump(mode="json", by_alias=True))
        )
        return record

    def update_store(self, directory: Path, **changes: Any) -> Self:
        """Writes ``stage.json`` with changes to the store's record; returns the record as written.
        The digests of the other files are kept, since a file that differs now is damaged."""
        assert self.store is not None
        store = self.store.model_copy(update=changes)
        record = self.model_copy(update={"store": store})
        write_whole(
            directory / "stage.json", with_digest(record.model_dump(mode="json", by_alias=True))
        )
        return record

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Reads and checks ``stage.json``. Raises ``UserError`` if it is damaged."""
        path = directory / "stage.json"
        try:
            document = read_with_digest(path)
            if document.get("format") != FORMAT:
                raise ValueError(f"this version reads only format {FORMAT}")
            return cls.model_validate(document)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{path} is damaged ({_reason(error)}): delete {directory} and resume with "
                f"{command('train', '--run', directory.parent)}"
            ) from error

    def check_file(self, directory: Path, name: str) -> Path:
        """Returns the path of another file of the stage. Raises ``UserError`` if it is missing or
        its digest is not the recorded one."""
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
    """Returns the first fault of a document, in few words."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(map(str, first["loc"]))
        return f"{field}: {first['msg']}" if field else str(first["msg"])
    return str(error).splitlines()[0]


def channel_moments(recipe: Recipe, data: StageRecord) -> tuple[list[float], list[float]]:
    """Returns mean and standard deviation of each channel: those of the recipe if it has them and
    image files hold bytes, which are scaled to [0, 1]; else those measured for stage 0's record
    ``data``."""
    measured, recipe_data = data.data_choices, recipe.data
    if measured.pixels != "bytes" or recipe_data.mean is None or recipe_data.std is None:
        return measured.mean, measured.std
    return recipe_data.mean, recipe_data.std
