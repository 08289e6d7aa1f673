"""Views drawn and written anew while the stage after them trains."""

from dataclasses import dataclass

from greedy.cache import Store
from greedy.reporting import Reporter
from greedy.runs import RunDirectory, replacing
from greedy.source import Source
from greedy.training.freeze import write_split


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
        path = self.run.store(self.stored) / "train"
        old = Store(path)
        self.source.precision = record.resolved["precision"]
        with replacing(path, path.with_name(".train.part")) as place:
            written = write_split(
                place,
                self.source,
                "train",
                views=old.views,
                generation=generation,
                encoding=old.encoding,
                compressor=old.compressor,
                batch=record.resolved["write_batch"],
                reporter=self.reporter,
                stage=self.stored,
            )
        store = record.store.rewritten(generation, written)
        record.model_copy(update={"store": store}).write(self.run.stage(self.stored))
        return True
