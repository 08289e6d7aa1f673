"""Views drawn and written anew while the stage after them trains."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from greedy.base.files import canonical_json, digest
from greedy.runs.directory import RunDirectory
from greedy.runs.events import Reporter
from greedy.runs.exchange import replacing
from greedy.runs.record import UNKNOWN, StageRecord
from greedy.stores.source import Source
from greedy.stores.writing import write_split


@dataclass
class Refresh:
    """Keeps a store's views those of the current generation, epoch // every.

    ``source`` gives the store's rows from the raw images, the frozen stages replayed; the old
    views stay until the new ones are whole. The test split is not augmented and stays.
    """

    run: RunDirectory
    stored: int
    every: int
    source: Source
    reporter: Reporter

    def __call__(self, epoch: int) -> bool:
        """Makes the store hold the views of this epoch; says whether it had to write them."""
        generation = epoch // self.every
        record = self.run.complete(self.stored)
        assert record.store is not None
        if record.store.generation == generation:
            return False
        directory = self.run.stage(self.stored)
        path = self.run.store(self.stored) / "train"
        old = self.run.open_store(self.stored, "train")
        self.source.precision = record.choices.precision
        with replacing(path, _workshop(path, record, generation), go_on=True) as place:
            written = write_split(
                place,
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
            # Whatever happens between the exchange and the record, it does not say less.
            record = record.with_store(directory, generation=UNKNOWN)
        assert record.store is not None
        record.with_store(
            directory,
            generation=generation,
            split_bytes=record.store.split_bytes | {"train": written.disk_bytes},
            digests=record.store.digests | {"train": written.digest},
            bytes_written=record.store.bytes_written + written.disk_bytes,
        )
        return True


def _workshop(path: Path, record: StageRecord, generation: int) -> Path:
    """The place where the views of a generation are written: named by what they follow from, so
    that one that was interrupted goes on and any other goes."""
    place = path.with_name(f".train.{digest(canonical_json([record.lineage, generation]))}.part")
    for other in path.parent.glob(".train.*.part"):
        if other != place:
            shutil.rmtree(other)
    return place
