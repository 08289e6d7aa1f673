"""Damaged stores computed anew from what they were computed from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from greedy.base.commands import command
from greedy.base.errors import UserError
from greedy.base.files import bytes_below
from greedy.cache import Damage, Store, verify
from greedy.cache import repair as mending
from greedy.cache.metadata import Description
from greedy.models import Stage
from greedy.runs.directory import SPLITS, RunDirectory
from greedy.runs.events import Reporter
from greedy.runs.exchange import replacing
from greedy.runs.integrity import verify_stage
from greedy.runs.record import UNKNOWN, StageRecord, StoreRecord
from greedy.stores.opening import Sources
from greedy.stores.source import Source
from greedy.stores.writing import fit, outputs_from, write_split


@dataclass(frozen=True)
class Repair:
    """What was done about a split of a stage's store.

    Attributes:
        chunks: that were computed anew.
        identical: whether the split is, byte for byte, what was written.
    """

    stage: int
    split: str
    chunks: int
    identical: bool


@dataclass
class Mender:
    """Repairs the stores of a run, whose network's ``stages`` get their weights from it."""

    run: RunDirectory
    stages: Sequence[Stage]
    device: torch.device
    reporter: Reporter = field(default_factory=Reporter)

    def repair(self, number: int, *, dropped: bool = False) -> tuple[list[Repair], list[Damage]]:
        """What was repaired in the store of a stage, and what is damaged still: weights and
        records cannot be computed anew, nor can images. Chunks are rebuilt alone and are what
        they were while their source is; otherwise their views are rebuilt, and the content hash
        in the stage's record changes. A store that was ``dropped`` is written if asked for."""
        record = self.run.record(number)
        done: list[Repair] = []
        if number and record and record.store:
            if self.run.store(number).is_dir():
                done = [each for split in SPLITS if (each := self._repair(record, split))]
            elif dropped:
                done = self._write_again(self.run.complete(number), record.store)
        return done, verify_stage(self.run, number)

    def _write_again(self, record: StageRecord, store: StoreRecord) -> list[Repair]:
        """Writes a store from what it was written from, or else from the images."""
        number = record.stage
        path = self.run.store(number)
        _require_known_views(self.run, store)
        torch.set_num_threads(record.choices.threads)
        source, batch = self._source(record), record.choices.write_batch
        seed = self.run.recipe.seed
        fitted = fit(store.encoding, source, record.row_shape, batch, seed, number)
        with replacing(path, path.with_name(f".{path.name}.part")) as place:
            written = {
                split: write_split(
                    place / split,
                    source,
                    split,
                    views=store.views if split == "train" else 1,
                    generation=store.generation,
                    encoding=fitted,
                    compressor=store.compressor,
                    batch=batch,
                    reporter=self.reporter,
                    stage=number,
                )
                for split in SPLITS
            }
        digests = {split: summary.digest for split, summary in written.items()}
        split_bytes = {split: summary.disk_bytes for split, summary in written.items()}
        record.with_store(
            self.run.stage(number),
            digests=digests,
            split_bytes=split_bytes,
            bytes_written=store.bytes_written + sum(split_bytes.values()),
        )
        done = []
        for split in SPLITS:
            there = Store(path / split)
            chunks, same = there.views * there.layout.chunks, digests[split] == store.digests[split]
            done.append(Repair(number, split, chunks, same))
        return done

    def _repair(self, record: StageRecord, split: str) -> Repair | None:
        path = self.run.store(record.stage) / split
        if not (damages := verify(path)):
            return None
        assert record.store is not None
        images = self.run.open_store(0, split)
        description = mending.describe_store(path) or self._description(record, split)
        files = {damage.path.name for damage in damages}
        if "zarr.json" in files:
            mending.rewrite_metadata(path, description)
        if "c.0" in files:
            mending.rewrite_side_arrays(path, images.labels, images.index)
        found = mending.damaged_shards(path, description)
        digest = partial(mending.content_digest, path, description, images.labels, images.index)
        chunks = sum(map(len, found.values()))
        if not found:
            return Repair(record.stage, split, 0, digest() == record.store.digests[split])
        rows_of = self._rows(record, split, description)
        for (view, shard), places in found.items():
            mending.rewrite_chunks(path, description, view, shard, places, partial(rows_of, view))
        if digest() == record.store.digests[split]:
            return Repair(record.stage, split, chunks, True)
        layout = description.layout
        for view in sorted({view for view, _ in found}):
            for shard in range(layout.shards):
                every = range(layout.chunks_in(shard))
                mending.rewrite_chunks(
                    path, description, view, shard, every, partial(rows_of, view)
                )
        current = self.run.complete(record.stage)
        assert current.store is not None
        current.with_store(
            self.run.stage(record.stage),
            digests=current.store.digests | {split: digest()},
            split_bytes=current.store.split_bytes | {split: bytes_below(path)},
        )
        views = len({view for view, _ in found})
        return Repair(record.stage, split, views * layout.chunks, False)

    def _description(self, record: StageRecord, split: str) -> Description:
        """The description of a split whose metadata are lost: both splits have one encoding."""
        store, other = record.store, SPLITS[split == SPLITS[0]]
        found = mending.describe_store(self.run.store(record.stage) / other)
        if found is None or store is None:
            way = command("train", "--run", self.run.path, "--retrain", record.stage)
            raise UserError(
                f"the metadata of both splits of stage {record.stage}'s store are damaged: write "
                f"it again with {way}"
            )
        views = store.views if split == "train" else 1
        return mending.description_of(found.encoding, found.compressor, views, record.rows[split])

    def _rows(
        self, record: StageRecord, split: str, description: Description
    ) -> Callable[[int, int], np.ndarray]:
        """A function from view and chunk to the chunk's rows, computed in the batches in which
        the store was written."""
        source, store = self._source(record), record.store
        assert store is not None
        if split == "train":
            _require_known_views(self.run, store)
        torch.set_num_threads(record.choices.threads)
        batch, step = record.choices.write_batch, description.layout.chunk_rows

        def rows_of(view: int, chunk: int) -> np.ndarray:
            wanted, parts, have = description.layout.rows_in(chunk), [], 0
            for outputs in outputs_from(source, split, view, chunk * step, batch, store.generation):
                parts.append(outputs)
                have += len(outputs)
                if have >= wanted:
                    break
            return np.concatenate(parts)[:wanted]

        return rows_of

    def _source(self, record: StageRecord) -> Source:
        """What the store was written from, or else the nearest to it that is there."""
        data = self.run.complete(0)
        sources = Sources(self.run, self.stages, data, self.device, Reporter())
        assert record.store is not None
        source = sources.of_store(record.stage, record.store)
        source.precision = record.choices.precision
        return source


def _require_known_views(run: RunDirectory, store: StoreRecord) -> None:
    if store.generation == UNKNOWN:
        raise UserError(
            f"the views of this store were being replaced when the run stopped: "
            f"{command('train', '--run', run.path)} writes them anew"
        )
