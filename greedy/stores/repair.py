"""Repairing damaged stores by computing them again from their sources."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product

import numpy as np
import torch

from greedy.base.commands import command
from greedy.base.devices import set_determinism
from greedy.base.errors import UserError
from greedy.cache import Damage, Store, verify
from greedy.cache import repair as cache_repair
from greedy.cache.metadata import StoreMetadata
from greedy.cache.shards import store_digest
from greedy.cache.urls import LOCATION
from greedy.data import Split
from greedy.models import Stage
from greedy.runs.directory import SPLITS, RunDirectory
from greedy.runs.events import Reporter
from greedy.runs.exchange import PART, exchange_path, replacing
from greedy.runs.integrity import verify_stage
from greedy.runs.record import UNKNOWN_VIEW, RingRecord, StageRecord, StoreRecord
from greedy.runs.state import RunState
from greedy.stores.opening import SourceFinder, another_store
from greedy.stores.source import Source
from greedy.stores.writing import fit_output_encoding, output_batches, place_store, write_split


@dataclass(frozen=True)
class Repair:
    """The repair of one split of a stage's store.

    Attributes:
        chunks: that were computed again.
        identical: whether the split is byte for byte what was first written.
    """

    stage: int
    split: str
    chunks: int
    identical: bool


@dataclass
class StoreRepairer:
    """Repairs the stores of a run, given its state. ``stages`` of its network get their weights
    when needed; ``images`` is the data set's training split, for runs that read it again in every
    pass."""

    state: RunState
    stages: Sequence[Stage]
    device: torch.device
    reporter: Reporter = field(default_factory=Reporter)
    images: Split | None = None

    @property
    def run(self) -> RunDirectory:
        """The run."""
        return self.state.run

    def repair(self, number: int, *, dropped: bool = False) -> tuple[list[Repair], list[Damage]]:
        """Computes a stage's store again where it is damaged.

        Damaged chunks alone are computed again if that gives what was first written; otherwise
        their whole views are, and the digest in the stage's record changes. Weights, records and
        images cannot be computed again.

        Args:
            number: of the stage.
            dropped: whether to write a store that was deleted.

        Returns:
            The repairs, and the damage that is left.
        """
        record = self.state.record(number)
        repairs: list[Repair] = []
        if number and record and record.store:
            if self.state.has_store(number):
                repairs = [done for split in SPLITS if (done := self._repair(record, split))]
            elif dropped:
                repairs = self._write_again(self.state.complete_record(number), record.store)
        if repairs:
            self.state = self.state.read_again(number)
        return repairs, verify_stage(self.run, number)

    def _write_again(self, record: StageRecord, store: StoreRecord) -> list[Repair]:
        """Writes a store again from the source it was written from, or else from the images."""
        number = record.stage
        path = self.run.store_path(number)
        numbers = {split: self._numbers(record, store, split) for split in SPLITS}
        self._compute_as(record)
        source, batch = self._source(record), record.choices.write_batch
        seed = self.run.recipe.seed
        encoding = fit_output_encoding(
            store.encoding, source, record.row_shape, batch, seed, number
        )
        with replacing(path, exchange_path(path, PART)) as new_path:
            place_store(new_path, self.run.recipe.store.stores, number)
            written = {
                split: write_split(
                    new_path / split,
                    source,
                    split,
                    numbers=numbers[split],
                    encoding=encoding,
                    compressor=store.compressor,
                    batch=batch,
                    reporter=self.reporter,
                    stage=number,
                )
                for split in SPLITS
            }
        digests = {split: summary.digest for split, summary in written.items()}
        split_bytes = {split: summary.disk_bytes for split, summary in written.items()}
        record.update_store(
            self.run.stage_dir(number),
            digests=digests,
            split_bytes=split_bytes,
            ring=_with_shards(store.ring, written["train"].shards, "train"),
            bytes_written=store.bytes_written + sum(split_bytes.values()),
        )
        repairs = []
        for split in SPLITS:
            written_store = Store(path / split)
            chunks = written_store.views * written_store.layout.chunks
            repairs.append(Repair(number, split, chunks, digests[split] == store.digests[split]))
        return repairs

    def _repair(self, record: StageRecord, split: str) -> Repair | None:
        path = self.run.store_path(record.stage) / split
        files = {damage.path.name for damage in verify(path)}
        if not files or LOCATION in files:  # then nobody knows where the others are
            return None
        assert record.store is not None
        images = self.run.open_store(0, split)
        metadata = cache_repair.read_metadata(path) or self._metadata(record, split)
        if split == "train" and not record.store.fits(metadata.layout):
            raise another_store(self.run, record.stage, split, "it has other views")
        if "zarr.json" in files:
            cache_repair.rewrite_metadata(path, metadata)
        if "c.0" in files:
            cache_repair.rewrite_side_arrays(path, images.labels, images.index)
        damaged = cache_repair.damaged_shards(path, metadata)
        layout, unknown = metadata.layout, _unknown_views(record.store, split)
        for view, shard in product(unknown, range(layout.shards)):
            damaged[view, shard] = range(layout.chunks_in(shard))

        def digest() -> tuple[str, list[bytes]]:
            shards = cache_repair.shard_digests(path, metadata)
            return store_digest((images.labels, images.index), shards), shards

        chunks = sum(map(len, damaged.values()))
        if not damaged:
            return Repair(record.stage, split, 0, digest()[0] == record.store.digests[split])
        rows_of = self._rows(record, split, metadata)
        for (view, shard), chunks_of in damaged.items():
            cache_repair.rewrite_chunks(
                path, metadata, view, shard, chunks_of, partial(rows_of, view)
            )
        identical = digest()[0] == record.store.digests[split]
        if not identical:
            views = sorted({view for view, _ in damaged})
            chunks = len(views) * layout.chunks
            for view, shard in product(views, range(layout.shards)):
                all_chunks = range(layout.chunks_in(shard))
                cache_repair.rewrite_chunks(
                    path, metadata, view, shard, all_chunks, partial(rows_of, view)
                )
        if unknown or not identical:
            current = self.run.record(record.stage)  # the repair of the other split changes it
            assert current is not None and current.store is not None
            content, shards = digest()
            current.update_store(
                self.run.stage_dir(record.stage),
                digests=current.store.digests | {split: content},
                split_bytes=current.store.split_bytes | {split: Store(path).disk_bytes},
                ring=_with_shards(current.store.ring, [shard.hex() for shard in shards], split),
            )
        return Repair(record.stage, split, chunks, identical)

    def _metadata(self, record: StageRecord, split: str) -> StoreMetadata:
        """Returns the metadata of a split whose metadata are damaged, from the other split,
        which has the same encoding. Raises ``UserError`` if both are damaged."""
        store, other = record.store, SPLITS[split == SPLITS[0]]
        intact = cache_repair.read_metadata(self.run.store_path(record.stage) / other)
        if intact is None or store is None:
            retrain = command("train", "--run", self.run.path, "--retrain", record.stage)
            raise UserError(
                f"the metadata of both splits of stage {record.stage}'s store are damaged: write "
                f"it again with {retrain}"
            )
        views = store.views if split == "train" else 1
        return cache_repair.new_metadata(
            intact.encoding, intact.compressor, views, record.rows[split]
        )

    def _rows(
        self, record: StageRecord, split: str, metadata: StoreMetadata
    ) -> Callable[[int, int], np.ndarray]:
        """Returns a function from view and chunk to the chunk's rows, which it computes in the same
        batches in which the store was written."""
        source, store = self._source(record), record.store
        assert store is not None
        numbers = self._numbers(record, store, split)
        self._compute_as(record)
        batch, step = record.choices.write_batch, metadata.layout.chunk_rows

        def rows_of(view: int, chunk: int) -> np.ndarray:
            start, rows = chunk * step, metadata.layout.rows_in(chunk)
            which = (split, numbers[view], start, batch, start + rows)
            return np.concatenate(list(output_batches(source, *which)))[:rows]

        return rows_of

    def _compute_as(self, record: StageRecord) -> None:
        """Makes torch compute as it did when a stage's store was written."""
        torch.set_num_threads(record.choices.threads)
        set_determinism(self.device, record.choices.deterministic)

    def _numbers(self, record: StageRecord, store: StoreRecord, split: str) -> Sequence[int]:
        """Returns the numbers of the views of a split, by which they are computed again. Raises
        ``UserError`` if an older version replaced them."""
        if split == "test":
            return [0]
        if store.generation:
            again = command("train", "--run", self.run.path, "--retrain", record.stage)
            raise UserError(
                f"the views of stage {record.stage}'s store were replaced by an older version, in "
                f"another way, and cannot be computed again: train it again with {again}"
            )
        return store.ring.known().numbers if store.ring else store.view_numbers

    def _source(self, record: StageRecord) -> Source:
        """Returns the source from which a stage's store is computed again."""
        sources = SourceFinder(self.state, self.stages, self.device, self.reporter, self.images)
        assert record.store is not None
        return sources.for_repair(record, record.store)


def _unknown_views(store: StoreRecord, split: str) -> list[int]:
    """Returns the places of the views of a split that were being exchanged when a run stopped."""
    numbers = store.view_numbers if split == "train" and store.ring else []
    return [place for place, number in enumerate(numbers) if number == UNKNOWN_VIEW]


def _with_shards(ring: RingRecord | None, shards: Sequence[str], split: str) -> RingRecord | None:
    """Returns the record of a ring with other digests of the training split's shards."""
    if ring is None or split != "train":
        return ring
    return ring.known().model_copy(update={"shards": list(shards)})
