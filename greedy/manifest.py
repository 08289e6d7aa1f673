"""What a finished stage says of itself: ``stage.json``."""

import json
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from greedy.cache import StoreSummary
from greedy.cache.files import write_whole
from greedy.errors import UserError
from greedy.files import canonical, digest, file_digest

FORMAT = 1
ENCODER, HEADS, HISTORY = "encoder.safetensors", "heads.safetensors", "history.jsonl"


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Parent(_Document):
    """The stage before a stage, as it was when the stage was trained."""

    stage: int
    lineage: str


class StoreRecord(_Document):
    """One stage's activation store, both splits together.

    ``generation`` counts the writings of the training split, ``bytes_written`` is what all of
    them wrote; ``digests`` are those of each split's contents.
    """

    encoding: str
    compressor: str
    views: int
    values: int
    split_bytes: dict[str, int]
    digests: dict[str, str]
    generation: int = 0
    bytes_written: int

    @property
    def bytes(self) -> int:
        """Both splits on disk."""
        return sum(self.split_bytes.values())

    @classmethod
    def of(
        cls, written: dict[str, StoreSummary], encoding: str, compressor: str, views: int
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
            bytes_written=sum(split_bytes.values()),
        )

    def rewritten(self, generation: int, train: StoreSummary) -> Self:
        """The store after its training split was written again."""
        return self.model_copy(
            update={
                "generation": generation,
                "split_bytes": self.split_bytes | {"train": train.disk_bytes},
                "digests": self.digests | {"train": train.digest},
                "bytes_written": self.bytes_written + train.disk_bytes,
            }
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
    settings that decide the run's results.
    """

    format: int = FORMAT
    stage: int
    name: str
    lineage: str
    recipe: str
    layers: list[str] = []
    parent: Parent | None = None
    source: int | None = None
    row_shape: tuple[int, ...]
    class_names: list[str]
    network: list[str]
    resolved: dict[str, Any] = {}
    metrics: Metrics = Metrics()
    store: StoreRecord | None = None
    written_before: int = 0
    rows: dict[str, int] = {}
    seconds: float = 0.0
    peak_memory_bytes: int | None = None
    versions: dict[str, str] = {}
    device: str = ""
    files: dict[str, str] = {}

    @property
    def bytes_written(self) -> int:
        """All that was ever written into stores of this stage."""
        return self.written_before + (self.store.bytes_written if self.store else 0)

    def write(self, directory: Path) -> Self:
        """Writes ``stage.json`` with the digests of its siblings and, last, of itself; returns
        the record as written."""
        files = {
            path.name: file_digest(path)
            for path in sorted(directory.iterdir())
            if path.is_file() and path.name != "stage.json"
        }
        record = self.model_copy(update={"files": files})
        document = record.model_dump(mode="json")
        document["digest"] = digest(canonical(document))
        write_whole(directory / "stage.json", json.dumps(document, indent=2).encode())
        return record

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Reads and checks ``stage.json``. Raises ``UserError`` naming what is wrong with it."""
        path = directory / "stage.json"
        try:
            document = json.loads(path.read_bytes())
            claimed = document.pop("digest")
            if digest(canonical(document)) != claimed:
                raise ValueError("its digest does not match")
            return cls.model_validate(document)
        except (ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"{path} is damaged ({reason}): delete {directory} and go on with `greedy train`"
            ) from error

    def check_file(self, directory: Path, name: str) -> Path:
        """The path of a sibling file whose bytes are those recorded."""
        path = directory / name
        if not path.is_file():
            raise UserError(f"{path} is missing: train the stage again with --retrain")
        if file_digest(path) != self.files.get(name):
            raise UserError(
                f"{path} is not the file that was written (its digest differs): "
                f"train the stage again with --retrain"
            )
        return path
