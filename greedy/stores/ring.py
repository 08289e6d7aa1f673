"""Drawing new views of a store and putting them in the place of the oldest, while the next stage
trains from it."""

import secrets
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from greedy.base.files import bytes_below, canonical_json, digest
from greedy.base.torch_private import keep_casts
from greedy.cache import (
    StoreSummary,
    exchange_view,
    location_of,
    put_elsewhere,
    remove_tree,
    store_with_view,
)
from greedy.runs.directory import RunDirectory
from greedy.runs.events import Reporter
from greedy.runs.exchange import PART, exchange_path, replacing
from greedy.runs.record import UNKNOWN_VIEW, StageRecord
from greedy.runs.views import view_numbers, views_drawn
from greedy.stores.source import Source
from greedy.stores.writing import SplitWriter


class _Unfinished(Exception):
    """Leaves a writer whose store is not finished."""


@dataclass(frozen=True)
class Drawing:
    """How new views are drawn while a stage trains.

    Attributes:
        device: on which the frozen stages compute.
        streamed: whether their weights are in memory only while they compute.
        beside: whether that is done in another thread, beside the steps.
    """

    device: torch.device
    streamed: bool = False
    beside: bool = False


@dataclass
class Ring:
    """The views of a store's training split. The test split is not augmented and stays.

    A view is drawn a few rows after each step, in a directory next to the split, and is put into
    its place between two epochs. Which rows are due when depends only on the epoch and its rows; a
    thread that draws them beside the steps may lag behind.

    Attributes:
        stored: the stage whose store it is.
        reuse: epochs after which the oldest view is replaced.
        epochs: of the stage that trains.
        threads: of torch, with which the store was first written and is repaired: the last digit
            of an activation may depend on their number.
        source: computes the store's rows from the images, replaying the frozen stages.
        beside: whether views are drawn beside the steps, in another thread, if torch has as many
            threads as they need. It computes with tensors and modules of its own.
    """

    run: RunDirectory
    stored: int
    reuse: int
    epochs: int
    threads: int
    source: Source
    reporter: Reporter
    beside: bool = False
    _writer: SplitWriter | None = field(default=None, init=False, repr=False)
    _thread: ThreadPoolExecutor | None = field(default=None, init=False, repr=False)
    _jobs: deque[Future[None]] = field(default_factory=deque, init=False, repr=False)
    _open: ExitStack = field(default_factory=ExitStack, init=False, repr=False)

    @property
    def drawn_bytes(self) -> int:
        """The bytes on disk of views that are not yet in the store."""
        return sum(map(bytes_below, self._unfinished()))

    def advance(self, epoch: int) -> Iterator[int]:
        """Makes the store hold the views of an epoch; yields the place of each view that is new.

        The one that is new after ``reuse`` epochs has been drawn by then. Others are drawn where
        the store holds the views of another epoch, as when the stage is trained again."""
        wanted = view_numbers(epoch, len(self._numbers()), self.reuse)
        for number in sorted(wanted):
            place = wanted.index(number)
            if self._numbers()[place] != number:
                self._replace(place, number)
                yield place

    def draw(self, epoch: int, done: int, rows: int) -> None:
        """Draws the rows of the next view that are due after ``done`` of an epoch's ``rows``."""
        if epoch // self.reuse == views_drawn(self.epochs, self.reuse):
            return  # no epoch is left for another view
        writer = self._writer
        if writer is None:
            newest = max(view_numbers(epoch, len(self._numbers()), self.reuse))
            writer = self._begin(newest + 1)
        passed = (epoch % self.reuse) * rows + done
        due = writer.rows * passed // (self.reuse * rows)
        if self.beside and torch.get_num_threads() == self.threads:  # a setting of all threads
            self._write_beside(writer, due)
        else:
            self._write(writer, due)

    def close(self, *, finished: bool) -> None:
        """Ends the drawing. Unless training is ``finished``, what is drawn stays for its next
        process, in whole shards."""
        self._end_thread()  # if one of its jobs has failed, that ends the training already
        with suppress(_Unfinished), self._open:
            raise _Unfinished
        self._writer = None
        if finished:
            self._remove_views()

    def _replace(self, place: int, number: int) -> None:
        """Completes a view and puts it into its place."""
        drawn = self._complete(number)
        record, store = self._record(), self._record().store
        assert store is not None and store.ring is not None
        ring = store.ring.with_view(place, number, drawn.shards)
        path, other = self.run.store_path(self.stored) / "train", self._path(number)
        # If the process ends before the new record is written, the view is exchanged again.
        unknown = store.ring.with_view(place, UNKNOWN_VIEW)
        if (url := location_of(path)) and (other_url := location_of(other)):
            record = record.update_store(self.run.stage_dir(self.stored), ring=unknown)
            written = exchange_view(url, place, other_url, ring.shards)
        else:
            with replacing(path, exchange_path(path, PART)) as new_path:
                written = store_with_view(path, place, other, new_path, ring.shards)
                record = record.update_store(self.run.stage_dir(self.stored), ring=unknown)
        record.update_store(
            self.run.stage_dir(self.stored),
            ring=ring,
            split_bytes=store.split_bytes | {"train": written.disk_bytes},
            digests=store.digests | {"train": written.digest},
            bytes_written=store.bytes_written + drawn.disk_bytes,
        )
        self._remove_views()

    def _complete(self, number: int) -> StoreSummary:
        """Returns the summary of a view once all its rows are written."""
        for job in self._end_thread():
            job.result()
        writer = self._writer or self._begin(number)
        if writer.written < writer.rows:
            self.reporter.writing_started(self.stored, "train", writer.rows)
            if writer.written:
                self.reporter.resumed(writer.written)
        self._write(writer, writer.rows, self.reporter.batch_finished)
        self._open.close()
        self._writer = None
        return writer.summary

    def _write_beside(self, writer: SplitWriter, rows: int) -> None:
        """Lets the thread draw a view until ``rows`` of its rows are written, after what it was
        given before. Raises what has failed there."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "greedy-ring", initializer=keep_casts)
        while self._jobs and self._jobs[0].done():
            self._jobs.popleft().result()
        self._jobs.append(self._thread.submit(self._write, writer, rows))

    def _end_thread(self) -> list[Future[None]]:
        """Ends the thread once it has drawn what it draws now. Returns what it did, of which some
        may have failed."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
            self._thread = None
        done = [job for job in self._jobs if not job.cancelled()]
        self._jobs.clear()
        return done

    def _write(
        self, writer: SplitWriter, rows: int, written: Callable[[int], None] = lambda rows: None
    ) -> None:
        """Draws a view until ``rows`` of its rows are written; calls ``written`` with those of each
        batch."""
        if writer.written >= rows:
            return  # as after most steps
        threads = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            for count in writer.write(rows):
                written(count)
        finally:
            torch.set_num_threads(threads)

    def _begin(self, number: int) -> SplitWriter:
        """Begins to draw a view, or resumes it; what was drawn of others is deleted."""
        path, record = self._path(number), self._record()
        self._remove_views(but=path)
        if url := location_of(self.run.store_path(self.stored) / "train"):
            put_elsewhere(path, f"{url.rpartition('/')[0]}/view-{secrets.token_hex(6)}")
        store = self.run.open_store(self.stored, "train")
        writer = SplitWriter(
            path,
            self.source,
            "train",
            numbers=[number],
            encoding=store.encoding,
            compressor=store.compressor,
            batch=record.choices.write_batch,
            stage=self.stored,
        )
        self._writer = self._open.enter_context(writer)
        return writer

    def _record(self) -> StageRecord:
        record = self.run.record(self.stored)  # it changes with each view
        assert record is not None
        return record

    def _numbers(self) -> Sequence[int]:
        store = self._record().store
        assert store is not None
        return store.view_numbers

    def _path(self, number: int) -> Path:
        """Returns the directory in which a view is drawn, named after what decides its bytes."""
        named = digest(canonical_json([self._record().lineage, number]))
        return self.run.store_path(self.stored) / f".view.{named}.part"

    def _unfinished(self) -> Iterator[Path]:
        return self.run.store_path(self.stored).glob(".view.*.part")

    def _remove_views(self, but: Path | None = None) -> None:
        for path in self._unfinished():
            if path != but:
                remove_tree(path)
