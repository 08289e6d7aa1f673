"""Drawing and writing new views of a store while the next stage trains."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from greedy.base.files import canonical_json, digest
from greedy.runs.directory import RunDirectory
from greedy.runs.events import Reporter
from greedy.runs.exchange import replacing
from greedy.runs.record import UNKNOWN_GENERATION, StageRecord
from greedy.stores.source import Source
from greedy.stores.writing import write_split


@dataclass
class ViewRefresher:
    """Writes a store's views of the current generation, epoch // every.

    The old views are kept until the new ones are complete. The test split is not augmented and is
    not written.

    Attributes:
        stored: the stage whose store it is.
        every: epochs per generation.
        source: computes the store's rows from the images, replaying the frozen stages.
    """

    run: RunDirectory
    stored: int
    every: int
    source: Source
    reporter: Reporter

    def __call__(self, epoch: int) -> bool:
        """Writes the views of an epoch if the store does not hold them; returns whether it did."""
        generation = epoch // self.every
        record = self.run.record(self.stored)
        assert record is not None and record.store is not None
        if record.store.generation == generation:
            return False
        directory = self.run.stage_dir(self.stored)
        path = self.run.store_path(self.stored) / "train"
        old = self.run.open_store(self.stored, "train")
        temporary = _temporary_path(path, record, generation)
        with replacing(path, temporary, resume=True) as new_path:
            written = write_split(
                new_path,
                self.source,
                "train",
                views=old.views,
                generation=generation,
                encoding=old.encoding,
                compressor=old.compressor,
                batch=record.choices.write_batch,
                reporter=self.reporter,
                stage=self.stored,
            )
            # If the process ends between the exchange and the record, the generation is unknown.
            record = record.update_store(directory, generation=UNKNOWN_GENERATION)
        assert record.store is not None
        record.update_store(
            directory,
            generation=generation,
            split_bytes=record.store.split_bytes | {"train": written.disk_bytes},
            digests=record.store.digests | {"train": written.digest},
            bytes_written=record.store.bytes_written + written.disk_bytes,
        )
        return True


def _temporary_path(path: Path, record: StageRecord, generation: int) -> Path:
    """Returns the directory in which the views of a generation are written, and deletes those of
    other generations. It is named after its inputs, so that an interrupted writing resumes."""
    temporary = path.with_name(
        f".train.{digest(canonical_json([record.lineage, generation]))}.part"
    )
    for other in path.parent.glob(".train.*.part"):
        if other != temporary:
            shutil.rmtree(other)
    return temporary
